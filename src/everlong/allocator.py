"""What the C library does with freed memory."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h
NEVER = -1
PAD = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, for the next tensor of its size; for the whole process.

    A training step asks for the same large tensors as the one before. By default what is 32 MiB and
    larger goes back to the system each time, which clears the pages when they are asked for again: a
    quarter of a step of 16K tokens. The process then holds its peak until it ends. `everlong train`
    does this; in a program of your own call it once, before the first step.

    Returns whether it was possible: with glibc, that is on most of Linux.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    wanted = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, NEVER), (M_TOP_PAD, PAD))
    done = [mallopt(name, value) == 1 for name, value in wanted]
    return all(done)
