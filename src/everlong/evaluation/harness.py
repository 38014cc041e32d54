"""A model of everlong, or any causal one of `transformers`, as lm-eval sees it.

Importing this registers it with lm-eval as "everlong":

    import lm_eval, everlong.evaluation.harness
    lm_eval.simple_evaluate(model="everlong", model_args={"pretrained": FOLDER}, tasks=["piqa"])

lm-eval's command line finds no models of other packages; `python -m everlong.lm_eval` is that command
line with this model. Scores are those of lm-eval's own model "hf", with two differences: what shares a
beginning is read once (`log_likelihoods`), and nothing is cut off. A prompt that is longer than the
model takes raises ValueError; a model without a limit reads a document whole, with its state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from .answers import Answers
from .likelihood import batches, log_likelihoods, pad_right, shared_prefixes
from .loading import load_subject
from .subject import Subject

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

NEW_TOKENS = 256  # lm-eval's own, where a task does not say how many
LM_EVALS_DEVICE = "cuda:0"  # where its command line is told of none
FEW = 8  # special tokens around a text, at most


@register_model("everlong")
class EverlongLM(TemplateLM):
    """A `Subject`, or a folder or hub id of a model, asked by lm-eval.

    answers: a file that keeps every answer as it comes; a run that broke off goes on from there.
    piece, tokens_per_forward: as of `Subject`. dtype: of the weights, "bfloat16" or another of torch's;
    "auto": as they are saved. device: "cpu", "cuda:1", ...; lm-eval's "cuda:0", which it says where
    nobody has, is taken where there is one. batch_size and max_batch_size, which lm-eval's command
    line always gives, are not used: tokens_per_forward decides how many rows are read side by side.
    """

    def __init__(
        self,
        pretrained: Subject | str,
        answers: str | Path | None = None,
        *,
        piece: int = 1024,
        tokens_per_forward: int = 32768,
        dtype: str | torch.dtype = "auto",
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(
                f"the model everlong does not know {', '.join(sorted(unknown))}: its model_args are "
                "pretrained, answers, piece, tokens_per_forward, dtype, device"
            )
        dtype = _dtype(dtype)
        if isinstance(pretrained, Subject):
            if dtype != "auto":
                raise ValueError(f"the Subject has its dtype already: leave dtype={dtype} out")
            self.subject = pretrained
        else:
            sizes = {"piece": piece, "tokens_per_forward": tokens_per_forward}
            self.subject = load_subject(pretrained, dtype, **sizes)
            _move(self.subject.model, device)
        self.tokenizer = self.subject.tokenizer
        self._device = self.subject.model.device
        mark = self.subject.info.fingerprint
        if dtype != "auto":  # other weights, other answers
            mark = f"{mark} {dtype}"
        self.answers = None if answers is None else Answers(answers, mark)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that follows nothing: <bos>, or <eos> where there is none."""
        token = self._prefix()
        if token is None:
            raise ValueError(
                "the tokenizer has neither <bos> nor <eos>: a text's first token needs one"
            )
        return token

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids. Special ones as the tokenizer adds them by itself, if it is not said otherwise;
        none to a text that begins with <bos> already."""
        prefix = self._prefix()
        if (
            add_special_tokens is None
            and prefix is not None
            and string.startswith(self._text([prefix]))
        ):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **given)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as the tokenizer's template writes it."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """For each (context, continuation) its log-likelihood, and whether greedy decoding gives it."""

        def ask(new: Sequence[Instance]) -> Iterator[tuple[int, list[Any]]]:
            pairs = [self.encode_pair(*request.args) for request in new]
            for i, score in log_likelihoods(self.subject, pairs):
                yield i, list(score)

        found = self._answer("loglikelihood", requests, ask, disable_tqdm)
        return [(score, is_greedy) for score, is_greedy in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each text. Where the model has a limit, in lm-eval's windows, which do
        not overlap in what they foretell."""

        def ask(new: Sequence[Instance]) -> Iterator[tuple[int, float]]:
            yield from _log_likelihoods_of_texts(
                self.subject, [self._windows(self.tok_encode(request.args[0])) for request in new]
            )

        return self._answer("loglikelihood_rolling", requests, ask, disable_tqdm)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations of contexts. Raises ValueError for a task that wants samples."""

        def ask(new: Sequence[Instance]) -> Iterator[tuple[int, str]]:
            wishes: dict[tuple[int, tuple[str, ...]], list[tuple[int, list[int]]]] = {}
            for i, request in enumerate(new):
                wish = self._wish(request)
                ids = self.tok_encode(request.args[0])
                wishes.setdefault(wish, []).append((i, ids))
            for (new_tokens, stop), asked in wishes.items():
                yield from _continuations(self.subject, asked, new_tokens, stop)

        return self._answer("generate_until", requests, ask, disable_tqdm)

    def check(self, requests: Sequence[Instance]) -> None:
        """Raise ValueError if one of them is longer than the model takes, or cannot be answered."""
        longest = self.subject.info.longest
        for request in requests:
            new_tokens = 0
            if request.request_type == "generate_until":
                new_tokens = self._wish(request)[0]
            # A token is a byte at least: most need not be counted.
            texts = [text for text in request.args if isinstance(text, str)]
            bytes_ = sum(len(text.encode()) for text in texts) + FEW
            is_whole = request.request_type == "loglikelihood_rolling"
            if longest is None or is_whole or bytes_ + new_tokens <= longest:
                continue
            if new_tokens:
                tokens = len(self.tok_encode(texts[0])) + new_tokens - 1
            else:
                context, end = self.encode_pair(*request.args)
                tokens = len(context) + len(end) - 1
            if tokens > longest:
                raise ValueError(
                    f"{request.task_name or 'a task'} has a question of {tokens:,} tokens, the model "
                    f"takes {longest:,} at most, and nothing is cut off: give fewer examples "
                    "(num_fewshot), or leave the task out"
                )

    def encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The tokens of a context and of what follows it. An empty context is <bos>."""
        if context:
            return self._encode_pair(context, continuation)
        ids = self.tok_encode(continuation, add_special_tokens=False)
        prefix = self.prefix_token_id
        return ([prefix], ids) if prefix != ids[0] else (ids[:1], ids[1:])

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        pairs = [(context, end) for _, context, end in requests]
        found = dict(log_likelihoods(self.subject, pairs))
        return [found[i] for i in range(len(pairs))]

    def _answer(
        self,
        kind: str,
        requests: Sequence[Instance],
        ask: Callable[[Sequence[Instance]], Iterable[tuple[int, Any]]],
        is_quiet: bool,
    ) -> list[Any]:
        """Answers to all requests: those that are known, and what `ask` yields for the others."""
        found: list[Any] = [None] * len(requests)
        if self.answers is not None:
            found = [self.answers.get(kind, request.args) for request in requests]
        places = [i for i, answer in enumerate(found) if answer is None]
        self.check([requests[place] for place in places])
        with tqdm(total=len(places), desc=f"{kind} requests", disable=is_quiet) as bar:
            for i, answer in ask([requests[place] for place in places]):
                found[places[i]] = answer
                asked = requests[places[i]].args
                if self.answers is not None:
                    self.answers.add(kind, asked, answer)
                self.cache_hook.add_partial(kind, asked, answer)
                bar.update()
        return found

    def _prefix(self) -> int | None:
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def _windows(self, tokens: list[int]) -> list[tuple[list[int], list[int]]]:
        """A text as contexts and continuations, which together are all of it."""
        if not tokens:
            return []
        longest = self.subject.info.longest
        if longest is None:
            return [([self.prefix_token_id], tokens)]
        windows = get_rolling_token_windows(tokens, self.prefix_token_id, longest, context_len=1)
        return [make_disjoint_window(window) for window in windows]

    def _wish(self, request: Instance) -> tuple[int, tuple[str, ...]]:
        """How many new tokens a request wants at most, and what ends its text."""
        wish = normalize_gen_kwargs(request.args[1], NEW_TOKENS)
        if wish.get("do_sample") or wish.get("num_beams", 1) != 1:
            raise ValueError(
                f"{request.task_name or 'a task'} wants other than greedy texts ({request.args[1]}): "
                "everlong continues greedily alone; lm-eval's own model hf can do it"
            )
        end = None if self.eot_token_id is None else self._text([self.eot_token_id])
        stop = handle_stop_sequences(list(wish["until"]), eos=end)
        return wish["max_gen_toks"], tuple(mark for mark in stop if mark)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)


