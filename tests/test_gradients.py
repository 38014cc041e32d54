"""Gradients do not grow with the length of a text: of fresh models and of trained ones."""

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


def train(model, steps):
    """On rows whose second half repeats the first."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        half = torch.randint(SYMBOLS, (16, 32), generator=generator)
        ids = torch.cat([half, half], 1)
        labels = ids.clone()
        labels[:, :32] = -100
        optimizer.zero_grad()
        model(ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["lmm", "mac", "mag", "mal"])
def test_a_fresh_model_s_gradient_does_not_grow(kind, depth):
    model = build(kind, depth)
    assert gradient(model, 4096) <= 10 * gradient(model, 512)


@pytest.mark.slow
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["lmm", "mac", "mag", "mal"])
def test_a_trained_model_s_gradient_does_not_grow(kind, depth):
    """After 200 steps, to 16,384 tokens."""
    model = build(kind, depth)
    fresh = gradient(model, 16384) / gradient(model, 512)
    train(model, 200)
    short, middle, long = (gradient(model, tokens) for tokens in (512, 4096, 16384))
    print(kind, depth, *(f"{float(x):.3g}" for x in (fresh, short, middle, long)))
    assert fresh <= 10
    assert middle <= 10 * short
    assert long <= 10 * short
