"""Gradients do not grow with the length of a text, of fresh models or trained ones."""

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


def learn_to_copy(model, steps=200):
    """Half of 64 symbols, then the same again."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.95))
    for step in range(steps):
        half = torch.randint(SYMBOLS, (32, 32), generator=generator)
        ids, labels = torch.cat([half, half], 1), torch.cat([torch.full_like(half, -100), half], 1)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 20)
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["lmm", "mac", "mag", "mal"])
def test_a_trained_model_s_gradient_does_not_grow(kind, depth):
    model = build(kind, depth)
    learn_to_copy(model)
    least = gradient(model, 512)
    assert gradient(model, 4096) <= 10 * least
    assert gradient(model, 16384) <= 10 * least
