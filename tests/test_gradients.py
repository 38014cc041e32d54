"""Gradients of fresh models do not grow with the length of a text."""

import pytest
import torch

from everlong.models import TitansConfig, TitansForCausalLM

SYMBOLS = 24


def build(kind, depth):
    torch.manual_seed(0)
    return TitansForCausalLM(
        TitansConfig(
            vocab_size=SYMBOLS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            layer_types=[kind] * 2,
            memory_depth=depth,
            memory_expansion=2,
            chunk_size=16,
            segment_length=32,
            sliding_window=32,
            num_persistent_tokens=2,
        )
    )


def gradient(model, tokens):
    ids = torch.randint(SYMBOLS, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["lmm", "mac", "mag", "mal"])
def test_a_fresh_model_s_gradient_does_not_grow(kind, depth):
    model = build(kind, depth)
    assert gradient(model, 4096) <= 10 * gradient(model, 512)
