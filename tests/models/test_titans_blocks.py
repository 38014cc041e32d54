"""Law 2 for whole blocks: attention, memory and gates against the token-by-token reference."""

import pytest
import torch
from titans_reference import REFERENCES

from everlong import TitansConfig
from everlong.models.configuration_titans import OLDER
from everlong.models.titans_blocks import BLOCKS
from numerics import assert_close

SWITCHES = {
    "": {},
    "linear": {"memory_depth": 1},
    "deep": {"memory_depth": 3},
    "no conv": {"conv_kernel": 0},
    "no momentum": {"memory_momentum": False},
    "no decay": {"memory_decay": False},
    "no persistent tokens": {"num_persistent_tokens": 0},
    "more persistent tokens than a chunk": {"num_persistent_tokens": 5},
    "the last layer alone forgets": {"memory_forget": "last"},
    "a gate that sees the key": {"memory_gate_by_key": True},
    "a threshold": {"memory_write_threshold": 0.3, "initial_theta": 0.3},
    "saved before scales": OLDER,
    "to the letter": {"mac_residual": False},
}


def make_block(name, **options):
    config = TitansConfig(
        **{
            "hidden_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "layer_types": [name],
            "sliding_window": 5,
            "segment_length": 8,
            "chunk_size": 4,
            "num_persistent_tokens": 2,
            "memory_expansion": 2,
            "initial_alpha": 0.05,
            "initial_theta": 0.2,
        }
        | options
    )
    torch.manual_seed(0)
    block = BLOCKS[name](config).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return block, config


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("name", REFERENCES)
def test_block_equals_reference(name, switch):
    """Outputs, the gradients of the input and every parameter, and the memory's trace, over three
    segments."""
    block, config = make_block(name, **SWITCHES[switch])
    x = torch.randn(1, 19, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(19, 8, dtype=torch.float64)
    leaves = {"x": x, **dict(block.named_parameters())}
    outputs, wanted_trace = REFERENCES[name](block, list(x[0]), config)
    want = torch.stack(outputs)
    wanted = torch.autograd.grad((want * weights).sum(), leaves.values())
    got, _, _, trace = block(x, trace=True)
    got = got[0]
    assert_close("y", got, want)
    grads = torch.autograd.grad((got * weights).sum(), leaves.values())
    for leaf, grad, want_grad in zip(leaves, grads, wanted, strict=True):
        assert_close(leaf, grad, want_grad)
    for field, tokens in zip(trace._fields, zip(*wanted_trace[-19:], strict=True), strict=True):
        assert_close(field, getattr(trace, field)[0], torch.stack(tokens))
