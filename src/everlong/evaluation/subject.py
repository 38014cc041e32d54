"""A model that is evaluated: itself, its tokenizer, and how it reads."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .results import ModelInfo

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


WHOLE = 4  # times tokens_per_forward: a text that attention reads in one call, at most


def _tell_nobody(tokens: int) -> None:
    """A function that goes to other processes, as a lambda cannot."""


@dataclass
class Subject:
    """A causal language model that is evaluated.

    recipe: what it was trained by, {} if that is not known. piece: tokens of a row that it is fed at a
        time. tokens_per_forward: rows are read side by side, up to so many tokens a call. (Models whose
        cache grows get larger pieces, and fewer rows of long texts.)
    passages: if not 0, the model reads so many of a text's passages that fit the question best
        (`Retrieval`) instead of the text, where a task knows how.
    on_tokens: told of tokens that were read, for a progress bar.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: ModelInfo
    recipe: dict[str, Any] = field(default_factory=dict)
    piece: int = 1024
    tokens_per_forward: int = 32768
    passages: int = 0
    on_tokens: Callable[[int], None] = _tell_nobody

    def __post_init__(self) -> None:
        if self.piece < 64:
            raise ValueError(f"piece must be at least 64 tokens, got {self.piece}")
        # Mamba's models have a name of their own for what others call past_key_values.
        is_mamba = "cache_params" in inspect.signature(self.model.forward).parameters
        self.cache_name = "cache_params" if is_mamba else "past_key_values"

    @property
    def grows(self) -> bool:
        """Whether what the model keeps of a text grows with it."""
        return not getattr(self.model, "_is_stateful", False)

    def rows(self, length: int) -> int:
        """How many texts of a length are read side by side. What a model with a cache that grows holds
        of them is bounded too."""
        if self.grows:
            return max(1, self.tokens_per_forward // max(length, 1))
        return max(1, self.tokens_per_forward // max(min(self.piece, length), 1))

    @torch.inference_mode()
    def read(self, ids: Tensor, keep: int = 1, cache: Any = None) -> tuple[Tensor, Any]:
        """Read ids [B, T] (of any integer type) in pieces, going on from `cache` (which is used up).

        Returns the logits [B, keep, V] of the last `keep` tokens (0 < keep <= T) and the cache to go on
        from; refuses logits as `sound` does. A model whose cache does not grow reads any length in
        constant memory.
        """
        length, piece = ids.shape[1], self.piece
        if self.grows:  # attention over the past is twice as fast where there is none
            piece = max(piece, WHOLE * self.tokens_per_forward // ids.shape[0])
        starts = list(range(0, length, piece))
        while len(starts) > 1 and length - starts[-1] < keep:
            starts.pop()  # the kept tokens must not be cut in two: the last piece takes a few more
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            is_last = end == length
            outputs = self.model(
                input_ids=ids[:, start:end].to(self.model.device, torch.long),
                use_cache=True,
                logits_to_keep=keep if is_last else 1,
                **{self.cache_name: cache},
            )
            cache = getattr(outputs, self.cache_name)
            self.on_tokens(ids.shape[0] * (end - start))
        return self.sound(outputs.logits[:, -keep:]), cache

    @torch.inference_mode()
    def losses(self, ids: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """The negative log-likelihood (nats, float32) of each of ids [B, T] but the first, given those
        before it: [B, T - 1] (1 < T), on the CPU; and the cache, which the last token is not in: a
        model of T - 1 positions takes them. Logits are held for one piece at a time."""
        losses = []
        for start in range(0, ids.shape[1] - 1, self.piece):
            part = ids[:, start : start + self.piece + 1].to(self.model.device, torch.long)
            read, wanted = part[:, :-1], part[:, 1:]
            outputs = self.model(input_ids=read, use_cache=True, **{self.cache_name: cache})
            cache = getattr(outputs, self.cache_name)
            logits = self.sound(outputs.logits).float().transpose(1, 2)
            losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none").cpu())
            self.on_tokens(read.numel())
        return torch.cat(losses, 1), cache

    @torch.inference_mode()
    def generate(
        self, ids: Tensor, new_tokens: int, stop: Sequence[str] = (), cache: Any = None
    ) -> list[str]:
        """Continue ids [B, T] greedily, each row until a text of `stop` appears, an end-of-text token,
        or `new_tokens`. Returns the texts, without what stopped them."""
        logits, cache = self.read(ids, 1, cache)
        ends = self._ends()
        rows: list[list[int]] = [[] for _ in range(len(ids))]
        texts: list[str | None] = [None] * len(rows)
        for step in range(new_tokens):
            token = logits[:, -1].argmax(-1)
            for row, each in enumerate(token.tolist()):
                if texts[row] is not None:
                    continue
                if each in ends:
                    texts[row] = self._text(rows[row], stop)
                    continue
                rows[row].append(each)
                if stop and any(mark in self.decode(rows[row]) for mark in stop):
                    texts[row] = self._text(rows[row], stop)
            if step + 1 == new_tokens or all(text is not None for text in texts):
                break
            logits, cache = self.read(token[:, None], 1, cache)
        return [
            self._text(row, stop) if text is None else text
            for row, text in zip(rows, texts, strict=True)
        ]

    def sound(self, logits: Tensor) -> Tensor:
        """The logits, as `sound`."""
        return sound(logits, f"{self.info.name} ({self.info.path})")

    def copy(self, cache: Any) -> Any:
        """A cache at the same place, to be used up."""
        return cache.copy() if hasattr(cache, "copy") else copy.deepcopy(cache)

    def select(self, cache: Any, rows: Sequence[int]) -> Any:
        """A copy of a cache with these of its rows, in this order, any of them several times."""
        new = self.copy(cache)
        new.reorder_cache(torch.tensor(rows, device=self.model.device))
        return new

    def encode(self, text: str) -> Tensor:
        """Token ids [T] of a text, no special ones added."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.long)

    def opening(self) -> list[int]:
        """What the tokenizer puts before a text, such as a bos token."""
        with_it = self.tokenizer("a")["input_ids"]
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        return next((with_it[:i] for i in range(len(with_it)) if with_it[i:][: len(bare)] == bare), [])

    def shorten(self, prompt: Tensor) -> Tensor:
        """Of a prompt [T] the passages that fit its end best, and its end."""
        from everlong.models import Retrieval

        return Retrieval(self.tokenizer, num_passages=self.passages).shorten(prompt)

    def _ends(self) -> set[int]:
        known = getattr(self.model, "generation_config", None)
        ends = getattr(known, "eos_token_id", None)
        ends = ends if isinstance(ends, list) else [ends]
        return {each for each in [*ends, self.tokenizer.eos_token_id] if each is not None}

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """The text of token ids [T], without special ones."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _text(self, ids: Sequence[int], stop: Sequence[str]) -> str:
        text = self.decode(ids)
        places = [text.find(mark) for mark in stop if mark in text]
        return text[: min(places)] if places else text


def sound(logits: Tensor, name: str) -> Tensor:
    """The logits [..., V] of the model that is called `name`. Raises ValueError where they name no
    likeliest token: NaN would be scored, as wrong. (Some of them may be -inf: tokens that a model never
    says.)"""
    best = logits.amax(-1)
    if not bool(torch.isfinite(best).all()):
        found = best[~torch.isfinite(best)][0].item()
        raise ValueError(
            f"{name} cannot be evaluated: it gives logits of {found} "
            f"in {str(logits.dtype).removeprefix('torch.')}. Its weights are not finite, or too "
            "large for that type; leave it out"
        )
    return logits
