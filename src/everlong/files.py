"""Files that are whole or not there, and folders to which one process at a time writes.

A file is written under another name beside its place, brought to the disk and renamed: whatever stops
the writing, a full disk among it, leaves the old file or the new one.
"""

from __future__ import annotations

import datetime
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, get_args

from everlong.words import is_text, one_line

LOCK = ".lock"  # in a folder that a process writes to: which one does
UNFINISHED = "unfinished"  # names what is still being written


class NotWritten(OSError):
    """Something could not be written; the message says what, and why."""


def place(name: str, what: str) -> str:
    """The file or folder that a user names as `what`, with ~ written out. Raises ValueError if the name
    is empty: Path takes that for the folder one is in."""
    if not name:
        raise ValueError(f"{what} is empty: name a file or folder")
    return os.path.expanduser(name)


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file, or leave what is there as it is and raise NotWritten. Text is UTF-8."""
    data = content.encode() if isinstance(content, str) else content
    path = Path(os.path.realpath(path))  # a link stays one
    aside = path.with_name(f".{path.name}.{os.getpid()}.{UNFINISHED}")
    try:
        if path.exists() and not path.is_file():  # /dev/stdout
            path.write_bytes(data)
            return
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise NotWritten(f"{path} could not be written ({error.strerror or error})") from error


def append_line(path: Path, value: Any) -> None:
    """Append a line of JSON, all of it or nothing; half a line that a killed process left is cut off
    first. Raises NotWritten."""
    try:
        with path.open("ab+", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(end - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    end = file.truncate(file.readall().rfind(b"\n") + 1)
            data = json.dumps(value, ensure_ascii=False).encode() + b"\n"
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(end)
                raise
    except OSError as error:
        raise NotWritten(f"{path} could not be written ({error.strerror or error})") from error


def read_lines(path: Path) -> list[Any]:
    """The values of a file of JSON lines; what is no whole line is left out."""
    if not path.is_file():
        return []
    values = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            values.append(json.loads(line))
        except (ValueError, RecursionError):
            continue
    return values


def read_record(file: Path, **fields: Any) -> dict[str, Any]:
    """The record in a JSON file. Raises ValueError that names the file if it is none, or if one of
    the fields is missing or of another type. (Of type `int | None` it may be missing.)"""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged or cut short: {one_line(error)}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file} is damaged: it holds no fields")
    for name, kind in fields.items():
        value = record.get(name)
        if type(value) not in (get_args(kind) or (kind,)):
            raise ValueError(f"{file} is damaged: {name} is {str(value)[:80]!r}")
    return record


def sync(path: Path) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    if os.name == "nt":  # which cannot, of what is open for reading
        return
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def aside_of(folder: Path) -> Path:
    """Where files are written before they are moved to a folder. It has the folder's name, since some
    write it down."""
    return folder / UNFINISHED / folder.resolve().name


@contextmanager
def whole_files(folder: Path, what: str) -> Iterator[Path]:
    """A place to write to (`aside_of`); at the end the files and folders there move to `folder`, each
    whole. If they could not be written, none does, and NotWritten says that `what` was not."""
    aside = aside_of(folder)
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    try:
        with writing(what, aside):
            aside.mkdir(parents=True)
            yield aside
            for path in aside.rglob("*"):
                sync(path)
            for path in aside.iterdir():
                if path.is_dir():
                    shutil.rmtree(folder / path.name, ignore_errors=True)
                os.replace(path, folder / path.name)
            sync(folder)
    finally:
        shutil.rmtree(folder / UNFINISHED, ignore_errors=True)


@contextmanager
def writing(what: str, place: Path) -> Iterator[None]:
    """Turns what libraries say where they cannot write below `place` into NotWritten, with the file and
    the cause: some name neither."""
    try:
        yield
    except (NotWritten, ConnectionError):
        raise
    except Exception as error:
        reason = _reason(error, place)
        if reason is None:
            raise
        raise NotWritten(f"{what} could not be written ({reason})") from error


def _reason(error: Exception, place: Path) -> str | None:
    """The file that could not be written, and why; None where the error is about something else."""
    files = [(path.stat(), path) for path in place.rglob("*") if path.is_file()]
    last = max(files, key=lambda each: (each[0].st_mtime_ns, each[0].st_ino), default=(None, place))[1]
    if isinstance(error, OSError):
        name = Path(error.filename).name if error.filename else last.name
        return f"{name}: {error.strerror or error}"
    if "(os error" in str(error):  # of Rust; safetensors has deleted the file by now
        has_name = type(error).__name__ == "SafetensorError"
        name = "model.safetensors" if has_name and not any(place.rglob("*.safetensors")) else last.name
        return f"{name}: {' '.join(str(error).split())}"
    if last == place:
        return None
    try:  # torch does not say why: write on where it had to stop
        with last.open("ab", buffering=0) as file:
            file.write(bytes(1 << 16))
            file.write(b"\0")
            os.fsync(file.fileno())
    except OSError as cause:
        return f"{last.name}: {cause.strerror}"
    return None


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if it is not there; a folder that is made and
    stays empty goes again. The system lets go of it when this process dies.

    Raises ValueError where another process holds the folder, where it is a file, and where its name is
    no UTF-8, since libraries would find no place in it to write to.
    """
    from filelock import FileLock, Timeout

    for name in (str(folder), folder.resolve().name):
        if not is_text(name):
            raise ValueError(f"{name} is no UTF-8: give the folder another name")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name a folder")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / LOCK
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        owner = file.read_text(encoding="utf-8") if file.is_file() else ""
        raise ValueError(
            f"{folder} is being written to by {owner or 'another process'}: wait until it has ended, "
            "or name another folder"
        ) from None
    try:
        since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        with suppress(OSError):  # the lock counts, more than its owner's name
            file.write_text(f"process {os.getpid()} on {socket.gethostname()} since {since}")
        for left in folder.glob(f".*.{UNFINISHED}"):  # by a process that was killed
            left.unlink(missing_ok=True)
        yield
    finally:
        with suppress(OSError):
            file.unlink()  # nobody else can have it: it is locked still
        lock.release()
        if is_new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def check_output(
    folder: Path,
    what: str,
    known: Callable[[set[str]], bool],
    *,
    overwrite: bool,
    otherwise: str = "",
) -> None:
    """Refuse to write `what` to a folder that holds something else, or, unless `overwrite` is given, an
    earlier one.

    known: whether the names in a folder are those of an earlier one. otherwise: what else can be done
    with it. Raises ValueError.
    """
    names = {path.name for path in folder.iterdir()} - {LOCK} if folder.is_dir() else set()
    if not names:
        return
    if not known(names):
        some = ", ".join(sorted(names)[:3])
        raise ValueError(f"{folder} holds files of no {what} of everlong ({some}): name another folder")
    if not overwrite:
        raise ValueError(
            f"{folder} holds a {what} already: {otherwise}replace it with --overwrite, or name another "
            "folder"
        )
