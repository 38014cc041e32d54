"""Whether the memories of a model are healthy: scales, stability and gradients, measured on a text."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong.layers import NeuralMemory
from everlong.layers.neural_memory import STABLE
from everlong.ops import NeuralMemoryState
from everlong.ops.inner_mlp import NORM_EPS

ITERATIONS = 20
PIECES = 16  # of a text, for gradients by distance
LARGE = 10.0  # products, and their spread over the floor, are healthy below it


@dataclass(frozen=True)
class MemoryHealth:
    """One memory at one chunk of the text; means over rows, heads and the chunk's tokens.

    products: root mean square of each layer's product z W; GELU is curved where it is about 1.
    spread_over_floor: variance of the last product over the floor in LayerNorm; far below 1 the norm is
        a straight line and far above 1 forgetting makes steps longer and longer.
    value_over_output: |v| over |M(k)|; an output that cannot be as long as v leaves an error for ever.
    step_times_curvature: largest eigenvalue, over rows and heads, of the Hessian of the chunk's inner
        loss, each token's part times its step theta / (1 - eta). Above 2 the chunk overshoots.
    loss_before, loss_after: |M(k) - v|^2 of the chunk's tokens, before it is written and after.
    """

    name: str
    chunk: int
    products: list[float]
    spread_over_floor: float
    value_over_output: float
    step_times_curvature: float
    loss_before: float
    loss_after: float


@dataclass(frozen=True)
class Health:
    """memories: each at the first and at the last whole chunk of the text. gradients: (tokens back,
    norm): the gradient of the loss on the last piece of the text with respect to all memories' weights
    so many tokens before the text's end."""

    memories: list[MemoryHealth]
    gradients: list[tuple[int, float]]

    def problems(self) -> list[str]:
        """What is not as it should be, in words; none where all is well."""
        found = []
        for each in self.memories:
            where = f"{each.name}, chunk {each.chunk}"
            _, _, products, *figures = astuple(each)
            if not all(map(math.isfinite, [*products, *figures])):
                found.append(f"{where}: not all of it is finite")
                continue
            if max(each.products, default=0) > LARGE:
                found.append(
                    f"{where}: products of {max(each.products):.2g}, above {LARGE:g}: GELU is off for "
                    "half of them"
                )
            if each.spread_over_floor > LARGE:
                found.append(
                    f"{where}: the spread is {each.spread_over_floor:.2g} times the floor, above "
                    f"{LARGE:g}: forgetting makes steps longer"
                )
            if each.step_times_curvature > STABLE:
                found.append(
                    f"{where}: step times curvature is {each.step_times_curvature:.2g}, above "
                    f"{STABLE:g}: lower max_memory_learning_rate or initial_theta"
                )
            if each.loss_after > each.loss_before:
                found.append(
                    f"{where}: writing raises the inner loss from {each.loss_before:.3g} to "
                    f"{each.loss_after:.3g}"
                )
            if each.value_over_output > 3:
                found.append(
                    f"{where}: values are {each.value_over_output:.2g} times as long as what the "
                    "memory puts out: it is empty, or cannot reach them"
                )
        norms = [norm for _, norm in self.gradients if norm > 0 or math.isnan(norm)]
        if norms and not norms[-1] <= 10 * norms[0]:
            found.append(f"gradients grow on the way back: {norms[0]:.2g} to {norms[-1]:.2g}")
        return found

    def __str__(self) -> str:
        rows = [
            f"{each.name:<28} {each.chunk:>6} {' '.join(f'{p:.2f}' for p in each.products):>12} "
            f"{each.spread_over_floor:>8.2f} {each.value_over_output:>8.2f} "
            f"{each.step_times_curvature:>8.2f} {each.loss_before:>9.3g} {each.loss_after:>9.3g}"
            for each in self.memories
        ]
        heads = (
            f"{'memory':<28} {'chunk':>6} {'products':>12} {'spread':>8} {'v/M(k)':>8} {'step*cur':>8}"
        )
        back = ", ".join(f"{norm:.2g} at {tokens}" for tokens, norm in self.gradients)
        lines = [f"{heads} {'before':>9} {'after':>9}", *rows, f"gradients, by tokens back: {back}"]
        return "\n".join([*lines, *self.problems()])


