"""The kernels with two threads, on work that is large enough to be divided; and what is not finite."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from everlong.layers.attention import rotary_tables, rotate
from everlong.ops import (
    NeuralMemoryState,
    backends,
    causal_conv_silu,
    chunk_neural_memory,
    read_neural_memory,
    rms_norm,
    sigmoid_gate,
    swiglu,
    use_backend,
)
from everlong.ops.attention import full_attention, sliding_attention
from everlong.ops.native.library import SMALL, threads_for
from numerics import assert_close

pytestmark = pytest.mark.skipif("native" not in backends(), reason="no compiler here")


@pytest.fixture(autouse=True)
def backend():
    """Each test here takes both in turn."""


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random(*shape, scale=1.0):
    return (scale * torch.randn(*shape, dtype=torch.float64)).requires_grad_()


def memory_weights(batch, heads, size):
    widths = [size, 2 * size, size]
    return [random(batch, heads, *pair, scale=pair[0] ** -0.5) for pair in itertools.pairwise(widths)]


def scan():
    weights, shape = memory_weights(16, 2, 8), (16, 70, 2)
    gates = [random(*shape, 2) for _ in range(3)]

    def call(q, k, v, theta, retain, eta, scale, *weights):
        state = NeuralMemoryState.initial(weights, 16)
        gates = (1e-3 * theta.sigmoid(), F.logsigmoid(retain + 2), F.logsigmoid(eta))
        y, after = chunk_neural_memory(q, k, v, *gates, state=state, scale=scale)
        return [y, *after.weights, *after.momentum]

    return call, [*(random(*shape, 8, scale=0.3) for _ in range(3)), *gates, random(2, 8), *weights]


def read():
    inputs = random(3, 700, 1, 8), random(1, 8), *memory_weights(3, 1, 8)
    return lambda q, scale, *weights: read_neural_memory(q, weights, scale), inputs


def attention(window):
    inputs = [random(2, 4, 300, 8), *(random(2, 2, 333, 8) for _ in range(2))]
    prefix = [random(2, 2, 3, 8) for _ in range(2)]

    def call(q, k, v, *prefix):
        if window is None:
            return full_attention(q, k, v, None, prefix)
        return sliding_attention(q, k, v, window, None, prefix)

    return call, [*inputs, *prefix]


def conv(unit):
    inputs = random(2, 301, 32), random(32, 4), random(2, 3, 32)
    return lambda *given: causal_conv_silu(*given, None, unit), inputs


def norm(gated):
    inputs = random(701, 32), random(32), *([random(701, 32)] if gated else [])
    return lambda x, weight, gate=None: rms_norm(x, weight, 1e-6, gate), inputs


def rotary(start):
    inputs = random(2, 3, 301, 16), random(2, 4, 301, 16)
    tables = rotary_tables(start, 301, 10_000.0, 8, inputs[0])
    return lambda *rows: rotate(*tables, *rows), inputs


def gate(function):
    return function, (random(701, 33), random(701, 33))


CASES = {
    "scan": scan,
    "read": read,
    "full attention": lambda: attention(None),
    "sliding attention": lambda: attention(40),
    "conv": lambda: conv(None),
    "unit conv": lambda: conv(8),
    "norm": lambda: norm(False),
    "gated norm": lambda: norm(True),
    "rotary": lambda: rotary(5),
    "rotary by row": lambda: rotary(torch.tensor([5, 17])),
    "swiglu": lambda: gate(swiglu),
    "sigmoid gate": lambda: gate(sigmoid_gate),
}


@pytest.mark.parametrize("name", CASES)
def test_two_threads_do_what_one_operation_does(name):
    torch.manual_seed(0)
    function, inputs = CASES[name]()
    assert max(x.numel() for x in inputs) >= SMALL
    assert threads_for(SMALL) == 2
    found = []
    for chosen in ("eager", "auto"):
        with use_backend(chosen):
            outputs = function(*inputs)
        outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
        torch.manual_seed(1)
        loss = sum((x * torch.randn(x.shape)).sum() for x in outputs if x.requires_grad)
        found.append([*outputs, *torch.autograd.grad(loss, inputs)])
    for want, got in zip(*found, strict=True):
        assert_close(name, got, want)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_shows_alike(name, value):
    torch.manual_seed(0)
    function, inputs = CASES[name]()
    inputs = [x.detach() for x in inputs]
    inputs[0].flatten()[100] = value
    inputs = [x.float().requires_grad_() for x in inputs] if "rotary" not in name else inputs
    shows = []
    for chosen in ("eager", "auto"):
        with use_backend(chosen):
            y = function(*inputs)
        y = y if isinstance(y, torch.Tensor) else y[0]
        if y.requires_grad:
            torch.autograd.grad(y.sum(), inputs)
        shows.append(not y.isfinite().all())
    assert shows[0] == shows[1]
