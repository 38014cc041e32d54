"""LM2 as a model of `transformers` (its laws stand in test_laws.py, its equations in
test_lm2_reference.py)."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from everlong.models import LM2Config, LM2ForCausalLM
from numerics import assert_close
from subjects import SEGMENT, VOCABULARY, lm2

KINDS = {
    "slots": {"num_memory_slots": 5},
    "positions": {"memory_addressing": "positions"},
    "released": {"memory_addressing": "released"},
}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
SHORT = {"max_position_embeddings": 8, "segment_length": 9}
EVERY = pytest.mark.parametrize("kind", KINDS)


def make(kind, **options):
    torch.manual_seed(0)
    return lm2(**KINDS[kind], **options)().eval()


def text(batch=2, tokens=2 * SEGMENT + 3):
    return torch.randint(1, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def llama(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "llama")
    return model, tmp_path / "llama"


@pytest.mark.parametrize("kind", KINDS)
def test_a_llama_with_closed_banks_is_that_llama(kind, llama):
    model, folder = llama
    options = {"memory_addressing": kind, "memory_layers": [0, 2]}
    if kind == "slots":
        options["num_memory_slots"] = 6
    new = LM2ForCausalLM.from_llama(folder, **options).eval()
    assert new.config.segment_length == 32
    for tokens in (1, 7, 32):
        ids = text(2, tokens)
        assert torch.equal(new(ids).logits, model(ids).logits), tokens
    ids = text(1, 70)
    loss = new(ids, labels=ids).loss
    loss.backward()
    for name, parameter in new.named_parameters():
        if ".memory.scale" in name:
            assert parameter.grad.any(), name
    torch.optim.SGD(new.parameters(), lr=1.0).step()
    assert not torch.equal(new(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_llama_keeps_its_angles(dtype, llama, tmp_path):
    """Rotary frequencies in bfloat16 would be off by half a radian at position 1,000."""
    llama[0].to(dtype).save_pretrained(tmp_path / "half")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "half")
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(tmp_path / "half")
    new = LM2ForCausalLM.from_llama(tmp_path / "half", num_memory_slots=4).eval()
    assert {p.dtype for p in new.parameters()} == {dtype}
    ids = text(2, 32)
    assert torch.equal(new(ids).logits, model(ids).logits)
    new.save_pretrained(tmp_path / "new")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "new")
    ids = text(2, 70)
    assert torch.equal(loaded(ids).logits, new(ids).logits)
    assert new.generation_config.max_new_tokens == 7


def test_what_is_no_llama_is_named(tmp_path, llama):
    GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=1)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"is a gpt2, not a llama: RMTForCausalLM\.from_causal_lm"):
        LM2ForCausalLM.from_llama(tmp_path)
    model, folder = llama
    one, other = (LM2ForCausalLM.from_llama(x, num_memory_slots=4).eval() for x in (model, folder))
    ids = text(1, 32)
    assert torch.equal(one(ids).logits, other(ids).logits)


def test_a_llama_whose_bank_alone_is_trained(llama):
    _, folder = llama
    new = LM2ForCausalLM.from_llama(folder, memory_layers=1, segment_length=8, num_memory_slots=4)
    for name, parameter in new.named_parameters():
        parameter.requires_grad_(".memory." in name)
    ids = text(2, 40)
    optimizer = torch.optim.AdamW([p for p in new.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = new(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@EVERY
def test_what_the_bank_did(kind):
    """Weights over slots sum to one; the same in any split, and in a row of a padded batch."""
    model, ids = make(kind), text()
    trace = model(ids, output_memory=True).memory[0]
    assert_close("sum", trace.attention.sum(-1), torch.ones(2, ids.shape[1], 1), torch.float32)
    cache, pieces = None, []
    for piece in ids.split([5, 1, ids.shape[1] - 6], 1):
        out = model(piece, past_key_values=cache, use_cache=True, output_memory=True)
        cache = out.past_key_values
        pieces.append(out.memory[0])
    mask = torch.nn.functional.pad(torch.ones_like(ids[:1]), (3, 0))
    padded = torch.cat([torch.nn.functional.pad(ids[:1], (3, 0)), text(1, ids.shape[1] + 3)])
    mask = torch.cat([mask, torch.ones_like(mask)])
    padded = model(padded, attention_mask=mask, output_memory=True).memory[0]
    for name, value in trace._asdict().items():
        if isinstance(value, torch.Tensor):
            assert_close(name, torch.cat([getattr(p, name) for p in pieces], 1), value, torch.float32)
            assert_close(name, getattr(padded, name)[0, 3:], value[0], torch.float32)
    writes = [write for piece in pieces for write in piece.writes]
    assert len(writes) == len(trace.writes)
    for got, want in zip(writes, trace.writes, strict=True):
        for field in got._fields:
            assert_close(
                field, getattr(got, field).float(), getattr(want, field).float(), torch.float32
            )


def test_the_writes_of_slots_are_those_of_the_states():
    """Before and after each segment, with the equations that lie between."""
    model, ids = make("slots"), text(2, 2 * SEGMENT + 3)
    trace = model(ids, output_memory=True).memory[0]
    assert [write.rows.tolist() for write in trace.writes] == [[0, 1], [0, 1]]
    before = model.model.layers[0].memory.initial(torch.zeros(1)).expand(2, -1, -1)
    for end, write in zip((SEGMENT, 2 * SEGMENT), trace.writes, strict=True):
        after = model(ids[:, :end], use_cache=True).past_key_values.layers[0].state.bank
        assert_close("before", write.before, before, torch.float32)
        assert_close("after", write.after, after, torch.float32)
        kept = write.after - write.forget_gate * write.before
        assert (kept.abs() <= write.input_gate).all()
        before = after


def test_the_gates_of_positions_are_those_of_the_equations():
    for kind in ("positions", "released"):
        model, ids = make(kind), text(2, SEGMENT)
        first, second = model(ids, output_memory=True).memory
        assert_close("start", first.before, torch.eye(SEGMENT, 8).expand(2, -1, -1), torch.float32)
        assert torch.equal(first.after, second.before)
        kept = first.after - first.forget_gate * first.before
        assert (kept.abs() <= first.input_gate).all()
        bank = model(ids, use_cache=True).past_key_values.layers[0].state.bank
        assert_close("bank", second.after, bank, torch.float32)
        assert (first.output_gate is None) == (kind == "released")


def test_slots_that_start_as_the_identity():
    model = make("slots", identity_slots=True)
    assert "slots" not in "".join(dict(model.named_parameters()))
    state = model(text(2, 3), use_cache=True).past_key_values.layers[0].state
    assert torch.equal(state.bank, torch.eye(5, 8).expand(2, -1, -1))


def test_a_row_of_pads_hides_no_trace():
    model, ids = make("slots"), text(2, 9)
    mask = torch.tensor([[1] * 9, [0] * 9])
    trace = model(ids, attention_mask=mask, output_memory=True).memory[0]
    want = model(ids[:1], output_memory=True).memory[0]
    assert_close("attention", trace.attention[:1], want.attention, torch.float32)
    assert not trace.attention[1].any()


@EVERY
def test_half_precision(kind, tmp_path):
    model = make(kind)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    want = model(text(), labels=text(), use_cache=True)
    out = half(text(), use_cache=True)
    assert_close("bfloat16", out.logits.float(), want.logits, torch.bfloat16)
    assert out.past_key_values.layers[0].state.bank.dtype == torch.float32
    more = half(text(), past_key_values=out.past_key_values).logits
    assert more.dtype == torch.bfloat16
    assert more.isfinite().all()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(text(), labels=text(), use_cache=True)
        out.loss.backward()
        model(text(), past_key_values=out.past_key_values)
    assert_close("autocast", out.logits.float(), want.logits, torch.bfloat16)
    assert out.past_key_values.layers[0].state.bank.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_presets_on_the_meta_device():
    """1.64 billion by the paper's equations, 1.77 as the released code has it, 1.91 with slots."""
    for addressing, billions in (("positions", 1.64), ("released", 1.77), ("slots", 1.91)):
        with torch.device("meta"):
            model = LM2ForCausalLM(LM2Config.from_preset("lm2-1.7b", memory_addressing=addressing))
        assert round(model.num_parameters() / 1e9, 2) == billions, addressing
    with pytest.raises(ValueError, match=r"unknown preset 'lm2-7b'.*lm2-1\.7b"):
        LM2Config.from_preset("lm2-7b")


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("unknown memory_addressing 'rows': use slots", {"memory_addressing": "rows"}),
        ("num_memory_slots .5. must be segment_length", {"memory_addressing": "positions"}),
        ("memory_layers must be numbers from 0 to 1", {"memory_layers": [2]}),
        ("memory_layers must be numbers from 0 to 1", {"memory_layers": 3}),
        ("memory_layers must be a number of layers or a list, got -1", {"memory_layers": -1}),
        ("rope_type 'dynamic'.*beyond 8 positions", {"rope_parameters": DYNAMIC, **SHORT}),
        ("memory_layers must be numbers from 0 to 1", {"memory_layers": [1, 0]}),
        ("not a multiple of num_memory_heads", {"num_memory_heads": 3}),
        ("memory_top_k must be at least 1", {"memory_top_k": 0}),
        ("segment_length must be at least 1", {"segment_length": 0}),
        ("initial_memory_forget must lie between", {"initial_memory_forget": 1.0}),
    ],
)
def test_configurations_that_do_not_fit(message, fields):
    small = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "num_memory_slots": 5}
    with pytest.raises(Exception, match=message):
        LM2Config(**(small | fields))


def test_states_of_another_model_are_refused():
    cache = make("slots")(text(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="num_memory_slots 5 instead of 8"):
        lm2(num_memory_slots=8)()(text(), past_key_values=cache)
