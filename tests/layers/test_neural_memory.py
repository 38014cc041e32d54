"""The layer's options, start and refusals (its laws stand in test_laws.py)."""

import pytest
import torch

from everlong import NeuralMemory
from everlong.ops import read_neural_memory
from numerics import assert_close


def gates_of(layer, x):
    """theta, log(1 - alpha), log(eta), and theta's gate, of tokens x."""
    with layer._rows(x, None) as (_, k, _, _):
        return layer._gates(x, k, torch.float32)


def test_reads_and_continues():
    layer = NeuralMemory(hidden_size=12, num_heads=3, chunk_size=4)
    x = torch.randn(2, 9, 12)
    y, state = layer(x)
    assert y.shape == x.shape
    assert state.position == 1
    assert layer(x[:, :0], state)[0].shape == (2, 0, 12)


def test_sizes_of_the_memory():
    layer = NeuralMemory(12, 3, head_dim=5, depth=3, expansion=2)
    assert [tuple(w.weight.shape) for w in layer.memory_init] == [(3, 5, 10), (3, 10, 10), (3, 10, 5)]
    assert [tuple(w.weight.shape) for w in NeuralMemory(12, 3, depth=1).memory_init] == [(3, 4, 4)]


@pytest.mark.parametrize(
    ("options", "alpha"),
    [({}, [0.005, 0.005]), ({"forget": "last"}, [0, 0.01]), ({"unit_scale": False}, [0.01, 0.01])],
)
def test_a_fresh_layer_has_the_gates_it_was_told(options, alpha):
    options |= {"initial_alpha": 0.01, "initial_eta": 0.75, "initial_theta": 0.2}
    layer = NeuralMemory(8, 2, chunk_size=16, **options)
    (theta, log_retain, log_eta), strength = gates_of(layer, torch.zeros(1, 1, 8))
    forgotten = torch.tensor(alpha).expand_as(theta)
    assert_close("alpha", 1 - log_retain.exp(), forgotten, torch.float32)
    assert_close("eta", log_eta.exp(), torch.full_like(theta, 0.75), torch.float32)
    want = torch.tensor(layer.max_thetas) * 0.25 * 0.2
    assert_close("theta", theta, want.expand_as(theta), torch.float32)
    assert_close("strength", strength, torch.full_like(theta, 0.2), torch.float32)


def test_a_fresh_convolution_sees_four_tokens():
    layer = NeuralMemory(8, 2, conv_kernel=9)
    taps = layer.conv.weight.detach()
    assert taps[:, :5].abs().max() == 0
    assert 0.3 < taps[:, 6:].abs().max() <= 0.5
    assert NeuralMemory(8, 2, conv_kernel=1).conv.weight.abs().max() > 0.5


def test_theta_never_exceeds_its_bound():
    layer = NeuralMemory(8, 2, chunk_size=4)
    (theta, _, log_eta), _ = gates_of(layer, 1e4 * torch.randn(1, 50, 8))
    assert (theta >= 0).all()
    assert (theta <= torch.tensor(layer.max_thetas) * (1 - log_eta.exp()) + 1e-6).all()


def test_gates_are_exact_where_they_are_shut_or_open():
    """log(1 - alpha) and log(eta) without a detour over a sigmoid that has rounded to 0 or 1."""
    layer = NeuralMemory(8, 2)
    for projection, bias in ((layer.alpha_proj, 60.0), (layer.eta_proj, -60.0)):
        torch.nn.init.constant_(projection.bias, bias)
        torch.nn.init.zeros_(projection.weight)
    (_, log_retain, log_eta), _ = gates_of(layer, torch.zeros(1, 1, 8))
    assert_close("alpha", log_retain, torch.full_like(log_retain, -60.0), torch.float32)
    assert_close("eta", log_eta, torch.full_like(log_eta, -60.0), torch.float32)


def test_gates_are_computed_in_the_memory_s_type():
    torch.manual_seed(0)
    layer = NeuralMemory(8, 2).bfloat16()
    gates, strength = gates_of(layer, torch.randn(1, 50, 8).bfloat16())
    for gate in (*gates, strength):
        assert gate.dtype == torch.float32
        assert (gate != gate.bfloat16().float()).any()


def test_read_only_reads_the_open_chunk_too():
    torch.manual_seed(0)
    layer = NeuralMemory(8, 2, chunk_size=4, momentum=False, decay=False).double()
    x, more = torch.randn(1, 7, 8).double(), torch.randn(1, 5, 8).double()
    with torch.no_grad():
        layer.theta_proj.bias.fill_(3.0)
        _, state = layer(x)
        layer.read_only = True
        y, after = layer(more, state)
        assert after.position == state.position == 3
        layer.read_only = False
        layer.theta_proj.weight.zero_()
        layer.theta_proj.bias.fill_(-1e4)  # writes nothing
        assert_close("y", y, layer(more, state)[0])


def test_states_stay_in_float32_under_autocast():
    torch.manual_seed(0)
    layer = NeuralMemory(8, 2, chunk_size=4)
    x = torch.randn(1, 9, 8)
    want, _ = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = layer(x)
    assert state.dtype == torch.float32
    assert (y - want).norm() < 0.03 * want.norm()


