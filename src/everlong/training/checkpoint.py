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


def step_of(checkpoint: str) -> int:
    """The training step behind which a checkpoint was written."""
    return int(checkpoint.rpartition("-")[2])


def describe_last(folder: str | Path) -> str:
    """The same in words, for messages."""
    checkpoint = last_checkpoint(folder)
    return f"the last checkpoint is {checkpoint}" if checkpoint else "no checkpoint was saved yet"


def check_whole(checkpoint: str, max_steps: int) -> None:
    """Refuse a checkpoint that lacks what another run would begin anew, or that is past max_steps."""
    step, there = step_of(checkpoint), {path.name for path in Path(checkpoint).iterdir()}
    if step > max_steps:
        raise ValueError(
            f"{checkpoint} is past training.max_steps = {max_steps}: give more of them, or delete it"
        )
    for part in ("optimizer", "scheduler", "rng_state"):
        if not any(name.startswith(part) for name in there):
            raise ValueError(
                f"{checkpoint} has no {part}: delete it and resume again, from the one before it"
            )
