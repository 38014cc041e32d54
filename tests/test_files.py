"""Files are whole or as they were, whatever stops the writing; folders have one owner."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from everlong.files import (
    NotWritten,
    append_line,
    aside_of,
    check_output,
    hold,
    read_lines,
    whole_files,
    write_file,
)


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_file_is_replaced_or_left_as_it_was(function, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_file(path, "old")
    monkeypatch.setattr(f"everlong.files.os.{function}", full)
    with pytest.raises(NotWritten, match=r"a.json .*No space left"):
        write_file(path, "new")
    monkeypatch.undo()
    assert [each.name for each in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"
    (tmp_path / "link").symlink_to(path)
    write_file(tmp_path / "link", "ä")
    assert path.read_bytes() == "ä".encode()
    assert (tmp_path / "link").is_symlink()
    with pytest.raises(NotWritten, match="No such file"):
        write_file(tmp_path / "no" / "a", "")


def test_what_is_no_file_is_written_to_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_file(pipe, "text")
    assert os.read(reader, 9) == b"text"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_line_is_appended_or_not(tmp_path, monkeypatch):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"a": 1})
    with path.open("ab") as file:
        file.write(b'{"a": ')  # by a process that was killed
    append_line(path, {"a": 2})
    whole = path.read_bytes()
    assert read_lines(path) == [{"a": 1}, {"a": 2}]
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 5, limits[1]))  # room for half a line
    try:
        with pytest.raises(NotWritten, match=r"lines.jsonl .*File too large"):
            append_line(path, {"a": 3})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == whole


def test_files_of_a_folder_come_together_or_not_at_all(tmp_path):
    def write(text, *, fail=False):
        with whole_files(tmp_path, "the set") as place:
            assert place == aside_of(tmp_path)
            (place / "a").write_text(text)
            (place / "folder").mkdir()
            (place / "folder" / text).touch()
            if fail:
                (place / "b").write_text(text)
                full()

    write("old")
    with pytest.raises(NotWritten, match=r"the set could not be written \(b: No space left"):
        write("new", fail=True)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert files == {"a", "folder", "folder/old"}
    assert (tmp_path / "a").read_text() == "old"
    aside_of(tmp_path).mkdir(parents=True)
    (aside_of(tmp_path) / "left").touch()  # by a process that was killed
    write("new")
    assert {path.name for path in tmp_path.rglob("*")} == {"a", "folder", "new"}
    with pytest.raises(KeyError, match="mistake"), whole_files(tmp_path, "the set"):
        raise KeyError("our own mistake")


HOLDER = """
import sys, time
from pathlib import Path
from everlong.files import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_is_held_until_its_holder_dies(tmp_path):
    folder = tmp_path / "new" / "folder"
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        (folder / ".a.json.1.unfinished").touch()
        with (
            pytest.raises(ValueError, match=rf"{folder} .*process {process.pid} on \S+ since \d{{4}}-"),
            hold(folder),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with hold(folder), pytest.raises(ValueError, match=f"process {os.getpid()} "), hold(folder):
                pass
            break
        except ValueError:
            time.sleep(0.1)
    assert list(folder.iterdir()) == []
    folder.rmdir()
    with hold(folder):
        assert [path.name for path in folder.iterdir()] == [".lock"]
    assert not folder.exists()
    folder.touch()
    with pytest.raises(ValueError, match="folder is a file"), hold(folder):
        pass


def test_an_output_replaces_its_own_kind_alone_and_if_asked(tmp_path):
    known = {"a", "b"}.issubset
    check_output(tmp_path / "none", "thing", known, overwrite=False)
    check_output(tmp_path, "thing", known, overwrite=False)
    (tmp_path / "a").touch()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"files of no thing .*\(a\)"):
            check_output(tmp_path, "thing", known, overwrite=overwrite)
    (tmp_path / "b").touch()
    with pytest.raises(ValueError, match=r"holds a thing already: eat it, .*--overwrite"):
        check_output(tmp_path, "thing", known, overwrite=False, otherwise="eat it, ")
    check_output(tmp_path, "thing", known, overwrite=True)


def test_lines_that_are_damaged_are_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_bytes(json.dumps({"a": 1}).encode() + b"\n\0\0\0\n\xff\n3\n4")
    assert read_lines(path) == [{"a": 1}, 3]
    assert read_lines(tmp_path / "none") == []
