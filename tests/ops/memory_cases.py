"""Random inputs for the neural memory ops."""

from itertools import pairwise

import torch
import torch.nn.functional as F

from everlong.ops import NeuralMemoryState


def make_inputs(
    tokens, *, batch=2, heads=2, size=4, layers=2, expansion=2, theta=0.02, seed=0, **options
):
    """q, k, v, gates, M_0, S_0 and LN's scale in float64, as leaves that want gradients.

    theta: its upper bound. options: momentum, decay, norm (all default True).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    momentum, decay, norm = (options.get(name, True) for name in ("momentum", "decay", "norm"))
    sizes = [size, *[expansion * size] * (layers - 1), size]
    weights = [normal(batch, heads, a, b) / a**0.5 for a, b in pairwise(sizes)]
    named = {
        "q": F.normalize(normal(batch, tokens, heads, size), dim=-1),
        "k": F.normalize(normal(batch, tokens, heads, size), dim=-1),
        "v": normal(batch, tokens, heads, size),
        "theta": theta * torch.sigmoid(normal(batch, tokens, heads, layers)),
        "log_retain": F.logsigmoid(normal(batch, tokens, heads, layers) + 2) if decay else None,
        "log_eta": F.logsigmoid(normal(batch, tokens, heads, layers)) if momentum else None,
        "scale": 1 + 0.2 * normal(heads, size) if norm else None,
    }
    named |= {f"weight{i}": weight for i, weight in enumerate(weights)}
    if momentum:
        named |= {f"momentum{i}": 0.1 * normal(*weight.shape) for i, weight in enumerate(weights)}
    return {name: x if x is None else x.requires_grad_() for name, x in named.items()}


def start_state(inputs, chunk_size):
    """The state of M_0 and S_0 in `inputs`."""
    return NeuralMemoryState.initial(
        [x for name, x in inputs.items() if name.startswith("weight")],
        chunk_size,
        momentum=[x for name, x in inputs.items() if name.startswith("momentum")],
        decay=inputs["log_retain"] is not None,
    )


ROWS = ("q", "k", "v", "theta", "log_retain", "log_eta")


def run(function, inputs, state, start=0, stop=None, **keywords):
    """`function` on tokens start ... stop - 1."""
    rows = (inputs[name] for name in ROWS)
    piece = (x if x is None else x[:, start:stop] for x in rows)
    return function(*piece, state=state, scale=inputs["scale"], **keywords)
