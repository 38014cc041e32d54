"""Which tokens of a batch are real and which document each belongs to.

A memory's chunks, a segment and a convolution count the real tokens of one document. So a batch with
pads, or with several documents in a row, is read as one row for each document, without pads, and
what was read goes back to where it came from.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from everlong.ops.state import PerRow, State, per_row

Own = TypeVar("Own", bound=State)


@dataclass(frozen=True)
class Documents:
    """N documents in B rows of T tokens, in the order of their rows; all tensors on the CPU.

    The first document of a row continues the row's state unless it starts there; the last one leaves
    the row's state behind. A row without any real token holds one document of length 0.
    """

    row: Tensor  # [N]    the row each document is in
    fresh: Tensor  # [N]    whether it starts with an empty memory
    lengths: Tensor  # [N]    its tokens
    tokens: Tensor  # [real] where they are in the flat batch, document by document
    last: Tensor  # [B]    the last document of each row
    shape: tuple[int, int]  # B, T

    @classmethod
    def of(cls, real: Tensor, starts: Tensor, continued: bool) -> "Documents | None":
        """real, starts: [B, T] booleans: which tokens are no pads, and which ones start a document
        (counts at real tokens only). continued: whether the rows have a state to go on from.

        None if every row is one document of T tokens, and they go on if they are continued.
        """
        real, starts = real.cpu(), (starts & real).cpu()
        nth = starts.long().cumsum(1)
        behind = real & (real.cumsum(1) == 1)  # the first real token
        begins = (behind & starts).any(1)
        nth -= begins.long()[:, None]
        count = (
            torch.where(real, nth, 0).amax(1) + 1
            if real.shape[1]
            else torch.ones(len(real), device="cpu").long()
        )
        offset = count.cumsum(0) - count
        document = (offset[:, None] + nth)[real]
        fresh = torch.ones(int(count.sum()), dtype=torch.bool, device="cpu")
        fresh[offset] = begins if continued else True
        begins_anew = continued and bool(fresh.any())
        if len(fresh) == len(real) and bool(real.all()) and not begins_anew:
            return None
        return cls(
            row=torch.arange(len(real), device="cpu").repeat_interleave(count),
            fresh=fresh,
            lengths=document.bincount(minlength=len(fresh)),
            tokens=real.flatten().nonzero().squeeze(1),
            last=offset + count - 1,
            shape=(real.shape[0], real.shape[1]),
        )

    def groups(self) -> list["Documents"]:
        """The documents in groups of about one length, where one group would be mostly pads.

        `last` of a group is which of its documents are the last of a row.
        """
        if len(self.row) * self._longest <= 2 * len(self.tokens):
            return [self]
        groups: list[list[int]] = []
        for document in self.lengths.argsort(descending=True, stable=True).tolist():
            if not groups or 2 * self.lengths[document] < self.lengths[groups[-1][0]]:
                groups.append([])
            groups[-1].append(document)
        return [self._subset(torch.tensor(sorted(group), device="cpu")) for group in groups]

    def _subset(self, which: Tensor) -> "Documents":
        owner = torch.arange(len(self.row), device="cpu").repeat_interleave(self.lengths)
        return Documents(
            row=self.row[which],
            fresh=self.fresh[which],
            lengths=self.lengths[which],
            tokens=self.tokens[torch.isin(owner, which)],
            last=torch.isin(which, self.last).nonzero().squeeze(1),
            shape=self.shape,
        )

    def gather(self, x: Tensor) -> Tensor:
        """[B, T, ...] as [N, L, ...]: each document a row, aligned left, zeros behind it."""
        return self._put(
            x, x.flatten(0, 1), self.tokens, self._places(), (len(self.row), self._longest)
        )

    def scatter(self, y: Tensor) -> Tensor:
        """Back: [N, L, ...] as [B, T, ...], zeros at pads."""
        return self._put(y, y.flatten(0, 1), self._places(), self.tokens, self.shape)

    def begin(self, state: Own | None) -> Own | None:
        """The state of each document's row (None: all are new); `fresh` ones have yet to restart."""
        return None if state is None else state.select(self.row)

    @staticmethod
    def end(groups: list[tuple["Documents", Own]]) -> Own:
        """The state of each row, from those of the documents of each group."""
        states = [state.select(group.last) for group, state in groups if len(group.last)]
        rows = torch.cat([group.row[group.last] for group, _ in groups])
        joined = states[0] if len(states) == 1 else type(states[0]).join(states)
        return joined.select(rows.argsort())

    @property
    def _longest(self) -> int:
        return int(self.lengths.max()) if len(self.lengths) else 0

    def _places(self) -> Tensor:
        """Where the real tokens are in the flat [N, L]."""
        real = torch.arange(self._longest, device="cpu") < self.lengths[:, None]
        return real.flatten().nonzero().squeeze(1)

    @staticmethod
    def _put(x: Tensor, flat: Tensor, source: Tensor, target: Tensor, shape: tuple[int, int]) -> Tensor:
        out = x.new_zeros(shape[0] * shape[1], *x.shape[2:])
        moved = flat.index_select(0, source.to(x.device))
        return out.index_copy(0, target.to(x.device), moved).unflatten(0, shape)


