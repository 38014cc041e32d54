"""The needle, and other sentences in a haystack, scored: how often a model gives the whole answer, by
length and by depth.

Long inputs are streamed through the model in pieces with its cache carried along, so a model whose
cache does not grow is read at any length in constant memory.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from everlong.data import HaystackConfig, HaystackDataset
from everlong.data.haystack import IGNORE

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from everlong.models import Retrieval

NUM_DEPTH_BINS = 10


@dataclass(frozen=True)
class Share:
    """How many of how many."""

    hits: int
    samples: int

    @property
    def value(self) -> float:
        """The share in [0, 1]; NaN of nothing."""
        return self.hits / self.samples if self.samples else math.nan

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson's score interval; z = 1.96 is 95%. (0, 1) of nothing."""
        n = self.samples
        if not n:
            return 0.0, 1.0
        middle = (self.value + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(self.value * (1 - self.value) / n + (z / n / 2) ** 2)
        return max(0.0, middle - half), min(1.0, middle + half)


@dataclass(frozen=True)
class NeedleScore:
    """What a model found at one length.

    exact: samples with the whole answer right. digits: its single tokens right, given those before.
    by_depth: exact in ten bins of the needle's depth, from the text's start to its end.
    within_reach, beyond_reach: exact for needles nearer than the model's attention can reach, and
        for the others; None for a model without such a limit.
    mean_distance: tokens from the needle to the question. tokens_per_second: of reading.
    """

    length: int
    exact: Share
    digits: Share
    by_depth: list[Share]
    within_reach: Share | None
    beyond_reach: Share | None
    mean_distance: float
    seconds: float
    tokens_per_second: float

    def to_json(self) -> dict[str, Any]:
        """The score as JSON values; shares with their 95% interval."""

        def share(each: Share | None) -> dict[str, Any] | None:
            if each is None or not each.samples:
                return None
            low, high = each.interval()
            return {"share": each.value, "low": low, "high": high, "samples": each.samples}

        return {
            "length": self.length,
            "exact": share(self.exact),
            "digits": share(self.digits),
            "exact_by_depth": [share(each) for each in self.by_depth],
            "exact_within_reach": share(self.within_reach),
            "exact_beyond_reach": share(self.beyond_reach),
            "mean_distance": self.mean_distance,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens_per_second,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> NeedleScore:
        """The score that `to_json` wrote."""

        def share(each: dict[str, Any] | None) -> Share | None:
            if each is None:
                return None
            return Share(round(each["share"] * each["samples"]), each["samples"])

        nothing = Share(0, 0)
        return cls(
            length=values["length"],
            exact=share(values["exact"]) or nothing,
            digits=share(values["digits"]) or nothing,
            by_depth=[share(each) or nothing for each in values["exact_by_depth"]],
            within_reach=share(values["exact_within_reach"]),
            beyond_reach=share(values["exact_beyond_reach"]),
            mean_distance=values["mean_distance"],
            seconds=values["seconds"],
            tokens_per_second=values["tokens_per_second"],
        )


@torch.inference_mode()
def evaluate_needle(
    model: PreTrainedModel,
    config: HaystackConfig,
    lengths: Sequence[int],
    samples: int = 100,
    *,
    seed: int = 0,
    piece: int = 1024,
    tokens_per_forward: int = 32768,
    reach: int | None = None,
    retrieval: Retrieval | None = None,
    on_tokens: Callable[[int], None] = lambda tokens: None,
) -> list[NeedleScore]:
    """Score a byte-level causal language model on held-out needles, one score a length.

    One teacher-forced pass a sample: the model sees the true key, and counts as exact if the argmax
    before every digit is that digit. This equals greedy decoding of the whole key. As long as
    greedy decoding is right it has fed the model just those digits, so both see the same input; at
    its first wrong digit both miss the key, and what follows no longer matters.

    config: the task; its held-out documents are the text, the needles' depths are spread evenly.
    samples: for each length.
    piece: tokens fed at a time. tokens_per_forward: rows are batched up to so many.
    reach: tokens that the model's attention can look back, to split the score by; see
        `attention_reach`.
    retrieval: the model reads what this makes of the text and its question, answers apart.
    on_tokens: called with the number of tokens just read, for a progress bar.
    """
    _check(lengths, samples, piece)
    dataset = config.datasets(samples, seed)[1]
    model.eval()
    return [
        _score(model, dataset, length, piece, tokens_per_forward, reach, retrieval, on_tokens)
        for length in lengths
    ]


def attention_reach(config: PretrainedConfig) -> int | None:
    """Tokens that a model can look back at most: layers x window if every layer has a window.

    None if a layer remembers or attends without such a limit.
    """
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])  # Mistral names none
    if not window or kinds != {"sliding_attention"}:
        return None
    return config.num_hidden_layers * window


