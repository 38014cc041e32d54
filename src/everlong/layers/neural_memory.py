"""The neural memory as a layer: projections, gates and initialisation around the op."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from everlong.layers.norm import RMSNorm
from everlong.layers.weight import Gate, Layer, Started, Weight
from everlong.ops import (
    MemoryTrace,
    NeuralMemoryState,
    causal_conv_silu,
    chunk_neural_memory,
    read_neural_memory,
    trace_neural_memory,
    unit_length,
)
from everlong.ops.decay import Gates
from everlong.ops.documents import Documents
from everlong.ops.inner_mlp import NORM_EPS
from everlong.ops.recompute import recomputed
from everlong.ops.state import check_kind

GAIN = 0.5  # deviation of what comes into GELU; the means of GELU's square and its slope's there:
SQUARE, SLOPE_SQUARE = 0.0835, 0.3557
STABLE = 2.0  # step times curvature above which gradient descent overshoots more and more
BELOW = 0.1  # of what a write corrects, the share of each layer below the last
NEAR = 4  # tokens that a fresh convolution sees
ALIKE = 1 / 8  # how much two tokens' inner gradients have in common in a fresh memory, about


class MemoryOutput(NamedTuple):
    """What a memory gives: y [B, T, D], the state, how strongly each token was written in 0 ... 1
    [B, T, H, L], and what it did, where that was asked."""

    y: Tensor
    state: NeuralMemoryState
    strength: Tensor
    trace: MemoryTrace | None = None


class NeuralMemory(Layer, Started):
    """A sequence layer whose memory is a small MLP that learns while it reads (Titans v1 section 3).

    q, k, v = silu(conv(x W)), q and k of unit length, v of unit root mean square; alpha, eta, theta
    from the token, per head and per layer of the memory network; y = W_o (silu(x W_g) *
    norm(M_t(q_t))). Causal: y_t depends on x_1 ... x_t alone.

    Args:
        hidden_size: width D of x and y.
        num_heads: memories side by side, H.
        head_dim: key and value size K of a head; default hidden_size // num_heads.
        depth: layers L of the memory network, at least 1 (1 is the linear memory).
        expansion: hidden width of the memory network, in multiples of head_dim.
        chunk_size: tokens C whose inner gradients are taken at one point (1: the exact recurrence).
        conv_kernel: taps of the causal convolution after the projections; 0 leaves it out. Those
            farther back than four tokens start at zero.
        momentum, decay: False leaves out S_t or the forgetting.
        forget: "all" layers of the memory network, or the "last" alone: what finds its way through the
            others can be written again, however much was forgotten.
        residual_norm: M(x) = x + scale * LN(MLP(x)); False is the plain MLP, which may diverge.
        unit_scale: the fresh network's products have deviations of order 1, and theta is counted in
            what one write corrects of its own error (see `max_learning_rate`), most of it in the last
            layer. False: weights of variance 1 / fan-in, and one bound max_learning_rate / chunk_size *
            (1 - eta) for all layers.
        norm_floor: with unit_scale, what stands under LN's variance, as a share of the fresh
            output's: it bounds the step where the last layer's weights fade. Above 0.
        normalize_values: False takes the values as they come.
        max_learning_rate: upper end of theta. With unit_scale a token corrects at most this share of
            its own error, to first order, over 1 + (chunk_size - 1) / 8, since the gradients of a
            chunk's tokens, taken at one point, add up where they are alike.
        gate_by_key: True: theta's gate sees the key too, and so what the convolution has seen: logits
            x_t W + b + sqrt(head_dim) k_t U, U zero in a fresh layer.
        write_threshold: in [0, 1): gates of theta below it are 0, that is, nothing is written; their
            gradients are those of the gate.
        initial_alpha, initial_eta, initial_theta: values of the gates in a fresh layer, in (0, 1);
            theta's is the share of its upper end, alpha's with unit_scale what the network forgets of
            its output, shared out among the layers that forget. Two values of alpha: from the first
            head's to the last's, in equal ratios.

    Raises ValueError for sizes that do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        head_dim: int | None = None,
        depth: int = 2,
        expansion: int = 4,
        chunk_size: int = 64,
        *,
        conv_kernel: int = 4,
        momentum: bool = True,
        decay: bool = True,
        forget: str = "all",
        residual_norm: bool = True,
        unit_scale: bool = True,
        norm_floor: float = 0.7,
        normalize_values: bool = True,
        max_learning_rate: float = 1.2,
        gate_by_key: bool = False,
        write_threshold: float = 0.0,
        initial_alpha: float | Sequence[float] = 0.01,
        initial_eta: float = 0.5,
        initial_theta: float = 0.8,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if head_dim is None:
            head_dim = _divided(hidden_size, num_heads)
        _check_at_least(1, hidden_size=hidden_size, num_heads=num_heads, head_dim=head_dim)
        _check_at_least(1, depth=depth, expansion=expansion, chunk_size=chunk_size)
        _check_at_least(0, conv_kernel=conv_kernel)
        _check_options(forget, max_learning_rate, norm_floor, write_threshold, norm_eps)
        alphas = initial_gates(num_heads, initial_alpha, initial_eta, initial_theta)
        if unit_scale:
            _warn_if_unstable(initial_theta * max_learning_rate)
        self.hidden_size, self.num_heads, self.head_dim = hidden_size, num_heads, head_dim
        self.depth, self.chunk_size = depth, chunk_size
        self.momentum, self.decay = momentum, decay
        self.max_learning_rate, self.write_threshold = max_learning_rate, write_threshold
        self.value_length = math.sqrt(head_dim) if normalize_values else None
        self.read_only = False  # True: reads its state and writes nothing

        self.unit_scale = unit_scale
        self._add_projections(conv_kernel)
        self._add_gates(alphas, initial_eta, initial_theta, forget, gate_by_key)
        self._add_memory(expansion * head_dim, norm_floor if residual_norm else None)
        self.output_norm = RMSNorm(head_dim, norm_eps)
        self.gate_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.tie_queries()

    def _add_projections(self, conv_kernel: int) -> None:
        """Of queries, keys and values, and their convolution."""
        width = self.num_heads * self.head_dim
        self.q_proj = nn.Linear(self.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(self.hidden_size, width, bias=False)
        self.v_proj = nn.Linear(self.hidden_size, width, bias=False)
        self.conv = None
        if conv_kernel:
            self.conv = Weight(3 * width, conv_kernel, start=_near_taps)

    def _add_gates(
        self, alphas: Sequence[float], eta: float, theta: float, forget: str, by_key: bool
    ) -> None:
        """The gates and what a fresh one says; alphas: of each head."""
        count = self.num_heads * self.depth
        self.theta_proj = Gate(self.hidden_size, count, theta)
        self.theta_key = None
        if by_key:
            self.theta_key = Weight(self.num_heads, self.head_dim, self.depth, start=nn.init.zeros_)
        self.forgetting_layers = 1 if forget == "last" else self.depth
        shared = self.forgetting_layers if self.unit_scale else 1
        starts = [alpha / shared for alpha in alphas for _ in range(self.forgetting_layers)]
        self.alpha_proj = Gate(self.hidden_size, len(starts), starts) if self.decay else None
        self.eta_proj = Gate(self.hidden_size, count, eta) if self.momentum else None

    def _add_memory(self, hidden: int, floor: float | None) -> None:
        """The memory network's start, and theta's upper ends; floor: of LN's variance, or no LN."""
        sizes = [self.head_dim, *[hidden] * (self.depth - 1), self.head_dim]
        if self.unit_scale:
            scales = _Scales.unit(sizes, self.chunk_size, floor)
        else:
            scales = _Scales.plain(sizes, self.chunk_size)
        self.units = scales.units
        self.max_thetas = [self.max_learning_rate * step for step in scales.steps]
        self.memory_init = nn.ModuleList(
            Weight(self.num_heads, *shape, start=partial(nn.init.normal_, std=std))
            for shape, std in zip(pairwise(sizes), scales.stds, strict=True)
        )
        self.memory_scale = None
        if floor is not None:
            self.memory_scale = Weight(self.num_heads, self.head_dim, start=nn.init.ones_)

    def reset_parameters(self) -> None:
        """All parameters back to a start, queries tied."""
        super().reset_parameters()
        self.tie_queries()

    @torch.no_grad()
    def tie_queries(self, *, keep_loaded: bool = False) -> None:
        """A token's query starts as the key of the token behind it, as far as that is known: the same
        projection, and taps that lie one token later (without a convolution: its own key). So what
        followed something is found from the first step on. Nothing is changed without unit_scale,
        and with keep_loaded nothing that a checkpoint has filled.
        """
        if not self.unit_scale:
            return

        def is_kept(parameter: Tensor) -> bool:
            return keep_loaded and getattr(parameter, "_is_hf_initialized", False)

        if not is_kept(self.q_proj.weight):
            self.q_proj.weight.copy_(self.k_proj.weight)
        if self.conv is not None and not is_kept(self.conv.weight):
            q, k, _ = self.conv.weight.chunk(3)
            q[:, 1:].copy_(k[:, :-1])

    def finish_start(self) -> None:
        """The queries: the projections have started by the model's rules."""
        self.tie_queries(keep_loaded=True)

    def initial_state(self, batch_size: int, dtype: torch.dtype | None = None) -> NeuralMemoryState:
        """The memory before the first token: M_0 in every row, S_0 = 0."""
        weights = self._start()
        dtype = torch.promote_types(dtype or weights[0].dtype, torch.float32)
        # Copies: a memory is not to change when an optimizer changes where memories start.
        weights = [w.to(dtype, copy=True).expand(batch_size, *w.shape) for w in weights]
        state = NeuralMemoryState.initial(
            weights,
            self.chunk_size,
            momentum=self.momentum,
            decay=self.decay,
        )
        if self.conv is not None:
            taps = self.conv()
            tail = taps.new_zeros(batch_size, taps.shape[1] - 1, taps.shape[0])
            state = replace(state, conv_tail=tail)
        return state

    def forward(
        self,
        x: Tensor,
        state: NeuralMemoryState | None = None,
        *,
        mask: Tensor | None = None,
        restart: Tensor | None = None,
    ) -> tuple[Tensor, NeuralMemoryState]:
        """x: [B, T, D]; state: where an earlier call stopped, or None for an empty memory.

        mask: [B, T], which tokens are real: the others are not read, and get zeros. restart: [B, T],
        which real tokens start a document, with an empty memory; a row's state is that of its last
        document. Returns y [B, T, D] and the state to go on from. Any number of tokens a call.
        Raises ValueError when the state does not fit the layer or the input.
        """
        if state is not None:
            check_kind("kind", state, NeuralMemoryState)
            state.check()
        documents = None
        if mask is not None or restart is not None:
            self._check_rows(x, mask=mask, restart=restart)
            everything = torch.ones(x.shape[:2], dtype=torch.bool, device="cpu")
            real = everything if mask is None else mask.bool()
            starts = ~everything if restart is None else restart.bool().to(real.device)
            documents = Documents.of(real, starts, state is not None)
        if documents is None:
            output = self.read_write(x, state)
            return output.y, output.state
        if state is not None:
            state.check_batch(x.shape[0])
        y, states = torch.zeros_like(x), []
        for group in documents.groups():
            begin = group.begin(state)
            if begin is not None and bool(group.fresh.any()):
                begin = begin.restart(group.fresh, self.initial_state(len(group.row), x.dtype))
            output = self.read_write(group.gather(x), begin, group.lengths)
            y = y + group.scatter(output.y)
            states.append((group, output.state))
        return y, Documents.end(states)

    def read_write(
        self,
        x: Tensor,
        state: NeuralMemoryState | None = None,
        lengths: Tensor | None = None,
        trace: bool = False,
    ) -> MemoryOutput:
        """As `forward`, and how strongly each token was written.

        lengths: [B] on the CPU, the real tokens of each row, aligned left (default: all).
        trace: also report what the memory did, token by token.
        """
        state = self._checked(x, state)
        scale, report = self._scale(), None
        with self._rows(x, state.conv_tail, lengths) as (q, k, v, tail):
            gates, strength = self._gates(x, k, state.dtype)
            if self.read_only:
                gates = gates._replace(theta=torch.zeros_like(gates.theta))
                y, after = read_neural_memory(q, state.current()[0], scale), state
            else:
                y, after = chunk_neural_memory(
                    q, k, v, *gates, state=state, scale=scale, lengths=lengths
                )
        if trace:
            report = trace_neural_memory(k, v, gates, state=state, scale=scale, lengths=lengths)
        return MemoryOutput(
            self._out(y, self.gates_of(x)),
            replace(after, conv_tail=tail).known_right(),
            strength,
            report,
        )

    def read(self, q: Tensor, gate: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """y = M(q) at given weights, without writing: y [B, T, D].

        q: `queries` of the tokens, gate: `gates_of` them; [B, T, H, K].
        """
        return self._out(read_neural_memory(q, weights, self._scale()), gate)

    @contextmanager
    def queries(
        self, x: Tensor, tail: Tensor | None = None, lengths: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """q [B, T, H, K] alone, which nothing inside keeps for its gradients, and the tail of its
        convolution alone."""
        q = self.q_proj(x)
        taps = None if self.conv is None else self.conv().to(q.dtype)[: q.shape[-1]]
        with _convolved(q, taps, tail, lengths, self.head_dim, 1.0) as (q, tail):
            yield self._heads(q), tail

    def gates_of(self, x: Tensor) -> Tensor:
        """What gates the outputs of tokens x [B, T, D], before SiLU: [B, T, H, K]."""
        return self._heads(self.gate_proj(x))

    def _start(self) -> list[Tensor]:
        starts = [weight() for weight in self.memory_init]
        return [w if unit == 1 else w * unit for w, unit in zip(starts, self.units, strict=True)]

    def _scale(self) -> Tensor | None:
        return None if self.memory_scale is None else self.memory_scale()

    def _out(self, y: Tensor, gate: Tensor) -> Tensor:
        """W_o (silu(gate) * norm(y)) of what was read, y [B, T, H, K]."""
        with self.output_norm.unkept(y, gate) as normed:
            return self.o_proj(normed.flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[B, T, H K] as [B, T, H, K]."""
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def _checked(self, x: Tensor, state: NeuralMemoryState | None) -> NeuralMemoryState:
        """The state, or an empty one; refuses what does not fit."""
        if x.dim() != 3 or x.shape[2] != self.hidden_size:
            raise ValueError(f"x must be [B, T, {self.hidden_size}], got {list(x.shape)}")
        if state is None:
            return self.initial_state(x.shape[0], x.dtype)
        check_kind("kind", state, NeuralMemoryState)
        state.check_batch(x.shape[0])
        self._check_state(state)
        return state

    @staticmethod
    def _check_rows(x: Tensor, **rows: Tensor | None) -> None:
        for name, row in rows.items():
            if row is not None and row.shape != x.shape[:2]:
                raise ValueError(f"{name} must be [B, T] = {list(x.shape[:2])}, got {list(row.shape)}")

    def _check_state(self, state: NeuralMemoryState) -> None:
        """Refuse a state that is not this layer's (the op checks type and device)."""
        tail = state.conv_tail
        held = {
            "chunk_size": state.chunk_size,
            "memory weights": [list(w.shape[1:]) for w in state.weights],
            "momentum": state.momentum is not None,
            "forgetting": state.log_retain is not None,
            "convolution tail": None if tail is None else list(tail.shape[1:]),
        }
        own = {
            "chunk_size": self.chunk_size,
            "memory weights": [list(w.shape) for w in self._start()],
            "momentum": self.momentum,
            "forgetting": self.decay,
            "convolution tail": None,
        }
        if self.conv is not None:
            channels, taps = self.conv.weight.shape
            own["convolution tail"] = [taps - 1, channels]
        if held != own:
            wrong = [
                f"{name} {held[name]} instead of {own[name]}" for name in own if held[name] != own[name]
            ]
            raise ValueError(
                f"state was built with {', '.join(wrong)}: it belongs to another layer or model"
            )

    @contextmanager
    def _rows(
        self, x: Tensor, tail: Tensor | None, lengths: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """q, k, v [B, T, H, K], which nothing inside keeps for its gradients, and the convolution's
        tail."""
        rows = [self.q_proj(x), self.k_proj(x), self.v_proj(x)]
        taps = [None] * 3 if self.conv is None else self.conv().to(rows[0].dtype).chunk(3)
        tails = [None] * 3 if tail is None else tail.chunk(3, -1)
        sides = [1.0, 1.0, self.value_length]
        with ExitStack() as stack:
            pairs = []
            for row, tap, end, length in zip(rows, taps, tails, sides, strict=True):
                convolved = _convolved(row, tap, end, lengths, self.head_dim, length)
                pairs.append(stack.enter_context(convolved))
            q, k, v = (self._heads(row) for row, _ in pairs)
            ends = [end for _, end in pairs if end is not None]
            yield q, k, v, torch.cat(ends, -1) if ends else None

    def _gates(self, x: Tensor, k: Tensor, dtype: torch.dtype) -> tuple[Gates, Tensor]:
        """theta, log(1 - alpha), log(eta) as [B, T, H, L], from logits in at least float32, and the
        gate of theta; of tokens x [B, T, D] and their keys k [B, T, H, K]."""

        def logits(projection: Gate) -> Tensor:
            return projection(x).to(dtype).unflatten(-1, (self.num_heads, -1))

        writing = logits(self.theta_proj)
        if self.theta_key is not None:
            seen = torch.einsum("bthk,hkl->bthl", k.to(dtype), self.theta_key().to(dtype))
            writing = writing + math.sqrt(self.head_dim) * seen
        strength = torch.sigmoid(writing)
        if self.write_threshold:
            faint = (strength * (strength < self.write_threshold)).detach()
            strength = strength - faint
        theta = strength * strength.new_tensor(self.max_thetas)
        log_retain = log_eta = None
        if self.alpha_proj is not None:
            log_retain = F.logsigmoid(-logits(self.alpha_proj))
            log_retain = F.pad(log_retain, (self.depth - self.forgetting_layers, 0))
        if self.eta_proj is not None:
            momentum = logits(self.eta_proj)
            log_eta = F.logsigmoid(momentum)
            theta = theta * torch.sigmoid(-momentum)
        return Gates(theta, log_retain, log_eta), strength


class _Scales(NamedTuple):
    """How a memory network's layers start, and in what units.

    stds: deviations of the parameters. units: what a parameter is multiplied by to be the layer's
    weights M_0. steps: theta with which one write corrects its own error, to first order.
    """

    stds: list[float]
    units: list[float]
    steps: list[float]

    @classmethod
    def plain(cls, sizes: Sequence[int], chunk_size: int) -> "_Scales":
        """Variance 1 / fan-in and one step for all layers, whatever comes in."""
        stds = [1 / math.sqrt(size) for size in sizes[:-1]]
        return cls(stds, [1.0] * len(stds), [1 / chunk_size] * len(stds))

    @classmethod
    def unit(cls, sizes: Sequence[int], chunk_size: int, floor: float | None) -> "_Scales":
        """Products of deviation GAIN, the last one's of 1; each layer corrects its share of the error.

        floor: of LN's variance, None where there is no LN. LN's own NORM_EPS is that floor, as the last
        layer is kept in units of sqrt(NORM_EPS / floor).
        A step theta in a layer with input z changes the output by 2 theta |z|^2 |W|^2 / (1 + floor) of
        the error, |W|^2 being what the layers above make of an error on its way back. The layers below
        the last have a small share each: they make the inner loss curved, and long texts chaotic.
        """
        squares = [1.0, *(SQUARE * size for size in sizes[1:-1])]  # |z|^2; keys have unit length
        gains = [GAIN] * (len(squares) - 1) + [1.0]
        stds = [gain / math.sqrt(square) for gain, square in zip(gains, squares, strict=True)]
        units = [1.0] * len(stds)
        lower = len(stds) - 1
        below = min(BELOW, 0.5 / max(lower, 1))
        shares = [below] * lower + [1 - below * lower]
        crowd = 1 + ALIKE * (chunk_size - 1)
        back = 1.0
        steps: list[float] = []
        for share, square, std, size in reversed(
            [*zip(shares, squares, stds, sizes[:-1], strict=True)]
        ):
            steps.insert(0, share / (2 * square * back * crowd))
            back *= SLOPE_SQUARE * size * std**2
        if floor is not None:
            units[-1] = math.sqrt(NORM_EPS / floor)
            steps = [step * (1 + floor) for step in steps]
            steps[-1] *= units[-1] ** 2
        return cls(stds, units, steps)


def _convolved(
    x: Tensor,
    taps: Tensor | None,
    tail: Tensor | None,
    lengths: Tensor | None,
    size: int,
    length: float | None,
) -> AbstractContextManager[tuple[Tensor, Tensor | None]]:
    """`_conv_silu`, whose rows nothing inside keeps for its gradients."""
    return recomputed(partial(_conv_silu, lengths=lengths, size=size, length=length), x, taps, tail)


def _conv_silu(
    x: Tensor,
    taps: Tensor | None,
    tail: Tensor | None,
    lengths: Tensor | None,
    size: int,
    length: float | None,
) -> tuple[Tensor, Tensor | None]:
    """silu(conv(x)), each `size` channels at this length if given, and the tail for the next call;
    without taps there is no convolution."""
    if taps is not None:
        unit = None if length is None else size
        return causal_conv_silu(x, taps, tail, lengths, unit, length or 1.0)
    y = F.silu(x)
    if length is not None:
        y = unit_length(y.unflatten(-1, (-1, size)), length).flatten(-2)
    return y, None


@torch.no_grad()
def _near_taps(taps: Tensor) -> None:
    """The start of a convolution, [channels, taps]: a token would be lost among many others."""
    bound = 1 / math.sqrt(min(taps.shape[1], NEAR))
    nn.init.uniform_(taps, -bound, bound)
    taps[:, :-NEAR] = 0


def _divided(hidden_size: int, num_heads: int) -> int:
    """A head's size where none is given."""
    if num_heads < 1 or hidden_size % num_heads:
        raise ValueError(
            f"hidden_size ({hidden_size}) is not a multiple of num_heads ({num_heads}): "
            "change one of them or give head_dim"
        )
    return hidden_size // num_heads


def _check_at_least(least: int, **sizes: int) -> None:
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_options(
    forget: str, max_learning_rate: float, norm_floor: float, write_threshold: float, norm_eps: float
) -> None:
    if not 0 < max_learning_rate < math.inf:
        raise ValueError(f"max_learning_rate must be positive and finite, got {max_learning_rate}")
    if not 0 <= norm_eps < math.inf:
        raise ValueError(f"norm_eps must be at least 0 and finite, got {norm_eps}")
    if forget not in ("all", "last"):
        raise ValueError(f'forget must be "all" or "last", got {forget!r}')
    if not 0 < norm_floor < math.inf:
        raise ValueError(f"norm_floor must be positive and finite, got {norm_floor}")
    if not 0 <= write_threshold < 1:
        raise ValueError(f"write_threshold must lie in [0, 1), got {write_threshold}")


def _warn_if_unstable(start: float) -> None:
    """start: initial_theta x max_learning_rate, about step times curvature of a fresh memory."""
    if start > STABLE:
        warnings.warn(
            f"a fresh memory is beyond stability: initial_theta x max_learning_rate is {start:.3g}, "
            f"{STABLE:g} at most: lower one of them",
            stacklevel=3,
        )


def initial_gates(
    num_heads: int, alpha: float | Sequence[float], eta: float, theta: float
) -> list[float]:
    """Alpha of each head: the same, or from the first of two to the second, in equal ratios.

    Raises ValueError for a gate that no fresh layer can have.
    """
    alphas = [alpha] if isinstance(alpha, (int, float)) else alpha
    if not isinstance(alphas, Sequence) or len(alphas) not in (1, 2):
        raise ValueError(f"initial_alpha must be a number or two, from and to, got {alpha}")
    gates = {"initial_alpha": alphas, "initial_eta": [eta], "initial_theta": [theta]}
    for name, values in gates.items():
        for gate in values:
            if not isinstance(gate, (int, float)) or not 0 < gate < 1:
                raise ValueError(f"{name} must lie between 0 and 1, got {gate!r}")
    first, last = math.log(alphas[0]), math.log(alphas[-1])
    return [math.exp(first + (last - first) * i / max(num_heads - 1, 1)) for i in range(num_heads)]
