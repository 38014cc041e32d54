"""Documents of any size, as a stream of pieces: text files, JSONL, Parquet, packages, the hub.

Nothing here holds more than a piece or a document of JSONL or Parquet at a time.
"""

from __future__ import annotations

import gzip
import json
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from everlong.hub import from_hub
from everlong.words import one_line

from .text import PACKAGE, check_text, find_files, kind_of

HUB = "hub:"
PATTERNS = ("*.txt", "*.jsonl", "*.jsonl.gz", "*.ndjson", "*.ndjson.gz", "*.parquet")
PIECE = 2**20  # bytes: a longer text comes in pieces


class Piece(NamedTuple):
    """Some of a document's text, UTF-8; `starts` in its first piece."""

    text: bytes
    starts: bool


def sources(source: str | Sequence[str]) -> list[str]:
    """One source or several, as a list. Raises ValueError if there is none."""
    listed = [source] if isinstance(source, str) else list(source)
    if not listed or not all(listed):
        raise ValueError("source is empty: give a file, a folder, a pattern, package:NAME or hub:NAME")
    return listed


def list_files(source: str) -> list[Path]:
    """The files of a source that is not on the hub, in the order of their names.

    Raises FileNotFoundError where nothing is found, ValueError for a folder or package without any
    file that can be read, and for records of a kind that is not.
    """
    patterns = ("*.txt", "*.md") if source.startswith(PACKAGE) else PATTERNS
    files = sorted(find_files(source, patterns)[1])
    if not files:
        raise ValueError(
            f"{source} holds no file {', '.join(patterns)}: give a text file, JSONL, Parquet, a folder "
            "of them, a glob pattern, package:NAME or hub:OWNER/NAME"
        )
    for file in files:
        kind_of(file)
    return files


def has_columns(source: str) -> bool:
    """Whether some of a source's documents stand in a column beside others."""
    return source.startswith(HUB) or any(kind_of(file) != "text" for file in list_files(source))


def read_pieces(
    source: str | Sequence[str],
    column: str = "text",
    subset: str | None = None,
    split: str = "train",
    max_bytes: int | None = None,
) -> Iterator[Piece]:
    """The documents of the sources, one source behind the other, in pieces of about a megabyte.

    A text file is a document; a row of JSONL, of a JSON array of objects, or of Parquet is one, its
    text in `column`. A document without text is left out, and so is a byte-order mark. subset, split:
    of data sets on the hub. max_bytes: read no more text than that; the last document is cut.
    Raises ValueError for what is no text, naming the file and the place.
    """
    left = max_bytes
    for each in sources(source):
        for piece in _read_source(each, column, subset, split):
            if left is None:
                yield piece
                continue
            text = _whole_letters(piece.text[:left])
            if text:
                yield Piece(text, piece.starts)
            if len(text) < len(piece.text):
                return
            left -= len(text)


def _read_source(source: str, column: str, subset: str | None, split: str) -> Iterator[Piece]:
    if source.startswith(HUB):
        yield from _read_hub(source.removeprefix(HUB), column, subset, split)
        return
    for path in list_files(source):
        kind = kind_of(path)
        if kind == "json":
            yield from _cut_all(_text_of(row, column, where) for row, where in json_rows(path))
        elif kind == "parquet":
            yield from _cut_all(_parquet_texts(path, column))
        else:
            yield from _text_file(path)


def _cut_all(texts: Iterable[str]) -> Iterator[Piece]:
    """Documents that are at hand as a whole, in pieces."""
    for text in texts:
        rest, starts = text.encode(), True
        if not rest.strip():
            continue
        while rest:
            end = _cut(rest[:PIECE]) if len(rest) > PIECE else len(rest)
            yield Piece(rest[:end], starts)
            rest, starts = rest[end:], False


def _text_file(path: Path) -> Iterator[Piece]:
    """A text file is one document. Its pieces end where a paragraph does, if any does."""
    place, rest, starts = 0, b"", True
    with path.open("rb") as file:
        if file.peek(len(BOM_UTF8)).startswith(BOM_UTF8):
            place = len(file.read(len(BOM_UTF8)))
        while block := file.read(PIECE):
            text = rest + block
            end = _cut(text) if len(block) == PIECE and file.peek(1) else len(text)
            text, rest = text[:end], text[end:]
            check_text(path, text, place)
            place += len(text)
            if text.strip() or not starts:  # blanks before the first word are no document
                yield Piece(text, starts)
                starts = False
    if rest:
        check_text(path, rest, place)
        if rest.strip() or not starts:
            yield Piece(rest, starts)


