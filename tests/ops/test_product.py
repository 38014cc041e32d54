"""The native kernels' own matrix products are matrix products."""

import ctypes

import pytest
import torch

from everlong.ops.backend import backends
from everlong.ops.native.library import library
from numerics import assert_close

WHOLE, LOWER, UPPER, WANTED = range(4)  # of common.h
TRANSPOSED = [(0, 0), (1, 0), (0, 1), (1, 1)]

pytestmark = pytest.mark.skipif("native" not in backends(), reason="no native code here")

SIZES = [  # rows, columns, depth: whole tiles, parts of them, less than a vector, larger than a cache
    (64, 256, 64),
    (16, 32, 300),
    (7, 48, 17),
    (13, 37, 1),
    (1, 5, 3),
    (9, 16, 600),
    (300, 512, 8),
]


def inside(rows, columns, dtype):
    """Random numbers in the middle of a larger matrix."""
    return torch.randn(rows, columns + 3, dtype=dtype)[:, 2:-1]


def multiply(part, transposed, a, b, add, out):
    """out (+)= a b, each as stored; part: which of them is a triangle, as common.h counts them."""
    native = library(out.dtype)
    depth = a.shape[0 if transposed[0] else 1]
    places = [x for t in (a, b) for x in (ctypes.c_void_p(t.data_ptr()), ctypes.c_int64(t.stride(0)))]
    native._library.multiply_part(
        part,
        ctypes.c_void_p(native.gemm),
        *transposed,
        *map(ctypes.c_int64, (*out.shape, depth)),
        *places,
        add,
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(out.stride(0)),
    )


def check(part, transposed, a, b, add, out):
    """The product is right where it is wanted, and what lies around the output stays as it is."""
    around = out._base.clone()
    want = (a.T if transposed[0] else a).double() @ (b.T if transposed[1] else b).double() + add * out
    multiply(part, transposed, a, b, add, out)
    got, want = (x.tril() if part == WANTED else x for x in (out, want.to(out.dtype)))
    assert_close("product", got, want, out.dtype)
    around[:, 2:-1] = out
    assert torch.equal(out._base, around)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("transposed", TRANSPOSED, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products(dtype, size, transposed, add):
    """Operands and output in the middle of larger matrices, whose other numbers stay as they are."""
    torch.manual_seed(0)
    m, n, k = size
    a = inside(*((k, m) if transposed[0] else (m, k)), dtype)
    b = inside(*((n, k) if transposed[1] else (k, n)), dtype)
    check(WHOLE, transposed, a, b, add, inside(m, n, dtype))


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("transposed", TRANSPOSED, ids=str)
@pytest.mark.parametrize("side", [1, 5, 16, 17, 40, 64, 270, 600])  # a block of depth is 256
@pytest.mark.parametrize("part", [LOWER, UPPER, WANTED], ids=["lower", "upper", "wanted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products_of_triangles(dtype, part, side, transposed, add):
    """Zeros above or below an operand's diagonal, or an output whose upper half is not wanted."""
    torch.manual_seed(0)
    n, k = (side, 48) if part == WANTED else (48, side)
    a = inside(*((k, side) if transposed[0] else (side, k)), dtype)
    if part != WANTED:  # as stored: its transpose is a triangle the other way
        (torch.Tensor.tril_ if (part == LOWER) != bool(transposed[0]) else torch.Tensor.triu_)(a)
    b = inside(*((n, k) if transposed[1] else (k, n)), dtype)
    check(part, transposed, a, b, add, inside(side, n, dtype))
