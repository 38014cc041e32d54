"""BABILong: stories of bAbI in long texts, for models that were trained on it and for any other.

Answers are generated and scored by both rules that are in use, each by its name:

official: of the answer's first sentence, the labels of the task that the question does not name; right
    if that is the wanted one alone (of a list, just its parts).
substring: right if the wanted answer stands anywhere in what was generated (lm-eval's rule).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from everlong.data import BabilongConfig
from everlong.data.babi_story import Story
from everlong.data.babilong import TASKS, BabilongDataset
from everlong.data.config import digest
from everlong.data.corpus import cache_home
from everlong.data.ruler import Coder
from everlong.hub import from_hub
from everlong.words import one_line

from .haystack import check_length, check_whole
from .loading import data_config
from .results import Metric, TaskInfo
from .subject import Subject
from .task import Record, Task, share_time

NAME, FAMILY = "babilong", "BABILong"
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
LABELS = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), PLACES),
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
    **dict.fromkeys(("qa6", "qa9"), ("no", "yes")),
    "qa7": ("none", "one", "two", "three"),
    "qa8": ("apple", "football", "milk", "nothing"),
    "qa10": ("maybe", "no", "yes"),
}
CHANCE = {**dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), 1 / 6), "qa6": 0.5, "qa9": 0.5}
TITLES = {
    "qa1": "one fact",
    "qa2": "two facts",
    "qa3": "three facts",
    "qa4": "relations of two",
    "qa5": "relations of three",
    "qa6": "yes or no",
    "qa7": "counting",
    "qa8": "lists",
    "qa9": "negation",
    "qa10": "indefinite knowledge",
}
EXAMPLE = "Mary moved to the hallway. Where is John?"
TRAINED_TOKENS = 12  # of an answer, at most, with the full stop behind it
HUB = "RMT-team/babilong-1k-samples"


@dataclass(frozen=True)
class Prompt:
    """What surrounds the text: tokens before it and behind it."""

    head: list[int]
    tail: list[int]


@dataclass(frozen=True)
class Asked:
    """A prompt [T] and what belongs to it. evidence: the facts that the answer rests on, if known."""

    prompt: np.ndarray
    question: str
    wanted: str
    depth: float | None
    evidence: str | None


class BabilongTask(Task):
    """One of BABILong's tasks.

    task: qa1 ... qa10. setting: "trained" ends the text with the question, as the recipes train it;
    "few-shot" has the instruction, the examples and the template of lm-eval's installed task file;
    "auto" is "trained" for a model that was trained on BABILong, else "few-shot".
    published: a folder or hub id with the published samples; None: stories are simulated, and hidden in
    held-out documents of `source`.
    """

    def __init__(
        self,
        task: str,
        seed: int = 0,
        source: str | None = None,
        setting: str = "auto",
        published: str | None = None,
    ) -> None:
        if setting not in ("auto", "trained", "few-shot"):
            raise ValueError(f"setting is auto, trained or few-shot, got {setting!r}")
        self.task, self.seed, self.source = task, seed, source
        self.setting, self.published = setting, published
        told = f"published samples of {published}" if published else "simulated stories"
        self.info = TaskInfo(
            name=f"{NAME}_{task}",
            title=f"BABILong {task}: {TITLES[task]}",
            about=f"The sentences of a story of bAbI stand, in order, among those of a long text; its "
            f"question stands at the end ({told}). The answer is generated.",
            metrics={
                "official": Metric("right by the official rule", chance=CHANCE.get(task)),
                "substring": Metric("wanted answer in what was generated (lm-eval's rule)"),
            },
            family=FAMILY,
            settings={"seed": seed, "source": source, "setting": setting, "published": published},
        )
        self.data: dict[str, Any] = {}

    def check(self, subject: Subject, length: int | None) -> None:
        """Refuse lengths that the model or the task cannot take, and tokenizers that lose words."""
        check_whole(subject, self.info.name)
        check_length(subject, length)
        coder = Coder(subject.tokenizer)
        for text in (EXAMPLE, *LABELS[self.task]):
            coder.check(coder.ids(f" {text}"), text)
        self.ask(subject, length or 0, 0)

    def count(self, subject: Subject, length: int | None, samples: int) -> int:
        """At most as many as are published."""
        if self.published is None:
            return samples
        return min(samples, len(_published(self.published, self.task, length or 0)))

    def fingerprint(self, subject: Subject, length: int | None, count: int) -> str:
        """Of the text and the stories, or the published samples, and of what stands around them."""
        around = f"{self.around(subject, '?')} {self.answer_limits(subject)}"
        if self.published is not None:
            rows = _published(self.published, self.task, length or 0)
            told = " ".join(digest(f"{rows[index]}".encode()) for index in range(count))
        else:
            config = self.dataset(subject).config
            told = f"{config} {config.fingerprint()}"
        return digest(f"{around} {told}".encode())

    def trained(self, subject: Subject) -> bool:
        """Whether the model is asked as it was trained."""
        if self.setting != "auto":
            return self.setting == "trained"
        return subject.recipe.get("data", {}).get("task") == NAME

    def run(
        self, subject: Subject, length: int | None, indices: Sequence[int], count: int
    ) -> Iterator[Record]:
        """Prompts of one length side by side."""
        rows = subject.rows(length or 1024)
        new_tokens, stop = self.answer_limits(subject)
        by_size: dict[int, list[tuple[int, Asked]]] = {}
        for index in indices:
            asked = self.ask(subject, length or 0, index)
            same = by_size.setdefault(len(asked.prompt), [])
            same.append((index, asked))
            if len(same) == rows:
                yield from self._answer(subject, by_size.pop(len(asked.prompt)), new_tokens, stop)
        for same in by_size.values():
            yield from self._answer(subject, same, new_tokens, stop)

    def _answer(
        self, subject: Subject, batch: list[tuple[int, Asked]], new_tokens: int, stop: Sequence[str]
    ) -> Iterator[Record]:
        with share_time(len(batch)) as time:
            prompts = torch.from_numpy(np.stack([asked.prompt for _, asked in batch]))
            answers = subject.generate(prompts, new_tokens, stop)
        for (index, asked), answer in zip(batch, answers, strict=True):
            official = official_score(self.task, asked.question, asked.wanted, answer)
            yield {
                "index": index,
                "scores": {
                    "official": float(official),
                    "substring": float(asked.wanted.lower() in answer.lower()),
                },
                "tokens": len(asked.prompt) + new_tokens,
                "seconds": time.each,
                "depth": asked.depth,
                "prompt": subject.decode(asked.prompt[-100:].tolist()),
                "evidence": asked.evidence,
                "wanted": asked.wanted,
                "answer": answer,
            }

    def answer_limits(self, subject: Subject) -> tuple[int, tuple[str, ...]]:
        """How many tokens are generated at most, and what ends an answer."""
        if self.trained(subject):
            return TRAINED_TOKENS, (".",)
        return int(_task_file(self.task)["generation_kwargs"]["max_gen_toks"]), ()

    def ask(self, subject: Subject, length: int, index: int) -> Asked:
        """The prompt of a sample: with what is generated it takes `length` tokens (0: the facts alone).

        Raises ValueError for a length that it does not fit into.
        """
        if self.published is not None:
            return self._ask_published(subject, length, index)
        data = self.dataset(subject)
        if length == 0:
            text, story, depth = data.context(index, 0)
            around = self.around(subject, story.question)
            return _asked(around, text, story, depth)
        reserve = self.answer_limits(subject)[0]
        # Questions differ in length: the text takes what this one leaves.
        story = data.context(index, 0)[1]
        for _ in range(10):
            around = self.around(subject, story.question)
            room = length - reserve - len(around.head) - len(around.tail)
            if room < 1:
                break
            text, story, depth = data.context(index, room)
            if self.around(subject, story.question) == around:
                return _asked(around, text, story, depth)
        raise ValueError(
            f"{length} tokens are too few for {self.info.name}: the instruction, the examples and the "
            f"question take {len(around.head) + len(around.tail) + reserve} of them; ask for more"
        )

    def _ask_published(self, subject: Subject, length: int, index: int) -> Asked:
        assert self.published is not None
        row = _published(self.published, self.task, length)[index]
        around = self.around(subject, row["question"])
        given = row["input"].strip()
        ids = subject.encode(given).tolist()
        if around.head:
            ids = Coder(subject.tokenizer).ids(f" {given}")
        prompt = _joined(around, np.array(ids))
        asked = Asked(prompt, row["question"], row["target"], None, None)
        limit = subject.info.longest
        if limit is not None and len(asked.prompt) + self.answer_limits(subject)[0] > limit:
            raise ValueError(
                f"sample {index} of {self.info.name} has {len(asked.prompt):,} tokens in the tokenizer "
                f"of {subject.info.path}, which takes {limit:,} at most: leave {length:,} out"
            )
        return asked

    def dataset(self, subject: Subject) -> BabilongDataset:
        """Stories of this task in held-out text, in the model's tokens; made once."""
        if subject.info.path not in self.data:
            fields = dict(subject.recipe.get("data", {}))
            if fields.get("task") != NAME:
                fields = {}
            fields |= {"tasks": [self.task]} | ({"source": self.source} if self.source else {})
            config = data_config(BabilongConfig, fields, subject.info.path).plain()
            self.data = {subject.info.path: config.held_out_data(subject.tokenizer, 1 << 30, self.seed)}
        return self.data[subject.info.path]

    def around(self, subject: Subject, question: str) -> Prompt:
        """What stands before the text and behind it."""
        coder = Coder(subject.tokenizer)  # for what stands within a text
        if self.trained(subject):
            return Prompt(coder.opening, coder.ids(f" {question}"))
        before, after = few_shot(self.task, question)
        return Prompt(coder.opening + subject.encode(before).tolist(), coder.ids(after))


