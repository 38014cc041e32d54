"""The dual form against the per-token reference (law 2), and what the ops refuse."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_cases import make_inputs, run, start_state

from everlong.ops import (
    NeuralMemoryState,
    chunk_neural_memory,
    read_neural_memory,
    recurrent_neural_memory,
)
from numerics import assert_close, assert_states_close

CHUNK = 4
SWITCHES = [
    {"momentum": m, "decay": d, "norm": n} for m, d, n in itertools.product([True, False], repeat=3)
]


def outputs_and_gradients(function, inputs, tokens, chunk_size, first):
    """y, the final state, M_t and S_t, and the gradient of a random weighting of them all."""
    state = start_state(inputs, chunk_size)
    ys = []
    for start, stop in ((0, first), (first, tokens)):
        y, state = run(function, inputs, state, start, stop)
        ys.append(y)
    results = {"y": torch.cat(ys, 1)}
    results |= {name: x for name, x in state.tensors().items() if name != "position"}
    weights, momentum = state.current()
    results |= {f"M_t{i}": x for i, x in enumerate(weights)}
    results |= {f"S_t{i}": x for i, x in enumerate(momentum or ())}
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in results.values()
    )
    leaves = {name: x for name, x in inputs.items() if x is not None}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    results |= {
        f"d {name}": torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    return results


@pytest.mark.parametrize(
    "switches", SWITCHES, ids=lambda s: "-".join(n for n, on in s.items() if on) or "none"
)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, 2 * CHUNK + 3])
@pytest.mark.parametrize("first", [0, 2])
def test_dual_form_equals_reference(layers, tokens, first, switches):
    """Law 2: outputs, states and all input gradients, from S_0 != 0, also continued mid-chunk."""
    inputs = make_inputs(tokens, layers=layers, **switches)
    first = min(first, tokens)
    want = outputs_and_gradients(recurrent_neural_memory, inputs, tokens, CHUNK, first)
    got = outputs_and_gradients(chunk_neural_memory, inputs, tokens, CHUNK, first)
    assert want.keys() == got.keys()
    for name in want:
        assert_close(name, got[name], want[name])


@pytest.mark.parametrize("switches", [{}, {"momentum": False}, {"decay": False, "norm": False}])
@pytest.mark.parametrize("chunks", [11, 19, 34])
def test_many_chunks(switches, chunks):
    """More than a block of chunks, with states kept at every second, third and fourth of them."""
    tokens = 2 * chunks + 1
    # Small steps: with larger ones so long a text amplifies its inputs' last digit beyond the table.
    inputs = make_inputs(tokens, size=8, expansion=1, batch=1, theta=0.005, **switches)
    want = outputs_and_gradients(recurrent_neural_memory, inputs, tokens, 2, 0)
    got = outputs_and_gradients(chunk_neural_memory, inputs, tokens, 2, 0)
    for name in want:
        assert_close(name, got[name], want[name])


@pytest.mark.parametrize("switches", [{}, {"momentum": False}, {"decay": False, "norm": False}])
@pytest.mark.parametrize("chunk", [16, 37, 64, 300])
def test_large_chunks(switches, chunk):
    """Whole vectors and blocks of rows in a chunk, and what is left of them; two chunks and a part."""
    tokens = 2 * chunk + 5
    inputs = make_inputs(tokens, size=16, batch=1, heads=1, theta=0.2 / tokens, **switches)
    want = outputs_and_gradients(recurrent_neural_memory, inputs, tokens, chunk, 0)
    got = outputs_and_gradients(chunk_neural_memory, inputs, tokens, chunk, 0)
    for name in want:
        assert_close(name, got[name], want[name])


@pytest.mark.parametrize("wanted", ["q", "k", "theta", "log_eta", "scale", "weight1", "momentum0"])
def test_gradients_of_one_input_alone(wanted):
    inputs = make_inputs(9)
    (want,) = torch.autograd.grad(loss_of(inputs), inputs[wanted])
    alone = {n: x if x is None or n == wanted else x.detach() for n, x in inputs.items()}
    (got,) = torch.autograd.grad(loss_of(alone), alone[wanted])
    assert_close(wanted, got, want)


def loss_of(inputs):
    y, state = run(chunk_neural_memory, inputs, start_state(inputs, CHUNK))
    return y.square().sum() + sum(w.square().sum() for w in state.current()[0])


def test_incoming_gradients_stay_as_they_are():
    inputs = make_inputs(2 * CHUNK)
    y, state = run(chunk_neural_memory, inputs, start_state(inputs, CHUNK))
    outputs = [y, *state.weights, *state.momentum]
    grads = [torch.randn_like(x) for x in outputs]
    before = [grad.clone() for grad in grads]
    torch.autograd.grad(outputs, inputs["k"], grads)
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))


def test_a_scale_in_half_precision_has_its_gradient_summed_in_the_states_type():
    inputs = make_inputs(20 * CHUNK, theta=0.001)
    inputs = {n: x if x is None else x.detach().float() for n, x in inputs.items()}
    state = start_state(inputs, CHUNK)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        scale = inputs["scale"].bfloat16().to(dtype).requires_grad_()
        y, _ = run(chunk_neural_memory, {**inputs, "scale": scale}, state)
        (grad,) = torch.autograd.grad(y.square().sum(), scale)
        grads.append(grad)
    assert torch.equal(grads[1], grads[0].bfloat16()), "rounded once, at the end"


def test_backward_under_autocast():
    inputs = {n: x if x is None else x.detach().float() for n, x in make_inputs(9).items()}
    inputs["k"].requires_grad_()
    (want,) = torch.autograd.grad(loss_of(inputs), inputs["k"])
    with torch.autocast("cpu", torch.bfloat16):
        (got,) = torch.autograd.grad(loss_of(inputs), inputs["k"])
    assert_close("k", got, want, torch.bfloat16)


@pytest.mark.parametrize("name", ["q", "k", "v", "theta", "log_retain", "log_eta"])
def test_second_derivatives_are_refused(name):
    """At once: a second pass for chosen inputs would go round an error that waits on the graph."""
    inputs = make_inputs(9)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(loss_of(inputs), inputs[name], create_graph=True)


def test_keys_made_with_the_memory_itself():
    """The inner gradient is the weights' alone: what k owes to them is no part of it."""
    inputs = make_inputs(6)
    tied = {**inputs, "k": inputs["k"] * inputs["weight0"].sum((1, 2, 3))[:, None, None, None].tanh()}
    want, _ = run(recurrent_neural_memory, tied, start_state(tied, CHUNK))
    got, _ = run(chunk_neural_memory, tied, start_state(tied, CHUNK))
    assert_close("y", got, want)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 11), min_size=1, max_size=4), st.lists(st.integers(0, 5), max_size=4))
