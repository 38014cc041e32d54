"""A long text is read in pieces: by `memorize`, for its memory alone, and by `generate`."""

import gc
from functools import partial

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from everlong.models import LM2Config, RMTConfig, TitansConfig
from everlong.models.reading import default_piece
from numerics import assert_close, assert_states_close
from subjects import SEGMENT, SUBJECTS, lm2, rmt, titans

MODELS = {subject.name: subject for subject in SUBJECTS if subject.is_model}
EVERY = pytest.mark.parametrize("name", MODELS)
# One of each family.
SOME = pytest.mark.parametrize("name", ["hybrid-mac", "lm2", "rmt"])
TOKENS = 5 * SEGMENT + 1


def pads():
    """Rows with more pads than a piece on the left, on the right and between, and one without."""
    mask = torch.ones(4, TOKENS, dtype=torch.long)
    mask[0, : 2 * SEGMENT + 3] = 0
    mask[1, -SEGMENT - 3 :] = 0
    mask[2, 3:9] = 0
    return mask


def read_at_once(model, ids, mask=None, cache=None):
    with torch.no_grad():
        return model(ids, mask, past_key_values=cache, use_cache=True).past_key_values


def next_logits(model, cache, ids):
    with torch.no_grad():
        return model(ids, past_key_values=cache.copy()).logits


def states(cache):
    return [[layer.seen, layer.state] for layer in cache.layers]


@EVERY
@pytest.mark.parametrize("piece", [1, SEGMENT - 1, 3 * SEGMENT + 2])
def test_any_piece_leaves_what_one_call_leaves(name, piece):
    subject = MODELS[name]
    model, ids, more = subject.make(), subject.inputs(2, TOKENS), subject.inputs(2, 2 * SEGMENT, 1)
    want = read_at_once(model, ids)
    got = model.memorize(ids, piece=piece)
    assert_states_close("cache", states(got), states(want), subject.precision)
    assert_close(
        "logits", next_logits(model, got, more), next_logits(model, want, more), subject.precision
    )


@EVERY
@pytest.mark.parametrize("piece", [SEGMENT - 1, 2 * SEGMENT])
def test_rows_with_pads(name, piece):
    """What is compared are the next tokens: keys of pads may be anything."""
    subject = MODELS[name]
    model, ids, more = subject.make(), subject.inputs(4, TOKENS), subject.inputs(4, 2 * SEGMENT, 1)
    want = next_logits(model, read_at_once(model, ids, pads()), more)
    got = next_logits(model, model.memorize(ids, attention_mask=pads(), piece=piece), more)
    assert_close("logits", got, want, subject.precision)


@SOME
def test_it_goes_on_from_a_cache_and_changes_it(name):
    subject = MODELS[name]
    model, ids, more = subject.make(), subject.inputs(4, TOKENS), subject.inputs(4, SEGMENT, 1)
    want = next_logits(model, read_at_once(model, torch.cat([ids, ids], 1)), more)
    cache = model.memorize(ids, piece=5)
    assert model.memorize(ids, cache, piece=7) is cache
    assert cache.get_seq_length() == 2 * TOKENS
    assert_close("logits", next_logits(model, cache, more), want, subject.precision)


@SOME
@pytest.mark.parametrize("past_columns", [False, True])
def test_it_goes_on_from_a_cache_with_pads(name, past_columns):
    subject = MODELS[name]
    model, ids, more = subject.make(), subject.inputs(4, TOKENS), subject.inputs(4, SEGMENT, 1)
    first = ids[:, :7]
    want = read_at_once(model, ids, pads(), read_at_once(model, first))
    mask = torch.cat([torch.ones(4, 7, dtype=torch.long), pads()], 1) if past_columns else pads()
    got = model.memorize(ids, model.memorize(first), mask, piece=5)
    assert_close(
        "logits", next_logits(model, got, more), next_logits(model, want, more), subject.precision
    )


def parts_of(ids):
    """Of many lengths, none too, that fall together with no piece of 5."""
    yield from ids.split([1, 1, 0, 2, 9, 5, 1, 16, ids.shape[1] - 35], 1)


@pytest.mark.parametrize(
    "form",
    [
        parts_of,
        lambda ids: list(parts_of(ids)),
        lambda ids: (part.int().numpy() for part in parts_of(ids)),
        torch.Tensor.int,
        lambda ids: ids.numpy().astype(np.uint16),
    ],
    ids=["generator", "list", "arrays", "int32", "uint16"],
)
@pytest.mark.parametrize("piece", [1, 5, 1000])
def test_what_a_text_may_be(form, piece):
    subject = MODELS["mag"]
    model, ids, lengths = subject.make(), subject.inputs(2, TOKENS), []
    model.model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    got = model.memorize(form(ids), piece=piece)
    whole, rest = divmod(TOKENS, piece)
    assert lengths == [piece] * whole + [rest] * bool(rest)
    assert_states_close("cache", states(got), states(read_at_once(model, ids)))


