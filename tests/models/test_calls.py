"""Calls as `transformers` and its users make them: understood, or refused by name."""

import copy
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from everlong.models import MemoryCache
from numerics import assert_close
from subjects import SEGMENT, SUBJECTS, VOCABULARY, titans

MODELS = {s.name: s for s in SUBJECTS if s.is_model}
SOME = pytest.mark.parametrize("name", ["lmm", "mac", "full", "lm2", "lm2-positions", "rmt"])
TOKENS = 2 * SEGMENT + 5
GREEDY = {"max_new_tokens": SEGMENT + 3, "do_sample": False, "pad_token_id": 0}


def made(name, batch=2):
    subject = MODELS[name]
    return subject.make(), subject.inputs(batch, TOKENS)


@SOME
def test_generation_from_a_memory_uses_its_cache(name):
    """Whatever the configurations say, greedily and with beams."""
    model, ids = made(name)
    cache, new = model.memorize(ids[:, :9]), ids[:, 9:]
    off = GenerationConfig(use_cache=False, **GREEDY)
    wide = torch.ones_like(ids)
    for more in ({}, {"num_beams": 2}):
        want = model.generate_from(cache, new, **GREEDY, **more)
        given = GenerationConfig(use_cache=False, **GREEDY, **more)
        assert torch.equal(model.generate_from(cache, new, generation_config=given), want)
    want = model.generate_from(cache, new, **GREEDY)
    got = model.generate(new, off, attention_mask=wide, past_key_values=cache.copy())
    assert torch.equal(got, want)
    model.config.use_cache = model.generation_config.use_cache = False
    assert torch.equal(model.generate_from(cache, new, **GREEDY), want)
    for read in (cache, MemoryCache(model.model.num_states)):
        with pytest.raises(ValueError, match="use_cache=False with past_key_values"):
            model.generate(new, past_key_values=read, use_cache=False, **GREEDY)


@SOME
def test_new_tokens_alone(name):
    """Fewer than were read they are what a chat says next, pads on the left included."""
    model, ids = made(name)
    for new in (1, 3, SEGMENT):
        cache = model.memorize(ids[:, :-new])
        want = model.generate_from(cache, ids[:, -new:], **GREEDY)
        got = model.generate(ids[:, -new:], past_key_values=cache.copy(), **GREEDY)
        assert torch.equal(got, want)
    mask = torch.ones(2, 3, dtype=torch.long)
    mask[0, 0] = 0
    cache = model.memorize(ids)
    want = model.generate_from(cache, ids[:, :3], mask, **GREEDY)
    got = model.generate(ids[:, :3], attention_mask=mask, past_key_values=cache.copy(), **GREEDY)
    assert torch.equal(got, want)


@SOME
@pytest.mark.parametrize("read", [1, 7, TOKENS - 1])
def test_the_whole_text_behind_a_cache_of_its_beginning(name, read):
    """As in `transformers`; the cache goes on from what it has generated, too."""
    model, ids = made(name)
    ids = ids.clamp(min=1)  # without a mask `generate` takes token 0 for a pad
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    cache = model.memorize(ids[:, :read], piece=5)
    for more in ({}, {"attention_mask": torch.ones_like(ids)}):
        read_on = cache.copy()
        assert torch.equal(model.generate(ids, past_key_values=read_on, **GREEDY, **more), want)
    longer = torch.cat([want, ids[:, :4]], 1)
    seen = {"attention_mask": torch.ones_like(longer)}  # token 0 may have been generated
    fresh = model.generate(longer, **seen, **GREEDY)
    assert torch.equal(model.generate(longer, past_key_values=read_on, **seen, **GREEDY), fresh)


def test_ids_that_could_be_new_or_the_whole_text():
    """Ids of another text, as many as were read or more; a cache that does not know its text."""
    model, ids = made("lmm")
    cache = model.memorize(ids[:, :6])
    other = (ids + 1) % VOCABULARY
    for wrong in (other, ids[:, :6], other[:, :7]):
        with pytest.raises(ValueError, match=r"read 6 tokens .* generate_from"):
            model.generate(wrong, past_key_values=cache, **GREEDY)
    unknown = copy.deepcopy(cache)
    unknown.tail = None
    with pytest.raises(ValueError, match="generate_from"):
        model.generate(ids, past_key_values=unknown, **GREEDY)
    x = model.model.embed_tokens(ids)
    with pytest.raises(ValueError, match="go on with input_ids"):
        model.generate(inputs_embeds=x, past_key_values=cache, **GREEDY)
    with pytest.raises(ValueError, match="go on with input_ids"):
        model.generate(past_key_values=cache, **GREEDY)


