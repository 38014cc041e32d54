"""Model folders, loaded and evaluated."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from everlong.data import HAYSTACKS
from everlong.provenance import RECIPE_FILE, RESULT_FILE

from .needle import attention_reach, evaluate_needle
from .report import NeedleReport, length_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(folder: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and the tokenizer in a local folder, on the accelerator if there
    is one. Raises ValueError if the folder holds no model, or none that was finished."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not Path(folder, "config.json").is_file():
        is_run = Path(folder, RECIPE_FILE).is_file()
        hint = (
            f"its training has not finished: continue it with `everlong train --resume {folder}`, "
            "or name one of its checkpoint folders"
            if is_run
            else "name a folder that training wrote"
        )
        raise ValueError(f"{folder} holds no model (no config.json): {hint}")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a truncated or foreign file: every loader raises its own kind
        raise ValueError(
            f"{folder} cannot be loaded: {' '.join(str(error).split())}. If a file of it is cut short, "
            "train it anew or name an earlier checkpoint"
        ) from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def longest_text(model: PreTrainedModel) -> int | None:
    """Tokens that a model takes at most; None where there is no such limit."""
    if getattr(model, "_is_stateful", False):
        return None
    return getattr(model.config, "max_position_embeddings", None)


def evaluate_needle_folder(
    folder: str | Path,
    lengths: Sequence[int],
    samples: int = 100,
    *,
    task: str = "needle",
    seed: int = 0,
    source: str | None = None,
    stories: str | None = None,
    passages: int = 0,
) -> NeedleReport:
    """Evaluate the model in a folder on a task ("needle", "babi"), with a progress bar on stderr.

    The task is as the model was trained on it, with one needle and held-out text, or the default one
    if its recipe has another task or none. source: another text, as for `load_text`.
    stories: the folder of bAbI's files, for "babi"; without it, the recipe's, or simulated stories.
    passages: if not 0, the model reads so many of the text's passages that fit the question best
    (`Retrieval`), and the report's name ends in " +RAG".
    """
    model, tokenizer = load_model(folder)
    if tokenizer("é")["input_ids"] != list("é".encode()):
        raise ValueError(f"{folder} has a tokenizer whose ids are not bytes: {task} is scored on bytes")
    limit, longest = longest_text(model), max(lengths, default=0)
    if limit is not None and not passages and longest > limit:
        raise ValueError(
            f"{folder} takes {limit:,} tokens at most, asked are {longest:,}: leave longer lengths "
            "out, or read passages alone (--passages)"
        )
    recipe = _recipe_of(Path(folder))
    data = recipe.get("data", {})
    fields = dict(data) if data.get("task", "needle") == task else {}
    if stories is not None:
        fields["folder"] = stories
    config = HAYSTACKS[task](**fields)
    result = Path(folder, RESULT_FILE)
    name = recipe.get("name", "")
    if not Path(folder, RECIPE_FILE).is_file():  # a checkpoint of a run, or no run of everlong
        name = f"{name} {Path(folder).resolve().name}".strip()
    retrieval = None
    if passages:
        from everlong.models import Retrieval

        retrieval, name = Retrieval(tokenizer, num_passages=passages), f"{name} +RAG"
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        text = f"{name}, up to {length_name(longest)} tokens"
        done = bar.add_task(text, total=samples * sum(lengths))
        scores = evaluate_needle(
            model,
            replace(config.plain(), source=source or config.source),
            lengths,
            samples,
            seed=seed,
            reach=attention_reach(model.config),
            retrieval=retrieval,
            on_tokens=lambda tokens: bar.advance(done, tokens),
        )
    return NeedleReport(
        name=name,
        scores=scores,
        seed=recipe.get("seed"),
        training_length=data.get("length", config.length) if recipe else None,
        about=json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {},
    )


def name_apart(reports: Sequence[NeedleReport], folders: Sequence[str | Path]) -> list[NeedleReport]:
    """The reports of these folders, with the folder in the name of those that share a name without
    being seeds of one recipe."""
    named = []
    for report, folder in zip(reports, folders, strict=True):
        same = [
            place for other, place in zip(reports, folders, strict=True) if other.name == report.name
        ]
        recipes = [_recipe_of(Path(place)) for place in same]
        seeds = {recipe.pop("seed", None) for recipe in recipes}
        for recipe in recipes:
            recipe.pop("output_dir", None)
        one_model = len(seeds) == len(same) and all(recipe == recipes[0] for recipe in recipes)
        named.append(report if one_model else replace(report, name=f"{report.name} {folder}"))
    return named


def _recipe_of(folder: Path) -> dict[str, Any]:
    """The recipe of a run folder, or of the run that a checkpoint folder lies in; empty if none."""
    for place in (folder, folder.resolve().parent):
        if (place / RECIPE_FILE).is_file():
            return yaml.safe_load((place / RECIPE_FILE).read_text(encoding="utf-8"))
    return {}