@pytest.mark.parametrize("form", [parts_of, lambda ids: ids], ids=["generator", "tensor"])
@pytest.mark.parametrize("read", [1, SEGMENT, SEGMENT + 3, 36])
def test_reading_on_ends_where_segments_end(form, read, monkeypatch):
    """A segment that is cut is computed in two parts: not in every piece of a text."""
    monkeypatch.setattr("everlong.models.reading.PIECE", 2 * SEGMENT)
    subject = MODELS["mac"]
    model, lengths = subject.make(), []
    before, ids = subject.inputs(2, read), subject.inputs(2, 36 + SEGMENT)
    cache = model.memorize(before)
    model.model.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    got = model.memorize(form(ids), cache)
    assert sum(lengths) == ids.shape[1]
    ends = [read + sum(lengths[:i]) for i in range(1, len(lengths))]
    assert ends
    assert all(end % default_piece(model.config) == 0 for end in ends)
    assert_states_close("cache", states(got), states(read_at_once(model, torch.cat([before, ids], 1))))


def test_a_file_of_token_ids(tmp_path):
    subject = MODELS["lmm"]
    model, ids = subject.make(), subject.inputs(1, TOKENS)
    ids[0].numpy().astype(np.uint16).tofile(tmp_path / "ids.bin")
    text = np.memmap(tmp_path / "ids.bin", dtype=np.uint16, mode="r")
    got = model.memorize(text[None], piece=9)
    assert_states_close("cache", states(got), states(read_at_once(model, ids)))


@pytest.mark.parametrize("empty", [torch.zeros(2, 0, dtype=torch.long), []], ids=["tensor", "list"])
def test_nothing_to_read_changes_nothing(empty):
    subject = MODELS["lmm"]
    model, ids = subject.make(), subject.inputs(2, 5)
    assert model.memorize(empty).get_seq_length() == 0
    cache = model.memorize(ids)
    before = cache.copy()
    assert_states_close("cache", states(model.memorize(empty, cache)), states(before))


@SOME
def test_neither_logits_nor_a_graph(name):
    """Also where the cache had one, and in tensors that the text leaves as they were."""
    subject = MODELS[name]
    model, ids = subject.make(), subject.inputs(2, TOKENS)
    cache = model(ids[:, :5], use_cache=True).past_key_values
    assert any(leaf.requires_grad for leaf in subject.leaves(cache))
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("logits that nobody asked for"))
    graphs = []
    model.model.register_forward_hook(lambda *a: graphs.append(a[2].last_hidden_state.requires_grad))
    for got in (model.memorize(ids), model.memorize(ids[:, :1], cache)):
        assert not any(leaf.requires_grad for leaf in subject.leaves(got))
    assert graphs == [False, False]


@EVERY
def test_gradients_go_on_from_the_memory(name):
    subject = MODELS[name]
    model, ids = subject.make().train(), subject.inputs(2, TOKENS)
    cache = model.memorize(ids, piece=5)
    assert not any(leaf.is_inference() for leaf in subject.leaves(cache))
    model(ids, past_key_values=cache, labels=ids).loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@SOME
def test_memory_serves_generate(name):
    subject = MODELS[name]
    model, ids = subject.make(), subject.inputs(2, TOKENS)
    asked = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **asked)
    cache = model.memorize(ids[:, :-3], piece=5)
    assert torch.equal(model.generate_from(cache, ids[:, -3:], **asked), want[:, -12:])
    asked["attention_mask"] = torch.ones_like(ids)
    assert torch.equal(model.generate(ids, past_key_values=cache, **asked), want)


def test_a_model_whose_parameters_are_on_disk(tmp_path):
    subject = MODELS["lmm"]
    model, ids = subject.make(), subject.inputs(2, TOKENS)
    model.save_pretrained(tmp_path)
    aside = {"model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    aside["model.embed_tokens"] = "disk"
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float64, device_map=aside, offload_folder=tmp_path / "aside"
    )
    assert loaded.device.type == "meta"
    assert_states_close("cache", states(loaded.memorize(ids, piece=5)), states(model.memorize(ids)))


def test_progress():
    subject = MODELS["lmm"]
    model, ids, told = subject.make(), subject.inputs(3, 12), []
    model.memorize(ids, piece=5, progress=told.append)
    assert told == [5, 5, 2]


@pytest.mark.parametrize("form", [lambda ids: ids, lambda ids: ids.split(7, 1)])
def test_a_bar_on_stderr(form, capsys):
    subject = MODELS["lmm"]
    subject.make().memorize(form(subject.inputs(3, 12)), progress=True)
    out, err = capsys.readouterr()
    assert not out
    assert "reading" in err
    assert "12 tokens" in err


