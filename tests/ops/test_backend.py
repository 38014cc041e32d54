"""Which code does the work, and that both do the same."""

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from everlong.ops import (
    backends,
    chunk_neural_memory,
    current_backend,
    read_neural_memory,
    use_backend,
)
from everlong.ops.attention import full_attention, sliding_attention
from everlong.ops.native import build, library
from everlong.ops.neural_memory import NeuralMemoryState
from numerics import assert_close

needs_native = pytest.mark.skipif("native" not in backends(), reason="no compiler here")
CASES = [*itertools.product((1, 2, 3), (True, False), (True, False), (True, False))]


def results(backend, dtype, layers, momentum, decay, normed, chunk=5, tokens=35):
    """Outputs and every gradient of one piece of text by a back end."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        x = torch.randn(*shape, dtype=torch.float64, generator=generator) * scale
        return x.to(dtype).requires_grad_()

    q, k, v = (F.normalize(random(2, tokens, 3, 6), dim=-1) for _ in range(3))
    logits = [random(2, tokens, 3, layers) for _ in range(3)]
    widths = [6, *[10] * (layers - 1), 6]
    shapes = [(2, 3, *pair) for pair in itertools.pairwise(widths)]
    weights = [random(*shape, scale=shape[2] ** -0.5) for shape in shapes]
    surprise = [random(*shape, scale=0.1) for shape in shapes] if momentum else False
    scale = random(3, 6) if normed else None
    state = NeuralMemoryState.initial(weights, chunk, momentum=surprise, decay=decay)
    with use_backend(backend):
        y, after = chunk_neural_memory(
            q,
            k,
            v,
            0.01 * logits[0].sigmoid(),
            F.logsigmoid(logits[1] + 2) if decay else None,
            F.logsigmoid(logits[2]) if momentum else None,
            state=state,
            scale=scale,
        )
        out = [y, *after.weights, *(after.momentum or ())]
        generator.manual_seed(1)
        total = sum((x * torch.randn(x.shape, generator=generator).to(dtype)).sum() for x in out)
        used = [logits[0], *([logits[1]] if decay else []), *([logits[2]] if momentum else [])]
        used += [*weights, *(surprise or []), *([scale] if normed else [])]
        return [x.detach() for x in (*out, *torch.autograd.grad(total, used))]


@needs_native
@pytest.mark.parametrize(("layers", "momentum", "decay", "normed"), CASES)
def test_the_native_scan_is_the_eager_one(layers, momentum, decay, normed):
    case = (layers, momentum, decay, normed)
    exact = results("eager", torch.float64, *case)
    for want, got in zip(exact, results("native", torch.float64, *case), strict=True):
        assert_close("float64", got, want)
    # In float32 no further from these than the eager scan is, but for luck with so few roundings.
    single = (results(name, torch.float32, *case) for name in ("eager", "native"))
    for want, eager, native in zip(exact, *single, strict=True):
        error = [(x.double() - want).abs().max() / want.abs().max() for x in (eager, native)]
        assert error[1] <= 4 * error[0] + 1e-5


@needs_native
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("normed", [True, False])
def test_native_reading_at_given_weights(layers, normed):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    widths = [6, *[10] * (layers - 1), 6]
    weights = [random(2, 3, *pair) for pair in itertools.pairwise(widths)]
    q, scale = random(2, 70, 3, 6), random(3, 6) if normed else None
    dy = torch.randn(2, 70, 3, 6, dtype=torch.float64, generator=generator)
    found = []
    for backend in ("eager", "auto"):
        with use_backend(backend):
            y = read_neural_memory(q, weights, scale)
            given = [q, *weights, *([scale] if normed else [])]
            found.append([y, *torch.autograd.grad((y * dy).sum(), given)])
    for want, got in zip(*found, strict=True):
        assert_close("reading", got, want)


@needs_native
@pytest.mark.parametrize("window", [None, 70])
def test_native_attention_over_several_blocks(window):
    """More queries than a block has, more keys than queries, grouped heads, a prefix."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        x = torch.randn(*shape, dtype=torch.float64, generator=generator)
        return x.requires_grad_()

    q, k, v = random(2, 4, 150, 8), random(2, 2, 187, 8), random(2, 2, 187, 8)
    prefix = random(2, 2, 3, 8), random(2, 2, 3, 8)
    found = []
    for backend in ("eager", "auto"):
        with use_backend(backend):
            if window is None:
                y = full_attention(q, k, v, None, prefix)
            else:
                y = sliding_attention(q, k, v, window, None, prefix)
            inputs = [q, k, v, *prefix]
            found.append([y, *torch.autograd.grad(y.square().sum(), inputs, retain_graph=True)])
            # Gradients that are laid out otherwise: of a sum one number for all, and of a transpose.
            for loss in (y.sum(), torch.einsum("bntk,bnkt->", y, torch.ones_like(y.mT).cumsum(3))):
                found[-1] += torch.autograd.grad(loss, inputs, retain_graph=True)
    assert "Causal" not in type(found[0][0].grad_fn).__name__
    assert "CausalAttention" in type(found[1][0].grad_fn).__name__
    for want, got in zip(*found, strict=True):
        assert_close("attention", got, want)


