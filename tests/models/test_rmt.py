"""RMT around models of `transformers` (its laws stand in test_laws.py, what any model can do in
test_ecosystem.py)."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
)

from everlong.models import RMTConfig, RMTForCausalLM
from everlong.training import load_recipe
from everlong.training.recipe import build_model_config
from numerics import assert_close
from subjects import GPT2, LLAMA, SEGMENT, VOCABULARY, rmt

KINDS = {"llama": LLAMA, "gpt2": {"model_type": "gpt2", **GPT2}}
EVERY = pytest.mark.parametrize("kind", KINDS)
IDS = torch.randint(1, VOCABULARY, (2, 3 * SEGMENT + 5), generator=torch.Generator().manual_seed(1))


def make(kind, **options):
    torch.manual_seed(0)
    return rmt(**({"model_type": "gpt2"} if kind == "gpt2" else {}), **options)().double().eval()


def literally(model, ids):
    """The paper's decoder: segment by segment, [memory, segment, memory] in one pass from nothing."""
    memory = model.model.memory().expand(len(ids), -1, -1)
    logits = []
    for piece in ids.split(SEGMENT, 1):
        x = torch.cat([memory, model.model.embed_tokens(piece), memory], 1)
        y = model.model.base(inputs_embeds=x, use_cache=False).last_hidden_state
        logits.append(model.lm_head(y[:, memory.shape[1] : memory.shape[1] + piece.shape[1]]))
        memory = y[:, -memory.shape[1] :]
    return torch.cat(logits, 1)


@EVERY
def test_it_is_the_paper(kind):
    """Outputs and gradients, in one call and in calls of seven tokens."""
    model, grads, logits = make(kind), [], []
    weight = torch.randn(*IDS.shape, VOCABULARY, dtype=torch.float64)

    def in_calls(model, ids):
        cache, parts = None, []
        for piece in ids.split(7, 1):
            out = model(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits)
        return torch.cat(parts, 1)

    for read in (literally, lambda model, ids: model(ids).logits, in_calls):
        model.zero_grad()
        logits.append(read(model, IDS))
        (logits[-1] * weight).sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for got, grad in zip(logits[1:], grads[1:], strict=True):
        assert_close("logits", got, logits[0], torch.float32)
        for name, value in grad.items():
            assert_close(name, value, grads[0][name], torch.float32)


@EVERY
def test_a_pretrained_model_gets_a_memory(kind, tmp_path):
    """Its weights are all there, tied ones stay tied, and the whole loads again."""
    inner = AutoModelForCausalLM.from_config(make(kind, tie_word_embeddings=True).config.base)
    inner.save_pretrained(tmp_path / "inner")
    model = RMTForCausalLM.from_causal_lm(
        tmp_path / "inner", num_memory_tokens=2, segment_length=SEGMENT
    )
    for name, weight in inner.base_model.named_parameters():
        assert torch.equal(weight, model.model.base.get_parameter(name)), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.eval().save_pretrained(tmp_path / "whole")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert isinstance(loaded, RMTForCausalLM)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    loaded.resize_token_embeddings(VOCABULARY + 3)
    loaded.save_pretrained(tmp_path / "wider")
    wider = AutoModelForCausalLM.from_pretrained(tmp_path / "wider")
    assert wider(IDS).logits.shape[-1] == VOCABULARY + 3


def test_a_model_that_scales_its_logits_is_refused(tmp_path):
    small = {k: v for k, v in LLAMA.items() if k != "model_type"}
    CohereForCausalLM(CohereConfig(vocab_size=VOCABULARY, **small)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"cohere.*more than a linear map.*llama or gpt2"):
        RMTForCausalLM.from_causal_lm(tmp_path, num_memory_tokens=2, segment_length=SEGMENT)


def test_nothing_of_the_pretrained_model_is_used_by_chance(tmp_path):
    """Weights of the inner model that only its head class knows are not forgotten: none are left."""
    torch.manual_seed(0)
    inner = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **GPT2)).eval()
    inner.save_pretrained(tmp_path)
    model = RMTForCausalLM.from_causal_lm(tmp_path, num_memory_tokens=2, segment_length=SEGMENT)
    own = {"model.memory.weight"}
    assert model.num_parameters() == inner.num_parameters() + model.model.memory.weight.numel()
    assert {n for n, _ in model.named_parameters() if ".base." not in n} == own


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("unknown model_type 'lama'", {"base_config": {"model_type": "lama"}}),
        ("mamba2 has layers|num_attention_heads", {"base_config": {"model_type": "mamba2"}}),
        ("mistral has layers.*sliding_window 4096", {"base_config": {"model_type": "mistral"}}),
        ("is 12 positions, but the model inside takes 11", {"n_positions": 11}),
        ("num_memory_tokens must be at least 1", {"num_memory_tokens": 0}),
        ("segment_length must be at least 1", {"segment_length": 0}),
        ("backprop_segments must be at least 1", {"backprop_segments": 0}),
    ],
)
def test_configurations_that_do_not_fit(message, fields):
    base = KINDS["gpt2"] | {n: v for n, v in fields.items() if n == "n_positions"}
    outer = {n: v for n, v in fields.items() if n != "n_positions"}
    asked = {"base_config": base, "num_memory_tokens": 2, "segment_length": SEGMENT} | outer
    with pytest.raises(Exception, match=message):
        RMTConfig(**asked)


def test_states_of_another_model_are_refused():
    cache = make("llama")(IDS, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="base llama instead of gpt2"):
        make("gpt2")(IDS, past_key_values=cache)


def test_a_recipe_says_what_is_inside(tmp_path):
    """The vocabulary is that of bytes, as for every model."""
    path = tmp_path / "rmt.yaml"
    path.write_text(
        "model: {type: rmt, base_config: {model_type: llama, hidden_size: 16, intermediate_size: 16,"
        " num_hidden_layers: 1, num_attention_heads: 2}, num_memory_tokens: 2, segment_length: 32}\n"
        "training: {max_steps: 1}\n"
    )
    config = build_model_config(load_recipe(path))
    assert config.vocab_size == config.base.vocab_size > 256
    assert config.eos_token_id == config.base.eos_token_id
    assert AutoModelForCausalLM.from_config(config).model.base.config.hidden_size == 16
