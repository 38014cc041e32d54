"""Which code does the work: the same functions either way, held to the same laws.

"eager" is PyTorch and runs on every device; "native" is C for plain tensors on the CPU in float32 and
float64, in the places where it exists; "auto" (the default) takes it where it can and wins.
`use_backend` chooses for a block of code, the environment variable EVERLONG_BACKEND for a process.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from everlong.ops.native.library import load, problem

BACKENDS = ("auto", "eager", "native")
_chosen: ContextVar[str | None] = ContextVar("everlong_backend", default=None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Take the back end of this name inside the block. Raises ValueError for an unknown one.

    What you checkpoint yourself (`torch.utils.checkpoint`) must be computed again by the same back end:
    have the block inside the function, or around backward too.
    """
    token = _chosen.set(_checked(name))
    try:
        yield
    finally:
        _chosen.reset(token)


def current_backend() -> str:
    """The name in force."""
    return _chosen.get() or _checked(os.environ.get("EVERLONG_BACKEND") or "auto")


def backends() -> tuple[str, ...]:
    """The names that work on this machine; looks for the compiler if it must."""
    native = isinstance(load(torch.float32), OSError)
    return tuple(name for name in BACKENDS if name != "native" or not native)


def native_takes(*tensors: Tensor | None) -> bool:
    """Whether the native code is wanted, and can take these; torch.compile gets the eager one."""
    if torch.compiler.is_compiling():
        return False
    return current_backend() != "eager" and problem(*tensors) is None


def refuse_transforms() -> None:
    """Raise ValueError inside `torch.func`'s transforms, which cannot take backward passes that are
    written by hand."""
    if torch._C._are_functorch_transforms_active():
        raise ValueError(
            "torch.func's transforms (grad, vmap, jvp, ...) do not go through the memory and its "
            "norms: call functional_call without them, and loss.backward() or torch.autograd.grad"
        )


def _checked(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"no back end {name!r}: choose one of {', '.join(BACKENDS)}")
    return name