def official_score(task: str, question: str, wanted: str, answer: str) -> bool:
    """Whether an answer is right by BABILong's own rule."""
    first = answer.lower().split(".")[0]
    for mark in ("<context>", "<example>"):  # its third, "Question", is looked for in small letters
        first = first.split(mark)[0]
    labels = {label.lower() for label in LABELS[task]}
    given = {label for label in labels if label in first and label not in question.lower()}
    target = wanted.lower()
    return given == (set(target.split(",")) if "," in target else {target})


def few_shot(task: str, question: str) -> tuple[str, str]:
    """What lm-eval puts before a text and behind it: instruction, examples, template, read from its
    installed task file. Raises ValueError where lm-eval is not installed."""
    import jinja2

    given = _task_file(task)
    template = jinja2.Template(given["doc_to_text"])
    delimiter = given.get("target_delimiter", " ")
    examples = given["fewshot_config"]["samples"][: given.get("num_fewshot", 0)]
    shown = "".join(f"{template.render(**each)}{delimiter}{each['target']}\n\n" for each in examples)
    mark = "\0"
    before, after = template.render(input=mark, question=question).split(mark)
    return f"{given['description']}{shown}{before}", after


@cache
def _task_file(task: str) -> dict[str, Any]:
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            "BABILong's few-shot prompts are those of lm-eval's task files: "
            "`pip install everlong[eval]`"
        )
    folder = Path(next(iter(found.submodule_search_locations)), "tasks", "babilong")
    values: dict[str, Any] = {}
    for name in (f"babilong_{task}.yaml", "_babilong_common_yaml"):
        text = (folder / name).read_text(encoding="utf-8")
        values = {**yaml.load(text, _Plain), **values}
    return values


