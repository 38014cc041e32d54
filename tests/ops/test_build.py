"""The compiled library: whose it is, that it is whole, and what is said where there is none."""

import ctypes
import os
import shutil
import subprocess
import sys
import warnings
from contextlib import ExitStack

import pytest
import torch

from everlong.ops import backends, sigmoid_gate, swiglu
from everlong.ops.native import build, library

needs_native = pytest.mark.skipif("native" not in backends(), reason="no compiler here")


@pytest.fixture(autouse=True)
def backend():
    """Each test here is of the native one."""


@pytest.fixture(autouse=True)
def process(monkeypatch, tmp_path):
    """As in a process of its own, that has built nothing and warned of nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_told", set())
    library.load.cache_clear()
    yield
    library.load.cache_clear()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A cache with a library in it, built without optimisation: that is quick."""
    home = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home))
        patch.setenv("EVERLONG_NATIVE_FLAGS", "-O0")
        with build.built("float"):
            pass
    return home


@pytest.fixture
def cache(made, tmp_path, monkeypatch):
    """A copy of it: the folder of libraries."""
    monkeypatch.setenv("EVERLONG_NATIVE_FLAGS", "-O0")
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path / "everlong" / "native"


def only(folder):
    (path,) = folder.iterdir()
    return path


@needs_native
def test_a_kept_library_is_taken(cache, monkeypatch):
    monkeypatch.setattr(build, "_compiled", None)
    with build.built("float") as path:
        assert path == only(cache)
    assert cache.stat().st_mode & 0o777 == 0o700


DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "changed": lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
}


@needs_native
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_library_is_built_again(cache, damage):
    right = only(cache).read_bytes()
    only(cache).write_bytes(DAMAGES[damage](right))
    with (
        pytest.warns(UserWarning, match="built again.*damaged") as warned,
        build.built("float") as path,
    ):
        assert ctypes.CDLL(str(path)).everlong_norm_forward
    assert len(warned) == 1
    assert only(cache) == path
    assert path.stat().st_size == len(right)


@needs_native
def test_a_library_cut_short_does_not_end_the_process(cache):
    only(cache).write_bytes(only(cache).read_bytes()[:20000])
    code = "import torch; from everlong.ops import swiglu; x = torch.ones(2); print(swiglu(x, x))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "0.7311" in done.stdout
    assert done.stderr.count("UserWarning") == 1


def link(folder):
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to(folder.parent / "elsewhere")


def file(folder):
    shutil.rmtree(folder)
    folder.write_text("")


UNFIT = {
    "a link": link,
    "exists": file,
    "others can write": lambda folder: folder.chmod(0o777),
    "mode 0o720": lambda folder: folder.chmod(0o720),
    "belongs to user 12345": lambda folder: os.chown(folder, 12345, -1),
}


@needs_native
@pytest.mark.parametrize("reason", UNFIT)
def test_a_folder_that_is_not_the_users_own_is_left_alone(cache, reason, monkeypatch):
    if reason.startswith("belongs") and os.getuid():
        pytest.skip("only root can give a folder away")
    UNFIT[reason](cache)
    before = list(cache.parent.rglob("*"))
    folders = []
    monkeypatch.setattr(build, "_compiled", lambda command, key, folder: folders.append(folder))
    with ExitStack() as stack:
        with pytest.warns(UserWarning, match=f"for this process alone: .*{reason}"):
            stack.enter_context(build.built("float"))
        assert folders[0].stat().st_mode & 0o777 == 0o700
        assert cache.parent not in folders[0].parents
    with build.built("float"):  # and says nothing more
        assert not folders[0].exists()
    assert not folders[1].exists()
    assert list(cache.parent.rglob("*")) == before


@needs_native
def test_others_may_not_read_it_either(cache, monkeypatch):
    monkeypatch.setattr(build, "_compiled", None)
    cache.chmod(0o755)
    with build.built("float"):
        assert cache.stat().st_mode & 0o777 == 0o700


@needs_native
def test_a_library_of_another_owner_is_not_loaded(cache):
    if os.getuid():
        pytest.skip("only root can give a file away")
    os.chown(only(cache), 12345, -1)
    with pytest.warns(UserWarning, match="damaged"), build.built("float"):
        assert only(cache).stat().st_uid == os.getuid()


COMPILERS = {
    'gcc "x': r"CC='gcc \"x' is no command: No closing quotation",
    "no-such-compiler --fast": "no-such-compiler --fast -O3 .*No such file",
    "false": "false -O3 .* failed: it ended with 1",
    "true": "true -O3 .* failed: it made no library",
    "cc -no-such-flag": "cc -no-such-flag -O3 .* failed: .*unrecognized",
    "/": "/ -O3 .*Permission denied",
}


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_compiler_that_fails_is_told_of_once(monkeypatch, compiler, tmp_path):
    monkeypatch.setenv("CC", compiler)
    x = torch.linspace(-1, 1, 5)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for y in (x, x.double(), x):
            assert torch.equal(swiglu(y, y), torch.nn.functional.silu(y) * y)
            assert torch.equal(sigmoid_gate(y, y), torch.sigmoid(y) * y)
    assert len(warned) == 1
    with pytest.raises(UserWarning, match=f"(?s){COMPILERS[compiler]}.*EVERLONG_BACKEND"):
        raise warned[0].message
    assert not list(tmp_path.rglob("*.so"))


def test_flags_that_cannot_be_read(monkeypatch):
    monkeypatch.setenv("EVERLONG_NATIVE_FLAGS", "'")
    with pytest.raises(OSError, match="EVERLONG_NATIVE_FLAGS"), build.built("float"):
        pass


def test_a_cache_that_cannot_be_made(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null")
    monkeypatch.setenv("CC", "false")
    with pytest.warns(UserWarning, match="process alone.*/dev/null") as warned:  # noqa: SIM117
        with pytest.raises(OSError, match="false"), build.built("float"):
            pass
    assert len(warned) == 1