def test_what_is_read_under_autocast_is_read_in_float32():
    torch.manual_seed(0)
    layer = NeuralMemory(8, 2, chunk_size=4)
    with torch.no_grad():
        _, state = layer(torch.randn(1, 3, 8))
        q = torch.nn.functional.normalize(torch.randn(1, 5, 2, 4), dim=-1)
        wanted = state.current()[0], read_neural_memory(q, state.weights, layer.memory_scale())
        with torch.autocast("cpu", torch.bfloat16):
            got = state.current()[0], read_neural_memory(q, state.weights, layer.memory_scale())
    assert all(torch.equal(g, w) for g, w in zip(got[0], wanted[0], strict=True))
    assert torch.equal(got[1], wanted[1])


def test_second_derivatives_of_the_layer_are_refused():
    layer = NeuralMemory(8, 2, chunk_size=4)
    x = torch.randn(1, 9, 8)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.functional.hvp(
            lambda rows: layer(rows)[0].square().sum(), x, torch.randn_like(x)
        )


def test_memory_learns_what_it_reads():
    """The point of it all: a pair read often is recalled better than before."""
    torch.manual_seed(0)
    layer = NeuralMemory(16, 1, chunk_size=1, conv_kernel=0, initial_alpha=1e-4)
    x = torch.randn(1, 1, 16)
    state = layer.initial_state(1)
    with layer._rows(x, None) as (_, k, v, _):
        pass
    errors = []
    for _ in range(30):
        recalled = read_neural_memory(k, state.weights, layer.memory_scale())
        errors.append((recalled - v).square().sum().item())
        _, state = layer(x, state)
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("not a multiple of num_heads", {"hidden_size": 8, "num_heads": 3}),
        ("num_heads", {"hidden_size": 8, "num_heads": 0}),
        ("depth must be at least 1, got 0", {"depth": 0}),
        ("expansion must be at least 1", {"expansion": 0}),
        ("chunk_size must be at least 1", {"chunk_size": 0}),
        ("conv_kernel must be at least 0", {"conv_kernel": -1}),
        ("initial_alpha must lie between 0 and 1, got 0", {"initial_alpha": 0.0}),
        ("max_learning_rate must be positive", {"max_learning_rate": 0.0}),
        ("norm_floor must be positive", {"norm_floor": 0.0}),
        (r"write_threshold must lie in \[0, 1\), got 1", {"write_threshold": 1.0}),
        ("must be a number or two, from and to", {"initial_alpha": (0.1, 0.2, 0.3)}),
    ],
)
def test_sizes_that_do_not_fit(message, options):
    with pytest.raises(ValueError, match=message):
        NeuralMemory(**{"hidden_size": 8, "num_heads": 2} | options)


def test_inputs_and_states_that_do_not_fit():
    layer = NeuralMemory(8, 2, chunk_size=4)
    with pytest.raises(ValueError, match=r"x must be \[B, T, 8\], got \[2, 3, 7\]"):
        layer(torch.randn(2, 3, 7))
    with pytest.raises(ValueError, match="chunk_size 8 instead of 4"):
        layer(torch.randn(2, 3, 8), NeuralMemory(8, 2, chunk_size=8).initial_state(2))
    with pytest.raises(ValueError, match="batch 1 but the input has batch 2"):
        layer(torch.randn(2, 3, 8), layer.initial_state(1))
    with pytest.raises(ValueError, match="belongs to another layer"):
        layer(torch.randn(2, 3, 8), NeuralMemory(8, 4, chunk_size=4).initial_state(2))
    with pytest.raises(ValueError, match="belongs to another layer"):
        layer(torch.randn(2, 3, 8), NeuralMemory(8, 2, expansion=2, chunk_size=4).initial_state(2))
    with pytest.raises(ValueError, match=r"the state is torch\.float32"):
        layer.double()(torch.randn(2, 3, 8).double(), NeuralMemory(8, 2, chunk_size=4).initial_state(2))


def test_a_state_of_another_convolution_is_refused():
    x = torch.randn(1, 5, 8)
    states = {kernel: NeuralMemory(8, 2, chunk_size=4, conv_kernel=kernel)(x)[1] for kernel in (2, 4)}
    for kernel, wrong in ((4, 2), (2, 4), (0, 4)):
        with pytest.raises(ValueError, match="convolution tail"):
            NeuralMemory(8, 2, chunk_size=4, conv_kernel=kernel)(x, states[wrong])


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_what_forgot_everything_in_its_last_layer_is_written_again(depth):
    """After 100,000 tokens of full forgetting, which leave nothing of the last layer."""
    torch.manual_seed(0)
    layer = NeuralMemory(8, 1, chunk_size=4, depth=depth, forget="last", conv_kernel=0)
    x = torch.randn(1, 4, 8)
    with torch.no_grad():
        theta = layer.theta_proj.bias.clone()
        layer.alpha_proj.bias.fill_(30.0)
        layer.theta_proj.bias.fill_(-200.0)
        state = layer(torch.randn(1, 100_000, 8))[1].close()
        assert not state.weights[-1].any()
        layer.alpha_proj.bias.fill_(-10.0)
        layer.theta_proj.bias.copy_(theta)
        with layer._rows(x, None) as (_, k, v, _):
            empty = read_neural_memory(k, state.weights, layer.memory_scale())
            state = layer(x.repeat(1, 50, 1), state)[1]
            full = read_neural_memory(k, state.weights, layer.memory_scale())
    assert (full - v).square().sum() < 0.5 * (empty - v).square().sum()
