"""The tasks of `everlong eval`, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from everlong.data.babilong import TASKS as BABI_TASKS

from .babilong import FAMILY, babilong_tasks
from .haystack import HaystackTask
from .perplexity import ContextTask, PerplexityTask
from .task import Task

TRAINED = ("needle", "babi")
BABILONG = (FAMILY, *(f"{FAMILY}_{task}" for task in BABI_TASKS))
OWN = (*TRAINED, *BABILONG, "perplexity", "context")


@dataclass(frozen=True)
class TaskOptions:
    """What tasks are told besides their names.

    seed: of the samples. source: a text, as for `load_text`. stories: a folder of bAbI's files, for
    babi. setting, babilong: of `BabilongTask` (babilong is its `published`).
    """

    seed: int = 0
    source: str | None = None
    stories: str | None = None
    setting: str = "auto"
    babilong: str | None = None


def build_tasks(names: Sequence[str], lengths: Sequence[int], options: TaskOptions) -> list[Task]:
    """The tasks by name, each once. Raises ValueError for an unknown name."""
    tasks: list[Task] = []
    for name in dict.fromkeys(names):
        tasks += _tasks(name, lengths, options)
    by_name = {task.info.name: task for task in reversed(tasks)}
    return list(reversed(by_name.values()))


def _tasks(name: str, lengths: Sequence[int], options: TaskOptions) -> Sequence[Task]:
    if name in TRAINED:
        return [HaystackTask(name, options.seed, options.source, options.stories)]
    if name in BABILONG:
        return babilong_tasks(
            [name],
            seed=options.seed,
            source=options.source,
            setting=options.setting,
            published=options.babilong,
        )
    if name == "perplexity":
        return [PerplexityTask(options.source, lengths)]
    if name == "context":
        return [ContextTask(options.source, lengths)]
    raise ValueError(f"unknown task {name!r}: known are {', '.join(OWN)}")
