"""Rows of tokens from documents: packed, or streams that go on from row to row.

In both, labels are the tokens themselves; the first token of a document and the first of a row have
none, since what comes before them is another text or not in the row. (Models shift labels: label t is
what position t - 1 has to predict.)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import Dataset

from .config import IGNORE, DataConfig
from .corpus import TokenFile

Item = dict[str, torch.Tensor]


class Text:
    """Documents one behind the other, without end: behind the last comes the first.

    tokens: [N], an array or a file of them. spans: [documents, 2], where each begins and ends in there.
    eos: the token behind each document; None: none. len() counts it.
    """

    def __init__(self, tokens: np.ndarray | TokenFile, spans: np.ndarray, eos: int | None) -> None:
        self.tokens, self.spans, self.eos = tokens, spans, eos
        self.ends = np.cumsum(spans[:, 1] - spans[:, 0] + (eos is not None))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def shuffled(self, rng: np.random.Generator) -> Text:
        """The same documents in another order."""
        return Text(self.tokens, self.spans[rng.permutation(len(self.spans))], self.eos)

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`length` tokens from place `start` on, and the place of each in its document."""
        ids = np.empty(length, np.int64)
        positions = np.empty(length, np.int64)
        start %= len(self)
        document = int(np.searchsorted(self.ends, start, side="right"))
        begin = int(self.ends[document - 1]) if document else 0
        offset, filled = start - begin, 0
        while filled < length:
            first, last = self.spans[document].tolist()
            size = last - first + (self.eos is not None)
            count = min(size - offset, length - filled)
            text = self.tokens[first + offset : min(first + offset + count, last)]
            ids[filled : filled + len(text)] = text
            if self.eos is not None and len(text) < count:
                ids[filled + len(text)] = self.eos
            positions[filled : filled + count] = np.arange(offset, offset + count)
            filled += count
            document, offset = (document + 1) % len(self.spans), 0
        return ids, positions


def as_item(ids: np.ndarray, positions: np.ndarray, join: bool) -> Item:
    """A row as a model takes it; join: without position_ids."""
    input_ids, position_ids = torch.from_numpy(ids), torch.from_numpy(positions)
    labels = input_ids.masked_fill(position_ids == 0, IGNORE)
    labels[0] = IGNORE
    item = {"input_ids": input_ids, "labels": labels}
    return item if join else {**item, "position_ids": position_ids}


def restarted(positions: np.ndarray) -> np.ndarray:
    """The positions, with those of the row's first document counted from the row's start."""
    next_document = np.flatnonzero(positions[1:] == 0)
    first = int(next_document[0]) + 1 if len(next_document) else len(positions)
    return np.concatenate([np.arange(first), positions[first:]])