def test_a_text_is_known_by_its_last_tokens():
    model, ids = made("lmm")
    for pieces in ([TOKENS], [1] * TOKENS, [3, TOKENS - 4, 1]):
        cache = MemoryCache(model.model.num_states)
        for piece in ids.split(pieces, 1):
            model(piece, past_key_values=cache)
        assert torch.equal(cache.tail, ids[:, -16:])
    model(inputs_embeds=model.model.embed_tokens(ids[:, :2]), past_key_values=cache)
    assert cache.tail is None
    model(ids[:, :2], past_key_values=cache)
    assert cache.tail is None
    cache.reset()
    model(ids[:, :2], past_key_values=cache)
    assert torch.equal(cache.tail, ids[:, :2])


@SOME
def test_documents_by_their_offsets(name):
    """As a padding-free batch tells them: the logits of each document alone."""
    model, ids = made(name, 1)
    offsets = [0, 1, 1 + SEGMENT, TOKENS]
    flat = torch.tensor(offsets, dtype=torch.int32)
    index = torch.tensor([[0, *[1] * SEGMENT, *[2] * (TOKENS - SEGMENT - 1)]])
    positions = torch.cat([torch.arange(n) for n in flat.diff().tolist()])[None]
    told = {"cu_seq_lens_q": flat, "cu_seq_lens_k": flat, "max_length_q": 9, "max_length_k": 9}
    want = torch.cat([model(each).logits for each in ids.split(flat.diff().tolist(), 1)], 1)
    for more in (told, {"seq_idx": index}, {**told, "seq_idx": index, "position_ids": positions}):
        assert_close("logits", model(ids, **more).logits, want, MODELS[name].precision)
        hidden = model.model(ids, **more).last_hidden_state
        assert_close("hidden", model.lm_head(hidden), want, MODELS[name].precision)


def test_documents_that_are_told_in_two_ways_agree():
    model, ids = made("lmm", 1)
    flat = torch.tensor([0, 4, TOKENS])
    plain = torch.arange(TOKENS)[None]
    for wrong in ({"position_ids": plain}, {"cu_seq_lens_k": flat + torch.tensor([0, 1, 0])}):
        with pytest.raises(ValueError, match=f"cu_seq_lens_q and {next(iter(wrong))}"):
            model(ids, cu_seq_lens_q=flat, **wrong)
    for wrong in ([0, 4], [1, TOKENS], [0, 5, 4, TOKENS], []):
        with pytest.raises(ValueError, match="offsets from 0 to T = 21"):
            model(ids, cu_seq_lens_q=torch.tensor(wrong, dtype=torch.int32))
    with pytest.raises(ValueError, match="for 2 rows"):
        model(ids.expand(2, -1), cu_seq_lens_q=flat)
    with pytest.raises(ValueError, match=r"seq_idx must be \[B, T\]"):
        model(ids, seq_idx=torch.zeros(1, 3))
    with pytest.raises(ValueError, match="with a cache that has read something"):
        model(ids, cu_seq_lens_q=flat, past_key_values=model.memorize(ids))


def test_a_padding_free_batch_trains_as_its_documents_do():
    model, ids = made("mac")
    rows = [{"input_ids": ids[0].tolist()}, {"input_ids": ids[1, :4].tolist()}]
    collate = DataCollatorWithFlattening(
        return_position_ids=False, return_flash_attn_kwargs=True, return_seq_idx=True
    )
    got = model(**collate(rows), num_items_in_batch=1).loss
    alone = [torch.tensor([row["input_ids"]]) for row in rows]
    want = sum(model(each, labels=each, num_items_in_batch=1).loss for each in alone)
    assert_close("loss", got, want, torch.float32)


@SOME
def test_a_cache_that_is_given_goes_on_as_in_a_llama(name):
    """use_cache asks for a new one; one that is there is read and written whatever it says."""
    config = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=1, **config)).double()
    for model, precision in ((llama, torch.float32), (made(name)[0], MODELS[name].precision)):
        ids = MODELS[name].inputs(2, TOKENS)
        want = model(ids).logits[:, 5:]
        cache = model(ids[:, :5], use_cache=True).past_key_values
        out = model(ids[:, 5:], past_key_values=cache, use_cache=False)
        assert out.past_key_values is cache
        assert cache.get_seq_length() == TOKENS
        assert_close("logits", out.logits, want, precision)
        assert model(ids, use_cache=False).past_key_values is None


