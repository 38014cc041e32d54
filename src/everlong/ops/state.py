"""What a layer keeps between calls: a dataclass of tensors, batch first, that can be saved.

Some numbers are one for each row: they are an integer while all rows agree and [B] integers on the
CPU when they do not, so that no step waits for a device to learn where it stands.
"""

import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor

FORMAT = "everlong.state.1"
ANOTHER = "it is damaged, or belongs to another layer or model"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
MOST_TOKENS = 1 << 31  # nobody has read more: a file that says so is no memory
PerRow = int | Tensor
Own = TypeVar("Own", bound="State")


def per_row(number: PerRow, batch: int) -> Tensor:
    """As [B] integers on the CPU."""
    return number if isinstance(number, Tensor) else torch.full((batch,), number, device="cpu")


def check_tensor(
    name: str,
    x: Any,
    shape: tuple[int | None, ...],
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise ValueError unless x is a tensor of this shape (None: any size), on this device and of this
    type (None: of any floating point one)."""
    if isinstance(x, Tensor) and len(x.shape) == len(shape):
        sizes = x.shape == shape or all(
            want in (None, got) for got, want in zip(x.shape, shape, strict=True)
        )
        kind = x.dtype == dtype or (dtype is None and x.dtype in FLOATS)
        if sizes and kind and x.layout == torch.strided and (device is None or x.device == device):
            return
    got = type(x).__name__
    if isinstance(x, Tensor):
        got = f"{list(x.shape)} of {x.dtype} on {x.device}, {x.layout}"
    want = ", ".join("any" if size is None else str(size) for size in shape)
    raise ValueError(
        f"the state's {name} must be [{want}] of {dtype or 'floating point numbers'} on "
        f"{device or 'any device'}, got {got}: {ANOTHER}"
    )


def check_position(position: Any, batch: int, below: int | None = None) -> None:
    """Raise ValueError unless it is a number for each row, at least 0 (and below `below`)."""
    if isinstance(position, Tensor):
        if torch.compiler.is_compiling():  # what it holds is not known before it runs
            return
        right = position.shape == (batch,) and position.dtype in INTEGERS
        right = right and position.is_cpu and position.layout == torch.strided
        least, most = map(int, position.aminmax()) if right and batch else (0, 0)
    else:
        right = isinstance(position, int) and not isinstance(position, bool)
        least = most = position if right else 0
    if not right or least < 0 or most >= (below or MOST_TOKENS):
        bound = "at least 0" if below is None else f"in 0 ... {below - 1}"
        raise ValueError(
            f"the state's position must be an integer {bound}, or [{batch}] of them on the CPU, got "
            f"{position!r}: {ANOTHER}"
        )


def check_same_place(*places: PerRow | None) -> None:
    """Raise ValueError unless all (but None) are the same, row by row."""
    known = [place for place in places if place is not None]
    for place in known[1:]:
        if isinstance(place, int) and isinstance(known[0], int):
            same = place == known[0]
        elif torch.compiler.is_compiling():  # what they hold is not known before they run
            continue
        else:
            same = bool((torch.as_tensor(known[0], device="cpu") == place).all())
        if not same:
            raise ValueError(
                f"parts of the state, or layers of the model, have read {known} tokens, not as many as "
                f"each other: {ANOTHER}"
            )


def agreed(numbers: PerRow) -> PerRow:
    """As one integer if all rows agree."""
    if isinstance(numbers, Tensor) and len(numbers) and bool((numbers == numbers[0]).all()):
        return int(numbers[0])
    return numbers


@dataclass(frozen=True)
class State:
    """Base of the states: dataclasses of tensors (batch first), tuples of them, integers, states.

    The first field holds tensors. One called `position` is a number for each row, and stays on the
    CPU. A file of states names their classes: each is known by its name from its definition on.
    """

    kinds: ClassVar[dict[str, type["State"]]] = {}

    def __init_subclass__(cls) -> None:
        State.kinds[cls.__name__] = cls
        cls.__repr__ = State.__repr__  # type: ignore[method-assign]  # a dataclass would print tensors

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.batch_size} rows, {format_bytes(self.nbytes)})"

    def check(self) -> None:
        """Raise ValueError where the fields do not fit each other. Nothing else is read before it: a
        state may come from a file, and a kernel believes what it is given.
        """
        if torch.compiler.is_compiling() or "is_right" not in vars(self):
            self.check_fields()
            self.known_right()

    def known_right(self: Own) -> Own:
        """This state, which was made of what had been checked, or is checked now: once is enough, as a
        state does not change."""
        if not torch.compiler.is_compiling():
            vars(self)["is_right"] = True
        return self

    def check_fields(self) -> None:
        """What `check` does."""
        raise NotImplementedError

    def check_part(self, name: str, kind: type["State"]) -> None:
        """Raise ValueError unless the field of this name is a state of this kind that is right in
        itself and has as many rows."""
        part = getattr(self, name)
        check_kind(name, part, kind)
        part.check()
        if part.batch_size != self.batch_size:
            raise ValueError(
                f"the state's {name} has {part.batch_size} rows, the rest {self.batch_size}: {ANOTHER}"
            )

    @property
    def place(self) -> PerRow | None:
        """Tokens so far, as `check_same_place` compares them; None: nobody else counts them so."""
        return None

    def check_like(self: Own, initial: Own) -> None:
        """Raise ValueError where this state, right in itself, has other parts or sizes than `initial`,
        of any batch."""
        for field in fields(self):
            if field.name != "position":
                _check_like(field.name, getattr(self, field.name), getattr(initial, field.name))

    @property
    def nbytes(self) -> int:
        """What the tensors hold, in bytes."""
        return sum(x.nbytes for x in self.tensors().values())

    @property
    def first(self) -> Tensor:
        """The first of the tensors: its rows and its device are the state's."""
        first = getattr(self, fields(self)[0].name)
        while isinstance(first, tuple):
            first = first[0]
        return first.first if isinstance(first, State) else first

    @property
    def batch_size(self) -> int:
        """Number of rows, B."""
        return len(self.first)

    def restart(self: Own, fresh: Tensor, initial: Own) -> Own:
        """The state with `initial` in the rows where `fresh` [B] (on the CPU) holds."""
        parts = {}
        for field in fields(self):
            new, old = getattr(initial, field.name), getattr(self, field.name)
            parts[field.name] = (
                choose_number(fresh, new, old) if field.name == "position" else choose(fresh, new, old)
            )
        return replace(self, **parts)

    def map(self: Own, function: Callable[[Tensor], Tensor]) -> Own:
        """The state with `function` applied to every tensor."""
        return _map(self, function)

    def select(self: Own, rows: Tensor | Sequence[int]) -> Own:
        """The rows with these indices, in this order (repeats allowed)."""
        index = torch.as_tensor(rows, device="cpu")
        if index.dtype == torch.bool:
            raise ValueError("rows must be indices, got booleans: use rows.nonzero().squeeze(1)")
        if index.dim() != 1 or (index.numel() and index.dtype not in INTEGERS):
            raise ValueError(f"rows must be a row of integers, got {index.dtype} {list(index.shape)}")
        index = index.long()
        batch = self.batch_size
        if index.numel() and not -batch <= index.min() <= index.max() < batch:
            raise ValueError(
                f"rows must lie in 0 ... {batch - 1} for a state of batch {batch}, got {index.tolist()}"
            )
        index = index % max(batch, 1)
        return self.map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    def repeat(self: Own, n: int) -> Own:
        """Each row `n` times in a row (as beams want them): a b -> a a b b."""
        return self.map(lambda tensor: tensor.repeat_interleave(n, 0))

    def expand(self: Own, batch: int) -> Own:
        """The one row of this state, seen `batch` times."""
        return self.map(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    @classmethod
    def join(cls: type[Own], states: Sequence[Own]) -> Own:
        """The rows of several states of one kind, one behind the other."""
        joined = {}
        for field in fields(cls):
            values = [getattr(state, field.name) for state in states]
            if field.name == "position":
                rows = [per_row(v, s.batch_size) for v, s in zip(values, states, strict=True)]
                joined[field.name] = agreed(torch.cat(rows))
            else:
                joined[field.name] = _join(values)
        return cls(**joined)

    def detach(self: Own) -> Own:
        """The same values without their history: gradients stop here."""
        return self.map(Tensor.detach)

    def to(self: Own, device: torch.device | str) -> Own:
        """The state on another device (`position` stays on the CPU)."""
        return _map(self, lambda tensor: tensor.to(device), skip="position")

    def check_batch(self, batch: int) -> None:
        """Raise ValueError when the state is not for so many rows."""
        if self.batch_size != batch:
            raise ValueError(
                f"state was built for batch {self.batch_size} but the input has batch {batch}: take "
                "rows with state.select(rows), or pass state=None to start from an empty memory"
            )

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name: `weights.0`, ..."""
        named: dict[str, Tensor] = {}
        _describe(self, "", named)
        return named

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file."""
        save_states(self, path)

    @classmethod
    def load(cls: type[Own], path: str | Path, device: torch.device | str = "cpu") -> Own:
        """Read a state written by `save`.

        Raises FileNotFoundError, or ValueError when the file is damaged or holds something else.
        """
        state = load_states(path)
        if not isinstance(state, cls):
            held = "the cache of a model" if isinstance(state, dict) else f"a {type(state).__name__}"
            raise ValueError(f"{path} holds {held}, not a {cls.__name__}")
        return state.to(device)


def _check_like(name: str, value: Any, initial: Any) -> None:
    if isinstance(initial, State):
        check_kind(name, value, type(initial))
        value.check_like(initial)
    elif isinstance(initial, tuple):
        check_tuple(name, value, len(initial))
        for i, pair in enumerate(zip(value, initial, strict=True)):
            _check_like(f"{name}.{i}", *pair)
    elif isinstance(initial, Tensor):
        check_tensor(name, value, (None, *initial.shape[1:]))
    elif (value is None) != (initial is None):
        raise ValueError(
            f"the state has {'no ' if value is None else ''}{name}, and should "
            f"{'not' if initial is None else 'have'}: {ANOTHER}"
        )


def check_tuple(name: str, value: Any, length: int | None = None) -> None:
    """Raise ValueError unless the field of this name is a tuple of so many (None: of one or more)."""
    if not isinstance(value, tuple) or not value or length not in (None, len(value)):
        got = f"one of {len(value)}" if isinstance(value, tuple) else f"a {type(value).__name__}"
        raise ValueError(
            f"the state's {name} must be a tuple of {length or 'tensors'}, got {got}: {ANOTHER}"
        )


def check_kind(name: str, value: Any, kind: type) -> None:
    """Raise ValueError unless the field of this name is of this kind."""
    if not isinstance(value, kind):
        raise ValueError(
            f"the state's {name} must be a {kind.__name__}, got a {type(value).__name__}: {ANOTHER}"
        )


def format_bytes(count: float) -> str:
    """As a person reads it: 512 bytes, 1.5 MiB."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.4g} {unit}"


def choose(rows: Tensor, left: Any, right: Any) -> Any:
    """What `left` holds in the rows where `rows` [B] is true, and `right` elsewhere: tensors, tuples of
    them, states, or None."""
    if isinstance(right, State):
        return right.restart(rows, left)
    if isinstance(left, tuple):
        return tuple(choose(rows, *pair) for pair in zip(left, right, strict=True))
    if left is None:
        return None
    mask = rows.to(left.device).view(-1, *[1] * (left.dim() - 1))
    return torch.where(mask, left, right)


def choose_number(rows: Tensor, left: PerRow, right: PerRow) -> PerRow:
    """As `choose`, for a number for each row."""
    batch = len(rows)
    return agreed(torch.where(rows, per_row(left, batch), per_row(right, batch)))


def _join(values: list[Any]) -> Any:
    first = values[0]
    if any((value is None) != (first is None) for value in values):
        raise ValueError(f"states with and without a part cannot be joined: {ANOTHER}")
    if isinstance(first, Tensor):
        return torch.cat(values)
    if isinstance(first, tuple):
        return tuple(_join(list(items)) for items in zip(*values, strict=True))
    return type(first).join(values) if isinstance(first, State) else first


def _map(value: Any, function: Callable[[Tensor], Tensor], skip: str | None = None) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple):
        return tuple(_map(item, function, skip) for item in value)
    if isinstance(value, State):
        names = [field.name for field in fields(value) if field.name != skip]
        return replace(value, **{n: _map(getattr(value, n), function, skip) for n in names})
    return value


def save_states(states: Any, path: str | Path) -> None:
    """Write a tree of states, lists, dicts, tensors, numbers and names to one safetensors file, whole:
    where it cannot be written, OSError says why and an earlier file stays."""
    named: dict[str, Tensor] = {}
    tree = _describe(states, "", named)
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"cannot save to {path}: there is no folder {Path(path).parent}")
    tensors = {name: x.detach().cpu().contiguous().clone() for name, x in named.items()}
    path = Path(os.path.realpath(path))  # a link stays one
    if path.exists() and not path.is_file():
        raise OSError(f"cannot save to {path}: it is no file")
    aside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.unfinished")
    try:
        save_file(tensors, aside, metadata={"format": FORMAT, "tree": json.dumps(tree)})
        os.replace(aside, path)
    except (SafetensorError, OSError) as error:
        aside.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error})") from error


def load_states(path: str | Path) -> Any:
    """Read what `save_states` wrote.

    Raises FileNotFoundError, or ValueError when the file is damaged or holds something else. Every
    state in it is checked in itself; the call that takes it checks whether it is the layer's own.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no memory state at {path}")
    try:
        data = Path(path).read_bytes()  # not mapped: a file may be changed or cut at any time
        named = load_tensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata = header.get("__metadata__") or {}
    except (SafetensorError, OSError, TypeError, ValueError, MemoryError, OverflowError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}): it is damaged, cut short or "
            "something else; save the state again with state.save(path)"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} holds no state of format {FORMAT!r} (its metadata: {metadata})")
    try:
        return _rebuild(json.loads(metadata["tree"]), named, path)
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: its tensors and their description differ") from error