@needs_native
@pytest.mark.parametrize("momentum", [True, False])
def test_what_the_native_scan_keeps_for_the_way_back(momentum):
    """The formula of docs/performance.md."""
    size, wide, chunk, chunks, memories = 8, 32, 16, 32, 6
    shapes = [(2, 3, size, wide), (2, 3, wide, size)]
    weights = [torch.zeros(shape).requires_grad_() for shape in shapes]
    rows = [torch.randn(2, chunks * chunk, 3, size).requires_grad_() for _ in range(3)]
    gates = [-torch.rand(2, chunks * chunk, 3, 2) for _ in range(3)]
    state = NeuralMemoryState.initial(weights, chunk, momentum=momentum)
    given = {x.untyped_storage().data_ptr() for x in (*rows, *gates, *state.tensors().values())}
    sizes = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in given:
            sizes[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with use_backend("native"), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        chunk_neural_memory(*rows, -gates[0], gates[1], gates[2] if momentum else None, state=state)
    parts = 2 if momentum else 1
    interval = 8  # the root of twice the chunks
    products = memories * chunks * chunk * (chunk + wide + parts * size)
    states = memories * (chunks // interval - 1) * parts * 2 * size * wide
    assert sorted(sizes.values())[-2:] == sorted([products, states])


def test_choosing():
    with use_backend("eager"):
        assert current_backend() == "eager"
        with use_backend("auto"):
            assert current_backend() == "auto"
        assert current_backend() == "eager"
    with pytest.raises(ValueError, match="choose one of auto, eager, native"), use_backend("fast"):
        pass


def test_choosing_for_a_process(monkeypatch):
    monkeypatch.setenv("EVERLONG_BACKEND", "slow")
    with use_backend("auto"):
        pass
    code = "from everlong.ops import current_backend; print(current_backend())"
    environment = {**os.environ, "EVERLONG_BACKEND": "eager"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "eager"


@needs_native
def test_native_refuses_what_it_cannot_read():
    x = torch.zeros(1, 4, 1, 2)
    half = NeuralMemoryState.initial([torch.zeros(1, 1, 2, 2)] * 9, 2, momentum=False, decay=False)
    theta = torch.zeros(1, 4, 1, 9)
    with use_backend("native"), pytest.raises(RuntimeError, match="8 layers at most"):
        chunk_neural_memory(x, x, x, theta, None, None, state=half)
    with use_backend("auto"):
        chunk_neural_memory(x, x, x, theta, None, None, state=half)


def test_without_a_compiler_the_eager_code_does_the_work(monkeypatch, tmp_path):
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(build, "_told", set())
    library.load.cache_clear()
    try:
        assert "native" not in backends()
        with pytest.warns(UserWarning, match="no-such-compiler .* failed"):
            y = results("auto", torch.float64, 2, True, True, True)
        want = results("eager", torch.float64, 2, True, True, True)
        assert all(torch.equal(*pair) for pair in zip(y, want, strict=True))
        with pytest.raises(RuntimeError, match="no-such-compiler"):
            results("native", torch.float64, 2, True, True, True)
    finally:
        library.load.cache_clear()
