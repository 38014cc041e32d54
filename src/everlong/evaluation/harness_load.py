"""lm-eval's tasks, loaded by name, with rows from local files where there are some."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def load_tasks(
    name: str, data_dir: str | Path | None = None
) -> list[tuple[dict[str, Any], Any | None]]:
    """What lm-eval has by a name: (its tasks by their names, the group that scores them or None).

    The tasks read local data as `harness_tasks` says; lm-eval's own functions take them as they are.
    """
    manager = _manager()
    if name not in manager.task_index:
        near = ", ".join(manager.match_tasks([f"*{name}*"])[:5])
        raise ValueError(
            f"lm-eval knows no task {name!r}: `lm-eval ls tasks` lists them"
            + (f"; among them are {near}" if near else "")
        )
    with _quiet_datasets():
        loaded = manager.load([{"group": "everlong", "task": _members(manager, name, data_dir)}])
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
        raise ValueError(
            "this task is lm-eval's, which is not installed: pip install 'everlong[eval]'"
        ) from error
    return TaskManager()


def _members(manager: Any, name: str, data_dir: str | Path | None) -> list[dict[str, Any]]:
    """A task, a group, or the tasks of a tag, of a class that looks for local data.

    A task that is a class of its own keeps it; its data come from the hub alone.
    """
    local = {"class": _local_task(data_dir)}
    index = manager.task_index
    kind = index[name].kind.name
    if kind == "GROUP":
        return [{"group": name, **local}]
    names = sorted(index[name].tags) if kind == "TAG" else [name]
    return [{"task": each, **({} if index[each].kind.name == "PY_TASK" else local)} for each in names]


def _local_task(data_dir: str | Path | None) -> type:
    """A class of lm-eval tasks that look for their data in a folder first."""
    from lm_eval.api.task import ConfigurableTask

    from .harness_data import load_local

    class LocalTask(ConfigurableTask):  # type: ignore[misc]
        """As lm-eval's; `source` says where its rows are from."""

        source = ""
        lacks_examples = False

        def __init__(self, config: dict[str, Any]) -> None:
            super().__init__(config={k: v for k, v in config.items() if k != "class"})

        def download(self, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
            config, found = self.config, None
            if data_dir is not None and self.DATASET_PATH:
                found = load_local(data_dir, config.task, self.DATASET_PATH, self.DATASET_NAME)
            if found is not None:
                self.dataset, place = found
                self.source = str(place)
                self._leave_out_missing_splits()
                return
            self.source = f"hub: {self.DATASET_PATH}"
            try:
                super().download(dataset_kwargs, **kwargs)
            except Exception as error:  # offline, unknown, gated, broken: each its own kind
                raise ValueError(_missing(config.task, self, data_dir, error)) from error

        def _leave_out_missing_splits(self) -> None:
            """lm-eval scores the validation split of a task that has no test split, and takes examples
            from where there are some: what is not in the folder does not exist."""
            config = self.config
            examples = config.fewshot_split or config.training_split
            self.lacks_examples = examples is not None and examples not in self.dataset
            for name in ("training_split", "validation_split", "test_split"):
                if getattr(config, name) not in self.dataset:
                    setattr(config, name, None)
            if config.fewshot_split is not None and self.lacks_examples:
                config.fewshot_split = self.fewshot_cfg.split = None
            if not (config.test_split or config.validation_split):
                raise ValueError(
                    f"{self.source} has no split that {config.task} is scored on, only "
                    f"{', '.join(self.dataset)}: put its test or validation split there"
                )

    return LocalTask


def _missing(name: str, task: Any, data_dir: str | Path | None, error: Exception) -> str:
    """What to do without a data set."""
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