def test_rows_of_unequal_lengths(lengths, before):
    """Each row, at its own phase and of its own length, is read as it would be alone; gradients too."""
    batch = len(lengths)
    inputs = make_inputs(17, batch=batch)
    before = torch.tensor((before + [0] * batch)[:batch])
    counts = torch.tensor(lengths)
    _, state = run(chunk_neural_memory, inputs, start_state(inputs, CHUNK), 0, 5, lengths=before)
    y, state = run(chunk_neural_memory, inputs, state, 5, 5 + int(counts.max()), lengths=counts)
    weights = torch.randn_like(y)
    leaves = [x for x in inputs.values() if x is not None]
    got = (y * weights).sum() + sum(w.sum() for w in state.weights)
    got = torch.autograd.grad(got, leaves, allow_unused=True, materialize_grads=True)
    loss = 0
    for row in range(batch):
        alone = {n: x if n == "scale" else x[row : row + 1] for n, x in inputs.items()}
        own = start_state(alone, CHUNK)
        _, own = run(chunk_neural_memory, alone, own, 0, int(before[row]))
        want, own = run(chunk_neural_memory, alone, own, 5, 5 + lengths[row])
        assert_close("y", y[row, : lengths[row]], want[0])
        assert_states_close("state", state.select([row]).weights, own.weights)
        loss = loss + (want[0] * weights[row, : lengths[row]]).sum()
        loss = loss + sum(w.sum() for w in own.weights)
    wanted = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    for g, w in zip(got, wanted, strict=True):
        assert_close("gradient", g, w)