def memory_health(model: nn.Module, input_ids: Tensor) -> Health:
    """Measure a model's neural memories on a text, input_ids [B, T], as it evaluates, gradients uncut.

    Raises ValueError where the model has no neural memory, or the text is shorter than two chunks.
    """
    memories = {n: m for n, m in model.named_modules() if isinstance(m, NeuralMemory)}
    if not memories:
        raise ValueError(f"{type(model).__name__} has no neural memory")
    longest = max(memory.chunk_size for memory in memories.values())
    if input_ids.dim() != 2 or input_ids.shape[1] < 2 * longest:
        raise ValueError(
            f"input_ids must be [B, T] of at least two chunks, T = {2 * longest}, got "
            f"{list(input_ids.shape)}"
        )
    with _evaluating(model):
        with _calls(model, memories.values()) as calls, torch.no_grad():
            model(input_ids)
        gradients = _gradients(model, input_ids)
    found = []
    for name, memory in memories.items():
        whole = [call for call in calls[memory] if call[0].shape[1] >= memory.chunk_size]
        (x, state), (last_x, last_state) = whole[0], whole[-1]
        chunks = last_x.shape[1] // memory.chunk_size - 1
        count = sum(call[0].shape[1] // memory.chunk_size for call in whole)
        found.append(_measure(name, memory, x, state, 0, 0))
        found.append(_measure(name, memory, last_x, last_state, chunks, count - 1))
    return Health(found, gradients)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation, without a cut of gradients; afterwards as it was."""
    training = [module for module in model.modules() if module.training]
    config = getattr(model, "config", None)
    cut = getattr(config, "backprop_segments", None)
    try:
        model.eval()
        if cut:
            config.backprop_segments = None  # type: ignore[union-attr]
        yield
    finally:
        for module in training:
            module.training = True
        if cut:
            config.backprop_segments = cut  # type: ignore[union-attr]


@contextmanager
def _calls(model: nn.Module, memories: Any) -> Iterator[dict[NeuralMemory, list[tuple[Tensor, Any]]]]:
    """What each memory is called with, in the block; but not what it absorbs before the text."""
    calls: dict[NeuralMemory, list[tuple[Tensor, Any]]] = {memory: [] for memory in memories}
    owners = [m for m in model.modules() if getattr(m, "memory", None) in calls]

    def noting(memory: NeuralMemory) -> Any:
        read_write = memory.read_write

        def noted(x: Tensor, state: Any = None, *args: Any, **kwargs: Any) -> Any:
            calls[memory].append((x, state))
            return read_write(x, state, *args, **kwargs)

        return noted

    def aside(owner: Any) -> Any:
        initial_state = owner.initial_state

        def begun(*args: Any) -> Any:
            known = len(calls[owner.memory])
            state = initial_state(*args)
            del calls[owner.memory][known:]
            return state

        return begun

    try:
        for memory in calls:
            memory.read_write = noting(memory)  # type: ignore[method-assign]
        for owner in owners:
            owner.initial_state = aside(owner)
        yield calls
    finally:
        for memory in calls:
            vars(memory).pop("read_write", None)
        for owner in owners:
            vars(owner).pop("initial_state", None)


def _measure(
    name: str, memory: NeuralMemory, x: Tensor, state: Any, index: int, chunk: int
) -> MemoryHealth:
    """The chunk of this index of a call with x and state; chunk: its number in the text."""
    size = memory.chunk_size
    with torch.no_grad():
        state = memory._checked(x, state)
        if not isinstance(state.position, int) or state.position:
            state = state.close()
        if index:
            state = memory.read_write(x[:, : index * size], state).state
        x = x[:, index * size : (index + 1) * size]
        with memory._rows(x, state.conv_tail) as (_, k, v, _):
            (theta, _, log_eta), _ = memory._gates(x, k, state.dtype)
            k, v = (row.transpose(1, 2).to(state.dtype) for row in (k, v))
        after = memory.read_write(x, state).state
    steps = theta if log_eta is None else theta / -torch.expm1(log_eta)
    scale = memory._scale()
    scale = None if scale is None else scale.detach().to(state.dtype).unsqueeze(-2)
    weights = [w.detach() for w in state.weights]
    products, output = _forward(k, weights, scale)
    written = _forward(k, [w.detach() for w in after.weights], scale)[1]
    last = products[-1].var(-1, unbiased=False).mean() / NORM_EPS
    return MemoryHealth(
        name,
        chunk,
        [float(product.square().mean().sqrt()) for product in products[:-1]],
        float(last),
        float(v.norm(dim=-1).mean() / output.norm(dim=-1).mean()),
        _step_times_curvature(k, v, weights, scale, steps.transpose(1, 2)),
        float((output - v).square().sum(-1).mean()),
        float((written - v).square().sum(-1).mean()),
    )


def _forward(k: Tensor, weights: Sequence[Tensor], scale: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """The layers' products and M(k), of k [B, H, C, K]."""
    products, hidden = [], k
    for index, weight in enumerate(weights):
        hidden = (F.gelu(hidden) if index else hidden) @ weight
        products.append(hidden)
    if scale is not None:
        hidden = k + scale * F.layer_norm(hidden, hidden.shape[-1:], eps=NORM_EPS)
    return products, hidden


@torch.enable_grad()
def _step_times_curvature(
    k: Tensor, v: Tensor, weights: Sequence[Tensor], scale: Tensor | None, steps: Tensor
) -> float:
    """The largest eigenvalue of the Jacobian of a step, sum_t theta_t u_t, by power iteration; steps:
    [B, H, C, L]."""
    leaves = [w.clone().requires_grad_() for w in weights]
    products, output = _forward(k, leaves, scale)
    errors = torch.autograd.grad((output - v).square().sum(), products, create_graph=True)
    inputs = [k, *map(F.gelu, products[:-1])]
    step = [
        (z * steps[..., i, None]).mT @ error
        for i, (z, error) in enumerate(zip(inputs, errors, strict=True))
    ]
    # The way back is linear in what comes in: its own way back is the way forward, J times u.
    given = [torch.zeros_like(x, requires_grad=True) for x in step]
    back = torch.autograd.grad(step, leaves, given, create_graph=True)
    vector = [torch.randn_like(w) * w.square().mean().sqrt() for w in weights]
    for _ in range(ITERATIONS):
        length = _length(vector).clamp(min=1e-30)
        vector = [x / length for x in vector]
        vector = [x.detach() for x in torch.autograd.grad(back, given, vector, retain_graph=True)]
    return float(_length(vector).max())


def _length(vector: Sequence[Tensor]) -> Tensor:
    """[B, H, 1, 1]."""
    squares = [x.square().sum((-1, -2), keepdim=True) for x in vector]
    return torch.stack(squares).sum(0).sqrt()


def _gradients(model: nn.Module, input_ids: Tensor) -> list[tuple[int, float]]:
    """(tokens back, norm of the last piece's loss by all memories' weights there), nearest first."""
    size = -(-input_ids.shape[1] // PIECES)
    pieces = list(input_ids.split(size, 1))
    if pieces[-1].shape[1] == 1:  # in which nothing is predicted
        pieces[-2:] = [torch.cat(pieces[-2:], 1)]
    cache: Any = None
    held: list[list[Tensor]] = []
    with torch.enable_grad():
        for piece in pieces:
            if cache is not None:
                held.append([x for x in _weights(cache) if x.requires_grad])
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
        logits = out.logits[:, :-1].flatten(0, 1)
        if not len(logits):
            return []
        loss = F.cross_entropy(logits.float(), pieces[-1][:, 1:].flatten())
    flat = [x for tensors in held for x in tensors]
    grads = iter(torch.autograd.grad(loss, flat, allow_unused=True))
    norms = []
    for count, tensors in enumerate(held, 1):
        found = [grad for _, grad in zip(tensors, grads, strict=False) if grad is not None]
        if found:
            squares = torch.stack([grad.double().square().sum() for grad in found])
            norms.append((input_ids.shape[1] - count * size, float(squares.sum().sqrt())))
    return sorted(norms)


def _weights(cache: Any) -> list[Tensor]:
    """The memories' weights in a cache."""
    found: list[Tensor] = []
    for layer in cache.layers:
        states = [layer.state, getattr(layer.state, "memory", None)]
        for state in states:
            if isinstance(state, NeuralMemoryState):
                found.extend(state.weights)
    return found
