"""Fields of configurations: known by name, finite, and saved files of any version load."""

import copy
import json
import math

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from everlong import NeuralMemory
from everlong.models import (
    GatedDeltaNetConfig,
    LM2Config,
    LM2ForCausalLM,
    RMTConfig,
    RMTForCausalLM,
    TitansConfig,
)
from everlong.models.configuration_titans import OLDER
from numerics import assert_close
from subjects import titans

EVERY = pytest.mark.parametrize("kind", [TitansConfig, LM2Config, RMTConfig, GatedDeltaNetConfig])
# What files of transformers 4 and 5 hold besides a model's own fields.
OF_ANY_VERSION = {
    "architectures": ["A"],
    "transformers_version": "4.57.0",
    "torch_dtype": "float32",
    "_name_or_path": "somewhere",
    "_attn_implementation_autoset": True,
    "attn_implementation": "sdpa",
    "output_attentions": False,
    "is_decoder": True,
    "num_labels": 3,
    "temperature": 0.7,
    "max_length": 20,
    "tf_legacy_loss": False,
    "pruned_heads": {},
    "tokenizer_class": "T",
    "sep_token_id": 3,
    "auto_map": {},
}


@EVERY
@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("tie_word_embedding", "tie_word_embeddings"),
        ("use_cach", "use_cache"),
        ("output_hidden_state", "output_hidden_states"),
    ],
)
def test_fields_that_there_are_not_are_refused(kind, wrong, meant, tmp_path):
    """Of a constructor, a dict and a file, with the nearest that there is."""
    message = f"unknown field {wrong}: did you mean {meant}"
    with pytest.raises(ValueError, match=message):
        kind(**{wrong: True})
    fields = {**kind().to_dict(), wrong: True}
    with pytest.raises(ValueError, match=message):
        kind.from_dict(dict(fields))
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for reader in (kind, AutoConfig):
        with pytest.raises(ValueError, match=message):
            reader.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unknown field a_thing"):
        kind(a_thing=1)


def test_our_own_fields_too():
    for kind, wrong, meant in (
        (TitansConfig, "hidden_sise", "hidden_size"),
        (TitansConfig, "chunk_siz", "chunk_size"),
        (LM2Config, "num_memory_slot", "num_memory_slots"),
        (RMTConfig, "segment_lenght", "segment_length"),
    ):
        with pytest.raises(ValueError, match=f"unknown field {wrong}: did you mean {meant}"):
            kind(**{wrong: 8})
    with pytest.raises(
        ValueError, match=r"base_config\.hidden_sise: did you mean base_config\.hidden_size"
    ):
        RMTConfig(base_config={"model_type": "llama", "hidden_sise": 8})
    with pytest.raises(ValueError, match="unknown field rope_scaling"):  # which Titans would not heed
        TitansConfig(rope_scaling={"rope_type": "linear", "factor": 2.0})
    with pytest.raises(ValueError, match="unknown field hidden_size"):  # the inner model's
        RMTConfig(hidden_size=8)
    assert LM2Config(rope_scaling={"rope_type": "linear", "factor": 2.0}).rope_parameters["factor"] == 2


@EVERY
def test_what_files_of_any_version_hold_loads(kind, tmp_path):
    config = kind()
    fields = {**config.to_dict(), **OF_ANY_VERSION}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    loaded = AutoConfig.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert type(loaded) is kind
    loaded.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert kind(**copy.deepcopy(again).to_dict()).to_dict() == again.to_dict()
    assert kind.from_pretrained(tmp_path, use_cache=False).use_cache is False


