"""A tokenised corpus: one file of tokens, read where it is asked for, and where documents begin.

Tokenised once. A corpus lies in a folder of its own, which is written aside and renamed, so that a
corpus that is there is whole.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from everlong.files import NotWritten

from .config import digest
from .reading import PIECE, Piece
from .tokenizer import encode_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 1  # what lies in a corpus' folder; another number makes old ones unread
FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)  # of a file that cannot grow
TOKENS, STARTS, ABOUT = "tokens.bin", "starts.bin", "about.json"


class TokenFile:
    """The tokens in a file, [N], read slice by slice.

    Not a map: the pages of one stay resident as rows from everywhere are read, until all of the corpus
    is, and a process that loads data would get a copy of it.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, np.dtype(dtype)
        self.size = path.stat().st_size // self.dtype.itemsize

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, _ = part.indices(self.size)
        offset = start * self.dtype.itemsize
        return np.fromfile(self.path, self.dtype, count=max(stop - start, 0), offset=offset)


@dataclass(frozen=True)
class Corpus:
    """tokens: [N], unsigned, on disk. starts: [documents + 1], where each begins, and N.

    fingerprint: a hash of both. Documents follow one another; no special token stands between.
    """

    tokens: TokenFile
    starts: np.ndarray
    fingerprint: str

    @classmethod
    def load(cls, folder: Path) -> Corpus | None:
        """The corpus in a folder, or None if there is none, or not all of it."""
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
            tokens = TokenFile(folder / TOKENS, about["dtype"])
            starts = np.fromfile(folder / STARTS, np.int64)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        if len(starts) != about["documents"] + 1 or starts[-1] != len(tokens):
            return None
        return cls(tokens, starts, about["fingerprint"])

    def spans(self) -> np.ndarray:
        """[documents, 2]: where each begins and ends."""
        return np.stack([self.starts[:-1], self.starts[1:]], 1)


def cached_corpus(
    folder: Path,
    key: dict[str, Any],
    pieces: Iterable[Piece],
    tokenizer: PreTrainedTokenizerFast | None,
) -> Corpus:
    """The corpus of these pieces, tokenised if `folder` has none for this key.

    key: whatever the tokens depend on, as JSON values. tokenizer: None for bytes.
    Raises ValueError if the pieces hold no text.
    """
    place = folder / digest(json.dumps([FORMAT, key], sort_keys=True).encode())
    corpus = Corpus.load(place)
    if corpus is not None:
        return corpus
    with _writing(folder):
        _write_whole(place, key, pieces, tokenizer)
    corpus = Corpus.load(place)
    assert corpus is not None
    return corpus


def _write_whole(
    place: Path, key: dict[str, Any], pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerFast | None
) -> None:
    """Write a corpus aside, and rename it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix="unfinished-", dir=place.parent))
    try:
        write_corpus(aside, pieces, tokenizer, about={"key": key})
        if place.is_dir() and Corpus.load(place) is None:
            shutil.rmtree(place)
        try:
            aside.rename(place)
        except OSError:  # another process was as quick
            if Corpus.load(place) is None:
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Says where tokenised text could not be written, and what names another place. What is wrong with
    the source has its own words."""
    try:
        yield
    except OSError as error:
        inside = error.filename is not None and Path(error.filename).is_relative_to(folder)
        if not (inside or (error.filename is None and error.errno in FULL)):
            raise
        raise NotWritten(
            f"the tokenised text could not be written to {folder} ({error.strerror}); "
            "data.cache_folder names another place"
        ) from error


def write_corpus(
    folder: Path,
    pieces: Iterable[Piece],
    tokenizer: PreTrainedTokenizerFast | None,
    about: dict[str, Any] | None = None,
) -> None:
    """Tokenise pieces into a folder, with a bar on stderr; what is held is a few megabytes.

    about: kept beside the corpus. Raises ValueError if the pieces hold no text.
    """
    dtype = token_type(tokenizer)
    hashed = hashlib.blake2b(digest_size=16)
    starts, count = array("q"), 0
    with (folder / TOKENS).open("wb") as file:
        for ids, begins in _encoded(_shown(pieces), tokenizer):
            if begins:
                starts.append(count)
            data = ids.astype(dtype, copy=False).tobytes()
            hashed.update(data)
            file.write(data)
            count += len(ids)
    if not count:
        raise ValueError("the source holds no text: all its documents are empty")
    starts.append(count)
    hashed.update(starts.tobytes())
    (folder / STARTS).write_bytes(starts.tobytes())
    facts = {
        "dtype": dtype.name,
        "documents": len(starts) - 1,
        "tokens": count,
        "fingerprint": hashed.hexdigest(),
        **(about or {}),
    }
    (folder / ABOUT).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def token_type(tokenizer: PreTrainedTokenizerFast | None) -> np.dtype:
    """The smallest unsigned type that holds every id; None: bytes."""
    size = 256 if tokenizer is None else len(tokenizer)
    return np.min_scalar_type(size - 1)


def encode_pieces(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerFast | None
) -> Iterator[tuple[np.ndarray, bool]]:
    """The token ids of each piece, no special ones added, and whether it starts a document."""
    if tokenizer is None:
        for text, starts in pieces:
            yield encode_bytes(text), starts
        return
    for batch in _batches(pieces):
        texts = [piece.text.decode() for piece in batch]
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for piece, each in zip(batch, encoded, strict=True):
            yield np.array(each.ids, dtype=np.int64), piece.starts


def cache_home() -> Path:
    """Where corpora are kept: everlong below $XDG_CACHE_HOME, or below ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "everlong"


def token_bytes(tokenizer: PreTrainedTokenizerFast | None) -> np.ndarray:
    """[vocabulary]: how many bytes of text each token stands for; special ones for none."""
    if tokenizer is None:
        return np.concatenate([np.ones(256, np.int64), np.zeros(3, np.int64)])
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    # ByteLevel writes each byte as a letter; SentencePiece writes a blank as ▁ and a byte as <0x0A>.
    if "ByteLevel" in str(tokenizer.backend_tokenizer.decoder):
        sizes = [len(name or "") for name in names]
    else:
        sizes = [
            1
            if name and name.startswith("<0x") and len(name) == 6
            else len((name or "").replace("▁", " ").encode())
            for name in names
        ]
    counts = np.array(sizes, np.int64)
    counts[[each for each in tokenizer.all_special_ids if each < len(counts)]] = 0
    return counts


def _encoded(
    pieces: Iterable[Piece], tokenizer: PreTrainedTokenizerFast | None
) -> Iterator[tuple[np.ndarray, bool]]:
    """As `encode_pieces`, without documents that have no token."""
    waiting = False
    for ids, starts in encode_pieces(pieces, tokenizer):
        waiting = waiting or starts
        if len(ids):
            yield ids, waiting
            waiting = False


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces in lists of about PIECE bytes each."""
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= PIECE:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _shown(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """The pieces, with a bar on stderr of how much text has gone by."""
    from rich.console import Console
    from rich.progress import DownloadColumn, Progress, SpinnerColumn, TextColumn, TransferSpeedColumn

    columns = (SpinnerColumn(), TextColumn("tokenising"), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("tokenising", total=None)
        waiting = 0
        for piece in pieces:
            yield piece
            waiting += len(piece.text)
            if waiting >= PIECE:  # a bar that moves for every short document is slow
                bar.advance(task, waiting)
                waiting = 0
        bar.advance(task, waiting)
