"""Sentences hidden in a text, asked for at its end: models trained on such a task, asked as they were
trained.

One teacher-forced pass a sample: the model sees the true answer, and counts as right if the argmax
before each of its tokens is that token. This equals greedy decoding of the whole answer. As long as
greedy decoding is right it has fed the model just those tokens, so both see the same input; at its
first wrong token both miss the answer, and what follows no longer matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch

from everlong.data import HAYSTACKS, HaystackConfig, HaystackDataset
from everlong.data.config import digest
from everlong.data.haystack import IGNORE

from .loading import data_config
from .results import Cell, Estimate, Metric, TaskInfo
from .subject import Subject
from .task import AROUND, Record, Task, share_time

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TITLES = {
    "needle": "A pass key hidden in real text",
    "babi": "Stories of bAbI scattered in real text",
}
ABOUT = {
    "needle": "A sentence with a number stands somewhere in a text, in the words of the model's "
    "training; the question for it stands at the end. Right is the whole number.",
    "babi": "The sentences of a story of bAbI stand, in order, between the words of a text; its "
    "question stands at the end, as in the model's training. Right is the whole answer.",
}


class HaystackTask(Task):
    """Needles or stories in the words that a model was trained on, with held-out text, depths spread
    evenly; in default words for a model that was trained on something else.

    name: "needle" or "babi". source: another text, as for `load_text`. stories: the folder of bAbI's
    files. Models must read bytes.
    """

    fields = frozenset({"distance"})

    def __init__(
        self, name: str, seed: int = 0, source: str | None = None, stories: str | None = None
    ) -> None:
        self.seed, self.source, self.stories = seed, source, stories
        self.info = TaskInfo(
            name=name,
            title=TITLES[name],
            about=ABOUT[name],
            metrics={
                "exact": Metric("whole answers right"),
                "tokens": Metric("single tokens of the answers right, given those before"),
            },
            settings={"seed": seed, "source": source, "stories": stories},
        )
        self.data: dict[tuple[str, int], HaystackDataset] = {}

    def check(self, subject: Subject, length: int | None) -> None:
        """Refuse tokenizers whose tokens are not bytes, and lengths that are too short or too long."""
        if subject.tokenizer("é")["input_ids"] != list("é".encode()):
            raise ValueError(
                f"{subject.info.path} has a tokenizer whose ids are not bytes: {self.info.name} is "
                "scored on bytes (niah and babilong take any tokenizer)"
            )
        if not length:
            raise ValueError(f"{self.info.name} stands in a text: ask for lengths above 0")
        check_length(subject, length, "or read passages alone (--passages)")
        self.dataset(subject, 1).sample(0, length)

    def config(self, subject: Subject) -> HaystackConfig:
        """The task as the model was trained on it, with one question; or the default one."""
        fields = dict(subject.recipe.get("data", {}))
        if fields.get("task", "needle") != self.info.name:
            fields = {}
        if self.stories is not None and self.info.name == "babi":  # needles have none
            fields["folder"] = self.stories
        config = data_config(HAYSTACKS[self.info.name], fields, subject.info.path).plain()
        return replace(config, source=self.source or config.source)

    def dataset(self, subject: Subject, samples: int) -> HaystackDataset:
        """The held-out samples for a model; they are made once."""
        key = (subject.info.path, samples)
        if key not in self.data:
            self.data = {key: self.config(subject).datasets(samples, self.seed)[1]}
        return self.data[key]

    def fingerprint(self, subject: Subject, length: int | None, count: int) -> str:
        """Of the words, the text and the stories."""
        config = self.config(subject)
        return digest(f"{config} {config.fingerprint()}".encode())

    def run(
        self, subject: Subject, length: int | None, indices: Sequence[int], count: int
    ) -> Iterator[Record]:
        """Teacher-forced passes over samples of one length, side by side."""
        assert length is not None
        dataset = self.dataset(subject, count)
        reach = attention_reach(subject.model.config)
        rows = subject.rows(length)
        for start in range(0, len(indices), rows):
            part = indices[start : start + rows]
            with share_time(len(part)) as time:
                samples = [_slim(dataset.sample(i, length, (i + 0.5) / count)) for i in part]
                logits = _answers(subject, samples, dataset.config.longest_answer)
            for index, sample, row in zip(part, samples, logits, strict=True):
                record = _record(subject, sample, row)
                if reach is not None:
                    record["within_reach"] = sample["distance"] < reach
                yield {"index": index, **record, "seconds": time.each}

    def cell(
        self,
        subject: Subject,
        length: int | None,
        records: Sequence[Record],
        group: str | None = None,
    ) -> Cell:
        """As of any task, and what an attention with a reach found within it, and beyond."""
        cell = super().cell(subject, length, records, group)
        more: dict[str, Any] = {}
        for name, near in (("within_reach", True), ("beyond_reach", False)):
            found = [r["scores"]["exact"] for r in records if r.get("within_reach") is near]
            if found:
                more[name] = asdict(Estimate.of(found))
        distances = [record["distance"] for record in records]
        return replace(
            cell, more={**cell.more, **more, "mean_distance": sum(distances) / len(distances)}
        )


def check_length(subject: Subject, length: int | None, instead: str = "") -> None:
    """Refuse a length that the model does not take, naming the longest."""
    limit = subject.info.longest
    if limit is not None and length is not None and length > limit and not subject.passages:
        raise ValueError(
            f"{subject.info.path} takes {limit:,} tokens at most, asked are {length:,}: leave longer "
            f"lengths out{', ' if instead else ''}{instead}"
        )


def check_whole(subject: Subject, task: str) -> None:
    """Refuse passages for a task that would read the whole text all the same."""
    if subject.passages:
        raise ValueError(
            f"{task} reads whole texts, not the {subject.passages} passages that fit best: leave "
            "--passages off, or ask for needle, babi or niah"
        )


def attention_reach(config: PretrainedConfig) -> int | None:
    """Tokens that a model can look back at most: layers x window if every layer has a window.

    None if a layer remembers or attends without such a limit.
    """
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ["sliding_attention"])  # Mistral names none
    if not window or kinds != {"sliding_attention"}:
        return None
    return config.num_hidden_layers * window


def _slim(sample: dict[str, Any]) -> dict[str, Any]:
    """A sample in less memory: a text of a million tokens is held several times over."""
    labels = sample["labels"]
    answer = int((labels != IGNORE).sum())
    return {
        **sample,
        "input_ids": sample["input_ids"].to(torch.int32),
        "labels": labels[len(labels) - answer :].clone(),
    }


def _answers(subject: Subject, samples: list[dict[str, Any]], longest: int) -> torch.Tensor:
    """The logits [B, longest + 1, vocabulary] of the last tokens, from the one before them on."""
    ids = [sample["input_ids"] for sample in samples]
    if not subject.passages:
        return subject.read(torch.stack(ids), longest + 1)[0]
    logits = []
    for row, sample in zip(ids, samples, strict=True):
        answer = len(sample["labels"])
        short = torch.cat([subject.shorten(row[:-answer]), row[-answer:]])
        logits.append(subject.read(short[None], longest + 1)[0])
    return torch.cat(logits)


def _record(subject: Subject, sample: dict[str, Any], logits: torch.Tensor) -> Record:
    wanted, ids = sample["labels"], sample["input_ids"]
    given = logits[-len(wanted) - 1 : -1].argmax(-1).cpu()
    place = len(ids) - len(wanted) - sample["distance"]
    around = ids[max(place - AROUND, 0) : place + len(wanted) + AROUND]
    return {
        "scores": {
            "exact": float(torch.equal(given, wanted)),
            "tokens": float((given == wanted).float().mean()),
        },
        "tokens": len(ids),
        "depth": sample["depth"],
        "distance": sample["distance"],
        "prompt": subject.decode(ids[-len(wanted) - 300 : -len(wanted)]),
        "evidence": f"… {subject.decode(around).strip()} …",
        "wanted": subject.decode(wanted),
        "answer": subject.decode(given),
    }
