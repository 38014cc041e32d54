"""The native kernels' own matrix products are matrix products."""

import ctypes

import pytest
import torch

from everlong.ops.backend import backends
from everlong.ops.native.library import library
from numerics import assert_close

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


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("transposed", [(0, 0), (1, 0), (0, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_products(dtype, size, transposed, add):
    """Operands and output in the middle of larger matrices, whose other numbers stay as they are."""
    torch.manual_seed(0)
    m, n, k = size

    def inside(rows, columns):
        whole = torch.randn(rows, columns + 3, dtype=dtype)
        return whole[:, 2:-1]

    a = inside(*((k, m) if transposed[0] else (m, k)))
    b = inside(*((n, k) if transposed[1] else (k, n)))
    out = inside(m, n)
    around = out._base.clone()
    want = (a.T if transposed[0] else a).double() @ (b.T if transposed[1] else b).double() + add * out
    native = library(dtype)
    places = [x for t in (a, b) for x in (ctypes.c_void_p(t.data_ptr()), ctypes.c_int64(t.stride(0)))]
    native._library.multiply(
        ctypes.c_void_p(native.gemm),
        *transposed,
        *map(ctypes.c_int64, size),
        *places,
        add,
        ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(out.stride(0)),
    )
    assert_close("product", out, want.to(dtype), dtype)
    around[:, 2:-1] = out
    assert torch.equal(out._base, around)
