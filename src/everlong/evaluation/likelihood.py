"""Log-likelihoods of many continuations: what they share is read once.

Three things are shared. Contexts with a long common beginning, such as examples before every question,
go on from copies of one cache. A context with several continuations is read once, and they go on from
copies of its cache. A continuation of one token needs no reading at all.

Rows of one call may differ in length only where the cache is thrown away afterwards: pads then stand
to the right of all that is asked, where no causal model sees them. Where it is kept, rows are equally
long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, TypeVar

import torch
from torch import Tensor

from .subject import Subject

Tokens = tuple[int, ...]
Score = tuple[float, bool]
"""The log-likelihood (nats), and whether each token is the likeliest."""
Row = TypeVar("Row")

SHARED = 32  # tokens at least, for a common beginning to be read apart
LOGITS = 2**28  # numbers at most in a call's logits
SPREAD = 0.8  # rows side by side are at least so long, as a share of the longest


@dataclass
class Fork:
    """A context and what may follow it: for each continuation, where it was asked."""

    context: Tokens
    ends: dict[Tokens, list[int]] = field(default_factory=dict)

    @property
    def has_branches(self) -> bool:
        """Whether its cache is gone on from more than once."""
        return len(self.ends) > 1 and any(len(end) > 1 for end in self.ends)


def log_likelihoods(
    subject: Subject, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[tuple[int, Score]]:
    """The score of each continuation after its context, both of at least one token.

    Yields the pair's index and its score, in an order of its own, as they come.
    """
    forks: dict[Tokens, Fork] = {}
    for i, (context, end) in enumerate(pairs):
        fork = forks.setdefault(tuple(context), Fork(tuple(context)))
        fork.ends.setdefault(tuple(end), []).append(i)
    for prefix, contexts in shared_prefixes(forks):
        cache = None
        if prefix:
            cache = subject.read(torch.tensor([prefix]), 1)[1]
        family = [forks[context] for context in contexts]
        for end, score in _score_family(subject, family, len(prefix), cache):
            yield from ((i, score) for i in end)


def shared_prefixes(contexts: Iterable[Tokens]) -> Iterator[tuple[Tokens, list[Tokens]]]:
    """Contexts that begin with the same `SHARED` tokens or more, with what they share; and all that
    share nothing, with nothing.

    At least one token of each is left. A context that shares much less than those before it begins a
    family of its own.
    """
    alone: list[Tokens] = []
    family: list[Tokens] = []
    shared = 0
    for context in [*sorted(contexts), ()]:
        # Never all of a context: what begins another comes before it.
        same = takewhile(lambda two: two[0] == two[1], zip(family[-1] if family else (), context))  # noqa: B905
        common = min(sum(1 for _ in same), shared)
        if common >= SHARED and (len(family) == 1 or 2 * common >= shared):
            family.append(context)
            shared = common
            continue
        if len(family) > 1:
            yield family[0][:shared], family
        else:
            alone += family
        family, shared = [context], len(context) - 1
    if alone:
        yield (), alone


def batches(
    rows: Iterable[Row], length: Callable[[Row], int], fits: Callable[[int, Row, Row], bool]
) -> Iterator[list[Row]]:
    """Rows to be read side by side, the longest first, of about the same length.

    fits(count, longest, row): whether so many rows may stand together if the longest and this one do.
    """
    batch: list[Row] = []
    for row in sorted(rows, key=length, reverse=True):
        if batch and (
            length(row) < SPREAD * length(batch[0]) or not fits(len(batch) + 1, batch[0], row)
        ):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def pad_right(rows: Sequence[Sequence[int]]) -> Tensor:
    """[B, T] token ids; any token stands for a pad, where nothing is asked after it."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


