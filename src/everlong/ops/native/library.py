"""The C sources as a library: built on first use with the system's compiler, called by ctypes.

Its matrix products are those of the BLAS inside torch, its threads OpenMP's.
"""

import ctypes
import functools
import hashlib
import math
import os
import platform
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SMALL = 2**14
SPARE = 64  # numbers
FOLDER = Path(__file__).parent
FLAGS = ["-O3", "-fPIC", "-shared", "-std=gnu11", "-fno-math-errno", "-fno-trapping-math"]
# The machine's own instructions and OpenMP are worth much, and not everywhere to be had.
EXTRAS: tuple[list[str], ...] = (
    ["-march=native", "-fopenmp"],
    ["-mcpu=native", "-fopenmp"],
    ["-fopenmp"],
    [],
)
TYPES = {torch.float32: ("float", "sgemm_"), torch.float64: ("double", "dgemm_")}


class Rows(ctypes.Structure):
    """`Rows` of common.h: [B, H, N, size] by address and strides."""

    _fields_ = [("at", ctypes.c_void_p), *((n, ctypes.c_int64) for n in ("batch", "head", "row"))]

    @classmethod
    def of(cls, x: Tensor) -> "Rows":
        """Of [B, H, N, size], the last dimension dense."""
        return cls(x.data_ptr(), *x.stride()[:3])


class Library:
    """The C functions for one type of numbers."""

    def __init__(self, dtype: torch.dtype) -> None:
        real, routine = TYPES[dtype]
        self.dtype = dtype
        self.gemm = ctypes.cast(_blas(routine), ctypes.c_void_p).value
        self._library = ctypes.CDLL(str(_built(real)))
        self._own = threading.local()

    def call(self, name: str, *structures: ctypes.Structure) -> int:
        """The function of this name, with pointers to the structures."""
        function = getattr(self._library, name)
        function.restype = ctypes.c_int64
        return int(function(*map(ctypes.byref, structures)))

    def scratch(self, size: int) -> Tensor:
        """Room for numbers, kept from call to call: fresh memory costs more than its use."""
        held = getattr(self._own, "scratch", None)
        if held is None or len(held) < size:
            held = self._own.scratch = torch.empty(size, dtype=self.dtype)
        return held


@functools.cache
def load(dtype: torch.dtype) -> Library | OSError:
    """The library for a type, or why there is none."""
    if dtype not in TYPES:
        return OSError(f"there are no native kernels for {dtype}")
    try:
        return Library(dtype)
    except OSError as error:
        return error


def library(dtype: torch.dtype) -> Library:
    """The library for a type. Raises OSError where there is none."""
    loaded = load(dtype)
    if isinstance(loaded, OSError):
        raise loaded
    return loaded


def problem(*tensors: Tensor | None) -> str | None:
    """Why the native kernels cannot take these tensors, if so."""
    given = [x for x in tensors if x is not None]
    dtype = given[0].dtype
    for x in given:
        if type(x) not in (Tensor, torch.nn.Parameter) or x.device.type != "cpu" or x.dtype != dtype:
            got = f"{type(x).__name__} of {x.dtype} on {x.device}"
            return f"they take plain tensors of one type on the CPU, got {got}"
    loaded = load(dtype)
    return str(loaded) if isinstance(loaded, OSError) else None


def threads_for(numbers: int) -> int:
    """Threads for work on so many numbers: to wake them for a few costs more than it saves."""
    return torch.get_num_threads() if numbers >= SMALL else 1


def room(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty tensor for what a kernel makes.

    It has a little more memory than it needs, so that where it lay another of its size will fit once it
    is gone: glibc looks for a block that is larger by the alignment that torch wants, passes over a
    hole of just the size, and a training step's short-lived tensors leave such holes all over.
    """
    return like.new_empty(math.prod(shape) + SPARE).resize_(shape)


def room_by_token(like: Tensor, shape: Sequence[int]) -> Tensor:
    """`room` [B, H, T, K] in which each token's heads lie side by side, as projections want them."""
    batch, heads, tokens, size = shape
    return room(like, (batch, tokens, heads, size)).transpose_(1, 2)


def dense(x: Tensor) -> Tensor:
    """With the last dimension in one piece."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def integers(names: str) -> list[tuple[str, type]]:
    """Fields of a structure."""
    return [(name, ctypes.c_int64) for name in names.split()]


def pointers(names: str) -> list[tuple[str, type]]:
    """Fields of a structure."""
    return [(name, ctypes.c_void_p) for name in names.split()]


def _blas(name: str) -> Any:
    """A routine of the BLAS that torch brings along."""
    for path in sorted((Path(torch.__file__).parent / "lib").glob("lib*")):
        if path.name.startswith(("libtorch_cpu.", "libopenblas")):
            try:
                return getattr(ctypes.CDLL(str(path)), name)
            except (OSError, AttributeError):
                continue
    raise OSError(f"torch brings no BLAS with {name}")


def _built(real: str) -> Path:
    """The library for one type of numbers, from the user's cache or built now."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    sources = sorted(FOLDER.glob("*.[ch]"))
    key = "|".join([real, *compiler, *FLAGS, platform.machine(), _processor()]).encode()
    name = hashlib.sha256(b"".join(path.read_bytes() for path in sources) + key).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "everlong"
    path = cache / f"native-{name}.so"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    units = [str(source) for source in sources if source.suffix == ".c"]
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        built = Path(folder) / path.name
        for extra in EXTRAS:
            command = [*compiler, *FLAGS, *extra, f"-DREAL={real}", *units, "-o", str(built), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                os.replace(built, path)  # other processes may be at it as well
                return path
    raise OSError(f"{shlex.join(command)} failed: {done.stderr.strip()}")


def _processor() -> str:
    """What instructions there are: a library built on another machine may not run here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
