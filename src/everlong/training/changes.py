"""What changed between a run and its continuation."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from everlong.data.babilong import BPE
from everlong.data.config import digest
from everlong.data.tokenizer import BYTES
from everlong.files import read_record
from everlong.provenance import PROVENANCE_FILE

from .recipe import Recipe

MISSING = "nothing"
# An optimizer cannot go on from what another one has saved.
FIXED = ("training.optim", "training.optim_target_modules")
# Fields that may change within a run; any other would make another run of it.
FREE = ("training.", "evaluation.", "guards.", "data.cache_folder", "name", "output_dir")


def identity(recipe: Recipe, samples_per_step: int, processes: int) -> dict[str, Any]:
    """What a run is, as JSON values: its recipe, the fingerprints of its data and its tokenizer, the
    samples of a training step."""
    tokenizer = recipe.data.build_tokenizer()
    return {
        "recipe": json.loads(json.dumps(dataclasses.asdict(recipe))),
        "data_fingerprint": recipe.data.fingerprint(),
        "tokenizer_fingerprint": digest(tokenizer.backend_tokenizer.to_str().encode()),
        "samples_per_step": samples_per_step,
        "processes": processes,
    }


def check_changes(folder: str | Path, now: dict[str, Any]) -> list[str]:
    """The fields that differ from those a run folder's checkpoints were made with, in words.

    Raises ValueError where one of them must not: a model, its data or its batches.
    """
    file = Path(folder, PROVENANCE_FILE)
    if not file.is_file() or "recipe" not in read_record(file):  # nothing is known of it
        return []
    before = read_record(file, recipe=dict, samples_per_step=int, processes=int)
    old, new = flat_fields(before["recipe"]), flat_fields(now["recipe"])
    changed = [name for name in {**old, **new} if old.get(name, MISSING) != new.get(name, MISSING)]
    words = {
        name: f"{name} ({old.get(name, MISSING)!r} before, {new.get(name, MISSING)!r} now)"
        for name in changed
    }
    fixed = [words[name] for name in changed if name in FIXED or not name.startswith(FREE)]
    if not fixed:
        fixed = _changed_files(before, now)
    if fixed:
        raise ValueError(
            f"{folder} cannot be continued, since this changed: {'; '.join(fixed)}. "
            "Undo that, or train anew in another --output_dir"
        )
    samples = "samples_per_step"
    if before[samples] != now[samples]:
        raise ValueError(
            f"{folder} was trained with {before[samples]} samples a step by {before['processes']} "
            f"processes, now it would be {now[samples]} by {now['processes']}: start as many, or give "
            "--training.per_device_train_batch_size or --training.gradient_accumulation_steps that "
            "make up for it"
        )
    return list(words.values())


def _changed_files(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What the recipe names still, but has another content now."""
    changed = [name for name, value in now.items() if before.get(name, value) != value]
    data = now["recipe"]["data"]
    # Another tokenizer makes other tokens of the same text, and one made of a text follows it.
    tokenizer = data.get("tokenizer", BYTES)
    if "tokenizer_fingerprint" in changed and tokenizer != BPE:
        return [f"the tokenizer that data.tokenizer names ({tokenizer})"]
    if "data_fingerprint" in changed:
        return [f"the text that data.source names ({data.get('source')})"]
    return []


def flat_fields(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            flat_fields(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return flat