def _cut(text: bytes) -> int:
    """Where to cut a text: behind its last paragraph, else its last line, word or letter."""
    for mark in (b"\n\n", b"\n", b" "):
        end = text.rfind(mark) + len(mark)
        if end >= max(len(text) // 2, len(mark) + 1):
            return end
    return len(_whole_letters(text)) or len(text)


def _whole_letters(text: bytes) -> bytes:
    """The text without a letter of UTF-8 that is cut at its end."""
    for back in range(1, min(4, len(text)) + 1):
        byte = text[-back]
        if byte & 0xC0 != 0x80:  # the letter's first byte says how many it has
            size = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return text if size <= back else text[:-back]
    return text


def json_rows(path: Path) -> Iterator[tuple[Any, str]]:
    """The values of a file of JSON, and where each stands: of JSONL one a line, blank lines passed
    over; of one array of objects each item, which takes the whole file into memory.

    Raises ValueError that names the file and the line.
    """
    opened: Any = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opened(path, "rb") as file:
            place = 0
            for number, line in enumerate(file, 1):
                start = len(BOM_UTF8) if not place and line.startswith(BOM_UTF8) else 0
                check_text(path, line[start:], place + start, number)
                if not place and line[start:].startswith(b"["):
                    yield from _items(path, line[start:] + file.read())
                    return
                place += len(line)
                if line[start:].strip():
                    where = f"{path}, line {number}"
                    yield _json(line[start:], f"{where} is not JSON, as each line must be"), where
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged or no gzip file: {error}") from None


def _items(path: Path, text: bytes) -> Iterator[tuple[Any, str]]:
    rows = _json(text, f"{path} begins like a JSON array and is none")
    if rows and not isinstance(rows[0], dict):
        yield rows, f"{path}, line 1"  # a row that has no columns
        return
    for number, row in enumerate(rows, 1):
        yield row, f"{path}, item {number}"


def _json(text: bytes, wrong: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{wrong}: {one_line(error)}") from None


def _parquet_texts(path: Path, column: str) -> Iterator[str]:
    """The texts of a Parquet file, a batch of rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise _no_column(column, file.schema_arrow.names, str(path))
            rows = 0
            for batch in file.iter_batches(batch_size=256, columns=[column]):
                for text in batch.column(0).to_pylist():
                    rows += 1
                    yield _text_of({column: text}, column, f"{path}, row {rows}")
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is damaged or no Parquet file: {one_line(error)}") from None


def _read_hub(name: str, column: str, subset: str | None, split: str) -> Iterator[Piece]:
    """A data set of the hub, or of a folder that `datasets` knows, streamed: nothing is stored."""
    import datasets

    path, _, revision = name.partition("@")
    try:
        rows = from_hub(
            path,
            lambda: datasets.load_dataset(
                path, subset, split=split, streaming=True, revision=revision or None
            ),
            "dataset",
        )
    except Exception as error:  # a dozen kinds, from no network to no such split
        raise ValueError(
            f"hub:{name} cannot be read (subset {subset}, split {split}): {one_line(error)}"
        ) from error
    yield from _cut_all(_text_of(row, column, f"hub:{name}") for row in rows)


def _text_of(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict) or column not in row:
        raise _no_column(column, row if isinstance(row, dict) else [], where)
    text = row[column]
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{where}: {column} holds {str(text)[:40]!r}, which is no text")
    if text is not None and not text.isascii() and any("\ud800" <= each <= "\udfff" for each in text):
        raise ValueError(f"{where}: {column} holds half a letter (a lone surrogate), which is no text")
    return text or ""


def _no_column(column: str, there: Iterable[str], where: str) -> ValueError:
    names = ", ".join(map(str, there))
    return ValueError(
        f"{where} has no column {column!r}"
        f"{f': it has {names}; name the one with the text by text_column' if names else ''}"
    )