class Piece:
    """Some tokens of each row, aligned left: those at start[i] ... start[i] + count[i] - 1 of the row
    rows[i].

    start, count, rows: [N] on the CPU; rows: default every row, in order.
    """

    def __init__(
        self,
        start: Tensor,
        count: Tensor,
        device: torch.device,
        rows: Tensor | None = None,
    ) -> None:
        slots = torch.arange(int(count.max()), device="cpu")
        self.token = (start[:, None] + slots).to(device)
        self.real = (slots < count[:, None]).to(device)
        self.rows = None if rows is None else rows.to(device)

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """The tokens of x [B, ..., T, ...], which has them at `dim`; zeros behind a row's last.

        What pads hold may be anything, NaN too: zeros take its place before any arithmetic.
        """
        x = x if self.rows is None else x.index_select(0, self.rows)
        return x.gather(dim, self._places(x, dim)).where(_along(self.real, x, dim), 0.0)

    def put(self, whole: Tensor, part: Tensor, dim: int = 1) -> Tensor:
        """`whole` with what `take` gave, or what came of it, added where it was taken from."""
        part = part.where(_along(self.real, part, dim), 0.0)
        if self.rows is None:
            return whole.scatter_add(dim, self._places(whole, dim), part)
        spread = whole.new_zeros(len(part), *whole.shape[1:])
        spread = spread.scatter_add(dim, self._places(whole, dim), part)
        return whole.index_add(0, self.rows, spread)

    def _places(self, x: Tensor, dim: int) -> Tensor:
        token = self.token.clamp(max=x.shape[dim] - 1)
        sizes = [*x.shape]
        sizes[0], sizes[dim] = token.shape
        return _along(token, x, dim).expand(sizes)


class Cuts:
    """A call's T tokens, cut where a segment ends: rows may stand at positions, or have lengths, of
    their own.

    position: tokens of the open segment so far, an integer or [B]; lengths: [B] on the CPU, the real
    tokens of each row, aligned left (None: all).
    """

    def __init__(
        self, shape: tuple[int, int], position: PerRow, segment: int, lengths: Tensor | None
    ) -> None:
        batch, tokens = self.shape = shape
        self.counts: list[Tensor] | None = None
        if lengths is None and isinstance(position, int):
            first = min(segment - position, tokens)
            # No divmod: the compiler has none for lengths that it keeps open.
            after = range(first, tokens, segment)
            self.sizes = [first, *(min(segment, tokens - start) for start in after)]
            return
        lengths = per_row(tokens if lengths is None else lengths, batch)
        position = per_row(position, batch)
        offset, self.counts, self.starts = torch.zeros_like(lengths), [], []
        while not self.counts or bool((offset < lengths).any()):
            count = torch.minimum(segment - position, lengths - offset)
            self.counts.append(count)
            self.starts.append(offset)
            offset, position = offset + count, (position + count) % segment

    def take(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The pieces of x [B, T, ...] in turn, each with its lengths."""
        if self.counts is None:
            yield from ((piece, None) for piece in x.split(self.sizes, 1))
            return
        for start, count in zip(self.starts, self.counts, strict=True):
            yield Piece(start, count, x.device).take(x), count

    def join(self, parts: list[Tensor]) -> Tensor:
        """What came of the pieces, [B, T, ...]."""
        if self.counts is None:
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        whole = parts[0].new_zeros(*self.shape, *parts[0].shape[2:])
        for start, count, part in zip(self.starts, self.counts, parts, strict=True):
            whole = Piece(start, count, part.device).put(whole, part)
        return whole


def _along(numbers: Tensor, x: Tensor, dim: int) -> Tensor:
    """numbers [N, L] in the shape of x [B, ..., T, ...], whose tokens are at `dim`."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = numbers.shape
    return numbers.view(shape)
