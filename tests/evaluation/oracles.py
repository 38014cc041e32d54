"""Models whose answers are known, as subjects of an evaluation."""

from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM

from everlong.data import byte_tokenizer
from everlong.evaluation import ModelInfo, Subject


class Reader(torch.nn.Module):
    """A causal model of bytes: it says what `answer` says of the text so far, which is its cache."""

    device = torch.device("cpu")
    _is_stateful = True

    def __init__(self, answer=lambda text: ord("0")):
        super().__init__()
        self.answer = answer
        self.largest_output = 0
        self.config = SimpleNamespace(model_type="reader")

    def forward(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
        ids = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], 1)
        keep = logits_to_keep or input_ids.shape[1]
        logits = torch.zeros(len(ids), keep, 259)
        for row, text in enumerate(bytes(min(each, 255) for each in row.tolist()) for row in ids):
            for i in range(keep):
                logits[row, i, self.answer(text[: len(text) - keep + i + 1])] = 9
        self.largest_output = max(self.largest_output, keep)
        return SimpleNamespace(logits=logits, past_key_values=ids if use_cache else None)


def pass_key(reach=10**9, wrong_at=()):
    """Answers a pass-key question right if the key lies among the last `reach` tokens, and with a 0
    otherwise; wrong_at: (place, digit) of digits that it gets wrong."""

    def answer(text):
        ask = text.rfind(b"The pass key is ")
        digit = len(text) - ask - len(b"The pass key is ")
        key = text.find(b"The pass key is ") + len(b"The pass key is ") + digit
        if ask < 0 or key >= len(text) or len(text) - key > reach:
            return ord("0")
        if (digit, text[key]) in wrong_at:
            return ord("0")
        return text[key]

    return answer


def saying(answers):
    """Says answers[question] behind each question that a text ends with, then an end of text."""

    def answer(text):
        for question, said in answers.items():
            start = text.rfind(question.encode())
            if start >= 0:
                given = text[start + len(question) :]
                if said.encode().startswith(given):
                    return said.encode()[len(given)] if len(given) < len(said.encode()) else 258
        return 258

    return answer


def subject(model, recipe=None, longest=None, tokenizer=None, **options):
    """A model as a subject."""
    if not callable(getattr(model, "forward", None)):
        model = AutoModelForCausalLM.from_config(model)
    info = ModelInfo("model", "model", "model", "kind", 1, longest=longest)
    return Subject(model, tokenizer or byte_tokenizer(), info, recipe or {}, **options)
