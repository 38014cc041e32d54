"""The C sources, compiled on first use and kept in the user's cache.

What is loaded runs with all the user's rights: the cache is a folder of the user's own that nobody else
can write to. And a library that was cut short ends the process that loads it: each has the checksum of
its bytes in its name.
"""

import hashlib
import os
import platform
import shlex
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).parent
FLAGS = ["-O3", "-fPIC", "-shared", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math"]
# The machine's own instructions and OpenMP are worth much, and not everywhere to be had.
EXTRAS: tuple[list[str], ...] = (
    ["-march=native", "-fopenmp"],
    ["-mcpu=native", "-fopenmp"],
    ["-fopenmp"],
    [],
)
PATIENCE = 600  # seconds for a compiler
_told: set[str] = set()


@contextmanager
def built(real: str) -> Iterator[Path]:
    """The library for one type of numbers, from the user's cache or built now; there as long as the
    block lasts. Raises OSError where it cannot be built."""
    compiler, flags = _words("CC", "cc"), [*FLAGS, *_words("EVERLONG_NATIVE_FLAGS", "")]
    sources = sorted(FOLDER.glob("*.[ch]"))
    about = "|".join([real, *compiler, *flags, platform.machine(), _processor()]).encode()
    key = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + about).hexdigest()[:16]
    units = [str(source) for source in sources if source.suffix == ".c"]
    command = [*compiler, *flags, f"-DREAL={real}", *units, "-lm"]
    try:
        cache = _cache()
    except OSError as error:
        warn_once(
            f"the native kernels are built for this process alone: {error}; mend that, or set "
            "XDG_CACHE_HOME to a folder of your own"
        )
        with tempfile.TemporaryDirectory(prefix="everlong-") as folder:
            yield _compiled(command, key, Path(folder))
    else:
        yield _kept(key, cache) or _compiled(command, key, cache)


def warn_once(text: str) -> None:
    """Warn, once a process."""
    kind = text.partition(":")[0]
    if kind not in _told:
        _told.add(kind)
        warnings.warn(text, stacklevel=2)


def _words(variable: str, default: str) -> list[str]:
    """An environment variable as words of a command."""
    text = os.environ.get(variable) or default
    try:
        return shlex.split(text)
    except ValueError as error:
        raise OSError(f"{variable}={text!r} is no command: {error}") from error


def _cache() -> Path:
    """The folder of built libraries. Raises OSError where it is not the user's alone."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folder = home / "everlong" / "native"
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not folder.is_symlink():
        folder.mkdir(mode=0o700, exist_ok=True)
    if os.name == "posix":  # elsewhere modes say nothing
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise OSError(f"{folder} is a link, and must be a folder")
        if found.st_uid != os.getuid():
            raise OSError(f"{folder} belongs to user {found.st_uid}, not to {os.getuid()}")
        if found.st_mode & 0o022:
            mode = oct(stat.S_IMODE(found.st_mode))
            raise OSError(f"others can write to {folder} (mode {mode}), and may have: remove it")
        folder.chmod(0o700)
    return folder


def _kept(key: str, cache: Path) -> Path | None:
    """The library in the cache, if it is there and whole; one that is not goes."""
    for path in sorted(cache.glob(f"{key}-*.so")):
        if _whole(path):
            return path
        warn_once(f"the native kernels are built again: {path} is damaged")
        path.unlink(missing_ok=True)
    return None


def _whole(path: Path) -> bool:
    found = path.lstat()
    own = os.name != "posix" or found.st_uid == os.getuid()
    return own and stat.S_ISREG(found.st_mode) and path.stem.endswith(_checksum(path))


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _compiled(command: list[str], key: str, folder: Path) -> Path:
    """The library, built into the folder. Raises OSError with the command and what it said."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        made = Path(place) / "made.so"
        for extra in EXTRAS:
            whole = [*command, *extra, "-o", str(made)]
            failure = _failure(whole)
            if failure is None and made.is_file():
                path = folder / f"{key}-{_checksum(made)}.so"
                os.replace(made, path)  # other processes may be at it as well
                return path
    raise OSError(f"{shlex.join(whole)} failed: {failure or 'it made no library'}")


def _failure(command: list[str]) -> str | None:
    """What went wrong with a command, if anything."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=PATIENCE, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = done.stderr.decode(errors="replace").strip()
    return (said or f"it ended with {done.returncode}") if done.returncode else None


def _processor() -> str:
    """What instructions there are: a library built on another machine may not run here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
