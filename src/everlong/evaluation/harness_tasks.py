"""lm-eval's tasks as tasks of `everlong eval`.

A task's prompts, its scores for a document and how these are put together are lm-eval's own. Here:
documents that are asked one by one, rows from local files, intervals, and the groups that the papers
report. Which documents: the first ones of the split that lm-eval scores, of a group of tasks the first
ones of each; index i is the same document however many are wanted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from everlong.data.config import digest

from .harness_load import load_tasks, set_fewshot
from .haystack import check_whole
from .results import Cell, Estimate, Metric, TaskInfo
from .subject import Subject
from .task import Record, Task, share_time

COMMONSENSE = (
    "wikitext",
    "lambada_openai",
    "piqa",
    "hellaswag",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "social_iqa",
    "boolq",
)
"""The tasks of Titans' Table 1, in its order: language modelling, then common sense."""

TITLES = {
    "wikitext": "WikiText-2: perplexity of a word",
    "lambada_openai": "LAMBADA: the last word of a passage",
    "piqa": "PIQA: which way works",
    "hellaswag": "HellaSwag: how it goes on",
    "winogrande": "WinoGrande: whom a sentence means",
    "arc_easy": "ARC-Easy: science questions for school",
    "arc_challenge": "ARC-Challenge: harder science questions",
    "social_iqa": "Social IQa: why people do what they do",
    "boolq": "BoolQ: yes or no, by a paragraph",
    "openbookqa": "OpenBookQA: elementary science",
    "commonsense_qa": "CommonsenseQA: what goes with what",
    "sciq": "SciQ: science questions",
    "mmlu": "MMLU: questions from 57 subjects",
}
MAIN = {"hellaswag": "acc_norm", "arc_challenge": "acc_norm"}  # what Titans' Table 1 reports
METRIC_TITLES = {
    "acc": "right answers",
    "acc_norm": "right answers, by likelihood a character",
    "exact_match": "answers given word for word",
    "perplexity": "perplexity of the answer",
    "word_perplexity": "perplexity of a word",
    "byte_perplexity": "perplexity of a byte",
    "bits_per_byte": "bits a byte",
}
SHARES = ("acc", "exact_match", "em", "f1", "contains", "likelihood")
MMLU_PARTS = {
    "stem": "STEM",
    "humanities": "Humanities",
    "social_sciences": "Social Sciences",
    "other": "Others",
}
MMLU_NAMES = {
    "high_school_": "High School",
    "college_": "College",
    "professional_": "Professional",
    "": "General Knowledge",
}
FEWSHOT_SEED = 1234  # lm-eval's own
CHUNK = 256  # documents asked at a time
SHOWN = 1000  # last letters of a prompt that a record keeps


def harness_tasks(
    names: Sequence[str],
    *,
    data_dir: str | Path | None = None,
    num_fewshot: int | None = None,
    answers: str | Path | None = None,
) -> list[HarnessTask]:
    """Tasks of lm-eval by its names; "commonsense" stands for those of `COMMONSENSE`.

    A group that lm-eval gives one score, such as mmlu, is one task; of any other group and of a tag
    each member is one. data_dir: a folder of data sets (see `harness_data`), looked at before the hub.
    num_fewshot: examples before each question, default lm-eval's. answers: a file that keeps the
    model's answers as they come.
    Raises ValueError for a name that lm-eval does not know, and for data that cannot be had.
    """
    tasks: list[HarnessTask] = []
    for name in names:
        for each in COMMONSENSE if name == "commonsense" else (name,):
            family = "Common sense" if each in COMMONSENSE else None
            for leaves, group in load_tasks(each, data_dir):
                tasks.append(HarnessTask(leaves, group, family, num_fewshot, answers))
    return tasks