class RowsDataset(Dataset):
    """What data sets of rows share: the number of items, and the bytes behind their labels.

    byte_sizes: [vocabulary], the bytes of text that each token stands for.
    """

    def __init__(self, num_samples: int, byte_sizes: np.ndarray, join: bool) -> None:
        self.num_samples, self.byte_sizes, self.join = num_samples, byte_sizes, join

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        return as_item(*self.row(index), self.join)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of an item and their positions, both [T]."""
        raise NotImplementedError

    def label_bytes(self, index: int) -> int:
        """The bytes of text that item `index` has labels for: bits per byte are the sum of its
        losses over this, and over log 2. A special token is no text."""
        labels = self[index]["labels"].numpy()
        return int(self.byte_sizes[labels[labels != IGNORE]].sum())


class PackedDataset(RowsDataset):
    """Rows filled with documents; each restarts, and one that is cut goes on in another row as if it
    began there.

    A pass over the text takes documents in an order of its own, cuts it into rows and takes these in
    an order of their own; the next pass does both anew. A length of the curriculum begins a pass.
    Item i belongs to training step i // batch.
    """

    def __init__(
        self,
        text: Text,
        config: DataConfig,
        num_samples: int,
        byte_sizes: np.ndarray,
        *,
        seed: int = 0,
        batch: int = 1,
        join: bool = False,
    ) -> None:
        super().__init__(num_samples, byte_sizes, join)
        self.text, self.config, self.seed, self.batch = text, config, seed, batch
        self._first_steps = _first_steps(config, -(-num_samples // batch))
        self._pass: tuple[tuple[int, int], Text, np.ndarray] | None = None

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """As in `RowsDataset`."""
        length = self.config.length_at(index // self.batch)
        number = index - self._first_steps[length] * self.batch
        number, place = divmod(number, len(self.text) // length)
        text, starts = self._order(length, number)
        ids, positions = text.read(int(starts[place]), length)
        return ids, restarted(positions)

    def _order(self, length: int, number: int) -> tuple[Text, np.ndarray]:
        """The text of pass `number` over rows of this length, and where each row starts in it."""
        if self._pass is None or self._pass[0] != (length, number):
            rng = np.random.default_rng((self.seed, length, number))
            text = self.text.shuffled(rng)
            # The rows of one pass do not end where those of the other did.
            starts = rng.permutation(len(text) // length) * length + rng.integers(length)
            self._pass = ((length, number), text, starts)
        return self._pass[1:]


class StreamsDataset(RowsDataset):
    """Streams of text, cut into consecutive rows: item i + streams goes on where item i ended.

    Streams begin at places that are spread evenly over the text, in an order of documents of this
    seed. Positions are those in the document, so that only a document's first token has 0.
    Item i belongs to training step i // batch, and `batch` is a multiple of `streams`.
    """

    def __init__(
        self,
        text: Text,
        config: DataConfig,
        num_samples: int,
        byte_sizes: np.ndarray,
        *,
        seed: int = 0,
        batch: int = 1,
        streams: int = 1,
        join: bool = False,
    ) -> None:
        super().__init__(num_samples, byte_sizes, join)
        if batch % streams:
            raise ValueError(f"batch must be a multiple of streams = {streams}, got {batch}")
        self.text = text.shuffled(np.random.default_rng(seed))
        self.streams, self.pieces_a_step = streams, batch // streams
        steps = range(-(-num_samples // batch))
        lengths = np.repeat([config.length_at(step) for step in steps], self.pieces_a_step)
        self._ends = np.cumsum(lengths)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """As in `RowsDataset`."""
        piece, stream = divmod(index, self.streams)
        begin = int(self._ends[piece - 1]) if piece else 0
        start = stream * len(self.text) // self.streams
        return self.text.read(start + begin, int(self._ends[piece]) - begin)


def _first_steps(config: DataConfig, steps: int) -> dict[int, int]:
    """For each length of the curriculum the first step that has it."""
    first: dict[int, int] = {}
    for step in range(min(steps, config.hold_steps + config.growth_steps + 1)):
        first.setdefault(config.length_at(step), step)
    return first


class StreamedDataset(RowsDataset):
    """Packed rows of documents that come by once, tokenised as they are asked for.

    documents: gives the token ids of each document in pass 0, 1, ... over the text, eos behind it.
    Items are to be asked for in rising order: what is passed over, as when a run is resumed, is read
    and dropped, and an item that has gone by begins anew from the first.
    """

    def __init__(
        self,
        documents: Callable[[int], Iterator[np.ndarray]],
        config: DataConfig,
        num_samples: int,
        byte_sizes: np.ndarray,
        *,
        batch: int = 1,
        join: bool = False,
    ) -> None:
        super().__init__(num_samples, byte_sizes, join)
        self.documents, self.config, self.batch = documents, config, batch
        self._rows: Iterator[tuple[np.ndarray, np.ndarray]] | None = None
        self._next = 0

    def __getstate__(self) -> dict[str, object]:
        # A worker process reads for itself.
        return {**self.__dict__, "_rows": None, "_next": 0}

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """As in `RowsDataset`."""
        if self._rows is None or index < self._next:
            self._rows, self._next = self._read(), 0
        while True:
            row = next(self._rows)
            self._next += 1
            if self._next > index:
                return row

    def _read(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The rows from the first on."""
        ids, positions = np.empty(0, np.int64), np.empty(0, np.int64)
        index = 0
        for document in self._endless():
            ids = np.concatenate([ids, document])
            positions = np.concatenate([positions, np.arange(len(document))])
            length, begin = self.config.length_at(index // self.batch), 0
            while len(ids) - begin >= length:
                row = slice(begin, begin + length)
                yield ids[row], restarted(positions[row])
                index, begin = index + 1, begin + length
                length = self.config.length_at(index // self.batch)
            ids, positions = ids[begin:], positions[begin:]

    def _endless(self) -> Iterator[np.ndarray]:
        for number in itertools.count():
            tokens = 0
            for document in self.documents(number):
                tokens += len(document)
                yield document
            if tokens < self.config.length:
                raise ValueError(too_short("the training text", tokens, self.config.length))


def too_short(what: str, tokens: int, length: int) -> str:
    """What to say of a text that does not fill one row."""
    return (
        f"{what} has {tokens:,} tokens, which do not fill one sample of length {length:,}: "
        "take a shorter length, or more text (for evaluation: a larger held_out)"
    )
