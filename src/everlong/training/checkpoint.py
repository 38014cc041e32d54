"""Which checkpoint of a run folder to go on from."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in a run folder; what is written last decides that it is whole."""
    found = sort_checkpoints(str(folder))
    whole = [path for path in found if Path(path, TRAINER_STATE_NAME).is_file()]
    return whole[-1] if whole else None


def describe_last(folder: str | Path) -> str:
    """The same in words, for messages."""
    checkpoint = last_checkpoint(folder)
    return f"the last checkpoint is {checkpoint}" if checkpoint else "no checkpoint was saved yet"
