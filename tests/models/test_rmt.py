"""RMT around models of `transformers` (its laws stand in test_laws.py, what any model can do in
test_ecosystem.py)."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from everlong.models import RMTConfig, RMTForCausalLM
from everlong.models.configuration_rmt import KINDS as CONFIGURATIONS
from everlong.training import load_recipe
from everlong.training.model import build_model_config
from numerics import assert_close
from subjects import GPT2, LLAMA, SEGMENT, VOCABULARY, rmt

KINDS = {"llama": LLAMA, "gpt2": {"model_type": "gpt2", **GPT2}}
EVERY = pytest.mark.parametrize("kind", KINDS)
LLAMA_11 = LLAMA | {"vocab_size": 11}
SLIDING = {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}
ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 2, "long_factor": [2.0] * 2}
LONGROPE = LLAMA | {"rope_parameters": ROPE | {"original_max_position_embeddings": 8, "factor": 2.0}}
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


def test_an_untied_head_and_the_way_to_generate_come_along(tmp_path):
    inner = AutoModelForCausalLM.from_config(make("llama").config.base)
    inner.generation_config.max_new_tokens = 7
    inner.save_pretrained(tmp_path)
    model = RMTForCausalLM.from_causal_lm(tmp_path, num_memory_tokens=2, segment_length=SEGMENT).eval()
    x = torch.cat([model.model.memory().expand(2, -1, -1), model.model.embed_tokens(IDS[:, :5])], 1)
    want = inner.eval()(inputs_embeds=x).logits[:, 2:]
    assert_close("logits", model(IDS[:, :5]).logits, want, torch.float32)
    assert model.generate(IDS[:, :5], attention_mask=torch.ones(2, 5)).shape == (2, 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_model_keeps_its_angles(dtype, tmp_path):
    """Rotary frequencies in bfloat16 would be off by half a radian at position 1,000."""
    AutoModelForCausalLM.from_config(make("llama").config.base).to(dtype).save_pretrained(
        tmp_path / "a"
    )
    model = RMTForCausalLM.from_causal_lm(tmp_path / "a", num_memory_tokens=2, segment_length=SEGMENT)
    assert {p.dtype for p in model.parameters()} == {dtype}
    model.eval().save_pretrained(tmp_path / "b")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    whole = model.float()
    with torch.autocast("cpu", dtype):
        out = whole(IDS, labels=IDS, use_cache=True)
        out.loss.backward()
        again = whole(IDS, past_key_values=out.past_key_values).logits
    assert (out.logits - whole(IDS).logits).norm() < 0.1 * whole(IDS).logits.norm()
    assert again.isfinite().all()
    assert all(p.grad.isfinite().all() for p in whole.parameters())


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_every_kind_that_it_wraps(kind):
    """The paper's pass, calls at odd places, and a padded batch whose table of positions is full."""
    torch.manual_seed(0)
    small = LLAMA | {"vocab_size": VOCABULARY, "model_type": kind, "eos_token_id": None}
    small |= {"num_key_value_heads": 2}
    small |= {"max_position_embeddings": SEGMENT + 4} if kind != "bloom" else {}
    small |= {"head_dim": 4} if kind in ("gemma", "qwen3") else {}
    small |= GPT2 | {"pad_token_id": None} if kind in ("gpt2", "biogpt") else {"pad_token_id": None}
    config = RMTConfig(base_config=small, num_memory_tokens=2, segment_length=SEGMENT)
    model = RMTForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        want = model(IDS).logits
        assert_close("literally", literally(model, IDS), want, torch.float32)
        first = IDS.clone()
        first[:, -1] = (first[:, -1] + 1) % VOCABULARY
        assert torch.equal(model(first).logits[:, :-1], want[:, :-1])
        for pads in (1, 3, SEGMENT - 1):
            mask = torch.ones_like(IDS)
            mask[1, :pads] = 0
            alone = model(IDS[1:, pads:]).logits[0]
            for split in (SEGMENT - 1, SEGMENT, SEGMENT + 5):
                out = model(IDS[:, :split], mask[:, :split], use_cache=True)
                rest = model(IDS[:, split:], mask, past_key_values=out.past_key_values).logits
                got = torch.cat([out.logits, rest], 1)
                assert_close("row 0", got[0], want[0], torch.float32)
                assert_close("row 1", got[1, pads:], alone, torch.float32)


@pytest.mark.parametrize("kind", ["bert", "cohere", "ctrl", "falcon", "mistral", "mamba2"])
def test_what_it_does_not_wrap_is_refused(kind, tmp_path):
    with pytest.raises(Exception, match=f"{kind}.* RMT wraps llama, gpt2"):
        RMTConfig(base_config={"model_type": kind})
    AutoConfig.for_model(kind).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is a {kind}: RMT wraps llama, gpt2"):
        RMTForCausalLM.from_causal_lm(tmp_path)


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
        ("type 'lama' cannot be in base_config", {"base_config": {"model_type": "lama"}}),
        ("layers of full_attention, sliding_attention", {"base_config": SLIDING}),
        ("vocab_size is 5, but 11 in base_config", {"base_config": LLAMA_11, "vocab_size": 5}),
        ("rope_type 'longrope'.*beyond 8 positions.*A segment has 12", {"base_config": LONGROPE}),
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


@pytest.mark.parametrize("field", ["num_memory_tokens", "segment_length"])
def test_states_of_another_shape_are_refused(field):
    cache = make("llama")(IDS, use_cache=True).past_key_values
    other = make("llama").config.to_dict() | {field: 3}
    with pytest.raises(ValueError, match=f"{field} . instead of 3"):
        RMTForCausalLM(RMTConfig(**other))(IDS, past_key_values=cache)


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
