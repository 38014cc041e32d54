"""lm-eval's tasks, loaded by name, with rows from local files where there are some."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from everlong.hub import from_hub

from .harness_data import load_local


class UnknownTask(ValueError):
    """lm-eval has no task of that name, or is not there to have one."""


def load_tasks(
    name: str, data_dir: str | Path | None = None
) -> list[tuple[dict[str, Any], Any | None]]:
    """What lm-eval has by a name: (its tasks by their names, the group that scores them or None).

    The tasks read local data as `harness_tasks` says; lm-eval's own functions take them as they are.
    """
    manager = _manager()
    if name not in manager.task_index:
        near = ", ".join(manager.match_tasks([f"*{name}*"])[:5])
        raise UnknownTask(
            f"lm-eval knows no task {name!r}: `lm-eval ls tasks` lists them"
            + (f"; among them are {near}" if near else "")
        )
    with _quiet_datasets(), _data_from(data_dir):
        loaded = manager.load([name])
    group = loaded.get("groups", {}).get(name)
    if group is not None and group.has_aggregation:
        return [(loaded["tasks"], group)]
    return [({each: task}, None) for each, task in loaded["tasks"].items()]


def set_fewshot(task: Any, wanted: int | None) -> None:
    """As lm-eval's `simple_evaluate`: a task that says 0 itself keeps to it."""
    own = task.config.num_fewshot
    if own is None or (wanted is not None and own != 0):
        task.set_config("num_fewshot", wanted or 0)
    if task.config.num_fewshot and getattr(task, "lacks_examples", False):
        raise ValueError(
            f"{task.config.num_fewshot} examples before each question of {task.config.task} are to "
            f"come from a split that is not in {task.source}: put it there, or ask without examples"
        )


@functools.cache
def _manager() -> Any:
    """lm-eval's list of tasks. Raises ValueError where lm-eval is not installed."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UnknownTask(
            "this task is lm-eval's, which is not installed: pip install 'everlong[eval]'"
        ) from error
    return TaskManager()


@contextlib.contextmanager
def _data_from(data_dir: str | Path | None) -> Iterator[None]:
    """lm-eval's tasks that are made inside look for their data in a folder, then on the hub."""
    from lm_eval.api.task import ConfigurableTask

    original = ConfigurableTask.download

    def download(task: Any, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if data_dir is not None and _take_local(task, data_dir):
            return
        task.source = f"hub: {task.DATASET_PATH}"
        try:
            from_hub(
                str(task.DATASET_PATH), lambda: original(task, dataset_kwargs, **kwargs), "dataset"
            )
        except Exception as error:  # offline, unknown, gated, broken: each its own kind
            raise ValueError(_missing(task, data_dir, error)) from error

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = original


def _take_local(task: Any, data_dir: str | Path) -> bool:
    """Whether a folder has the task's data, which are then its own.

    lm-eval scores the validation split of a task that has no test split, and takes examples from where
    there are some: what is not in the folder does not exist.
    """
    config = task.config
    found = load_local(data_dir, config.task, task.DATASET_PATH or "", task.DATASET_NAME)
    if found is None:
        return False
    task.dataset, place = found
    task.source = str(place)
    examples = config.fewshot_split or config.training_split
    task.lacks_examples = examples is not None and examples not in task.dataset
    for name in ("training_split", "validation_split", "test_split"):
        if getattr(config, name) not in task.dataset:
            setattr(config, name, None)
    if config.fewshot_split is not None and task.lacks_examples:
        config.fewshot_split = task.fewshot_cfg.split = None
    if not (config.test_split or config.validation_split):
        raise ValueError(
            f"{place} has no split that {config.task} is scored on, only {', '.join(task.dataset)}: "
            "put its test or validation split there"
        )
    return True


def _missing(task: Any, data_dir: str | Path | None, error: Exception) -> str:
    """What to do without a data set."""
    name = task.config.task
    looked = "nowhere else" if data_dir is None else f"not in {data_dir} either"
    split = task.config.test_split or task.config.validation_split
    subset = f", subset {task.DATASET_NAME}" if task.DATASET_NAME else ""
    reason = " ".join(str(error).split())[:200]
    return (
        f"the data of {name} do not come from the hub ({type(error).__name__}: {reason}) and are "
        f"{looked}: download the data set {task.DATASET_PATH}{subset}, put its {split} split into "
        f"{data_dir or 'DIR'}/{name}/{split}.parquet (.arrow, .jsonl), and name that folder with "
        f"--data_dir {data_dir or 'DIR'}"
    )


@contextlib.contextmanager
def _quiet_datasets() -> Iterator[None]:
    """No progress bars of `datasets` inside."""
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()