def _describe(value: Any, name: str, named: dict[str, Tensor]) -> Any:
    """The tree as JSON, with tensors put into `named`, each under its path."""
    dot = f"{name}." if name else ""
    if isinstance(value, Tensor):
        named[name] = value
        return {"tensor": name}
    if isinstance(value, (tuple, list)):
        return [_describe(item, f"{dot}{i}", named) for i, item in enumerate(value)]
    if isinstance(value, State):
        parts = {f.name: _describe(getattr(value, f.name), dot + f.name, named) for f in fields(value)}
        return {"state": type(value).__name__, "fields": parts}
    if isinstance(value, dict):
        return {"dict": {n: _describe(item, dot + n, named) for n, item in value.items()}}
    assert value is None or isinstance(value, (int, str))
    return value


def _rebuild(tree: Any, named: dict[str, Tensor], path: str | Path) -> Any:
    if isinstance(tree, list):
        return tuple(_rebuild(item, named, path) for item in tree)
    if not isinstance(tree, dict):
        return tree
    if "dict" in tree:
        return {n: _rebuild(item, named, path) for n, item in tree["dict"].items()}
    if "tensor" in tree:
        return named[tree["tensor"]]
    if tree["state"] not in State.kinds:
        raise ValueError(f"{path} holds a {tree['state']}, which is no state of everlong")
    parts = {n: _rebuild(part, named, path) for n, part in tree["fields"].items()}
    state = State.kinds[tree["state"]](**parts)
    state.check()
    return state