@dataclass
class Leaf:
    """A task of lm-eval's, and the requests of its first documents."""

    name: str
    task: Any
    requests: list[list[Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        # Prepared once: `eval_docs` prepares all of them whenever it is read.
        self.docs = getattr(self.task, "task_docs", None) or self.task.eval_docs

    @property
    def documents(self) -> int:
        """In the split that is scored."""
        return len(self.docs)

    def prepare(self, count: int) -> None:
        """Write the prompts of the first `count` documents.

        Always from the first one on: lm-eval draws the examples before a question from one stream of
        random numbers, document by document.
        """
        if count <= len(self.requests):
            return
        task = self.task
        task.set_fewshot_seed(FEWSHOT_SEED)
        self.requests = []
        for number in range(count):
            doc = self.docs[number]
            context = task.fewshot_context(
                doc, num_fewshot=task.config.num_fewshot, gen_prefix=task.doc_to_prefix(doc)
            )
            made = task.construct_requests(
                doc=doc, ctx=context, metadata=(task.config.task, number, task.config.repeats)
            )
            self.requests.append(made if isinstance(made, list) else [made])


class HarnessTask(Task):
    """A task of lm-eval, or a group of them that has one score.

    Cells: of all documents; of a group also each of its tasks, and for MMLU the eight rows of LM2's
    Table 2. STEM, Humanities, Social Sciences and Others are lm-eval's own parts of the 57 subjects.
    For High School, College, Professional and General Knowledge the paper does not say which subjects
    it means: here a subject belongs where its name says so (high_school_..., college_...,
    professional_...), and to General Knowledge if it says none of these. The paper's average is the
    mean of its eight rows; it is in the first cell's `more`, whose metrics count each question once.
    """

    fields = frozenset({"task", "values"})

    def __init__(
        self,
        leaves: dict[str, Any],
        group: Any | None = None,
        family: str | None = None,
        num_fewshot: int | None = None,
        answers: str | Path | None = None,
    ) -> None:
        self.leaves = [Leaf(name, task) for name, task in leaves.items()]
        self.group = group
        self.answers = answers
        for leaf in self.leaves:
            _check_kind(leaf)
            set_fewshot(leaf.task, num_fewshot)
        self.info = self._info(family)

    def check(self, subject: Subject, length: int | None) -> None:
        """Refuse passages; whether the model can be asked each document `count` sees."""
        check_whole(subject, self.info.name)

    def count(self, subject: Subject, length: int | None, samples: int) -> int:
        """The first `samples` documents of each of lm-eval's tasks.

        Raises ValueError if the model cannot be asked one of them: it is too long, or wants samples.
        """
        self._check_documents(subject, samples)
        return sum(min(samples, leaf.documents) for leaf in self.leaves)

    def fingerprint(self, subject: Subject, length: int | None, count: int) -> str:
        """Of the documents and their prompts."""
        told = []
        places = self._places(count)
        for number, leaf in enumerate(self.leaves):
            leaf.prepare(sum(1 for each, _ in places if each == number))
        for number, document in places:
            asked = self.leaves[number].requests[document]
            told.append(f"{asked[0].doc!r} {asked[0].args!r}")
        return digest("\0".join(told).encode())

    def cost(self, subject: Subject, length: int | None) -> int:
        """Tokens of a document, by the first few."""
        from .harness import EverlongLM

        lm = EverlongLM(subject)
        counts = []
        for leaf in self.leaves[:: max(1, len(self.leaves) // 8)]:
            leaf.prepare(min(4, leaf.documents))
            counts += [_tokens(lm, requests) for requests in leaf.requests[:4]]
        return max(1, sum(counts) // len(counts))

    def run(
        self, subject: Subject, length: int | None, indices: Sequence[int], count: int
    ) -> Iterator[Record]:
        """Ask and score these documents."""
        from .harness import EverlongLM

        lm = EverlongLM(subject, self.answers)
        places = self._places(count)
        wanted: dict[int, list[tuple[int, int]]] = {}
        for index in indices:
            leaf, document = places[index]
            wanted.setdefault(leaf, []).append((document, index))
        for number, documents in sorted(wanted.items()):
            self.leaves[number].prepare(sum(1 for leaf, _ in places if leaf == number))
            for start in range(0, len(documents), CHUNK):
                chunk = sorted(documents)[start : start + CHUNK]
                yield from self._ask(lm, self.leaves[number], chunk)

    def cells(self, subject: Subject, length: int | None, records: Sequence[Record]) -> list[Cell]:
        """All documents, the rows of MMLU, and each task of a group."""
        whole = self.cell(subject, length, records)
        cells = [whole]
        for name, members in self._groups().items():
            mine = [record for record in records if record["task"] in members]
            if mine:
                cells.append(self.cell(subject, length, mine, name))
        rows = [cell for cell in cells[1:] if cell.group in _mmlu_rows()]
        if rows:
            mean = sum(cell.main.value for cell in rows) / len(rows)
            whole.more["mean of LM2's eight rows"] = mean
        return cells

    def cell(
        self,
        subject: Subject,
        length: int | None,
        records: Sequence[Record],
        group: str | None = None,
    ) -> Cell:
        """One cell of these documents, put together as lm-eval does it."""
        metrics = {name: self._estimate(name, records) for name in self.info.metrics}
        return replace(super().cell(subject, length, records, group), metrics=metrics)

    def _check_documents(self, subject: Subject, samples: int) -> None:
        from .harness import EverlongLM

        lm = EverlongLM(subject)
        for leaf in self.leaves:
            leaf.prepare(min(samples, leaf.documents))
            for requests in leaf.requests[:samples]:
                lm.check(requests)

    def _places(self, count: int) -> list[tuple[int, int]]:
        """(task, document) of each index: the first document of each task, then the second ones."""
        sizes = [leaf.documents for leaf in self.leaves]
        places: list[tuple[int, int]] = []
        document = 0
        while len(places) < count:
            places += [(leaf, document) for leaf, size in enumerate(sizes) if document < size]
            document += 1
        return places[:count]

    def _ask(self, lm: Any, leaf: Leaf, documents: Sequence[tuple[int, int]]) -> Iterator[Record]:
        """The records of some (document, index) of one task."""
        task = leaf.task
        asked = [leaf.requests[document] for document, _ in documents]
        flat = [request for requests in asked for request in requests]
        for request in flat:
            request.resps, request.filtered_resps = [], {}
        kinds = dict.fromkeys(request.request_type for request in flat)
        with share_time(len(documents)) as time:
            for kind in kinds:
                mine = [request for request in flat if request.request_type == kind]
                answers = getattr(lm, kind)(mine, disable_tqdm=True)
                for request, answer in zip(mine, answers, strict=True):
                    request.resps += [answer] * (request.repeats or 1)
        task._instances = flat
        task.apply_filters()
        for (_, index), requests in zip(documents, asked, strict=True):
            yield {**self._record(lm, leaf, index, requests), "seconds": time.each}

    def _record(self, lm: Any, leaf: Leaf, index: int, requests: list[Any]) -> Record:
        """The record of one document, whose requests are answered."""
        task, doc = leaf.task, requests[0].doc
        values = {}
        for name in requests[0].filtered_resps:
            answers = [request.filtered_resps[name] for request in requests]
            for metric, value in task.process_results(doc, answers).items():
                values[_metric_name(metric, name)] = _plain(value)
        scores = {}
        for name in self.info.metrics:
            if name in values:
                scores[name] = float(_aggregation(task, name)([_back(values[name])]))
        answer, wanted = _told(task, requests)
        return {
            "index": index,
            "task": leaf.name,
            "scores": scores,
            "values": values,
            "tokens": _tokens(lm, requests),
            "prompt": str(requests[0].args[0])[-SHOWN:],
            "answer": answer,
            "wanted": wanted,
            "responses": [_plain(request.resps[0]) for request in requests],
        }

    def _estimate(self, name: str, records: Sequence[Record]) -> Estimate:
        """A metric of some documents: lm-eval's value, with our interval."""
        mine = [record for record in records if name in record["values"]]
        values = [_back(record["values"][name]) for record in mine]
        if not values:
            return Estimate.of([])
        aggregation = _aggregation(self.leaves[0].task, name)
        estimate = _with_interval(aggregation, values)
        if self._counts_tasks_alike(name):
            tasks: dict[str, list[Any]] = {}
            for record in mine:
                tasks.setdefault(record["task"], []).append(_back(record["values"][name]))
            value = sum(aggregation(each) for each in tasks.values()) / len(tasks)
            shift = value - estimate.value
            estimate = Estimate(value, estimate.low + shift, estimate.high + shift, estimate.samples)
        return estimate

    def _counts_tasks_alike(self, name: str) -> bool:
        """Whether lm-eval's score of the group is the mean of its tasks', whatever their sizes."""
        wishes = [] if self.group is None else self.group.aggregate_metric_list or []
        return any(wish.metric == name.split(",")[0] and not wish.weight_by_size for wish in wishes)

    def _groups(self) -> dict[str, set[str]]:
        """The tasks of each row besides that of all of them."""
        if self.group is None:
            return {}
        rows: dict[str, set[str]] = {}
        if self.group.name == "mmlu":
            rows |= {name: set() for name in _mmlu_rows()}
            for part in self.group.get_all_groups():
                name = MMLU_PARTS[part.name.removeprefix("mmlu_")]
                rows[name] = {task.task_name for task in part.get_all_tasks()}
            for leaf in self.leaves:
                subject = leaf.name.removeprefix("mmlu_")
                start = next(start for start in MMLU_NAMES if subject.startswith(start))
                rows[MMLU_NAMES[start]].add(leaf.name)
        prefix = f"{self.group.name}_"
        return rows | {leaf.name.removeprefix(prefix): {leaf.name} for leaf in self.leaves}

    def _info(self, family: str | None) -> TaskInfo:
        name = self.leaves[0].name if self.group is None else self.group.name
        task = self.leaves[0].task
        splits = sorted({_split(leaf.task) for leaf in self.leaves})
        shots = sorted({leaf.task.config.num_fewshot for leaf in self.leaves})
        about = (
            f"{sum(leaf.documents for leaf in self.leaves):,} documents ({', '.join(splits)} split), "
            f"{' or '.join(map(str, shots))} examples before each; prompts and scores are those of "
            f"lm-eval's {name}."
        )
        return TaskInfo(
            name=name,
            title=TITLES.get(name, f"{name} of lm-eval"),
            about=about,
            metrics=self._metrics(name, task),
            axis=None,
            family=family,
            settings={
                "lm_eval": _lm_eval_version(),
                "num_fewshot": shots[0] if len(shots) == 1 else shots,
                "split": splits[0] if len(splits) == 1 else splits,
                "data": sorted({str(getattr(leaf.task, "source", "hub")) for leaf in self.leaves}),
            },
        )

    def _metrics(self, name: str, task: Any) -> dict[str, Metric]:
        """lm-eval's metrics of a task, the main one first."""
        filters = [ensemble.name for ensemble in task._filters]
        wanted = list(task.aggregation())
        if self.group is not None:
            wanted = [wish.metric for wish in self.group.aggregate_metric_list]
        if name in MAIN:
            wanted.sort(key=lambda metric: metric != MAIN[name])
        better = task.higher_is_better()
        choices = _choices(task, self.leaves[0].docs)
        found = {}
        for metric in wanted:
            is_share = metric.startswith(SHARES)
            for each in filters:
                found[_metric_name(metric, each)] = Metric(
                    METRIC_TITLES.get(metric, metric),
                    is_share=is_share,
                    higher_is_better=bool(better.get(metric, True)),
                    chance=1 / choices if choices and metric.startswith("acc") else None,
                )
        return found


def _check_kind(leaf: Leaf) -> None:
    """Raise ValueError for a task that is more than text."""
    if getattr(leaf.task, "UNSAFE_CODE", False):
        raise ValueError(
            f"{leaf.name} runs programs that the model wrote, which everlong does not: use lm-eval's "
            "command line (python -m everlong.lm_eval) with --confirm_run_unsafe_code"
        )
    if getattr(leaf.task, "MULTIMODAL", False):
        raise ValueError(f"{leaf.name} shows pictures or plays sounds: leave it out")


def _lm_eval_version() -> str:
    import importlib.metadata

    return importlib.metadata.version("lm-eval")


def _split(task: Any) -> str:
    return task.config.test_split or task.config.validation_split or "test"


def _choices(task: Any, docs: Any) -> int | None:
    """Of how many answers each question has one, where nearly all of the first ones agree on it."""
    if task.config.output_type != "multiple_choice":
        return None
    counts = [len(task.doc_to_choice(docs[i])) for i in range(min(20, len(docs)))]
    usual = max(set(counts), key=counts.count)
    return usual if counts.count(usual) >= 0.9 * len(counts) else None


def _told(task: Any, requests: Sequence[Any]) -> tuple[Any, Any]:
    """The answer of a document and what was wanted, as its reader is told."""
    doc, wanted = requests[0].doc, task.doc_to_target(requests[0].doc)
    answers = [_plain(request.resps[0]) for request in requests]
    if task.config.output_type != "multiple_choice":
        return answers[0] if len(answers) == 1 else answers, _plain(wanted)
    choices = task.doc_to_choice(doc)
    if task.multiple_input:
        wanted = task.doc_to_text(doc)
    likeliest = max(range(len(choices)), key=lambda i: answers[i][0])
    return choices[likeliest], choices[wanted] if isinstance(wanted, int) else _plain(wanted)


def _tokens(lm: Any, requests: Sequence[Any]) -> int:
    """Tokens of a document: of each context once, and of each text that is to follow."""
    texts = [*{request.args[0] for request in requests}]
    texts += [end for request in requests for end in request.args[1:] if isinstance(end, str)]
    return sum(len(lm.tok_encode(text)) for text in texts if text)


def _metric_name(metric: str, name: str) -> str:
    return metric if name == "none" else f"{metric},{name}"


def _aggregation(task: Any, name: str) -> Callable[[list[Any]], float]:
    """lm-eval's way from the documents' values of a metric to one number."""
    from lm_eval.api.metrics import mean

    return task.aggregation().get(name.split(",")[0], mean)


def _plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return value.item() if hasattr(value, "item") else value


def _back(value: Any) -> Any:
    """lm-eval takes pairs as tuples."""
    return tuple(value) if isinstance(value, list) else value


def _with_interval(aggregation: Callable[[list[Any]], float], values: list[Any]) -> Estimate:
    """lm-eval's number with a 95% interval: of a mean its own, of a perplexity that of the mean
    log-likelihood; of other numbers none (NaN)."""
    from lm_eval.api import metrics

    value = float(aggregation(values))
    if aggregation is metrics.mean:
        return Estimate.of([float(each) for each in values])
    pairs = None
    if aggregation is metrics.perplexity:
        pairs = [(each, 1) for each in values]
    elif aggregation in (metrics.weighted_perplexity, metrics.bits_per_byte):
        pairs = values
    if pairs is None:
        return Estimate(value, math.nan, math.nan, len(values))
    losses = Estimate.of([-nats / size for nats, size in pairs], [size for _, size in pairs])
    if aggregation is metrics.bits_per_byte:
        return Estimate(value, losses.low / math.log(2), losses.high / math.log(2), len(values))
    return Estimate(value, math.exp(losses.low), math.exp(losses.high), len(values))


def _mmlu_rows() -> list[str]:
    """The rows of LM2's Table 2, in its order."""
    return [*MMLU_PARTS.values(), *MMLU_NAMES.values()]