@SOME
def test_tuples(name):
    """In the order of `transformers`: loss, logits, past_key_values, hidden_states."""
    model, ids = made(name)
    out = model(ids, labels=ids, use_cache=True, output_hidden_states=True)
    got = model(ids, labels=ids, use_cache=True, output_hidden_states=True, return_dict=False)
    assert isinstance(got, tuple)
    assert torch.equal(got[0], out.loss)
    assert torch.equal(got[1], out.logits)
    assert isinstance(got[2], MemoryCache)
    assert torch.equal(got[3][-1], out.hidden_states[-1])
    assert torch.equal(model.model(ids, return_dict=False)[0], out.hidden_states[-1])
    model.config.return_dict = False
    assert torch.equal(model(ids, labels=ids)[0], out.loss)
    assert model(ids, return_dict=True).logits.shape == out.logits.shape


@SOME
def test_other_keywords_are_refused_by_name(name):
    model, ids = made(name)
    for call in (model, model.model):
        for wrong, hint in {
            "attention_masks": "did you mean attention_mask",
            "position_id": "did you mean position_ids",
            "skip_logits": "",
            "lengths": "",
        }.items():
            with pytest.raises(ValueError, match=f"unknown argument {wrong}.*{hint}"):
                call(ids, **{wrong: None})
        for wrong in (
            {"output_attentions": True},
            {"output_router_logits": True},
            {"token_type_ids": torch.ones_like(ids)},
            {"is_causal": False},
            {"output_hidden_states": [1]},
        ):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                call(ids, **wrong)
        call(
            ids,
            output_attentions=False,
            return_dict=None,
            token_type_ids=torch.zeros_like(ids),
            cache_position=torch.arange(TOKENS),
            num_items_in_batch=3,
            is_causal=True,
        )
    with pytest.raises(ValueError, match="unknown argument labels"):
        model.model(ids, labels=ids)
    with pytest.raises(ValueError, match="output_attentions"):
        model.generate(ids, output_attentions=True, return_dict_in_generate=True, **GREEDY)


def test_attentions_that_a_configuration_asks_for_are_refused():
    model, ids = made("mac")
    model.config._output_attentions = True
    with pytest.raises(ValueError, match="output_attentions"):
        model(ids)


# The price of writing.

PRICED = {"memory_write_cost": 0.5}


def priced():
    torch.manual_seed(0)
    return titans("lmm", "sliding_attention", **PRICED)().double().train()


def cross_entropy(logits, ids):
    return torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:])


@pytest.mark.parametrize("labelled", [True, False])
def test_a_loss_without_the_price_of_writing_is_refused(labelled):
    """A loss of one's own, whether the model had labels or not, from logits or hidden states."""
    model, ids = priced(), MODELS["lmm"].inputs(2, TOKENS)
    labels = ids if labelled else None
    out = model(ids, labels=labels)
    with pytest.raises(ValueError, match="lacks the price of writing"):
        cross_entropy(out.logits, ids).backward()
    hidden = model.model(ids).last_hidden_state
    with pytest.raises(ValueError, match="lacks the price of writing"):
        cross_entropy(model.lm_head(hidden), ids).backward()


def test_a_loss_of_ones_own_with_the_price():
    model, ids = priced(), MODELS["lmm"].inputs(2, TOKENS)
    grads = []
    for own in (False, True):
        model.zero_grad()
        out = model(ids, labels=ids)
        loss = cross_entropy(out.logits, ids) + out.price if own else out.loss
        loss.backward()
        grads.append({name: each.grad.clone() for name, each in model.named_parameters()})
    for name, want in grads[0].items():
        assert_close(name, grads[1][name], want, torch.float32)  # as the model's loss is
    assert model(ids).price > out.price  # which has waited for what is not learned
    assert model.eval()(ids, labels=ids).price is None
    cross_entropy(model(ids).logits, ids).backward()


def test_what_has_no_price_of_its_own_stays_free():
    """Nothing to pay: no cost, no gradient to the gates of writing, no backward pass."""
    ids = MODELS["lmm"].inputs(2, TOKENS)
    model = priced()
    model(ids).logits.sum().item()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.lm_head.weight.requires_grad_(True)
    cross_entropy(model(ids).logits, ids).backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["lmm", "lm2", "rmt"])
