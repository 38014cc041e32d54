"""A model reads in pieces, from caches, and generates."""

import pytest
import torch
from oracles import Reader, saying, subject
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config

from everlong.models import model_config

KINDS = {
    "llama": {"num_attention_heads": 2, "intermediate_size": 32},
    "titans": {
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "layer_types": ["mac", "lmm"],
        "segment_length": 16,
        "chunk_size": 16,
        "num_persistent_tokens": 2,
    },
    "lm2": {
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "segment_length": 16,
        "num_memory_slots": 4,
    },
    "mamba2": {"head_dim": 16},
    "gated_deltanet": {"num_attention_heads": 2},
}


@pytest.fixture(params=KINDS)
def reader(request):
    torch.manual_seed(0)
    fields = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 2, **KINDS[request.param]}
    model = AutoModelForCausalLM.from_config(model_config(request.param, **fields)).eval()
    return subject(model, piece=64, tokens_per_forward=32)


def test_pieces_give_what_one_call_gives(reader):
    ids = torch.randint(256, (2, 200))
    with torch.inference_mode():
        whole = reader.model(input_ids=ids).logits
    pieces, _ = reader.read(ids, 6)
    torch.testing.assert_close(pieces, whole[:, -6:], atol=1e-5, rtol=1e-4)
    losses, _ = reader.losses(ids)
    wanted = torch.nn.functional.cross_entropy(
        whole[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none"
    )
    torch.testing.assert_close(losses, wanted, atol=1e-4, rtol=1e-4)


def test_losses_need_a_position_less_than_there_are_tokens():
    """lm-eval's windows foretell as many tokens as the model has positions."""
    fields = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 100}
    model = AutoModelForCausalLM.from_config(GPT2Config(vocab_size=259, **fields)).eval()
    ids = torch.randint(256, (2, 101))
    for piece in (64, 100, 1024):
        losses, _ = subject(model, piece=piece).losses(ids)
        with torch.inference_mode():
            logits = model(input_ids=ids[:, :-1]).logits
        wanted = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
        torch.testing.assert_close(losses, wanted, atol=1e-5, rtol=1e-4)


def test_a_copied_cache_goes_on_from_where_it_was(reader):
    ids = torch.randint(256, (1, 100))
    _, cache = reader.read(ids[:, :70])
    rows = reader.select(cache, [0, 0])
    two, _ = reader.read(ids[:, 70:].repeat(2, 1), 3, rows)
    one, _ = reader.read(ids[:, 70:], 3, reader.copy(cache))
    again, _ = reader.read(ids[:, 70:], 3, cache)
    whole, _ = reader.read(ids, 3)
    for got in (two[:1], two[1:], one, again):
        torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-4)


def test_generates_what_transformers_generates(reader):
    ids = torch.randint(256, (2, 90))
    wanted = reader.model.generate(
        ids, max_new_tokens=8, do_sample=False, pad_token_id=256, eos_token_id=258
    )[:, 90:]
    assert reader.generate(ids, 8) == [reader.decode(row) for row in wanted]


def test_generation_ends_at_marks_and_at_the_end_of_text():
    model = subject(Reader(saying({"a?": "one. two", "b?": "three"})))
    ids = torch.stack([model.encode("tell a?"), model.encode("tell b?")])
    assert model.generate(ids, 20, (".",)) == ["one", "three"]
    assert model.generate(ids, 20) == ["one. two", "three"]
    assert model.generate(ids, 3) == ["one", "thr"]
    assert model.generate(ids[:1], 20, ("two", " ")) == ["one."]


def test_attention_reads_fewer_long_texts_at_once():
    fields = {"vocab_size": 259, "hidden_size": 32, "num_hidden_layers": 1, **KINDS["llama"]}
    llama = subject(AutoModelForCausalLM.from_config(model_config("llama", **fields)))
    memory = subject(Reader())
    assert memory.rows(1 << 20) == memory.rows(2048) == 32
    assert (llama.rows(64), llama.rows(2048), llama.rows(1 << 16)) == (512, 16, 1)
    assert isinstance(llama.read(torch.zeros(1, 3, dtype=torch.long))[1], DynamicCache)


def test_what_a_tokenizer_puts_before_a_text():
    model = subject(Reader())
    assert model.opening() == []
    backend = model.tokenizer.backend_tokenizer
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 257)])
    assert model.opening() == [257]


def test_pieces_that_are_too_short_are_refused():
    with pytest.raises(ValueError, match="piece must be at least 64 tokens, got 8"):
        subject(Reader(), piece=8)
