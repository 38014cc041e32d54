"""The run of an evaluation: checked before any work, in batches, resumable, over several processes."""

from __future__ import annotations

import datetime
import fnmatch
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from everlong.data.config import LONGEST, MOST_SAMPLES, digest
from everlong.files import check_output, hold
from everlong.pictures import short_name
from everlong.words import file_name, parse_size, plain

from .loading import load_outline, load_subject, name_apart
from .results import FORMAT, Cell, Results, is_results
from .store import Samples, is_samples
from .subject import Subject
from .task import Record, Task

if TYPE_CHECKING:
    from accelerate import PartialState

T = TypeVar("T")

RESULTS_FILE, SAMPLES_FOLDER = "results.json", "samples"
LENGTHS = "lengths are token numbers such as 512,1k,1m"
SAMPLES = "samples are a number, or numbers up to lengths such as 16k:100,128k:20"
SHOWN = 5  # samples of each cell that a report shows


@dataclass(frozen=True)
class SampleCounts:
    """How many samples at which length: "100", or "16k:100,128k:20,1m:5", so many up to each."""

    upto: tuple[tuple[int | None, int], ...]

    @classmethod
    def parse(cls, text: str) -> SampleCounts:
        """Raises ValueError for another form."""
        parts = []
        for part in text.split(","):
            length, colon, number = part.strip().rpartition(":")
            count = parse_size(number, SAMPLES if number == text else f"{SAMPLES}, in {text!r}")
            if not 1 <= count <= MOST_SAMPLES or bool(colon) != bool(length):
                raise ValueError(f"{SAMPLES}, 1 ... {MOST_SAMPLES:,} each, got {text!r}")
            parts.append((parse_length(length) if colon else None, count))
        ends = [end for end, _ in parts if end is not None]
        if ends != sorted(set(ends)) or any(end is None for end, _ in parts[:-1]):
            raise ValueError(
                "samples up to lengths must name ever longer ones, one without a length last, "
                f"got {text!r}"
            )
        return cls(tuple(parts))

    def at(self, length: int | None) -> int:
        """For a length; beyond the last one that is named, what was said for that."""
        for end, number in self.upto:
            if end is None or (length is not None and length <= end):
                return number
        return self.upto[-1][1] if length is not None else self.upto[0][1]


def parse_length(text: str) -> int:
    """Tokens: 512, 1k = 1,024, 2m = 2 x 1,024 x 1,024; 0k is 0, a text without noise.

    Raises ValueError for another form.
    """
    length = parse_size(text, LENGTHS)
    if length > LONGEST:
        raise ValueError(f"{LENGTHS}, {length_name(LONGEST)} at most, got {text!r}")
    return length


@dataclass
class _Job:
    """A model's samples of a task at a length."""

    task: Task
    length: int | None
    count: int

    def store(self, subject: Subject, folder: Path, rank: int) -> Samples:
        """Where its samples are kept: by all that they depend on."""
        key = [FORMAT, subject.info.fingerprint, subject.passages, self.task.info.settings]
        key += [self.length, self.count, self.task.fingerprint(subject, self.length, self.count)]
        hashed = digest(json.dumps(key, sort_keys=True).encode())[:10]
        length = "" if self.length is None else f"-{self.length}"
        # Not the label, which depends on the other models.
        path = Path(subject.info.path)
        model = file_name(path.resolve().name if path.is_dir() else str(path)) or "_"
        name = f"{self.task.info.name}{length}-{hashed}"
        return Samples(folder / model, name, rank, count=self.count, fault=self.task.fault)

    def cost(self, subject: Subject, samples: int) -> int:
        """Tokens of so many samples, about."""
        return samples * max(self.task.cost(subject, self.length), 1)


def evaluate(
    models: Sequence[str | Path],
    tasks: Sequence[Task],
    lengths: Sequence[int] | Mapping[str, Sequence[int]],
    samples: SampleCounts | int | Mapping[str, SampleCounts] = 100,
    out: str | Path = "runs/scores",
    *,
    settings: dict[str, Any] | None = None,
    console: Console | None = None,
    on_results: Callable[[Results], None] = lambda results: None,
    **options: Any,
) -> tuple[Results, dict[tuple[str, str], list[Record]]]:
    """Ask models tasks at lengths, and return what came of it and a few samples of each task and model.

    Everything is checked before any work. Samples are kept in `out`/samples as they are scored: what is
    there of the same model (weights and all), task and length is not asked again. With several
    processes (`torchrun`, `accelerate launch`) each asks its share, and the main one writes.
    lengths: tokens; samples: how many; for all models, or for each its own. settings: kept in the
    results. options: fields of `Subject`. on_results: told of what is there after each model and task
    at a length.
    Raises ValueError for whatever a model or task cannot take, all of it in one message.
    """
    if isinstance(samples, int):
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        samples = SampleCounts(((None, samples),))
    models = list(dict.fromkeys(models))
    state = processes()
    out = Path(out)
    outlines = [load_outline(model, **options) for model in models]
    for outline, info in zip(outlines, name_apart([o.info for o in outlines]), strict=True):
        outline.info = info
    plan = [
        _jobs(outline, tasks, _own(model, lengths), _own(model, samples))
        for model, outline in zip(models, outlines, strict=True)
    ]
    console = console or Console(stderr=True)
    cells: list[Cell] = []
    shown: dict[tuple[str, str], list[Record]] = {}
    results = Results([task.info for task in tasks], [o.info for o in outlines], cells, settings or {})
    total = sum(job.cost(o, job.count) for o, jobs in zip(outlines, plan, strict=True) for job in jobs)
    with _Bar(console, total, shown=state.is_main_process) as bar:
        for model, outline, jobs in zip(models, outlines, plan, strict=True):
            subject: Subject | None = None
            for job in jobs:
                store = job.store(outline, out / SAMPLES_FOLDER, state.process_index)
                known = store.load()
                state.wait_for_everyone()  # all divide the same samples: none has added to them yet
                missing = [index for index in range(job.count) if index not in known]
                bar.done(job.cost(outline, job.count - len(missing)))
                if missing and subject is None:
                    subject = replace(load_subject(model, **options), info=outline.info)
                    subject.on_tokens = bar.advance
                mine = missing[state.process_index :: state.num_processes]
                bar.begin(
                    f"{short_name(outline.info.name)} · {_name(job)}", job.cost(outline, len(mine))
                )
                if mine:
                    assert subject is not None
                    for record in job.task.run(subject, job.length, mine, job.count):
                        store.append({**record, "peak_mib": _peak_memory()})
                state.wait_for_everyone()
                if not state.is_main_process:
                    continue
                bar.end(job.cost(outline, len(missing) - len(mine)))
                found = list(store.load().values())
                cells += job.task.cells(outline, job.length, found)
                shown.setdefault((job.task.info.name, outline.info.name), []).extend(found[:SHOWN])
                on_results(results)
    return results, shown


