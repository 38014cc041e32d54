"""The C sources as a library, called by ctypes (build.py makes it).

Its matrix products are those of the BLAS inside torch, its threads OpenMP's.
"""

import ctypes
import functools
import math
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everlong.ops.native.build import built, warn_once

SMALL = 2**14
SPARE = 64  # numbers
MOST_STRIDE = 2**31 - 1  # of BLAS's integers
PLAIN = (Tensor, torch.nn.Parameter)
TYPES = {torch.float32: ("float", "sgemm_"), torch.float64: ("double", "dgemm_")}


class Rows(ctypes.Structure):
    """`Rows` of common.h: [B, H, N, size] by address and strides."""

    _fields_ = [("at", ctypes.c_void_p), *((n, ctypes.c_int64) for n in ("batch", "head", "row"))]

    @classmethod
    def of(cls, x: Tensor) -> "Rows":
        """Of what `dense` gives, [B, H, N, size]."""
        batch, head, row, _ = x.stride()
        # The stride of a single row may be any number, and BLAS wants one that rows fit in.
        return cls(x.data_ptr(), batch, head, row if x.shape[2] > 1 else max(x.shape[3], 1))


class Library:
    """The C functions for one type of numbers."""

    def __init__(self, dtype: torch.dtype) -> None:
        real, routine = TYPES[dtype]
        self.dtype = dtype
        self.gemm = ctypes.cast(_blas(routine), ctypes.c_void_p).value
        with built(real) as path:
            self._library = ctypes.CDLL(str(path))
        if not hasattr(self._library, "everlong_scan_forward"):
            raise OSError(f"{path} holds no kernels: what made it is no C compiler")
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
            held = self._own.scratch = torch.empty(size, dtype=self.dtype, device="cpu")
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
    if intercepted():
        return "they cannot be seen by a dispatch mode (FakeTensorMode is one) or by torch.func"
    given = [x for x in tensors if x is not None]
    dtype = given[0].dtype
    for x in given:
        if type(x) not in PLAIN or not x.is_cpu or x.dtype != dtype or x.is_neg():
            got = f"{type(x).__name__} of {x.dtype} on {x.device}"
            return f"they take plain tensors of one type on the CPU, got {got}"
    loaded = load(dtype)
    if not isinstance(loaded, OSError):
        return None
    if dtype in TYPES:
        warn_once(
            f"PyTorch's operations do the work of the native kernels: {loaded}; mend that, or choose "
            "them with EVERLONG_BACKEND=eager"
        )
    return str(loaded)


def intercepted() -> bool:
    """Whether a mode or a transformation stands between PyTorch's operations and what they make, which
    then may be no tensor with numbers: FakeTensorMode, a tracer, vmap."""
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active()


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
    """With the last dimension in one piece, and rows that do not overlap, as BLAS wants them: those of
    an expanded tensor do."""
    rows, size = x.shape[-2:]
    whole = x.stride(-1) == 1 or size == 1
    apart = rows == 1 or size <= x.stride(-2) <= MOST_STRIDE
    return x if whole and apart else x.contiguous()


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
