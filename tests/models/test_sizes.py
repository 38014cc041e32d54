"""The models to compare with: by name, by size, and as good as `transformers` has them."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from everlong.models import GatedDeltaNetForCausalLM, count_parameters, model_config
from everlong.models.sizes import _nearest
from everlong.training import load_recipe
from everlong.training.model import build_model_config
from numerics import assert_close

SMALL = {"vocab_size": 64, "num_hidden_layers": 2, "eos_token_id": None}
WIDE = {"hidden_size": 32, "num_attention_heads": 2}
KINDS = {
    "llama": WIDE,
    "mistral": {**WIDE, "num_key_value_heads": 2, "sliding_window": 16},
    "mamba2": {"head_dim": 8},
    "gated_deltanet": WIDE,
    "titans": {**WIDE, "layer_types": ["lmm", "mac"], "chunk_size": 4, "segment_length": 8},
    "lm2": {**WIDE, "num_memory_slots": 4, "segment_length": 8},
    "rmt": {
        "base_config": {"model_type": "llama", "num_hidden_layers": 2, **WIDE},
        "num_memory_tokens": 2,
        "segment_length": 8,
    },
}


GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
KINDS |= {
    "gpt2": GPT2,
    "rmt-gpt2": {
        "base_config": {"model_type": "gpt2", **GPT2},
        "num_memory_tokens": 2,
        "segment_length": 8,
    },
}


@pytest.mark.parametrize("parameters", [60_000, 90_000, 251_017])
@pytest.mark.parametrize("kind", KINDS)
def test_as_many_parameters_as_asked(kind, parameters):
    inner = kind.startswith("rmt") or kind == "gpt2"
    outer = {n: v for n, v in SMALL.items() if not inner or n != "num_hidden_layers"}
    config = model_config(kind.split("-")[0], parameters, **outer, **KINDS[kind])
    model = AutoModelForCausalLM.from_config(config)
    assert model.num_parameters() == count_parameters(config)
    assert model.num_parameters() == pytest.approx(parameters, rel=0.01)
    assert model(torch.arange(40)[None]).logits.shape == (1, 40, 64)


def test_a_budget_that_cannot_be_met():
    with pytest.raises(ValueError, match=r"even with the least intermediate_size .* more than 5,000"):
        model_config("llama", 5_000, **SMALL, **WIDE)
    with pytest.raises(ValueError, match="intermediate_size does not decide"):
        model_config("bloom", 60_000, **SMALL, **WIDE)
    with pytest.raises(ValueError, match="give either parameters or intermediate_size"):
        model_config("llama", 60_000, intermediate_size=8, **SMALL, **WIDE)
    with pytest.raises(ValueError, match="give either parameters or hidden_size"):
        model_config("mamba2", 60_000, hidden_size=8, **SMALL)
    with pytest.raises(ValueError, match=r"head_dim .7. must divide expand times hidden_size .64."):
        model_config("mamba2", hidden_size=32, head_dim=7, **SMALL)


@pytest.mark.parametrize("wanted", [10_000, 10_040, 10_099])
def test_the_nearest_number_is_taken(wanted):
    best = min(range(200), key=lambda n: abs(500 + 100 * n - wanted))
    assert _nearest(lambda n: 500 + 100 * n, wanted, "width") == best


def test_a_recipe_says_how_many(tiny_recipe):
    overrides = ["--model.parameters", "50000"]
    path = tiny_recipe("llama")
    with pytest.raises(ValueError, match="give either parameters or intermediate_size"):
        load_recipe(path, overrides)
    path.write_text("\n".join(x for x in path.read_text().splitlines() if "intermediate" not in x))
    config = build_model_config(load_recipe(path, overrides))
    assert count_parameters(config) == pytest.approx(50_000, rel=0.01)


@pytest.fixture
def deltanet():
    torch.manual_seed(0)
    config = model_config("gated_deltanet", **SMALL, **WIDE, intermediate_size=40)
    return AutoModelForCausalLM.from_config(config).eval()


def test_gated_deltanet_goes_on_from_its_cache(deltanet, tmp_path):
    """In any pieces; saved and loaded; `generate` with and without, beams and pads on the left."""
    ids = torch.randint(1, 64, (2, 90), generator=torch.Generator().manual_seed(0))
    want = deltanet(ids).logits
    for sizes in ([90], [70, 20], [60, *[1] * 30]):
        cache, parts = None, []
        for piece in ids.split(sizes, 1):
            out = deltanet(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
            assert cache.get_seq_length() == sum(part.shape[1] for part in parts)
        assert_close(f"{sizes[:2]}", torch.cat(parts, 1), want, torch.float32)
    deltanet.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, GatedDeltaNetForCausalLM)
    assert torch.equal(loaded(ids).logits, want)
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 3}):
        mask = torch.ones_like(ids)
        got = deltanet.generate(ids, attention_mask=mask, **asked, **more)
        slow = deltanet.generate(ids, attention_mask=mask, use_cache=False, **asked, **more)
        assert torch.equal(got, slow)
        padded = torch.nn.functional.pad(ids, (5, 0))
        mask = torch.nn.functional.pad(mask, (5, 0))
        padded = deltanet.generate(padded, attention_mask=mask, **asked, **more)
        assert torch.equal(padded[:, 95:], got[:, 90:])


def test_gated_deltanet_has_no_experts():
    with pytest.raises(Exception, match="num_experts is 0, got 4"):
        model_config("gated_deltanet", num_experts=4, **SMALL, **WIDE)