def test_fields_of_somebodys_llama_are_left_behind(tmp_path):
    """Files on a hub have fields of anything."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=11, is_llama_config=True, **sizes))
    llama.save_pretrained(tmp_path / "llama")
    segments = {"segment_length": 8}
    lm2 = LM2ForCausalLM.from_llama(tmp_path / "llama", num_memory_slots=2, **segments)
    rmt = RMTForCausalLM.from_causal_lm(tmp_path / "llama", num_memory_tokens=2, **segments)
    for model in (lm2, rmt):
        model.save_pretrained(tmp_path / "made")
        assert type(AutoConfig.from_pretrained(tmp_path / "made")) is type(model.config)


@EVERY
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(kind, number):
    """In every field that holds one, given, set or inside another."""
    config = kind()
    names = [name for name, value in config.to_dict().items() if isinstance(value, float)]
    if kind is LM2Config:
        names += ["initial_memory_scale", "attention_dropout"]
        with pytest.raises(ValueError, match=r"rope_parameters\.rope_theta must be a finite number"):
            LM2Config(rope_parameters={"rope_type": "default", "rope_theta": number})
    if kind is RMTConfig:
        names = []
        inner = {"model_type": "llama", "rms_norm_eps": number}
        for base in (inner, LlamaConfig(rms_norm_eps=number)):
            with pytest.raises(ValueError, match=r"base_config\.rms_norm_eps must be a finite number"):
                RMTConfig(base_config=base)
    for name in names:
        message = f"{name} must be a finite number, got {number}"
        with pytest.raises(ValueError, match=message):
            kind(**{name: number})
        with pytest.raises(ValueError, match=message):
            setattr(config, name, number)


def test_whole_numbers_are_taken_for_others():
    config = TitansConfig(max_memory_learning_rate=2, memory_write_cost=0, rope_theta=10_000)
    for name in ("max_memory_learning_rate", "memory_write_cost", "rope_theta"):
        assert type(getattr(config, name)) is float, name
    config.memory_write_cost = 1
    assert config.memory_write_cost == 1.0
    assert type(LM2Config(initial_memory_scale=0).initial_memory_scale) is float
    inner = RMTConfig(base_config={"model_type": "llama", "initializer_range": 1}).base
    assert inner.initializer_range == 1.0
    assert type(TitansConfig(chunk_size=8).chunk_size) is int


@pytest.mark.parametrize("number", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("name", ["max_learning_rate", "norm_eps", "initial_alpha", "initial_theta"])
def test_the_layers_numbers_are_finite(name, number):
    with pytest.raises(ValueError, match=f"{name} must .*{number}"):
        NeuralMemory(8, 2, **{name: number})
    assert torch.isfinite(NeuralMemory(8, 2, max_learning_rate=2)(torch.ones(1, 3, 8))[0]).all()


def test_a_file_from_before_the_scales_means_what_it_meant(tmp_path):
    """Its model and its memories too; a new configuration has the new start."""
    older = TitansConfig(**OLDER, max_memory_learning_rate=2.0, initial_alpha=1e-4, initial_theta=0.5)
    older.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    fields = {k: v for k, v in json.loads(file.read_text()).items() if k not in OLDER}
    file.write_text(json.dumps(fields))
    loaded = TitansConfig.from_pretrained(tmp_path)
    assert {name: getattr(loaded, name) for name in OLDER} == OLDER
    assert not set(OLDER) & set(loaded.state_fields())
    by_hand = TitansConfig.from_json_file(file)
    assert {name: getattr(by_hand, name) for name in OLDER} == OLDER
    assert TitansConfig().memory_unit_scale
    assert TitansConfig.from_dict({"memory_depth": 3}).memory_unit_scale  # nobody saved it


def test_alpha_is_spread_over_the_heads():
    alpha = NeuralMemory(8, 4, depth=1, initial_alpha=[1e-3, 0.064]).alpha_proj.bias.sigmoid()
    assert_close("alpha", alpha, torch.tensor([1e-3, 4e-3, 0.016, 0.064]), torch.float32)
    with pytest.raises(ValueError, match="initial_alpha must lie between 0 and 1, got 5"):
        NeuralMemory(8, 1, initial_alpha=(0.1, 5.0))


def test_a_memory_of_another_threshold_is_refused():
    ids = torch.randint(11, (1, 9))
    cache = titans("lmm", memory_write_threshold=0.1)().memorize(ids)
    with pytest.raises(ValueError, match="memory_write_threshold"):
        titans("lmm", memory_write_threshold=0.2)()(ids, past_key_values=cache)
    with pytest.raises(ValueError, match=r"memory_write_threshold 0\.1 instead of the default"):
        titans("lmm")()(ids, past_key_values=cache)


def test_a_memory_of_other_positions_is_refused():
    ids = torch.randint(11, (1, 9))
    cache = titans("mag")().memorize(ids)
    with pytest.raises(ValueError, match=r"rope_theta 10000\.0 instead of 500000"):
        titans("mag", rope_theta=5e5)()(ids, past_key_values=cache)
    cache.made_by.pop("rope_theta")  # as in caches of earlier versions
    titans("mag", rope_theta=5e5)()(ids, past_key_values=cache)