def test_arrays_of_any_integers_read_alike():
    model, ids = MODELS["lmm"].make(), np.random.default_rng(0).integers(0, 9, (2, 12))
    want = model.memorize(torch.tensor(ids))
    backwards = ids[:, ::-1].copy()[:, ::-1]
    parts = [torch.tensor(ids[:, :3], dtype=torch.int32), ids[:, 3:7].astype(np.uint16), ids[:, 7:]]
    mask = np.ones((2, 12), dtype=bool)
    for text in (ids.astype(">i4"), backwards, parts):
        got = model.memorize(text, attention_mask=None if text is parts else mask)
        assert_states_close("cache", states(got), states(want))


IDS = torch.ones(2, 6, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": IDS[0]}, r"must be \[B, T\], got \[6\]: .* ids\[None\]"),
        ({"input_ids": [IDS[0]]}, r"must be \[B, T\], got \[6\]: .* ids\[None\]"),
        ({"input_ids": IDS.float()}, "must be integers, got torch.float32"),
        ({"input_ids": "text"}, "there is a str: tokenizer"),
        ({"input_ids": {"input_ids": IDS}}, "there is a dict: tokenizer"),
        ({"input_ids": [[1, 2]]}, "there is a list: tokenizer"),
        ({"input_ids": 5}, "there is a int: tokenizer"),
        ({"input_ids": [IDS, IDS[:1]]}, "batch 2 and then 1: read other texts"),
        ({"piece": 0}, "piece must be a whole number of tokens, at least 1, got 0"),
        ({"piece": 1.5}, "piece must be a whole number of tokens, at least 1, got 1.5"),
        ({"piece": True}, "at least 1, got True"),
        ({"input_ids": IDS[:0]}, "at least one row, got"),
        ({"attention_mask": IDS[:, :4]}, r"must be \[B, T\] = \[2, 6\] .* got \[2, 4\]"),
        ({"input_ids": [IDS], "attention_mask": IDS}, "as one tensor, or each part of it"),
        ({"past_key_values": ()}, "must be a MemoryCache, got tuple"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    model = MODELS["lmm"].make()
    with pytest.raises(ValueError, match=message):
        model.memorize(**{"input_ids": IDS, "piece": 4} | arguments)


def test_a_cache_of_another_batch_or_model_is_refused():
    model, other = MODELS["lmm"].make(), MODELS["sliding"].make()
    for mask in (None, IDS):
        with pytest.raises(ValueError, match="batch 1 but the input has batch 2"):
            model.memorize(IDS, model.memorize(IDS[:1]), mask)
        with pytest.raises(ValueError, match="belongs to another model"):
            model.memorize(IDS, other.memorize(IDS), mask)


@pytest.mark.parametrize(
    ("config", "piece"),
    [
        (TitansConfig(), 2048),
        (TitansConfig(segment_length=768, chunk_size=64), 2304),
        (TitansConfig(segment_length=512, chunk_size=48), 3072),
        (TitansConfig(segment_length=512, chunk_size=500), 2048),
        (LM2Config(segment_length=4096), 4096),
        (LM2Config(segment_length=131072), 2048),
        (RMTConfig(base_config={"model_type": "llama"}, segment_length=500), 2500),
    ],
)
def test_the_default_piece_is_of_whole_segments_and_chunks(config, piece):
    assert default_piece(config) == piece


# `generate`, whose prompts are read in the same pieces.


@pytest.fixture
def short_pieces(monkeypatch):
    """Prompts of a test are long: they are read 5 tokens a call. Returns how many each call had."""
    monkeypatch.setattr("everlong.models.stateful.default_piece", lambda config: 5)

    def lengths_of(model):
        lengths = []
        hook = lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1])  # noqa: E731
        model.register_forward_pre_hook(hook, with_kwargs=True)
        return lengths

    return lengths_of


GREEDY = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}


@EVERY
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("beams", [1, 2])
def test_generate_reads_in_pieces_what_it_would_read_at_once(name, padded, beams, short_pieces):
    subject = MODELS[name]
    model, ids = subject.make(), subject.inputs(4, TOKENS)
    mask = torch.ones_like(ids)
    if padded:  # of three pieces, of a part of one, and none
        mask[0, :17] = 0
        mask[1, :3] = 0
    asked = {**GREEDY, "num_beams": beams, "attention_mask": mask}
    asked |= {"return_dict_in_generate": True, "output_logits": True}
    want = model.generate(ids, prefill_chunk_size=10_000, **asked)
    lengths = short_pieces(model)
    got = model.generate(ids, **asked)
    assert lengths[:9] == [5] * 8 + [1]
    assert torch.equal(got.sequences, want.sequences)
    for step, (one, other) in enumerate(zip(got.logits, want.logits, strict=True)):
        assert_close(f"logits {step}", one, other, torch.float32)  # which generate makes of any


