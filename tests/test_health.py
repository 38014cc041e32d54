"""What `memory_health` measures is what it says."""

import pytest
import torch

from everlong.health import memory_health
from everlong.models import TitansConfig, TitansForCausalLM
from everlong.models.presets import PRESETS
from subjects import titans

TEXT = torch.tensor(
    [
        list(
            b"Tomorrow, and tomorrow, and tomorrow, creeps in this petty pace from day to day, to the "
            b"last syllable of recorded time."
        )
    ]
)


def model(kind="lmm", **fields):
    torch.manual_seed(0)
    return TitansForCausalLM(
        TitansConfig(
            **{
                "vocab_size": 128,
                "hidden_size": 64,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "layer_types": [kind] * 2,
                "chunk_size": 16,
                "segment_length": 32,
                "sliding_window": 16,
                "num_persistent_tokens": 0,
            }
            | fields
        )
    )


def test_step_times_curvature_is_that_of_the_jacobian():
    """Against the whole Jacobian of a step, formed row by row."""
    from everlong.health import _forward, _step_times_curvature

    torch.manual_seed(0)
    k, v = torch.randn(2, 1, 1, 6, 3, dtype=torch.float64)
    weights = [torch.randn(1, 1, *shape, dtype=torch.float64) for shape in ((3, 5), (5, 3))]
    scale, steps = torch.rand(1, 1, 1, 3, dtype=torch.float64), 0.1 * torch.rand(1, 1, 6, 2).double()

    def step(flat):
        split = [x.view_as(w) for x, w in zip(flat.split([15, 15]), weights, strict=True)]
        total = 0
        for t in range(6):
            row = [w.detach().clone().requires_grad_() for w in split]
            parts = [part + (w - w.detach()) for part, w in zip(split, row, strict=True)]
            loss = (_forward(k[:, :, t : t + 1], parts, scale)[1] - v[:, :, t : t + 1]).square().sum()
            grads = torch.autograd.grad(loss, row, create_graph=True)
            total = total + torch.cat([steps[0, 0, t, i] * g.flatten() for i, g in enumerate(grads)])
        return total

    flat = torch.cat([w.flatten() for w in weights])
    jacobian = torch.autograd.functional.jacobian(step, flat)
    want = torch.linalg.eigvals(jacobian).abs().max()
    torch.manual_seed(1)
    got = _step_times_curvature(k, v, weights, scale, steps)
    assert abs(got - want) < 0.02 * want


@pytest.mark.parametrize("kind", ["lmm", "mac", "mag", "mal"])
def test_a_fresh_model_is_healthy(kind):
    health = memory_health(model(kind), TEXT[:, :96])
    assert health.problems() == []
    assert [each.chunk for each in health.memories] == [0, 5, 0, 5]
    assert all(each.loss_after < each.loss_before for each in health.memories)
    assert all(0.2 < product < 1 for each in health.memories for product in each.products)
    assert len(health.gradients) == 15
    assert "step*cur" in str(health)


def test_an_unhealthy_one_is_told():
    with pytest.warns(UserWarning, match="initial_theta x max_learning_rate is 30, 2 at most"):
        ill = model(max_memory_learning_rate=60.0, initial_theta=0.5)
    assert "step times curvature" in "".join(memory_health(ill, TEXT).problems())


def test_what_is_not_finite_or_far_too_large_is_told():
    ill = model()
    with torch.no_grad():
        ill.model.layers[0].mixer.memory.memory_init[0].weight.mul_(100)
        ill.model.layers[1].mixer.memory.memory_init[1].weight.mul_(100)
    told = "".join(memory_health(ill, TEXT).problems())
    assert "layers.0.mixer.memory, chunk 0: products of" in told
    assert "layers.1.mixer.memory, chunk 0: the spread is" in told
    with torch.no_grad():
        ill.model.layers[0].mixer.memory.memory_init[0].weight.fill_(torch.nan)
    told = memory_health(ill, TEXT).problems()
    assert "model.layers.0.mixer.memory, chunk 0: not all of it is finite" in told


def test_the_text_alone_is_measured():
    """Not the persistent rows; in training with a price and a cut as in evaluation; of any length."""
    one = model("mac", num_persistent_tokens=40, memory_write_cost=0.1, backprop_segments=1).train()
    one.lm_head.eval()
    health = memory_health(one, TEXT[:, :97])
    assert [each.chunk for each in health.memories] == [0, 5, 0, 5]
    assert len(health.gradients) == 13  # pieces of 7 tokens, and of what is left
    assert health.gradients[-1][1] > 0
    assert one.training
    assert one.model.layers[0].training
    assert not one.lm_head.training
    assert one.config.backprop_segments == 1
    assert "initial_state" not in vars(one.model.layers[0].mixer)


def test_nothing_is_left_behind():
    one = model()
    ids = torch.randint(64, (1, 40))
    want = one(ids).logits
    memory_health(one, ids)
    assert torch.equal(one(ids).logits, want)
    assert all(p.grad is None for p in one.parameters())
    assert "read_write" not in vars(one.model.layers[0].mixer.memory)


def test_what_cannot_be_measured():
    with pytest.raises(ValueError, match="has no neural memory"):
        memory_health(titans("sliding_attention")(), torch.zeros(1, 40, dtype=torch.long))
    with pytest.raises(ValueError, match="at least two chunks, T = 32"):
        memory_health(model(), torch.zeros(1, 31, dtype=torch.long))


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_starts_stable(preset):
    """Of each model two layers, which are like the others: step times curvature below 2."""
    torch.manual_seed(0)
    fields = {"num_hidden_layers": 2, "layer_types": [preset.split("-")[1]] * 2, "vocab_size": 256}
    fresh = TitansForCausalLM(TitansConfig.from_preset(preset, **fields))
    health = memory_health(fresh, TEXT[:, :64])
    assert max(each.step_times_curvature for each in health.memories) < 2
