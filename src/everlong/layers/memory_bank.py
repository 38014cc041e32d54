"""A bank of slots beside an attention: tokens read it, and write it (LM2).

E is the self-attention's output, M the bank. Whose slot is whose:

- `SlotBank`: any number of slots R for segments of any length; every token reads all slots, and at a
  segment's end every slot attends the segment's tokens.
- `PositionBank`: the paper's equations to the letter. Slot i belongs to place i of a segment, so there
  are as many slots as a segment has tokens, and the bank flows from block to block.
- `ReleasedBank`: the same, as the authors' released code has it where it differs from the paper.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from everlong.layers.attention import AttentionState, join_keys
from everlong.layers.weight import Gate, Layer, Weight
from everlong.ops.attention import causal_mask
from everlong.ops.state import State, agreed, check_kind, check_tensor


class BankWrite(NamedTuple):
    """How a segment's end wrote the slots of some rows (documents, where a call has several).

    rows: [n], which. before, after: [n, R, D], their banks. input_gate, forget_gate: [n, R, D].
    """

    rows: Tensor
    before: Tensor
    after: Tensor
    input_gate: Tensor
    forget_gate: Tensor


class BankTrace(NamedTuple):
    """What the tokens of a call did with a bank; 0 at pads.

    Where token i writes slot i: the gates and its row of the bank before and after. Where a segment's
    end writes all slots: `writes`, one for each place in the call where segments ended.
    """

    attention: Tensor  # [B, T, heads, R]  weights over slots
    output_gate: Tensor | None  # [B, T, D]   None in "released", which has none
    input_gate: Tensor | None = None  # [B, T, D]
    forget_gate: Tensor | None = None  # [B, T, D]
    before: Tensor | None = None  # [B, T, D]
    after: Tensor | None = None  # [B, T, D]
    writes: tuple[BankWrite, ...] = ()


class SlotBank(Layer):
    """R slots of width D.

        read    X = softmax(Q K^T / sqrt(d)) V     Q = E W_Q, K = M W_K, V = M W_V    (eq. 1)
                out = scale * sigmoid(X W_out) * X                                    (eqs. 2, 3)
        write   U = softmax(Q K^T / sqrt(d)) V     Q = M W_Q', K = E W_K', V = E W_V'
                M' = sigmoid(U W_in) * tanh(U) + sigmoid(U W_forget + b) * M          (eqs. 4-6)

    Args:
        hidden_size: D. num_slots: R. num_heads: heads of both attentions; divides D.
        top_k: each token reads its k best slots only; None: all.
        initial_scale: start of the scale, a number a channel; None: no scale. At 0 the bank is
            closed: out is exactly 0, until the scale learns.
        initial_forget: sigmoid(b) of a fresh bank, what a slot keeps at a segment's end.
        identity: slot r starts as row r of the identity (zeros beyond D, alike for ever), as in the
            paper; else every slot starts as a row that is learned.
    """

    def __init__(
        self,
        hidden_size: int,
        num_slots: int,
        num_heads: int = 1,
        top_k: int | None = None,
        initial_scale: float | None = None,
        initial_forget: float = 0.75,
        identity: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.top_k = num_heads, top_k
        self.shape = (num_slots, hidden_size)
        self.slots = None if identity else Weight(*self.shape, start=nn.init.normal_)
        self.q_proj, self.k_proj, self.v_proj = (_square(hidden_size) for _ in range(3))
        self.output_gate, self.input_gate = _square(hidden_size), _square(hidden_size)
        self.write_q_proj, self.write_k_proj, self.write_v_proj = (
            _square(hidden_size) for _ in range(3)
        )
        self.forget_gate = Gate(hidden_size, hidden_size, initial_forget)
        self.scale = _scale(hidden_size, initial_scale)

    def initial(self, like: Tensor) -> Tensor:
        """The bank before the first segment, [1, R, D], in float32 or better."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        if self.slots is not None:
            return self.slots().to(dtype).unsqueeze(0)
        return torch.eye(*self.shape, dtype=dtype, device=like.device).unsqueeze(0)

    def read(self, e: Tensor, bank: Tensor, trace: bool = False) -> tuple[Tensor, BankTrace | None]:
        """What each token of e [B, T, D] gets from bank [B, R, D]: [B, T, D]."""
        bank = bank.to(e.dtype)
        q, k, v = (
            _heads(x, self.num_heads) for x in (self.q_proj(e), self.k_proj(bank), self.v_proj(bank))
        )
        x, weights = _attend(q, k, v, None, self.top_k, trace)
        gate = torch.sigmoid(self.output_gate(x))
        found = None if weights is None else BankTrace(weights, gate)
        return _scaled(self.scale, gate * x), found

    def keys_and_values(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens e [B, T, D] offer to the slots: [B, heads, T, d] each."""
        return (
            _heads(self.write_k_proj(e), self.num_heads),
            _heads(self.write_v_proj(e), self.num_heads),
        )

    def write(
        self, bank: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The bank [B, R, D] after a segment of these keys and values, and the input and the forget
        gate [B, R, D]; mask: [B, 1, 1, T], which of the keys there are."""
        q = _heads(self.write_q_proj(bank.to(k.dtype)), self.num_heads)
        u = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        g_in, g_forget = torch.sigmoid(self.input_gate(u)), torch.sigmoid(self.forget_gate(u))
        return g_in * torch.tanh(u) + g_forget * bank, g_in, g_forget


class PositionRead(NamedTuple):
    """What tokens get from the bank, [B, T, D], their rows of the bank for the next block, [B, T, D],
    the state, and how, where that was asked."""

    out: Tensor
    rows: Tensor
    state: "PositionState"
    trace: BankTrace | None = None


@dataclass(frozen=True)
class PositionState(State):
    """A block's rows of the open segment: their keys and values; `pooled` [B, D]: the sum over its
    tokens that the gates of `ReleasedBank` see."""

    seen: AttentionState
    pooled: Tensor | None

    def check_fields(self) -> None:
        """Raise ValueError where the fields do not fit each other."""
        check_kind("seen", self.seen, AttentionState)
        self.seen.check()
        self.seen.check_slots(self.seen.position)
        if self.pooled is not None:
            check_tensor("pooled", self.pooled, (self.batch_size, None), self.seen.keys.device)


register_dataclass(PositionState)


class RowBank(Layer):
    """Base of the banks whose slot i belongs to place i of a segment.

    Args:
        hidden_size: D. num_slots: R, the tokens of a segment. num_heads: heads of the attention over
        the rows; divides D. top_k, initial_scale: as in `SlotBank`.
    """

    bias = False  # in Q, K, V

    def __init__(
        self,
        hidden_size: int,
        num_slots: int,
        num_heads: int = 1,
        top_k: int | None = None,
        initial_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.num_slots, self.num_heads, self.top_k = num_slots, num_heads, top_k
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(hidden_size, hidden_size, bias=self.bias) for _ in range(3)
        )
        self.scale = _scale(hidden_size, initial_scale)

    def initial_state(self, like: Tensor) -> PositionState:
        """The state of one row at a segment's start."""
        none = like.new_zeros(1, self.num_heads, 0, like.shape[-1] // self.num_heads)
        return PositionState(AttentionState(none, none, 0, None), None)

    def forward(
        self,
        e: Tensor,
        rows: Tensor,
        state: PositionState,
        lengths: Tensor | None = None,
        trace: bool = False,
    ) -> PositionRead:
        """e: the self-attention's output, [B, T, D]; rows: m, [B, T, D]. The T tokens (lengths: [B] on
        the CPU, the real ones of each row) lie in one segment."""
        raise NotImplementedError

    def _attend(
        self, e: Tensor, rows: Tensor, state: AttentionState, lengths: Tensor | None, trace: bool
    ) -> tuple[Tensor, AttentionState, Tensor | None]:
        """Token i's attention over rows j <= i of its segment: [B, T, D], the state, the weights."""
        q, k, v = (
            _heads(x, self.num_heads)
            for x in (self.q_proj(e), *(each(rows.to(e.dtype)) for each in (self.k_proj, self.v_proj)))
        )
        k, v = join_keys(state.keys, k), join_keys(state.values, v)
        mask = causal_mask(q, k.shape[2], state.position, None, plain=False)
        x, weights = _attend(q, k, v, mask, self.top_k, trace)
        if weights is not None:  # by slot instead of by key, of which a row has its own number
            slot = torch.arange(k.shape[2], device="cpu") - state.keys.shape[2]
            slot = slot + torch.as_tensor(state.position, device="cpu").view(-1, 1)
            slot = slot.clamp(0, self.num_slots - 1).to(e.device)[:, None, None]
            spread = weights.new_zeros(*weights.shape[:3], self.num_slots)
            weights = spread.scatter_add(3, slot.expand(weights.shape), weights)
        taken = e.shape[1] if lengths is None else lengths
        position = agreed((state.position + taken) % self.num_slots)
        return x, state.keep(k, v, position, lengths), weights


class PositionBank(RowBank):
    """The bank of the paper, to the letter: token i of a segment owns row m_i, and reads rows j <= i.

        X = softmax(Q K^T / sqrt(d)) V     Q = E W_Q, K = m W_K, V = m W_V    (eq. 1)
        out = scale * sigmoid(X W_out) * m                                    (eqs. 2, 3)
        m' = sigmoid(E W_in) * tanh(X) + sigmoid(X W_forget) * m              (eqs. 4-6)

    m' is m of the next block; what the last block leaves is m of the first one in the next segment.
    """

    def __init__(self, hidden_size: int, *sizes: Any, **options: Any) -> None:
        super().__init__(hidden_size, *sizes, **options)
        self.output_gate, self.input_gate, self.forget_gate = (_square(hidden_size) for _ in range(3))

    def forward(
        self,
        e: Tensor,
        rows: Tensor,
        state: PositionState,
        lengths: Tensor | None = None,
        trace: bool = False,
    ) -> PositionRead:
        """See the base class."""
        x, seen, weights = self._attend(e, rows, state.seen, lengths, trace)
        gate, g_in = torch.sigmoid(self.output_gate(x)), torch.sigmoid(self.input_gate(e))
        g_forget = torch.sigmoid(self.forget_gate(x))
        new = g_in * torch.tanh(x) + g_forget * rows
        found = None
        if weights is not None:
            found = BankTrace(weights, gate, g_in, g_forget, rows, new)
        out = _scaled(self.scale, gate * rows.to(e.dtype))
        return PositionRead(out, new, PositionState(seen, None), found)


class ReleasedBank(RowBank):
    """As `PositionBank`, with what the released code does otherwise.

        X = softmax(Q K^T / sqrt(d)) V       biases in Q, K, V
        Z = LN(m + X),  Z = LN(Z + MLP(Z))   an MLP of two ReLU layers that share one matrix
        g_in, g_forget = sigmoid(W p + W' tanh(m) + b),   p_i = mean over j <= i of relu(w * E_j)
        m' = g_in * tanh(Z) + g_forget * m,  out = scale * m'

    In that code p is the mean over the whole segment: every token sees the future. Here it is the mean
    over what a token may see. Dropout is left out.
    """

    bias = True

    def __init__(self, hidden_size: int, *sizes: Any, **options: Any) -> None:
        super().__init__(hidden_size, *sizes, **options)
        self.mlp = nn.Linear(hidden_size, hidden_size)
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.input_weight = Weight(hidden_size, start=nn.init.ones_)
        self.input_proj = nn.Linear(hidden_size, 2 * hidden_size)
        self.memory_proj = nn.Linear(hidden_size, 2 * hidden_size)
        self.gate_bias = Weight(2, start=_released_bias)

    def initial_state(self, like: Tensor) -> PositionState:
        """The state of one row at a segment's start."""
        state = super().initial_state(like)
        return replace(state, pooled=like.new_zeros(1, like.shape[-1]))

    def forward(
        self,
        e: Tensor,
        rows: Tensor,
        state: PositionState,
        lengths: Tensor | None = None,
        trace: bool = False,
    ) -> PositionRead:
        """See the base class."""
        x, seen, weights = self._attend(e, rows, state.seen, lengths, trace)
        z = self.attention_norm(rows.to(e.dtype) + x)
        z = self.mlp_norm(z + F.relu(self.mlp(F.relu(self.mlp(z)))))
        before = torch.as_tensor(state.seen.position, device="cpu").view(-1, 1)
        count = (before + 1 + torch.arange(e.shape[1], device="cpu")).to(e.device)[..., None]
        assert state.pooled is not None
        before_it = state.pooled.to(e.dtype)[:, None]
        pooled = before_it + F.relu(self.input_weight() * e).cumsum(1)
        gates = self.input_proj(pooled / count) + self.memory_proj(torch.tanh(rows.to(e.dtype)))
        bias = self.gate_bias()
        g_in, g_forget = gates.chunk(2, -1)
        g_in = torch.sigmoid(g_in + bias[0])
        g_forget = torch.sigmoid(g_forget + bias[1])
        new = g_in * torch.tanh(z) + g_forget * rows
        found = None
        if weights is not None:
            found = BankTrace(weights, None, g_in, g_forget, rows, new)
        # The sum of no token stands before the first: row b's sum is behind its lengths[b] tokens.
        sums = torch.cat([before_it, pooled], 1)
        taken = torch.as_tensor(e.shape[1] if lengths is None else lengths, device="cpu").expand(len(e))
        going_on = (torch.as_tensor(seen.position, device="cpu") > 0).to(e.device).view(-1, 1)
        last = sums[torch.arange(len(e), device=e.device), taken.to(e.device)].where(going_on, 0.0)
        out = _scaled(self.scale, new.to(e.dtype))
        return PositionRead(out, new, PositionState(seen, last), found)


def _square(size: int) -> nn.Linear:
    return nn.Linear(size, size, bias=False)


def _scale(size: int, initial: float | None) -> Weight | None:
    if initial is None:
        return None
    return Weight(size, start=partial(nn.init.constant_, val=initial))


def _scaled(scale: Weight | None, x: Tensor) -> Tensor:
    return x if scale is None else scale() * x


def _released_bias(weight: Tensor) -> None:
    with torch.no_grad():
        weight.copy_(torch.tensor([0.0, 1.0]))


def _heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, D] as [B, heads, T, d]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, top_k: int | None, trace: bool
) -> tuple[Tensor, Tensor | None]:
    """softmax(q k^T / sqrt(d)) v as [B, T, D], each query with its `top_k` best keys alone; and the
    weights [B, T, heads, R], where they are asked for. mask: True where a key may be seen."""
    if top_k is None and not trace:
        y, weights = F.scaled_dot_product_attention(q, k, v, attn_mask=mask), None
    else:
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        if top_k is not None and top_k < scores.shape[-1]:
            least = scores.topk(top_k, -1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        weights = scores.softmax(-1)
        y, weights = weights @ v, weights.transpose(1, 2)
    return y.transpose(1, 2).flatten(2), weights if trace else None
