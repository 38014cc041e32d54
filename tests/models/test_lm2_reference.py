"""LM2's banks in float64 against their equations, written out for one sequence.

Llama's norms and angles round to float32, so they are taken out here: what is left is attention inside
segments and the banks. The rest of the model is held by the laws.
"""

import math

import pytest
import torch
from torch import nn

from everlong.models import LM2Config
from everlong.models.modeling_lm2 import LM2Model
from numerics import assert_close

SEGMENT, WIDTH = 5, 8


class NoAngles(nn.Module):
    def forward(self, x, positions):
        shape = (*positions.shape, WIDTH // 2)
        return torch.ones(shape, dtype=x.dtype), torch.zeros(shape, dtype=x.dtype)


class Nothing(nn.Module):
    def forward(self, x):
        return torch.zeros_like(x)


def make(**options):
    config = LM2Config(
        **{
            "vocab_size": 3,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "segment_length": SEGMENT,
            "intermediate_size": 4,
        }
        | options
    )
    torch.manual_seed(0)
    model = LM2Model(config)
    for layer in model.layers:
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()
        layer.mlp = Nothing()
    model.norm, model.rotary_emb = nn.Identity(), NoAngles()
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def attend(q, k, v, heads, seen=None, top_k=None):
    """softmax(q k^T / sqrt(d)) v, head by head, row by row; seen[i]: the keys that row i sees."""
    out = torch.zeros(len(q), v.shape[1], dtype=q.dtype)
    size = q.shape[1] // heads
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for i, row in enumerate(q):
            keys = list(range(len(k))) if seen is None else seen[i]
            scores = torch.stack([row[part] @ k[j, part] for j in keys]) / math.sqrt(size)
            if top_k is not None:
                best = scores.argsort(descending=True)[:top_k].tolist()
                keys, scores = [keys[n] for n in best], scores[best]
            weights = torch.softmax(scores, 0)
            mixed = sum(w * v[j, part] for w, j in zip(weights, keys, strict=True))
            out = out + torch.zeros_like(out).index_put(
                (torch.tensor([i]), torch.arange(part.start, part.stop)), mixed
            )
    return out


def self_attention(layer, x):
    own = layer.self_attn
    q, k, v = (x @ p.weight.T for p in (own.q_proj, own.k_proj, own.v_proj))
    causal = [list(range(i + 1)) for i in range(len(x))]
    return attend(q, k, v, 2, causal) @ own.o_proj.weight.T


def slots(model, x):
    """Layer by layer, segment by segment."""
    heads, top_k = model.config.num_memory_heads, model.config.memory_top_k
    for layer in model.layers:
        bank, outputs = layer.memory, []
        m = bank.slots.weight
        for part in x.split(SEGMENT):
            e = self_attention(layer, part)
            q, k, v = (e @ bank.q_proj.weight.T, m @ bank.k_proj.weight.T, m @ bank.v_proj.weight.T)
            found = attend(q, k, v, heads, top_k=top_k)
            gated = torch.sigmoid(found @ bank.output_gate.weight.T) * found
            outputs.append(part + e + (gated if bank.scale is None else bank.scale.weight * gated))
            if len(part) == SEGMENT:
                q = m @ bank.write_q_proj.weight.T
                k, v = e @ bank.write_k_proj.weight.T, e @ bank.write_v_proj.weight.T
                u = attend(q, k, v, heads)
                g_in = torch.sigmoid(u @ bank.input_gate.weight.T)
                g_forget = torch.sigmoid(u @ bank.forget_gate.weight.T + bank.forget_gate.bias)
                m = g_in * torch.tanh(u) + g_forget * m
        x = torch.cat(outputs)
    return x


def positions(model, x):
    """Segment by segment, T = R: the paper's equations as they stand, with the causal mask."""
    heads, top_k = model.config.num_memory_heads, model.config.memory_top_k
    m, outputs = torch.eye(SEGMENT, WIDTH, dtype=x.dtype), []
    for part in x.split(SEGMENT):
        own, left = m[: len(part)], m[len(part) :]
        causal = [list(range(i + 1)) for i in range(len(part))]
        for layer in model.layers:
            bank = layer.memory
            e = self_attention(layer, part)
            q, k, v = e @ bank.q_proj.weight.T, own @ bank.k_proj.weight.T, own @ bank.v_proj.weight.T
            e_mem = attend(q, k, v, heads, causal, top_k)
            g_out = torch.sigmoid(e_mem @ bank.output_gate.weight.T)
            part = part + e + g_out * own
            g_in = torch.sigmoid(e @ bank.input_gate.weight.T)
            g_forget = torch.sigmoid(e_mem @ bank.forget_gate.weight.T)
            own = g_in * torch.tanh(e_mem) + g_forget * own
        outputs.append(part)
        m = torch.cat([own, left])
    return torch.cat(outputs)


def released(model, x):
    """As `positions`, as the released code computes it, the mean over what a token may see."""
    heads = model.config.num_memory_heads
    m, outputs = torch.eye(SEGMENT, WIDTH, dtype=x.dtype), []
    norm = torch.nn.functional.layer_norm
    for part in x.split(SEGMENT):
        own, left = m[: len(part)], m[len(part) :]
        causal = [list(range(i + 1)) for i in range(len(part))]
        for layer in model.layers:
            bank = layer.memory
            e = self_attention(layer, part)
            q, k, v = (
                rows @ p.weight.T + p.bias
                for rows, p in ((e, bank.q_proj), (own, bank.k_proj), (own, bank.v_proj))
            )
            z = own + attend(q, k, v, heads, causal)
            z = norm(z, (WIDTH,), bank.attention_norm.weight, bank.attention_norm.bias)
            hidden = z
            for _ in range(2):
                hidden = torch.relu(hidden @ bank.mlp.weight.T + bank.mlp.bias)
            z = norm(z + hidden, (WIDTH,), bank.mlp_norm.weight, bank.mlp_norm.bias)
            seen = torch.relu(bank.input_weight.weight * e)
            means = torch.stack([seen[: i + 1].mean(0) for i in range(len(part))])
            gates = means @ bank.input_proj.weight.T + bank.input_proj.bias
            gates = gates + torch.tanh(own) @ bank.memory_proj.weight.T + bank.memory_proj.bias
            b_in, b_forget = bank.gate_bias.weight
            g_in = torch.sigmoid(gates[:, :WIDTH] + b_in)
            own = g_in * torch.tanh(z) + torch.sigmoid(gates[:, WIDTH:] + b_forget) * own
            part = part + e + own
        outputs.append(part)
        m = torch.cat([own, left])
    return torch.cat(outputs)


CASES = {
    "slots": (slots, {"num_memory_slots": 3}),
    "slots, more than a segment": (slots, {"num_memory_slots": 7, "initial_memory_scale": 0.5}),
    "slots, top 2, 2 heads": (
        slots,
        {"num_memory_slots": 4, "memory_top_k": 2, "num_memory_heads": 2},
    ),
    "positions": (positions, {"memory_addressing": "positions"}),
    "positions, 2 heads": (positions, {"memory_addressing": "positions", "num_memory_heads": 2}),
    "released": (released, {"memory_addressing": "released", "num_memory_heads": 2}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [SEGMENT, 2 * SEGMENT, 3 * SEGMENT + 2])
def test_outputs_and_gradients_equal_the_equations(case, tokens):
    reference, options = CASES[case]
    model = make(**options)
    x = torch.randn(tokens, WIDTH, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(tokens, WIDTH, dtype=torch.float64)
    leaves = {"x": x, **{n: p for n, p in model.named_parameters() if "embed" not in n}}
    want = reference(model, x)
    got = model(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]
    assert_close("y", got, want)
    wanted = torch.autograd.grad((want * weights).sum(), leaves.values(), allow_unused=True)
    grads = torch.autograd.grad((got * weights).sum(), leaves.values(), allow_unused=True)
    for name, grad, want_grad in zip(leaves, grads, wanted, strict=True):
        if grad is not None and want_grad is not None:
            assert_close(name, grad, want_grad)
        else:
            assert all(g is None or not g.any() for g in (grad, want_grad)), name