def test_pads_may_hold_anything():
    inputs = make_inputs(6)
    want, want_state = run(
        chunk_neural_memory, inputs, start_state(inputs, CHUNK), lengths=torch.tensor([6, 3])
    )
    names = ("q", "k", "v", "theta", "log_retain", "log_eta")
    dirty = {n: x if x is None else x.detach().clone() for n, x in inputs.items()}
    for name in names:
        dirty[name][1, 3:] = torch.nan
    dirty["k"].requires_grad_()
    y, state = run(chunk_neural_memory, dirty, start_state(dirty, CHUNK), lengths=torch.tensor([6, 3]))
    assert_close("y", y, want)
    assert_states_close("state", state, want_state)
    (grad,) = torch.autograd.grad(y.sum(), dirty["k"])
    assert grad.isfinite().all()


def test_one_tensor_as_key_and_value():
    inputs = make_inputs(6)
    y, _ = run(chunk_neural_memory, {**inputs, "v": inputs["k"]}, start_state(inputs, CHUNK))
    want, _ = run(chunk_neural_memory, {**inputs, "v": inputs["k"].clone()}, start_state(inputs, CHUNK))
    assert_close("y", y, want)


def test_chunk_of_one_is_the_exact_recurrence():
    inputs = make_inputs(5)
    want = outputs_and_gradients(recurrent_neural_memory, inputs, 5, 1, 0)
    got = outputs_and_gradients(chunk_neural_memory, inputs, 5, 1, 0)
    for name in want:
        assert_close(name, got[name], want[name])


def test_reference_by_hand():
    """One token, one linear layer, no norm: written out from the equations with plain numbers."""
    inputs = make_inputs(1, batch=1, heads=1, size=2, layers=1, norm=False)
    q, k, v = (inputs[n][0, 0, 0] for n in "qkv")
    theta, retain, eta = (inputs["theta"], inputs["log_retain"].exp(), inputs["log_eta"].exp())
    weight, momentum = inputs["weight0"][0, 0], inputs["momentum0"][0, 0]
    gradient = torch.outer(k, 2 * (k @ weight - v))
    momentum = eta.item() * momentum - theta.item() * gradient
    weight = retain.item() * weight + momentum
    y, state = run(recurrent_neural_memory, inputs, start_state(inputs, 1))
    assert_close("y", y[0, 0, 0], q @ weight)
    assert_close("M", state.weights[0][0, 0], weight)
    assert_close("S", state.momentum[0][0, 0], momentum)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("norm", [True, False])
