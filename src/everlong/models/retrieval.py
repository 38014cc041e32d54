"""Retrieval: a causal language model that reads, of a long prompt, what fits its question best (+RAG).

BM25 is that of `bm25s`: `pip install everlong[rag]`.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Retrieval:
    """Shortens prompts: their best passages by BM25, in their order, then the question.

    Args:
        tokenizer: the model's; passages are compared as words of the text that it decodes.
        passage_tokens: of a passage. They overlap by half, so that one holds the whole of what is
            short; of two that overlap the better one is taken.
        num_passages: how many are taken, at most.
        question_tokens: the prompt's last tokens, which are always kept and say what is looked for.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        passage_tokens: int = 128,
        num_passages: int = 4,
        question_tokens: int = 64,
    ) -> None:
        for name, value in [
            ("passage_tokens", passage_tokens),
            ("num_passages", num_passages),
            ("question_tokens", question_tokens),
        ]:
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.tokenizer = tokenizer
        self.passage_tokens, self.num_passages = passage_tokens, num_passages
        self.question_tokens = question_tokens

    def shorten(self, prompt: Tensor) -> Tensor:
        """prompt: [T] token ids, the question last. Returns at most num_passages passages of it and the
        question; a prompt that is no longer than these is returned as it is."""
        text = len(prompt) - self.question_tokens
        if text <= self.num_passages * self.passage_tokens:
            return prompt
        starts = range(0, text, max(self.passage_tokens // 2, 1))
        spans = [(start, min(start + self.passage_tokens, text)) for start in starts]
        question = self._words([prompt[text:]])[0]
        scores = self._scores(self._words([prompt[a:b] for a, b in spans]), question)
        kept = torch.zeros(len(prompt), dtype=torch.bool)
        kept[text:] = True
        taken = 0
        # Of passages that fit equally well, those nearest to the question.
        for i in sorted(range(len(spans)), key=lambda i: (-scores[i], -i)):
            span = slice(*spans[i])
            if taken < self.num_passages and not bool(kept[span].any()):
                kept[span] = True
                taken += 1
        return prompt[kept.to(prompt.device)]

    def _words(self, rows: list[Tensor]) -> list[list[str]]:
        import bm25s

        texts = [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return bm25s.tokenize(texts, stopwords=None, return_ids=False, show_progress=False)

    def _scores(self, passages: list[list[str]], question: list[str]) -> list[float]:
        import bm25s

        known = {word for passage in passages for word in passage}
        asked = [word for word in question if word in known]
        if not asked:
            return [0.0] * len(passages)
        index = bm25s.BM25()
        index.index(passages, show_progress=False)
        return index.get_scores(asked).tolist()


class RetrievalLM:
    """A causal language model behind a `Retrieval`."""

    def __init__(self, model: PreTrainedModel, retrieval: Retrieval) -> None:
        self.model, self.retrieval = model, retrieval

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """As the model's `generate`: input_ids [B, T] with the new tokens behind them, of which the
        model has read a part. attention_mask: 0 at pads on the left."""
        pad = kwargs.get("pad_token_id", self.model.generation_config.pad_token_id) or 0
        real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [
            self.retrieval.shorten(row[keep.bool()]) for row, keep in zip(input_ids, real, strict=True)
        ]
        width = max(len(row) for row in rows)
        ids = torch.stack([_pad_left(row, width, pad) for row in rows])
        mask = torch.stack([_pad_left(torch.ones_like(row), width, 0) for row in rows])
        out = self.model.generate(ids, attention_mask=mask, **kwargs)
        copies = len(out) // len(ids)
        return torch.cat([input_ids.repeat_interleave(copies, 0), out[:, width:]], 1)


def _pad_left(row: Tensor, width: int, value: int) -> Tensor:
    return torch.nn.functional.pad(row, (width - len(row), 0), value=value)