class _Plain(yaml.SafeLoader):
    """YAML whose `!function` tags are names of functions that nobody calls."""


_Plain.add_constructor("!function", lambda loader, node: None)


@cache
def _published(where: str, task: str, length: int) -> Any:
    """The published samples of a task at a length of 1,024 tokens or a multiple, as rows."""
    import datasets

    name = f"{length // 1024}k" if length else "0k"
    if length % 1024:
        raise ValueError(f"the published samples have lengths of 1k, 2k and so on, not {length}")
    try:
        return from_hub(
            where,
            lambda: datasets.load_dataset(where, name=name, split=task, cache_dir=_rows_folder(where)),
            "dataset",
        )
    except Exception as error:  # no network, no such folder, no such configuration: many kinds
        raise ValueError(
            f"the samples of {task} at {name} cannot be read from {where} ({one_line(error)}): "
            f"where the hub is out of reach, download {HUB} elsewhere (`hf download {HUB} --repo-type "
            "dataset --local-dir FOLDER`), copy the folder here and give --babilong FOLDER"
        ) from error


def _rows_folder(where: str) -> str | None:
    """Where `datasets` keeps the rows of a folder: by its own choice it gives the old ones when a file
    of the folder has changed."""
    if not Path(where).is_dir():
        return None
    files = sorted(path for path in Path(where).rglob("*") if path.is_file())
    told = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return str(cache_home() / "datasets" / digest(repr(told).encode()))


def _asked(around: Prompt, text: np.ndarray, story: Story, depth: float) -> Asked:
    evidence = " ".join(story.facts[i] for i in sorted(story.supports))
    return Asked(_joined(around, text), story.question, story.answer, depth, evidence)


def _joined(around: Prompt, text: np.ndarray) -> np.ndarray:
    prompt = np.concatenate([np.array(around.head), text, np.array(around.tail)])
    return prompt.astype(np.int32)


def babilong_tasks(names: Sequence[str], **options: Any) -> list[BabilongTask]:
    """The tasks by name: babilong_qa1 ... babilong_qa10; babilong is qa1 ... qa5."""
    wanted = [
        each
        for name in names
        for each in (TASKS[:5] if name == NAME else [name.removeprefix(f"{NAME}_")])
    ]
    return [BabilongTask(task, **options) for task in dict.fromkeys(wanted)]