@SOME
def test_long_questions_too(name, short_pieces):
    subject = MODELS[name]
    model, ids = subject.make(), subject.inputs(3, TOKENS)
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    cache = model.memorize(subject.inputs(1, TOKENS, 1))
    want = model.generate_from(cache, ids, mask, prefill_chunk_size=10_000, **GREEDY)
    lengths = short_pieces(model)
    assert torch.equal(model.generate_from(cache, ids, mask, **GREEDY), want)
    assert lengths[:9] == [5] * 8 + [1]


def test_who_asks_for_all_hidden_states_gets_them(short_pieces):
    subject = MODELS["mac"]
    model, ids = subject.make(), subject.inputs(1, TOKENS)
    asked = {**GREEDY, "return_dict_in_generate": True, "output_hidden_states": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **asked)
    assert out.hidden_states[0][-1].shape[1] == TOKENS


def test_embeddings_as_a_prompt(short_pieces):
    subject = MODELS["mac"]
    model, ids = subject.make(), subject.inputs(2, TOKENS)
    want = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
    x = model.model.embed_tokens(ids)
    assert torch.equal(model.generate(inputs_embeds=x, **GREEDY), want[:, TOKENS:])


def test_generate_without_a_cache_and_the_users_own_settings(short_pieces):
    subject = MODELS["mac"]
    model, ids = subject.make(), subject.inputs(2, TOKENS)
    asked = {**GREEDY, "attention_mask": torch.ones_like(ids)}
    want = model.generate(ids, **asked)
    assert torch.equal(model.generate(ids, use_cache=False, **asked), want)
    lengths = short_pieces(model)
    assert torch.equal(model.generate(ids, prefill_chunk_size=20, **asked), want)
    assert lengths[:4] == [20, 20, 1, 1]
    assert model.generation_config.prefill_chunk_size is None


# Memory.

PIECE = 256
SLACK = 2 * 2**20  # bytes: what an allocator may keep; a piece's logits alone are 8 MiB


def wide(build, **options):
    """A tiny model whose logits of a piece, were they computed, would be large."""
    torch.manual_seed(0)
    return build(vocab_size=8192, segment_length=64, **options)().eval()


@pytest.mark.parametrize(
    "build",
    [
        partial(titans, "mac", "mag", chunk_size=32, sliding_window=64),
        partial(lm2, num_memory_slots=8),
        rmt,
    ],
    ids=["titans", "lm2", "rmt"],
)
def test_memory_does_not_grow_with_the_text(build):
    """Neither what the process holds, nor what tensors there are."""
    model, process = wide(build), psutil.Process()
    resident, alive = [], []
    gc.collect()
    # Other tests' (a compiler keeps some for a while): held, so that none of them goes meanwhile.
    others = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    known = set(map(id, others))

    def look(tokens):
        if len(resident) in (5, 59):  # these take memory themselves
            gc.collect()
            tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor and id(x) not in known]
            alive.append(sum(x.untyped_storage().nbytes() for x in tensors))
        resident.append(process.memory_info().rss)

    text = (torch.randint(8192, (1, PIECE)) for _ in range(60))
    cache = model.memorize(text, piece=PIECE, progress=look)
    assert cache.get_seq_length() == 60 * PIECE
    assert alive[0] == alive[1]
    assert max(resident[10:59]) - resident[10] < SLACK


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ({"input_ids": torch.zeros(1, 3, dtype=torch.long)}, "there is a dict"),
        (torch.tensor([[1, 300]]), r"0 \.\.\. 258.*got 1 \.\.\. 300"),
        (torch.tensor([[-1, 3]]), r"0 \.\.\. 258.*got -1 \.\.\. 3"),
    ],
)
def test_ids_that_are_none_are_named(ids, message):
    model = AutoModelForCausalLM.from_config(TitansConfig(vocab_size=259, **SMALL))
    with pytest.raises(ValueError, match=message):
        model.memorize(ids)


@pytest.mark.parametrize(
    "ids", [torch.tensor([1, 2]), torch.zeros(1, 0, dtype=torch.long), None, "text"]
)
def test_generate_from_wants_new_ids(ids):
    model = AutoModelForCausalLM.from_config(TitansConfig(vocab_size=259, **SMALL))
    memory = model.memorize(torch.tensor([[1, 2, 3]]))
    with pytest.raises(ValueError, match=r"\[B, T\]"):
        model.generate_from(memory, ids)


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "layer_types": ["lmm"],
    "chunk_size": 8,
}