def test_gradcheck(layers, norm):
    inputs = make_inputs(5, batch=1, heads=1, size=3, layers=layers, norm=norm)
    names = [name for name, x in inputs.items() if x is not None]

    def function(*leaves):
        given = {**inputs, **dict(zip(names, leaves, strict=True))}
        y, state = run(chunk_neural_memory, given, start_state(given, 2))
        return (y, *state.weights, *state.momentum)

    assert torch.autograd.gradcheck(function, [inputs[name] for name in names], eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("pieces", [[1] * 13, [3, 10], [5, 1, 7], [4, 4, 4, 1], [0, 13], [2, 0, 11]])
def test_any_split_gives_one_calls_outputs(pieces):
    inputs = make_inputs(13, layers=3)
    want, want_state = run(chunk_neural_memory, inputs, start_state(inputs, CHUNK))
    state, start, ys = start_state(inputs, CHUNK), 0, []
    for piece in pieces:
        y, state = run(chunk_neural_memory, inputs, state, start, start + piece)
        ys.append(y)
        start += piece
    assert_close("y", torch.cat(ys, 1), want)
    assert_states_close("state", state, want_state)


def test_rows_at_positions_of_their_own():
    """Rows of unequal lengths a call close their chunks at different steps."""
    inputs = make_inputs(13, batch=3)
    want, want_state = run(chunk_neural_memory, inputs, start_state(inputs, CHUNK))
    state, seen = start_state(inputs, CHUNK), [0, 0, 0]
    got = torch.zeros_like(want)
    for upto in ([2, 5, 0], [3, 6, 1], [13, 13, 4], [13, 13, 13]):
        counts = [b - a for a, b in zip(seen, upto, strict=True)]
        piece = {"scale": inputs["scale"]}
        for name in ("q", "k", "v", "theta", "log_retain", "log_eta"):
            rows = torch.full((3, max(counts), *inputs[name].shape[2:]), -0.5, dtype=torch.float64)
            for row, (a, b) in enumerate(zip(seen, upto, strict=True)):
                rows[row, : b - a] = inputs[name][row, a:b].detach()
            piece[name] = rows
        y, state = run(chunk_neural_memory, piece, state, lengths=torch.tensor(counts))
        for row, (a, b) in enumerate(zip(seen, upto, strict=True)):
            got[row, a:b] = y[row, : b - a]
            assert not y[row, b - a :].any(), "rows read zeros after their end"
        seen = upto
    assert_close("y", got, want)
    assert_states_close("state", state, want_state)


def test_read_does_not_write():
    inputs = make_inputs(6)
    y, state = run(chunk_neural_memory, inputs, start_state(inputs, CHUNK))
    weights, _ = state.current()
    assert_close("last y", read_neural_memory(inputs["q"], weights, inputs["scale"])[:, -1], y[:, -1])


def test_float32_state_for_bfloat16_rows():
    inputs = {n: x if x is None else x.detach().float() for n, x in make_inputs(9).items()}
    state = start_state(inputs, CHUNK)
    want, _ = run(chunk_neural_memory, inputs, state)
    half = {n: x.bfloat16() if n in ("q", "k", "v") else x for n, x in inputs.items()}
    y, state = run(chunk_neural_memory, half, state)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    assert_close("y", y, want, torch.bfloat16)


def refuse(message, change, **keywords):
    inputs = {n: x if x is None else x.detach() for n, x in make_inputs(3).items()}
    state = start_state(inputs, CHUNK)
    inputs, state = change(inputs, state)
    for function in (recurrent_neural_memory, chunk_neural_memory):
        with pytest.raises(ValueError, match=message):
            run(function, inputs, state, **(keywords if function is chunk_neural_memory else {}))


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("built for batch 1 but the input has batch 2: take rows", lambda i, s: (i, s.select([0]))),
        ("q, k, v must agree", lambda i, s: ({**i, "k": i["k"][:, :2]}, s)),
        ("q, k, v must agree", lambda i, s: ({**i, "v": i["v"][..., :1]}, s)),
        ("q, k, v must agree", lambda i, s: ({**i, "q": i["q"][0]}, s)),
        ("scale must be", lambda i, s: ({**i, "scale": i["scale"][:1]}, s)),
        ("theta must be", lambda i, s: ({**i, "theta": i["theta"][:, :2]}, s)),
        (
            "log_eta is absent but the state was started with it",
            lambda i, s: ({**i, "log_eta": None}, s),
        ),
        ("belongs to another layer", lambda i, s: (i, start_state(make_inputs(1, heads=1), CHUNK))),
        ("belongs to another layer", lambda i, s: (i, start_state(make_inputs(1, size=2), CHUNK))),
        (
            "3 layers but the gates are for 2",
            lambda i, s: (i, start_state(make_inputs(1, layers=3), CHUNK)),
        ),
        (
            "the state is torch.float32",
            lambda i, s: (i, s.map(lambda t: t.float() if t.is_floating_point() else t)),
        ),
        ("state is on meta", lambda i, s: (i, s.to("meta"))),
    ],
)
def test_states_and_shapes_that_do_not_fit(message, change):
    refuse(message, change)


def test_lengths_out_of_range():
    inputs = make_inputs(3)
    with pytest.raises(ValueError, match="lengths must be"):
        run(chunk_neural_memory, inputs, start_state(inputs, CHUNK), lengths=torch.tensor([4, 1]))


def test_chunk_size_must_be_positive():
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        NeuralMemoryState.initial([torch.zeros(1, 1, 2, 2)], 0)