def test_labels_that_are_smoothed_are_shifted(name, tmp_path):
    """As for any causal language model that the Trainer knows."""
    model, ids = made(name)
    arguments = TrainingArguments(
        str(tmp_path), label_smoothing_factor=0.1, report_to="none", use_cpu=True
    )
    got = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
    logs = -model(ids).logits[:, :-1].log_softmax(-1)
    plain = logs.gather(-1, ids[:, 1:, None]).mean()
    assert_close("loss", got, 0.9 * plain + 0.1 * logs.mean(), torch.float32)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_the_price_under_the_compiler():
    """It is in the model's loss. (That another loss lacks it is not seen there.)"""
    model, ids = priced(), MODELS["lmm"].inputs(2, TOKENS)
    torch._dynamo.reset()
    read = torch.compile(model, backend="aot_eager")
    grads = []
    for call in (model, read):
        model.zero_grad()
        call(ids, labels=ids).loss.backward()
        grads.append(model.model.layers[0].mixer.memory.theta_proj.weight.grad.clone())
    assert_close("gradient", grads[1], grads[0], torch.float32)


class OwnLoss(Trainer):
    """As trainers for instructions do: the loss is made of the logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        out = model(**inputs, use_cache=False)
        loss = cross_entropy(out.logits, labels)
        return (loss, out) if return_outputs else loss


@pytest.mark.parametrize("kind", [OwnLoss, Trainer])
def test_trainers_that_drop_the_price_are_stopped(kind, tmp_path):
    model, ids = priced(), MODELS["lmm"].inputs(4, TOKENS)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    smoothed = {} if kind is OwnLoss else {"label_smoothing_factor": 0.1}
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, **smoothed
    )
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="lacks the price of writing"):
        kind(model, arguments, train_dataset=rows).train()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    model.config.memory_write_cost = 0.0
    kind(model, arguments, train_dataset=rows).train()


def test_a_trainers_model_is_saved_for_use(tmp_path):
    """A card promises a cache only as calls have one."""
    model = titans("lmm")()
    model.config.use_cache = False  # as the Trainer leaves it
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "use_cache=True" in card
    assert json.loads((tmp_path / "config.json").read_text())["use_cache"] is False
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded(torch.ones(1, 3).long(), use_cache=True).past_key_values is not None


@pytest.mark.parametrize("kind", ["lmm", "mac", "mag", "mal"])
def test_a_memory_that_is_read_only_generates(kind):
    """It stands still while the attention beside it goes on."""
    model = titans(kind, "sliding_attention", memory_read_only=True)().eval()
    ids = torch.randint(VOCABULARY, (2, TOKENS))
    real = torch.ones_like(ids)  # or an id that is the pad's would count as one
    want = model.generate(ids, attention_mask=real, use_cache=False, **GREEDY)
    assert torch.equal(model.generate(ids, attention_mask=real, **GREEDY), want)


@SOME
def test_arguments_of_another_kind_are_refused(name):
    model, ids = made(name)
    half = torch.full(ids.shape, 0.5)
    for wrong in (
        {"input_ids": ids.float()},
        {"input_ids": ids[0]},
        {"input_ids": ids.tolist()},
        {"inputs_embeds": torch.zeros(2, 3)},
        {"inputs_embeds": torch.zeros(2, 3, 5)},
        {"input_ids": ids, "attention_mask": half},
        {"input_ids": ids, "attention_mask": torch.where(ids > 3, 0.0, -torch.inf)},
        {"input_ids": ids, "attention_mask": [[1] * TOKENS] * 2},
        {"input_ids": ids, "logits_to_keep": -2},
        {"input_ids": ids[:1], "cu_seq_lens_q": torch.tensor([0.0, 4.5, TOKENS])},
        {"input_ids": ids, "past_key_values": model.memorize(ids).to("meta")},
    ):
        with pytest.raises(ValueError, match=r"must|meta"):
            model(**wrong)


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of itself
def test_a_compiled_step_takes_two_rows():
    """As many as a number that a compiler may have seen elsewhere."""
    model = titans("lmm")().eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, dynamic=True, backend="eager")
    ids = torch.randint(VOCABULARY, (2, 9))
    with torch.no_grad():
        want, cache = model.memorize(ids[:, :6]), model.memorize(ids[:, :6])
        for t in range(6, 9):
            got = compiled(ids[:, t : t + 1], past_key_values=cache).logits
            assert_close(
                "logits", got, model(ids[:, t : t + 1], past_key_values=want).logits, got.dtype
            )
