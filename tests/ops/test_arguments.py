"""Every operation, with arguments that fit and with some that do not: all back ends give one result, or
refuse alike."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everlong.layers.attention import rotate
from everlong.ops import (
    NeuralMemoryState,
    backends,
    causal_conv_silu,
    chunk_neural_memory,
    read_neural_memory,
    recurrent_neural_memory,
    rms_norm,
    sigmoid_gate,
    swiglu,
    trace_neural_memory,
    unit_length,
    unit_rms,
    use_backend,
)
from everlong.ops.attention import full_attention, sliding_attention
from everlong.ops.decay import Gates
from numerics import assert_close

pytestmark = pytest.mark.skipif("native" not in backends(), reason="no compiler here")
KINDS = (torch.float32, torch.float64, torch.bfloat16, torch.int64)


@pytest.fixture(autouse=True)
def backend():
    """Each test here takes both in turn."""


class Draw:
    """Sizes and tensors of one example."""

    def __init__(self, data, seed):
        self.data = data
        self.dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
        self.generator = torch.Generator().manual_seed(seed)

    def size(self, least, most):
        return self.data.draw(st.integers(least, most))

    def maybe(self, make):
        return make() if self.data.draw(st.booleans()) else None

    def random(self, *shape, scale=1.0):
        return scale * torch.randn(shape, dtype=self.dtype, generator=self.generator)

    def scale(self, heads, size):
        """The norm of a row of a few numbers is too steep for float32."""
        return self.maybe(lambda: self.random(heads, size)) if self.dtype == torch.float64 else None

    def lengths(self, batch, tokens):
        return torch.tensor([self.size(0, tokens) for _ in range(batch)], dtype=torch.long)

    def widths(self, size):
        return [size, *(self.size(1, 9) for _ in range(self.size(0, 2))), size]


def norm(d):
    shape = [d.size(0, 3) for _ in range(d.size(0, 2))] + [d.size(1, 9)]
    x = {
        "x": d.random(*shape),
        "weight": d.random(shape[-1]),
        "gate": d.maybe(lambda: d.random(*shape)),
    }
    return lambda x, weight, gate: rms_norm(x, weight, 1e-3, gate), x


def units(d):
    x = {"x": d.random(*(d.size(1, 4) for _ in range(d.size(0, 3))))}
    return d.data.draw(st.sampled_from([unit_length, lambda x: unit_rms(x, 1e-3)])), x


def gates(d):
    shape = [d.size(0, 4) for _ in range(d.size(0, 3))]
    function = d.data.draw(st.sampled_from([swiglu, sigmoid_gate]))
    return function, {"gate": d.random(*shape), "x": d.random(*shape)}


def conv(d):
    batch, tokens, heads, unit, taps = (
        d.size(*bounds) for bounds in ((1, 3), (0, 6), (1, 3), (1, 4), (1, 5))
    )
    width = heads * unit
    tensors = {
        "x": d.random(batch, tokens, width),
        "weight": d.random(width, taps),
        "tail": d.maybe(lambda: d.random(batch, taps - 1, width)),
        "lengths": d.maybe(lambda: d.lengths(batch, tokens)),
    }
    unit = d.data.draw(st.sampled_from([None, unit, unit, unit + 1, 0]))
    return lambda *given: causal_conv_silu(*given, unit), tensors


def attention(d):
    batch, group, heads, tokens, past, size = (
        d.size(*bounds) for bounds in ((1, 3), (1, 3), (1, 3), (0, 6), (0, 4), (1, 6))
    )
    window = d.data.draw(st.sampled_from([None, 1, 2, 4, 9, 0]))
    each = d.size(1, 2) if window is None else 1
    keys, seen = (past + tokens) * each, d.size(0, 3)
    held = d.data.draw(st.sampled_from([None, past, 0, past + 1, torch.full((batch,), past)]))
    tensors = {
        "q": d.random(batch, group * heads, tokens, size),
        "k": d.random(batch, heads, keys, size),
        "v": d.random(batch, heads, keys, size),
        "past": held,
        "prefix_k": None,
        "prefix_v": None,
    }
    if d.data.draw(st.booleans()):
        for name in ("prefix_k", "prefix_v"):
            tensors[name] = d.random(batch, heads, seen, size)

    def call(q, k, v, past, *prefix):
        prefix = None if prefix == (None, None) else prefix
        if window is None:
            return full_attention(q, k, v, past, prefix, each)
        return sliding_attention(q, k, v, window, past, prefix)

    return call, tensors


def rotation(d):
    batch, heads, tokens, half = (d.size(*bounds) for bounds in ((0, 3), (0, 3), (0, 4), (0, 4)))
    of = d.data.draw(st.sampled_from([1, batch]))
    tensors = {
        "cos": d.random(of, 1, tokens, half),
        "sin": d.random(of, 1, tokens, half),
        "a": d.random(batch, heads, tokens, 2 * half),
        "b": d.random(batch, d.size(0, 3), tokens, 2 * half),
    }
    return rotate, tensors


def reading(d):
    batch, tokens, heads, size = (d.size(*bounds) for bounds in ((1, 3), (0, 70), (1, 3), (1, 9)))
    weights = [d.random(batch, heads, *pair) for pair in itertools.pairwise(d.widths(size))]
    tensors = {
        "q": d.random(batch, tokens, heads, size),
        "scale": d.scale(heads, size),
        **{f"weight{i}": w for i, w in enumerate(weights)},
    }
    return lambda q, scale, *weights: read_neural_memory(q, weights, scale), tensors


def memory(d):
    batch, tokens, heads, size, chunk = (
        d.size(*bounds) for bounds in ((1, 3), (0, 9), (1, 2), (1, 6), (1, 4))
    )
    widths = d.widths(size)
    weights = [d.random(batch, heads, a, b, scale=a**-0.5) for a, b in itertools.pairwise(widths)]
    with_momentum, with_decay = d.size(0, 1), d.size(0, 1)
    state = NeuralMemoryState.initial(
        weights, chunk, momentum=bool(with_momentum), decay=bool(with_decay)
    )

    def gate(there=True):
        shape = (batch, tokens, heads, len(weights))
        return -d.random(*shape, scale=0.01).abs() if there else None

    tensors = {
        **{name: d.random(batch, tokens, heads, size, scale=0.5) for name in "qkv"},
        "theta": -gate(),
        "log_retain": gate(with_decay),
        "log_eta": gate(with_momentum),
        "scale": d.scale(heads, size),
        "lengths": d.maybe(lambda: d.lengths(batch, tokens)),
    }
    function = d.data.draw(st.sampled_from([chunk_neural_memory] * 3 + [recurrent_neural_memory]))
    function = d.data.draw(st.sampled_from([function] * 3 + [trace_neural_memory]))

    def call(q, k, v, theta, log_retain, log_eta, scale, lengths):
        if function is trace_neural_memory:
            found = Gates(theta, log_retain, log_eta)
            return tuple(function(k, v, found, state=state, scale=scale, lengths=lengths))
        more = {"lengths": lengths} if function is chunk_neural_memory else {}
        given = (q, k, v, theta, log_retain, log_eta)
        y, after = function(*given, state=state, scale=scale, **more)
        return (y, *after.tensors().values())

    return call, tensors


OPERATIONS = [norm, units, gates, conv, attention, rotation, reading, memory]

# Ways to change one tensor, all of them silent where they leave it as it is. The first lay it out
# otherwise in memory.
CHANGES = {
    "strided": lambda x: torch.stack([x, x], -1)[..., 0],
    "turned": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "expanded": lambda x: x[..., :1, :].expand_as(x) if x.dim() > 1 else x,
    "one row": lambda x: x[:1] if x.dim() else x,
    "drop": lambda x: x[0] if x.dim() and len(x) else x,
    "squeeze": lambda x: x.squeeze(),
    "more": lambda x: x.unsqueeze(0),
    "transpose": lambda x: x.mT if x.dim() > 1 else x,
    "transpose first": lambda x: x.transpose(0, 1) if x.dim() > 1 else x,
    "cut": lambda x: x[..., :-1] if x.dim() else x,
    "cut second": lambda x: x[:, :-1] if x.dim() > 1 else x,
    "one of the last": lambda x: x[..., :1] if x.dim() else x,
    "double": lambda x: torch.cat([x, x], -1) if x.dim() else x,
    "negated": lambda x: torch._neg_view(x) if x.is_floating_point() else x,
}


def changed(d, tensors):
    """The tensors with one of them changed, or cast."""
    names = [name for name, x in tensors.items() if isinstance(x, torch.Tensor)]
    name = d.data.draw(st.sampled_from(names))
    change = d.data.draw(st.sampled_from([None, *CHANGES, *KINDS]))
    if change is None:
        return tensors
    x = tensors[name]
    x = CHANGES[change](x) if change in CHANGES else x.to(change)
    return {**tensors, name: x}


def result(function, tensors, backend):
    """Outputs and gradients by a back end, or a ValueError."""
    leaves = [
        x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for x in tensors.values()
    ]
    with use_backend(backend):
        try:
            found = function(*leaves)
        except ValueError as error:
            return error
        found = [found] if isinstance(found, torch.Tensor) else list(found)
        wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
        # A mean over rows: gradients that are laid out as no tensor of their own.
        loss = sum(x.square().mean(-2 if x.dim() > 1 else ()).sum() for x in found if x.requires_grad)
        if isinstance(loss, torch.Tensor):
            found += torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    return [x.detach() for x in found]


def check(operation, data, seed):
    """One example."""
    d = Draw(data, seed)
    function, tensors = operation(d)
    tensors = changed(d, tensors)
    eager, auto = (result(function, tensors, name) for name in ("eager", "auto"))
    if isinstance(eager, ValueError):
        assert isinstance(auto, ValueError), f"only eager refuses it: {eager}"
        assert str(auto) == str(eager)
        return
    assert not isinstance(auto, ValueError), f"only auto refuses it: {auto}"
    for got, want in zip(auto, eager, strict=True):
        assert got.dtype == want.dtype
        there = want.isfinite()
        assert torch.equal(got.isfinite(), there)
        kind = torch.bfloat16 if got.dtype == torch.bfloat16 else d.dtype
        assert_close("result", got.where(there, 0), want.where(there, 0), kind)


SILENT = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=SILENT)
@given(st.data(), st.integers(0, 2**31))
def test_back_ends_agree(operation, data, seed):
    check(operation, data, seed)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=1250, deadline=None, derandomize=True, suppress_health_check=SILENT)
@given(st.data(), st.integers(0, 2**31))
def test_back_ends_agree_on_ten_thousand_calls(operation, data, seed):
    check(operation, data, seed)
