"""Which checkpoint of a run folder to go on from."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from everlong.files import read_record, write_file
from everlong.words import is_number, one_line

FILES = "files.json"  # in a checkpoint: the bytes of each of its files
PARTS = ("optimizer", "scheduler", "rng_state")  # what another run would begin anew


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in a run folder that was written to its end."""
    found = _finished(folder)
    return found[-1] if found else None


def step_of(checkpoint: str) -> int:
    """The training step behind which a checkpoint was written."""
    return int(checkpoint.rpartition("-")[2])


def describe_last(folder: str | Path) -> str:
    """The last one of which nothing is damaged, in words, for messages."""
    whole = _whole(folder)
    return f"the last checkpoint is {whole[-1]}" if whole else "no checkpoint was saved yet"


def seal(checkpoint: Path) -> None:
    """Note which files a checkpoint has, so that `damage` sees what becomes of them."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    write_file(checkpoint / FILES, json.dumps(sizes, indent=2) + "\n")


def damage(checkpoint: str | Path) -> str | None:
    """What is missing in a checkpoint or cut short, in words; None where nothing is."""
    noted = Path(checkpoint, FILES)
    if not noted.is_file():  # of an earlier version
        lacking = _lacking([path.name for path in Path(checkpoint).iterdir()])
        return f"has no {lacking[0]}" if lacking else _state_fault(checkpoint)
    try:
        sizes = read_record(noted)
    except ValueError:
        return f"has a {FILES} that is cut short"
    if lacking := _lacking(sizes):
        return f"has a {FILES} that is damaged: it names no {lacking[0]}"
    for name, size in sizes.items():
        if type(size) is not int:
            return f"has a {FILES} that is damaged"
        file = Path(checkpoint, name)
        if not file.is_file():
            return f"has no {name}"
        if file.stat().st_size < size:
            return f"has a {name} that is cut short ({file.stat().st_size:,} bytes of {size:,})"
    return _state_fault(checkpoint)


def _lacking(names: Collection[str]) -> list[str]:
    return [part for part in PARTS if not any(name.startswith(part) for name in names)]


def _state_fault(checkpoint: str | Path) -> str | None:
    """What is wrong with the Trainer's state, in words; None where nothing is."""
    try:
        state = read_record(Path(checkpoint, TRAINER_STATE_NAME))
    except ValueError:
        return f"has a {TRAINER_STATE_NAME} that is cut short"
    types = get_type_hints(TrainerState) | {"stateful_callbacks": dict, "log_history": list}
    wrong = [name for name, value in state.items() if not _fits(value, types.get(name))]
    wrong += [name for name in ("global_step", "num_input_tokens_seen") if name not in state]
    if not wrong and state["global_step"] != step_of(str(checkpoint)):
        wrong = ["global_step"]
    if not wrong and not all(isinstance(line, dict) for line in state.get("log_history", [])):
        wrong = ["log_history"]
    if not wrong:
        return None
    value = str(state.get(wrong[0], "missing"))[:80]
    return f"has a {TRAINER_STATE_NAME} that is damaged: {one_line(wrong[0])} is {value!r}"


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of the state is of its type; a number may be any that is none below 0."""
    kinds = {get_origin(each) or each for each in get_args(hint) or (hint,)}
    if kinds & {int, float} and is_number(value):
        return value >= 0
    return type(value) in kinds


def check_whole(checkpoint: str, max_steps: int) -> None:
    """Refuse a checkpoint that is damaged, or past max_steps."""
    if step_of(checkpoint) > max_steps:
        raise ValueError(
            f"{checkpoint} is past training.max_steps = {max_steps}: give more of them, or delete it"
        )
    found = damage(checkpoint)
    if found:
        raise ValueError(f"{checkpoint} {found}: {_without(checkpoint)}")


@contextmanager
def reading(checkpoint: str) -> Iterator[None]:
    """Turns what libraries say of a damaged file into ValueError with the way to go on."""
    try:
        yield
    except (ValueError, ConnectionError):
        raise
    except Exception as error:  # a dozen kinds, of zip files, pickles and JSON
        raise ValueError(
            f"{checkpoint} is damaged or cut short ({one_line(error)}): {_without(checkpoint)}"
        ) from error


def _without(checkpoint: str) -> str:
    """How to go on without a checkpoint."""
    others = [other for other in _whole(Path(checkpoint).parent) if other != checkpoint]
    if not others:
        return f"delete {checkpoint} and train anew with --overwrite, as no other checkpoint is whole"
    return f"delete {checkpoint} and resume again, from {others[-1]}, the last one that is whole"


def _finished(folder: str | Path) -> list[str]:
    # The state is what the Trainer writes last.
    found = sort_checkpoints(str(folder))
    return [path for path in found if Path(path, TRAINER_STATE_NAME).is_file()]


def _whole(folder: str | Path) -> list[str]:
    return [path for path in _finished(folder) if damage(path) is None]