def _check(lengths: Sequence[int], samples: int, piece: int) -> None:
    if not lengths:
        raise ValueError("got no lengths: give at least one, in tokens")
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    if piece < 64:
        raise ValueError(f"piece must be at least 64 tokens, got {piece}")


def _score(
    model: PreTrainedModel,
    dataset: HaystackDataset,
    length: int,
    piece: int,
    tokens_per_forward: int,
    reach: int | None,
    retrieval: Retrieval | None,
    on_tokens: Callable[[int], None],
) -> NeedleScore:
    longest = dataset.config.longest_answer
    rows = max(1, tokens_per_forward // min(piece, length))
    exact: list[bool] = []
    single: list[bool] = []
    depths, distances = [], []
    started = time.perf_counter()
    for batch in _batches(dataset, length, rows):
        logits = _answers(model, batch, longest, piece, retrieval, on_tokens)
        labels = torch.stack([sample["labels"] for sample in batch])[:, -longest:]
        right = logits[:, :-1].argmax(-1).cpu() == labels
        exact += (right | (labels == IGNORE)).all(1).tolist()
        single += right[labels != IGNORE].tolist()
        depths += [sample["depth"] for sample in batch]
        distances += [sample["distance"] for sample in batch]
    seconds = time.perf_counter() - started

    is_near = [distance < reach for distance in distances] if reach is not None else None
    return NeedleScore(
        length=length,
        exact=_share(exact),
        digits=_share(single),
        by_depth=[
            _share([hit for hit, depth in zip(exact, depths, strict=True) if _bin(depth) == i])
            for i in range(NUM_DEPTH_BINS)
        ],
        within_reach=_share_where(exact, is_near, True),
        beyond_reach=_share_where(exact, is_near, False),
        mean_distance=sum(distances) / len(distances),
        seconds=seconds,
        tokens_per_second=len(exact) * length / max(seconds, 1e-9),
    )


def _answers(
    model: PreTrainedModel,
    batch: list[dict[str, Any]],
    longest: int,
    piece: int,
    retrieval: Retrieval | None,
    on_tokens: Callable[[int], None],
) -> torch.Tensor:
    """The logits [B, longest + 1, vocabulary] of the last tokens, from the one before them on."""
    ids = [sample["input_ids"] for sample in batch]
    if retrieval is None:
        return _last_logits(model, torch.stack(ids), longest + 1, piece, on_tokens)
    logits = []
    for row, sample in zip(ids, batch, strict=True):
        answer = int((sample["labels"] != IGNORE).sum())
        short = torch.cat([retrieval.shorten(row[:-answer]), row[-answer:]])[None]
        logits.append(_last_logits(model, short, longest + 1, piece, lambda tokens: None))
        on_tokens(len(row))
    return torch.cat(logits)


def _batches(dataset: HaystackDataset, length: int, rows: int) -> Iterator[list[dict[str, Any]]]:
    samples = len(dataset)
    for start in range(0, samples, rows):
        indices = range(start, min(start + rows, samples))
        yield [dataset.sample(i, length, depth=(i + 0.5) / samples) for i in indices]


def _last_logits(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    count: int,
    piece: int,
    on_tokens: Callable[[int], None],
) -> torch.Tensor:
    """The logits [B, count, vocabulary] of the last tokens, read in pieces."""
    input_ids = input_ids.to(model.device)
    length = input_ids.shape[1]
    starts = list(range(0, length, piece))
    if len(starts) > 1 and length - starts[-1] < count:
        starts.pop()  # the answer must not be cut in two: the last piece takes a few tokens more
    # Mamba's models have a name of their own for what others call past_key_values.
    is_mamba = "cache_params" in inspect.signature(model.forward).parameters
    cache_name = "cache_params" if is_mamba else "past_key_values"
    cache = None
    for start, end in zip(starts, [*starts[1:], length], strict=True):
        is_last = end == length
        outputs = model(
            input_ids=input_ids[:, start:end],
            use_cache=len(starts) > 1,
            logits_to_keep=count if is_last else 1,
            **{cache_name: cache},
        )
        cache = getattr(outputs, cache_name, None)
        on_tokens(input_ids.shape[0] * (end - start))
    return outputs.logits


def _bin(depth: float) -> int:
    return min(int(depth * NUM_DEPTH_BINS), NUM_DEPTH_BINS - 1)


def _share(hits: list[bool]) -> Share:
    return Share(sum(hits), len(hits))


def _share_where(hits: list[bool], flags: list[bool] | None, wanted: bool) -> Share | None:
    if flags is None:
        return None
    return _share([hit for hit, flag in zip(hits, flags, strict=True) if flag == wanted])