def _dtype(name: str | torch.dtype) -> str | torch.dtype:
    """torch's type of that name, or "auto"."""
    if isinstance(name, torch.dtype) or name == "auto":
        return name
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(
            f"dtype must be auto or a floating-point type of torch, such as bfloat16, got {name!r}"
        )
    return dtype


def _move(model: Any, device: str | None) -> None:
    """To the device, if one is named that somebody has chosen."""
    if device is None or (device == LM_EVALS_DEVICE and not torch.cuda.is_available()):
        return
    try:
        model.to(device)
    except (AssertionError, RuntimeError) as error:  # torch compiled without it, none of that number
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device {device} cannot be used here ({reason}): name another one, or none"
        ) from error


def _log_likelihoods_of_texts(
    subject: Subject, texts: Sequence[list[tuple[list[int], list[int]]]]
) -> Iterator[tuple[int, float]]:
    """The sum over each text's windows, as they come: (index, nats). A row is read from nothing; pads
    to its right are not asked for."""
    windows = [(i, context, end) for i, each in enumerate(texts) for context, end in each]
    sums = [0.0] * len(texts)
    left = [len(each) for each in texts]
    yield from ((i, 0.0) for i, count in enumerate(left) if not count)

    def fits(count: int, longest: Any, row: Any) -> bool:
        return count <= subject.rows(len(longest[1]) + len(longest[2]))

    for batch in batches(windows, lambda window: len(window[1]) + len(window[2]), fits):
        losses, _ = subject.losses(pad_right([context + end for _, context, end in batch]))
        for row, (i, context, end) in zip(losses, batch, strict=True):
            first = len(context) - 1
            sums[i] -= float(row[first : first + len(end)].double().sum())
            left[i] -= 1
            if not left[i]:
                yield i, sums[i]


def _continuations(
    subject: Subject, asked: list[tuple[int, list[int]]], new_tokens: int, stop: Sequence[str]
) -> Iterator[tuple[int, str]]:
    """The greedy continuation of each of `asked`, (index, token ids), as they come."""
    places: dict[tuple[int, ...], list[int]] = {}
    for i, ids in asked:
        places.setdefault(tuple(ids), []).append(i)

    def fits(count: int, longest: tuple[int, ...], row: tuple[int, ...]) -> bool:
        # Equally long: their caches are gone on from.
        tokens = count * (len(longest) + new_tokens)
        return len(row) == len(longest) and tokens <= subject.tokens_per_forward

    for prefix, contexts in shared_prefixes(places):
        cache = subject.read(torch.tensor([prefix]), 1)[1] if prefix else None
        for batch in batches(contexts, len, fits):
            start = None if cache is None else subject.select(cache, [0] * len(batch))
            rows = torch.tensor([context[len(prefix) :] for context in batch])
            texts = subject.generate(rows, new_tokens, stop, start)
            for context, text in zip(batch, texts, strict=True):
                yield from ((i, text) for i in places[context])
