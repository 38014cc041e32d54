"""A long text in pieces: what it may be given as, how it is cut, and how its reading is shown."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PIECE = 2048

# Of whoever wants to know how far a text is read: called with tokens of each row that were just read.
Told = Callable[[int], None]


def default_piece(config: Any) -> int:
    """Tokens of each row that a model reads in one call, where nobody says how many.

    At least 2,048: so many that what a call costs besides its products hardly counts, so few that
    their activations stay small. Whole segments and chunks, since one that is cut is computed in two
    parts; but not where that takes more than 8,192 tokens: a pretrained model's segment may be a book.
    """
    unit = math.lcm(config.segment_length, getattr(config, "chunk_size", 1))
    return PIECE if unit > 4 * PIECE else math.ceil(PIECE / unit) * unit


def text_length(input_ids: Any) -> int | None:
    """T of a tensor or an array [B, T], None of an iterable; raises ValueError for anything else."""
    is_one = isinstance(input_ids, (str, Mapping)) or not isinstance(input_ids, Iterable)
    if hasattr(input_ids, "shape") or is_one:
        _check_ids(input_ids)
        return int(input_ids.shape[1])
    return None


def cut_text(
    input_ids: Any, mask: Tensor | None, first: int, size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Token ids, and their part of the mask, in pieces of `first` and then `size` tokens (the last one
    may be shorter).

    input_ids: a tensor [B, T] or a numpy array, in a file or not; or an iterable of them, [B, any
    number] each, which are read as one text. mask: [B, T], only beside a tensor. The pieces are on
    `device`, int64, so the text need not be.
    """
    for piece, part in _cut(input_ids, mask, first, size):
        # Where parameters are offloaded, and so on no device, hooks move what they get.
        target = piece.device if device.type == "meta" else device
        yield piece.to(target, torch.long), part


def _cut(
    input_ids: Any, mask: Tensor | None, first: int, size: int
) -> Iterator[tuple[Tensor, Tensor | None]]:
    if not hasattr(input_ids, "shape"):
        yield from ((piece, None) for piece in _regroup(input_ids, first, size))
        return
    length = input_ids.shape[1]
    for start in range(first - size, length, size) if length else ():
        place = slice(max(start, 0), start + size)
        yield _tensor(input_ids[:, place]), None if mask is None else mask[:, place]


def _regroup(parts: Iterable[Any], first: int, size: int) -> Iterator[Tensor]:
    """Tensors [B, any number] as some of `first`, then `size` tokens: no line of a file is a piece."""
    held: list[Tensor] = []
    count = 0
    for part in parts:
        _check_ids(part)
        if held and len(part) != len(held[0]):
            raise ValueError(
                f"the parts of a text must have the same rows, got batch {len(held[0])} and then "
                f"{len(part)}: read other texts with calls of their own"
            )
        held.append(_tensor(part))
        count += part.shape[1]
        if count >= first:
            whole = torch.cat(held, 1)
            rest = (count - first) % size
            yield whole[:, :first]
            if count - first >= size:
                yield from whole[:, first : count - rest].split(size, 1)
            held, count, first = [whole[:, count - rest :].clone()], rest, size
    if count:
        yield torch.cat(held, 1)


def _tensor(ids: Any) -> Tensor:
    """As int64: parts of one text may differ in type, and an array in byte order or direction."""
    return (
        ids.long()
        if isinstance(ids, Tensor)
        else torch.tensor(ids.astype("int64", order="C"), device="cpu")
    )


def _check_ids(ids: Any) -> None:
    """Refuse what is no [B, T] of integers."""
    if not hasattr(ids, "shape"):
        raise ValueError(
            "input_ids must be a tensor [B, T] of token ids, or an iterable of such tensors, but "
            f'there is a {type(ids).__name__}: tokenizer(text, return_tensors="pt").input_ids is one'
        )
    if len(ids.shape) != 2:
        raise ValueError(
            f"input_ids must be [B, T], got {list(ids.shape)}: of one row ids, give ids[None]"
        )
    if ids.shape[0] < 1:
        raise ValueError(f"input_ids must have at least one row, got {list(ids.shape)}")
    # Of arrays the kind tells, whatever their byte order.
    if getattr(ids.dtype, "kind", None) not in ("i", "u") and "int" not in str(ids.dtype):
        raise ValueError(f"input_ids must be integers, got {ids.dtype}: give token ids")


@contextmanager
def show_reading(progress: bool | Told | None, total: int | None) -> Iterator[Told]:
    """What to tell of tokens that were read: `progress` itself, or a bar on stderr if it is True.

    total: tokens of each row, None if that is not known.
    """
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda tokens: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("reading"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.completed:,.0f} tokens"),
        TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("reading", total=total)
        yield lambda tokens: bar.advance(task, tokens)
