"""What has to be right before anything is timed.

Each back end of the op has to equal the per-token reference in outputs, states and gradients, and a
model has to read a text in pieces as it reads it at once.
"""

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

FLOAT64, FLOAT32 = "float64", "float32"
TOLERANCES = {FLOAT64: 1e-10, FLOAT32: 1e-3}  # relative to the largest value of a tensor
READING_TOLERANCE = 1e-3  # float32, of the logits and gradients of small models


def backends(device: str = "cpu") -> tuple[str, ...]:
    """Names of the back ends of the op that work there, without the choice among them."""
    from everlong import ops

    if device != "cpu":
        return ("eager",)
    return tuple(name for name in ops.backends() if name != "auto")


def check_op(device: str) -> dict[str, float]:
    """The largest error of each back end, type and depth. Ends the program if one is too large."""
    errors = {}
    for depth in (1, 2, 3):
        for name in backends(device):
            for dtype in TOLERANCES:
                errors[f"{name}, {dtype}, depth {depth}"] = op_error(name, dtype, depth, device)
    return gate(errors, lambda what: TOLERANCES[FLOAT64 if FLOAT64 in what else FLOAT32])


def check_reading(kinds: Sequence[str], device: str) -> dict[str, float]:
    """The same of models of these kinds, read in pieces and at once."""
    errors = {kind: reading_error(kind, device) for kind in kinds}
    return gate(errors, lambda what: READING_TOLERANCE)


def gate(errors: dict[str, float], tolerance: Callable[[str], float]) -> dict[str, float]:
    """The errors, if all are small enough; NaN is not."""
    wrong = [what for what, error in errors.items() if not error <= tolerance(what)]
    if wrong:
        for what in wrong:
            print(f"{what}: error {errors[what]:.1e}, at most {tolerance(what):.0e}", file=sys.stderr)
        sys.exit("wrong results: nothing was timed")
    print(
        f"Checked against the reference: {len(errors)} cases, largest error {max(errors.values()):.0e}"
    )
    return errors


def op_error(backend: str, dtype: str, depth: int, device: str) -> float:
    """The dual form in a type against the reference in float64, both on the same numbers."""
    from everlong.ops import chunk_neural_memory, recurrent_neural_memory, use_backend

    inputs = op_inputs(dtype, depth, device)
    want = op_results(recurrent_neural_memory, [tensor.double() for tensor in inputs], depth)
    with use_backend(backend):
        got = op_results(chunk_neural_memory, inputs, depth)
    return largest_error(got, want)


def op_inputs(dtype: str, depth: int, device: str) -> list[Any]:
    """q, k, v, three gates' logits, scale, weights, momentum: two whole chunks and a bit."""
    import torch

    generator = torch.Generator().manual_seed(0)
    batch, heads, size, hidden, tokens = 2, 2, 16, 32, 2 * 16 + 3
    sizes = [size, *[hidden] * (depth - 1), size]

    def random(*dims: int, scale: float = 1.0) -> torch.Tensor:
        values = scale * torch.randn(*dims, dtype=torch.float64, generator=generator)
        return values.to(device, getattr(torch, dtype))

    shapes = [(batch, heads, *pair) for pair in pairwise(sizes)]
    return [
        *[random(batch, tokens, heads, size, scale=size**-0.5) for _ in range(3)],
        *[random(batch, tokens, heads, depth) for _ in range(3)],
        random(heads, size),
        *[random(*dims, scale=dims[2] ** -0.5) for dims in shapes],
        *[random(*dims, scale=0.1) for dims in shapes],
    ]


def op_results(function: Callable[..., Any], inputs: Sequence[Any], depth: int) -> list[Any]:
    """Outputs, the state at the end, and the gradients of all inputs."""
    import torch

    from everlong.ops import NeuralMemoryState

    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    q, k, v, theta, log_retain, log_eta, scale, *states = inputs
    y, state = function(
        q,
        k,
        v,
        0.05 * theta.sigmoid(),
        torch.nn.functional.logsigmoid(log_retain + 3),
        torch.nn.functional.logsigmoid(log_eta),
        state=NeuralMemoryState.initial(states[:depth], 16, momentum=states[depth:]),
        scale=scale,
    )
    memory, surprise = state.current()
    results = [y, *memory, *surprise]
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (r * torch.randn(r.shape, dtype=torch.float64, generator=generator).to(r.device, r.dtype)).sum()
        for r in results
    )
    return [*results, *torch.autograd.grad(total, inputs)]


def largest_error(got: Sequence[Any], want: Sequence[Any]) -> float:
    """The largest difference, relative to the largest value of the tensor it is in."""
    import torch

    errors = [
        (g.detach().double() - w.detach().double()).abs().max()
        / w.detach().abs().max().clamp(min=1e-30)
        for g, w in zip(got, want, strict=True)
    ]
    return float(torch.stack(errors).max())  # which keeps NaN, unlike Python's max


def reading_error(kind: str, device: str) -> float:
    """A small model of a kind: logits of a text read in pieces in float64, and gradients of one read at
    once in float64, against the same of the model at once in float32."""
    import copy

    import torch

    from contenders import TINY_SIZES, build_model

    torch.manual_seed(0)
    model = build_model(kind, TINY_SIZES).to(device).train()
    exact = copy.deepcopy(model).double()
    ids = torch.randint(TINY_SIZES.vocabulary, (2, 75), device=device)
    logits = model(ids, use_cache=False).logits
    cache, pieces = None, []
    with torch.inference_mode():
        for piece in ids.split([1, 30, 1, 4, 39], 1):
            out = exact(piece, past_key_values=cache, use_cache=True)
            cache, _ = out.past_key_values, pieces.append(out.logits)
    got, want = [logits], [torch.cat(pieces, 1)]
    for each, found in ((model, got), (exact, want)):
        loss = each(ids, labels=ids, use_cache=False).loss
        total = torch.autograd.grad(loss, list(each.parameters()))
        found.append(torch.cat([gradient.flatten() for gradient in total]))
    return largest_error(got, want)