@contextmanager
def evaluation_folder(
    out: Path, *, overwrite: bool = False, beside: Sequence[str] = ()
) -> Iterator[None]:
    """Keep a folder for one evaluation at a time, which goes on with an earlier one's samples.

    overwrite: delete those first. beside: patterns of what else may be in it. Raises ValueError
    where another evaluation holds it, or it holds something else: an evaluation has our results, or,
    as long as there are none, our samples and nothing else.
    """

    def known(names: set[str]) -> bool:
        try:
            if RESULTS_FILE in names:
                return is_results(out / RESULTS_FILE)
        except ValueError as error:
            if overwrite:
                return True
            raise ValueError(
                f"{error}: delete it, and what is scored already is not asked again, or begin anew "
                "with --overwrite"
            ) from error
        others = names.difference(*(fnmatch.filter(names, pattern) for pattern in beside))
        files = [path for path in (out / SAMPLES_FOLDER).rglob("*") if not path.is_dir()]
        return others <= {SAMPLES_FOLDER} and all(map(is_samples, files))

    with hold(out):
        check_output(out, "evaluation", known, overwrite=True)
        if overwrite:
            for path in filter(is_samples, [*(out / SAMPLES_FOLDER).glob("*/*.jsonl")]):
                path.unlink()
            (out / RESULTS_FILE).unlink(missing_ok=True)
        yield


def processes() -> PartialState:
    """The processes of this run: those that `torchrun` or `accelerate launch` started, or this one."""
    import torch
    from accelerate import PartialState

    # One sample of a million tokens may take longer than processes wait for each other by default.
    patience = datetime.timedelta(days=7)
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=patience)


def _own(model: str | Path, values: T | Mapping[str, T]) -> T:
    """What is for all models, or this one's."""
    return values[str(model)] if isinstance(values, Mapping) else values


def _jobs(
    outline: Subject, tasks: Sequence[Task], lengths: Sequence[int], counts: SampleCounts
) -> list[_Job]:
    """What a model is asked, the short lengths first. Raises ValueError with all that it cannot be."""
    jobs, wrong = [], []
    for length in [None, *sorted(set(lengths))]:
        for task in tasks:
            if (length is None) == task.has_lengths:
                continue
            try:
                task.check(outline, length)
                jobs.append(_Job(task, length, task.count(outline, length, counts.at(length))))
            except ValueError as error:
                wrong.append(str(error))
    if wrong:
        raise ValueError("; ".join(dict.fromkeys(wrong)))
    return jobs


def length_name(length: int) -> str:
    """512 -> "512", 2048 -> "2K", 1048576 -> "1M", 10000000 -> "10,000,000"; 0 -> "0K"."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if length >= unit and length % unit == 0:
            return f"{length // unit}{name}"
    return "0K" if length == 0 else f"{length:,}"


def _peak_memory() -> float | None:
    """The most memory that this process has held so far, in MiB; on an accelerator, that of tensors."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / (1 << 20)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1 << 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / (1 << 20)


def _name(job: _Job) -> str:
    return job.task.info.name + ("" if job.length is None else f" at {length_name(job.length)}")


class _Bar:
    """One bar for all the work, in tokens, with the time that is left."""

    def __init__(self, console: Console, total: int, *, shown: bool) -> None:
        self.bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            disable=not shown,
        )
        self.task = self.bar.add_task("starting", total=max(total, 1))
        self.left = 0

    def __enter__(self) -> _Bar:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def done(self, tokens: int) -> None:
        """So many were there already."""
        self.bar.advance(self.task, tokens)

    def begin(self, description: str, tokens: int) -> None:
        """A part of the work, of about so many tokens."""
        self.bar.update(self.task, description=plain(description))
        self.left = tokens

    def advance(self, tokens: int) -> None:
        """Tokens were read; no more of them count than the part was said to have."""
        counted = min(tokens, self.left)
        self.left -= counted
        self.bar.advance(self.task, counted)

    def end(self, tokens: int) -> None:
        """The part is done, and so many by other processes."""
        self.bar.advance(self.task, self.left + tokens)
        self.left = 0
