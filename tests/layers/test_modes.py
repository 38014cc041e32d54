"""What is made while a mode or a transformation stands between operations and their results is not kept
for later calls, and never read by native code."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from everlong.layers import Attention, NeuralMemory
from everlong.layers.attention import _agreed_tables
from everlong.ops import swiglu
from everlong.ops.native.library import Library, load

LAYERS = {
    "attention": lambda: Attention(8, 2, 1, 4, None, 10_000.0),
    "window": lambda: Attention(8, 2, 1, 4, 3, 10_000.0),
    "memory": lambda: NeuralMemory(8, 2, chunk_size=4),
}


@pytest.fixture(params=LAYERS)
def case(request):
    """A layer, an input and its output; nothing is kept of how that came about."""
    torch.manual_seed(0)
    layer, x = LAYERS[request.param](), torch.randn(2, 9, 8)
    with torch.no_grad():
        y = layer(x)[0]
        forget()
        yield layer, x, y


def forget():
    _agreed_tables.cache_clear()
    if isinstance(native := load(torch.float32), Library):
        native._own = threading.local()


def fake(layer, x):
    """As compilers and exports call it; and with real numbers inside the mode."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert layer(mode.from_tensor(x))[0].shape == x.shape
        assert layer(x)[0].shape == x.shape


def traced(layer, x):
    make_fx(lambda x: layer(x)[0])(x)


def elsewhere(layer, x):
    with torch.device("meta"):
        layer(x)


@pytest.mark.parametrize("before", [fake, traced, elsewhere])
def test_a_call_is_right_whatever_was_called_before(case, before):
    layer, x, want = case
    before(layer, x)
    for _ in range(2):
        assert torch.equal(layer(x)[0], want)


def test_transformed_by_torch_func():
    x = torch.randn(3, 5)
    want = torch.autograd.functional.jacobian(lambda x: F.silu(x) * x, x)
    assert torch.allclose(torch.func.jacrev(lambda x: swiglu(x, x))(x), want)
    assert torch.equal(torch.func.vmap(swiglu)(x, x), F.silu(x) * x)