def _score_family(
    subject: Subject, family: list[Fork], past: int, cache: Any
) -> Iterator[tuple[list[int], Score]]:
    """Of contexts that share `past` tokens, which `cache` has read: where a continuation was asked,
    and its score."""
    lines = []
    for fork in family:
        if not fork.has_branches:
            # One continuation, or several of one token: those all want the same logits.
            longest = max(fork.ends, key=len)
            lines.append((fork, fork.context[past:] + longest[:-1], len(longest)))
    yield from _score_lines(subject, lines, past, cache)
    branching = [fork for fork in family if fork.has_branches]
    by_length: dict[int, list[Fork]] = {}
    for fork in branching:
        by_length.setdefault(len(fork.context), []).append(fork)
    for length in sorted(by_length, reverse=True):
        yield from _score_branches(subject, by_length[length], past, cache)


def _score_lines(
    subject: Subject, lines: list[tuple[Fork, Tokens, int]], past: int, cache: Any
) -> Iterator[tuple[list[int], Score]]:
    """Each line (its fork, tokens to read, the last of them whose logits are wanted) is read once."""

    def fits(count: int, longest: Any, row: Any) -> bool:
        kept = len(longest[1]) - len(row[1]) + max(row[2], longest[2])
        return _fits(subject, count, past + len(longest[1]), kept)

    for batch in batches(lines, lambda line: len(line[1]), fits):
        ids = pad_right([tokens for _, tokens, _ in batch])
        first = min(len(tokens) - wanted for _, tokens, wanted in batch)
        start = None if cache is None else subject.select(cache, [0] * len(batch))
        logits, _ = subject.read(ids, ids.shape[1] - first, start)
        for row, (fork, tokens, wanted) in zip(logits, batch, strict=True):
            place = len(tokens) - first
            for end, asked in fork.ends.items():
                yield asked, _score(row[place - wanted : place], end)


def _score_branches(
    subject: Subject, forks: list[Fork], past: int, cache: Any
) -> Iterator[tuple[list[int], Score]]:
    """Contexts of one length: each is read once, its continuations from copies of its cache."""
    length = len(forks[0].context)
    while forks:
        count, rows = 0, 0
        while count < len(forks):
            rows += len(forks[count].ends)
            if count and not _fits(subject, rows, length, 1):
                break
            count += 1
        batch, forks = forks[:count], forks[count:]
        ids = torch.tensor([fork.context[past:] for fork in batch])
        start = None if cache is None else subject.select(cache, [0] * count)
        logits, read = subject.read(ids, 1, start)
        ends = [(row, end) for row, fork in enumerate(batch) for end in fork.ends if len(end) > 1]
        tails = _score_tails(subject, ends, length, read)
        for row, fork in enumerate(batch):
            for end, asked in fork.ends.items():
                score, is_likely = _score(logits[row], end[:1])
                rest = tails.get((row, end), (0.0, True))
                yield asked, (score + rest[0], is_likely and rest[1])


def _score_tails(
    subject: Subject, ends: list[tuple[int, Tokens]], past: int, cache: Any
) -> dict[tuple[int, Tokens], Score]:
    """The score of all tokens but the first of each `end`, which goes on from a row of the cache."""
    found = {}

    def fits(count: int, longest: Any, row: Any) -> bool:
        return _fits(subject, count, past + len(longest[1]), len(longest[1]))

    for batch in batches(ends, lambda each: len(each[1]), fits):
        start = subject.select(cache, [row for row, _ in batch])
        ids = pad_right([end[:-1] for _, end in batch])
        logits, _ = subject.read(ids, ids.shape[1], start)
        for (row, end), each in zip(batch, logits, strict=True):
            found[row, end] = _score(each[: len(end) - 1], end[1:])
    return found


def _fits(subject: Subject, rows: int, length: int, kept: int) -> bool:
    """Whether so many rows of a length, the logits of whose last tokens are kept, fit into a call."""
    logits = rows * kept * subject.model.config.get_text_config().vocab_size
    return rows * length <= subject.tokens_per_forward and logits <= LOGITS


def _score(logits: Tensor, end: Tokens) -> Score:
    """Of a continuation whose tokens the logits [len(end), V] foretell."""
    logs = logits.float().log_softmax(-1)
    tokens = torch.tensor(end, device=logs.device)
    likely = bool((logs.argmax(-1) == tokens).all())
    return float(logs.gather(1, tokens[:, None]).sum()), likely
