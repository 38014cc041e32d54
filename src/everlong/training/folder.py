"""What in a run folder is the run's own: that alone is deleted for another run in its place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from everlong.data.reading import HUB
from everlong.data.text import PACKAGE, find_files
from everlong.files import LOCK, UNFINISHED, read_record
from everlong.provenance import PROVENANCE_FILE, RECIPE_FILE, RESULT_FILE

from .checkpoint import FILES
from .progress import METRICS_FILE
from .recipe import Recipe
from .runs import PICTURE_FILE

CARD = "README.md"
# What training, its scoring, `save_pretrained` and tokenizers write: paths below a run folder.
OWN = re.compile(
    "|".join(
        [
            *map(re.escape, (RECIPE_FILE, PROVENANCE_FILE, RESULT_FILE, METRICS_FILE, PICTURE_FILE)),
            rf"(evaluation/)?{re.escape(LOCK)}",
            rf"{UNFINISHED}/.*",
            r"tensorboard/events\.[^/]*",
            r"(config|generation_config)\.json|training_args\.bin",
            r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json",
            r"(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json",
            r"merges\.txt|vocab\.txt|(tokenizer|spiece|sentencepiece\.bpe)\.model",
            r"chat_template\.jinja|additional_chat_templates/[^/]*\.jinja",
            r"evaluation/(results\.json|results\.md|report\.html|[^/]+\.(png|svg))",
            r"evaluation/samples/[^/]+/[^/]+\.jsonl",
        ]
    )
)


def check_deletable(recipe: Recipe, folder: Path) -> None:
    """Refuse to delete the run in a folder that holds more than it, or what the recipe reads."""
    for name, value in _read(recipe):
        for path in _paths(value):
            if path.resolve().is_relative_to(folder.resolve()):
                raise ValueError(
                    f"{name} ({value}) lies in {folder}, which --overwrite would delete: name another "
                    "output_dir"
                )
    for path in _files(folder):
        if not _is_own(path, folder):
            what = "another run" if path.name == RECIPE_FILE else "no part of its run"
            raise ValueError(
                f"{folder} holds {path.relative_to(folder)}, which is {what}, and --overwrite deletes "
                "runs alone: move that away, or name another output_dir"
            )


def delete_run(folder: Path) -> None:
    """Delete what in a folder is a run's own, but for the lock of whoever writes there."""
    for path in [*_files(folder)]:
        if _is_own(path, folder) and path != folder / LOCK:
            path.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):  # what lies in a folder before the folder
        if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
            path.rmdir()


def _files(folder: Path) -> Iterator[Path]:
    """All below a folder that is no folder; links are not followed."""
    return (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())


def _is_own(path: Path, folder: Path) -> bool:
    name = path.relative_to(folder).as_posix()
    first, _, rest = name.partition("/")
    if rest and re.fullmatch(r"checkpoint-\d+", first):
        return _is_of_checkpoint(rest, folder / first)
    if name == CARD:  # of some models, and a user's own of others
        return path.read_bytes().startswith(b"---\nlibrary_name: everlong\n")
    return OWN.fullmatch(name) is not None


def _is_of_checkpoint(name: str, checkpoint: Path) -> bool:
    """Whether a checkpoint was written with this file; where it does not say so, any but a recipe."""
    try:
        return name == FILES or name in read_record(checkpoint / FILES)
    except (OSError, ValueError):
        return Path(name).name != RECIPE_FILE


def _read(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Each field that names what training reads, and what it names."""
    fields: list[tuple[str, Any]] = [("model.path", recipe.model.get("path"))]
    for name in ("source", "validation_source", "tokenizer", "folder"):
        value = getattr(recipe.data, name, None)
        fields += [(f"data.{name}", each) for each in (value if isinstance(value, list) else [value])]
    return ((name, value) for name, value in fields if value)


def _paths(name: str) -> list[Path]:
    """The files that a name stands for, and itself where it is on this machine."""
    if name.startswith(PACKAGE):
        return []
    if name.startswith(HUB):  # or a folder that `datasets` knows
        name = name.removeprefix(HUB).partition("@")[0]
    try:
        files = find_files(name)[1]
    except FileNotFoundError:  # a hub id, or what will be said to be missing
        files = []
    return [Path(name), *files] if Path(name).exists() else files
