"""The tasks of `everlong eval`, by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from everlong.data.babilong import TASKS as BABI_TASKS
from everlong.words import did_you_mean

from .babilong import NAME, babilong_tasks
from .harness_load import UnknownTask
from .harness_tasks import harness_tasks
from .haystack import HaystackTask
from .perplexity import ContextTask, PerplexityTask
from .ruler import NAMES as RULER
from .ruler import ruler_tasks
from .task import Task

TRAINED = ("needle", "babi")
BABILONG = (NAME, *(f"{NAME}_{task}" for task in BABI_TASKS))
RULER_OFFICIAL = tuple(f"ruler_{name}" for name in RULER)
OWN = (*TRAINED, *RULER, *BABILONG, "perplexity", "context")


LM_EVAL = "lm-eval's"
USED_BY = {  # an option, and who makes something of it
    "source": OWN,
    "stories": ("babi",),
    "setting": BABILONG,
    "babilong": BABILONG,
    "chat_template": RULER + RULER_OFFICIAL,
    "data_dir": (LM_EVAL,),
    "num_fewshot": (LM_EVAL,),
}


@dataclass(frozen=True)
class TaskOptions:
    """What tasks are told besides their names.

    seed: of the samples. source: a text, as for `load_text`. stories: a folder of bAbI's files, for
    babi. setting, babilong: of `BabilongTask` (babilong is its `published`). chat_template: niah's
    prompts are put as a user's message. data_dir, num_fewshot: of lm-eval's tasks, see `harness_tasks`.
    """

    seed: int = 0
    source: str | None = None
    stories: str | None = None
    setting: str = "auto"
    babilong: str | None = None
    chat_template: bool = False
    data_dir: str | Path | None = None
    num_fewshot: int | None = None


def build_tasks(names: Sequence[str], lengths: Sequence[int], options: TaskOptions) -> list[Task]:
    """The tasks by name, each once; a name that is none of everlong's is one of lm-eval's.

    Raises ValueError for an unknown name, for a task whose data cannot be had, and for options that
    none of the tasks takes.
    """
    if not names:
        raise ValueError(f"got no tasks: give some of {', '.join(OWN)}, or of lm-eval's")
    tasks: dict[str, Task] = {}
    for name in names:
        for task in _tasks(name, lengths, options):
            tasks.setdefault(task.info.name, task)
    if any(task.info.axis is not None for task in tasks.values()) and not lengths:
        raise ValueError("got no lengths: give at least one, in tokens")
    _check_used(names, options)
    return list(tasks.values())


def _check_used(names: Sequence[str], options: TaskOptions) -> None:
    """Refuse options that change nothing, and empty ones."""
    asked = {name if name in OWN + RULER_OFFICIAL else LM_EVAL for name in names}
    for option, users in USED_BY.items():
        value = getattr(options, option)
        if value == "":
            raise ValueError(f"--{option} is empty: give it a value, or leave it out")
        if value != getattr(TaskOptions, option) and asked.isdisjoint(users):
            raise ValueError(
                f"--{option} {value} changes nothing in {', '.join(names)}: leave it out, or ask for "
                f"tasks that take it ({', '.join(users)})"
            )


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
    if name in (*RULER, *RULER_OFFICIAL):
        return ruler_tasks(
            [name],
            seed=options.seed,
            source=options.source,
            chat_template=options.chat_template,
        )
    if name == "perplexity":
        return [PerplexityTask(options.source, lengths)]
    if name == "context":
        return [ContextTask(options.source, lengths)]
    try:
        return harness_tasks([name], data_dir=options.data_dir, num_fewshot=options.num_fewshot)
    except UnknownTask as error:
        raise ValueError(
            f"{name!r} is none of everlong's tasks ({', '.join(OWN)}); {error}{did_you_mean(name, OWN)}"
        ) from error
