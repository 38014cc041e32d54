"""Pretrained models that get a memory are loaded as `from_pretrained` loads."""

import inspect

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
)

from everlong.models import LM2ForCausalLM, RMTForCausalLM
from everlong.models.pretrained import LATER, LOADING, PLACING
from numerics import assert_close
from subjects import GPT2, LLAMA, SEGMENT, VOCABULARY

WAYS = {
    "lm2": (LM2ForCausalLM.from_llama, {"num_memory_slots": 3, "segment_length": SEGMENT}),
    "rmt": (RMTForCausalLM.from_causal_lm, {"num_memory_tokens": 2, "segment_length": SEGMENT}),
}
BOTH = pytest.mark.parametrize("way", WAYS)
IDS = torch.arange(1, VOCABULARY)[None]


def give_memory(way, source, **options):
    function, fields = WAYS[way]
    torch.manual_seed(0)
    return function(source, **fields, **options).eval()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    fields = {k: v for k, v in LLAMA.items() if k != "model_type"}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **fields)).train()
    model.generation_config.max_new_tokens = 3
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    model.save_pretrained(folder / "within")
    return model, folder


@BOTH
def test_a_model_and_its_folder_give_the_same(way, llama):
    model, folder = llama
    new, other = give_memory(way, model), give_memory(way, folder)
    for key, value in new.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert model.training
    # Nothing is shared with the model that it was.
    new.generation_config.max_new_tokens = 5
    assert model.generation_config.max_new_tokens == 3
    (new.config.base if way == "rmt" else new.config).vocab_size = 7
    assert model.config.vocab_size == VOCABULARY
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in new.parameters()}


@BOTH
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": torch.float64},
        {"dtype": "float64"},
        {"torch_dtype": torch.float64},
        {"subfolder": "within"},
        {"local_files_only": True, "use_safetensors": True, "revision": "main"},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated")
def test_what_from_pretrained_takes(way, options, llama):
    new = give_memory(way, llama[1], **options)
    want = torch.float64 if "dtype" in str(options) else torch.float32
    assert {p.dtype for p in new.parameters()} == {want}
    plain = give_memory(way, llama[1])
    if way == "rmt":  # which starts at random
        with torch.no_grad():
            new.model.memory.weight.copy_(plain.model.memory.weight)
    assert_close("logits", new(IDS).logits.float(), plain(IDS).logits, torch.float32)


@BOTH
def test_device_maps(way, llama, tmp_path):
    plain = give_memory(way, llama[0])
    inside = "model" if way == "lm2" else "model.base"
    rest = [f"{inside}.embed_tokens", f"{inside}.norm", f"{inside}.rotary_emb", "lm_head"]
    rest += ["model.memory"] if way == "rmt" else []
    places = dict.fromkeys(rest, "cpu")
    places |= {f"{inside}.layers.0": "disk", f"{inside}.layers.1": "cpu"}
    for given in ("cpu", "auto", places):
        new = give_memory(way, llama[1], device_map=given, offload_folder=tmp_path)
        with torch.no_grad():
            assert torch.equal(new(IDS).logits, plain(IDS).logits)
        assert new.generation_config.max_new_tokens == plain.generation_config.max_new_tokens
    assert any(p.is_meta for p in new.parameters())


@BOTH
def test_options_that_do_not_go_are_named(way, llama):
    with pytest.raises(ValueError, match="quantization_config"):
        give_memory(way, llama[1], quantization_config={"load_in_4bit": True})
    with pytest.raises(ValueError, match=r"dtype, revision .*LlamaForCausalLM"):
        give_memory(way, llama[0], dtype=torch.float64, revision="main")
    with pytest.raises(ValueError, match="LlamaModel has no head"):
        give_memory(way, LlamaModel(llama[0].config))
    with pytest.raises(ValueError, match="got a int"):
        give_memory(way, 3)
    new = give_memory("rmt", llama[0])
    with pytest.raises(ValueError, match="the RMTForCausalLM is a rmt"):
        give_memory(way, new)


def test_a_gguf_file(tmp_path, monkeypatch):
    """Which transformers reads, whoever asks: what is asked of it is what was given."""
    asked = {}

    def from_pretrained(source, **options):
        asked.update(options)
        raise OSError("enough")

    monkeypatch.setattr("everlong.models.pretrained.AutoConfig.from_pretrained", from_pretrained)
    with pytest.raises(OSError, match="enough"):
        LM2ForCausalLM.from_llama(tmp_path, gguf_file="a.gguf", num_memory_slots=3)
    assert asked == {"gguf_file": "a.gguf"}


def test_a_gpt2_that_is_there_gets_a_memory():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **GPT2, eos_token_id=None))
    new = give_memory("rmt", model)
    assert torch.equal(new.model.base.wte.weight, model.transformer.wte.weight)
    with pytest.raises(ValueError, match="the GPT2LMHeadModel is a gpt2, not a llama"):
        give_memory("lm2", model)


def test_every_argument_of_from_pretrained_is_known():
    named = set(inspect.signature(PreTrainedModel.from_pretrained).parameters)
    named -= {"pretrained_model_name_or_path", "model_args", "kwargs"}
    assert named <= LOADING | PLACING | LATER
