"""chunk_scan.c as a library: built on first use with the system's compiler, called by ctypes.

Its matrix products are those of the BLAS inside torch, its threads OpenMP's.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("chunk_scan.c")
MAX_LAYERS = 8
FLAGS = [
    "-O3",
    "-fPIC",
    "-shared",
    "-std=gnu11",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
]
TYPES = {torch.float32: ("float", "sgemm_"), torch.float64: ("double", "dgemm_")}


class Rows(ctypes.Structure):
    _fields_ = [("at", ctypes.c_void_p), *((n, ctypes.c_int64) for n in ("batch", "head", "row"))]

    @classmethod
    def of(cls, x: Tensor | None) -> "Rows":
        """Of [B, H, N, size]."""
        return cls() if x is None else cls(x.data_ptr(), *x.stride()[:3])


class Gate(ctypes.Structure):
    _fields_ = [
        ("at", ctypes.c_void_p),
        *((n, ctypes.c_int64) for n in ("batch", "head", "layer", "token")),
    ]

    @classmethod
    def of(cls, x: Tensor | None) -> "Gate":
        """Of [B, H, L, T]."""
        return cls() if x is None else cls(x.data_ptr(), *x.stride())


class Shape(ctypes.Structure):
    """`Shape` of chunk_scan.c."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                [
                    "batch",
                    "heads",
                    "tokens",
                    "size",
                    "chunk",
                    "layers",
                    "parts",
                    "decay",
                    "interval",
                    "train",
                    "threads",
                    "scaled",
                ]
            )
        ),
        ("widths", ctypes.c_int64 * (MAX_LAYERS + 1)),
    ]


class Arguments(ctypes.Structure):
    """`Tensors` of chunk_scan.c."""

    _fields_ = [
        *((name, Rows) for name in ("q", "k", "v", "y")),
        *((name, Gate) for name in ("theta", "log_retain", "log_eta")),
        ("scale", ctypes.c_void_p),
        *((n, Rows * MAX_LAYERS) for n in ("weights", "momentum", "last_weights", "last_momentum")),
        ("states", ctypes.c_void_p),
        ("kept", ctypes.c_void_p),
        *((name, Rows) for name in ("dq", "dk", "dv", "dy")),
        *((name, Gate) for name in ("dtheta", "dlog_retain", "dlog_eta")),
        ("dscale", ctypes.c_void_p),
        *((name, Rows * MAX_LAYERS) for name in ("dweights", "dmomentum")),
        ("scratch", ctypes.c_void_p),
        ("gemm", ctypes.c_void_p),
    ]

    def put(self, before: str, state: Sequence[Tensor], layers: int) -> None:
        """Weights and momentum, [B, H, in, out] each, into the fields named so."""
        for i, x in enumerate(state):
            field = getattr(self, before + ("weights" if i < layers else "momentum"))
            field[i % layers] = Rows.of(x)


def _blas(name: str) -> Any:
    """A routine of the BLAS that torch brings along, or None."""
    folder = Path(torch.__file__).parent / "lib"
    names = sorted(
        p for p in folder.glob("lib*") if p.name.startswith(("libtorch_cpu.", "libopenblas"))
    )
    for library in [*map(str, names), None]:
        try:
            return getattr(ctypes.CDLL(library), name)
        except (OSError, AttributeError):
            continue
    return None


def _compile(real: str) -> Path:
    """The library for one type of numbers, from the user's cache or built now."""
    compiler = shlex.split(os.environ.get("CC", "cc"))
    source = SOURCE.read_bytes()
    key = "|".join([real, *compiler, *FLAGS, platform.machine(), platform.processor(), _cpu()])
    name = hashlib.sha256(source + key.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "everlong"
    path = cache / f"chunk_scan-{name}.so"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        built = Path(folder) / path.name
        errors = ""
        # OpenMP and the machine's own instructions are worth much, and not everywhere to be had.
        for more in (["-march=native", "-fopenmp"], ["-mcpu=native", "-fopenmp"], ["-fopenmp"], []):
            command = [*compiler, *FLAGS, *more, f"-DREAL={real}", str(SOURCE), "-o", str(built), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                os.replace(built, path)
                return path
            errors = errors or done.stderr.strip()
    raise OSError(f"{compiler[0]} cannot build {SOURCE.name}: {errors}")


def _cpu() -> str:
    """What the machine's instructions are: a library of another machine may crash here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


class Library:
    """The C functions for one type of numbers."""

    def __init__(self, dtype: torch.dtype) -> None:
        real, routine = TYPES[dtype]
        gemm = _blas(routine)
        if gemm is None:
            raise OSError(f"torch brings no BLAS with {routine}")
        self.dtype = dtype
        self.gemm = ctypes.cast(gemm, ctypes.c_void_p).value
        library = ctypes.CDLL(str(_compile(real)))
        self.forward: Callable[..., int] = library.everlong_forward
        self.backward: Callable[..., int] = library.everlong_backward
        sizes = [getattr(library, f"everlong_{n}_size") for n in ("state", "kept", "scratch")]
        for size in sizes:
            size.restype = ctypes.c_int64
        self.state_size, self.kept_size, self.scratch_size = sizes
        self.own = threading.local()

    def room(self, shape: Shape) -> tuple[Tensor, Tensor]:
        """For what the way back wants kept: states [M, groups, .] and products [M, chunks, .]."""
        memories, chunks = shape.batch * shape.heads, shape.tokens // shape.chunk
        groups = -(-chunks // shape.interval)
        size = ctypes.byref(shape)
        if not shape.train:
            return torch.empty(0), torch.empty(0)
        return (
            torch.empty(memories, groups, self.state_size(size), dtype=self.dtype),
            torch.empty(memories, chunks, self.kept_size(size), dtype=self.dtype),
        )

    def run(self, direction: str, shape: Shape, arguments: Arguments) -> None:
        """Call it, with scratch memory that is kept from call to call: fresh memory costs more."""
        size = shape.threads * self.scratch_size(ctypes.byref(shape))
        held = getattr(self.own, "scratch", None)
        if held is None or len(held) < size:
            held = self.own.scratch = torch.empty(size, dtype=self.dtype)
        arguments.scratch, arguments.gemm = held.data_ptr(), self.gemm
        function = self.forward if direction == "forward" else self.backward
        if function(ctypes.byref(shape), ctypes.byref(arguments)):
            raise ValueError(f"the native scan does {MAX_LAYERS} layers at most, got {shape.layers}")


@functools.cache
def load(dtype: torch.dtype) -> Library | OSError:
    """The library for a type, or why there is none."""
    if dtype not in TYPES:
        return OSError(f"no native scan of {dtype}")
    try:
        return Library(dtype)
    except OSError as error:
        return error
