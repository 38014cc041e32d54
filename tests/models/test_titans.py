"""Titans as a `transformers` model: configuration, files, training, caches, refusals."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from everlong import TitansConfig, TitansForCausalLM, TitansModel
from numerics import assert_close
from subjects import titans


@pytest.fixture
def model():
    torch.manual_seed(0)
    return titans("lmm", "sliding_attention")().double().eval()


def test_auto_classes(tmp_path, model):
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TitansConfig)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path), TitansForCausalLM)
    assert isinstance(AutoModel.from_pretrained(tmp_path), TitansModel)
    assert AutoConfig.for_model("titans", num_hidden_layers=3).layer_types == ["lmm"] * 3


def test_from_config_initialises_as_the_layer_does():
    """post_init must not undo the layer's own start."""
    model = titans("lmm", initial_alpha=0.25, initial_theta=0.125)()
    memory = model.model.layers[0].mixer.memory
    assert_close("alpha", memory.alpha_proj.bias.sigmoid(), torch.full((4,), 0.125), torch.float32)
    assert_close("theta", memory.theta_proj.bias.sigmoid(), torch.full((4,), 0.125), torch.float32)
    assert memory.memory_init[0].weight.std() > 0.1
    assert memory.q_proj.weight.std() < 0.1


def test_a_checkpoint_with_missing_parameters_gets_a_proper_start(tmp_path):
    model = titans("lmm")()
    lost = (".memory.", "persistent")
    kept = {k: v for k, v in model.state_dict().items() if not any(name in k for name in lost)}
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded = TitansForCausalLM.from_pretrained(tmp_path)
    memory = loaded.model.layers[0].mixer.memory
    assert_close("alpha", memory.alpha_proj.bias.sigmoid(), torch.full((4,), 0.005), torch.float32)
    assert memory.memory_scale.weight.eq(1).all()
    assert all(p.isfinite().all() and p.abs().max() < 10 for p in loaded.parameters())
    assert 0.5 < loaded.model.layers[0].mixer.persistent.weight.std() < 2


def test_every_part_gets_the_numbers_of_the_configuration():
    kinds = ("lmm", "mac", "mag", "mal", "sliding_attention", "full_attention")
    model = titans(*kinds, rms_norm_eps=1e-3, rope_theta=123.0)()
    epsilons = [module.eps for module in model.modules() if hasattr(module, "eps")]
    assert len(epsilons) == 1 + 2 * 6 + 4 + 2 + 2 + 1  # last, two a layer, memories', MAC, MAG, MAL
    assert set(epsilons) == {1e-3}
    bases = [module.rope_theta for module in model.modules() if hasattr(module, "rope_theta")]
    assert bases == [123.0] * 5


def test_a_reset_cache_is_an_empty_one(model):
    ids = torch.randint(11, (2, 9))
    want = model(ids, use_cache=True)
    cache = want.past_key_values
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_close("logits", model(ids, past_key_values=cache).logits, want.logits, torch.float32)


def test_what_was_written_is_the_mean_over_all_memories():
    model = titans("lmm", "sliding_attention", "mag")().eval()
    out = model.model(torch.randint(11, (2, 9)), output_memory=True)
    memory = model.model.layers[0].mixer.memory
    theta = torch.stack([trace.theta for trace in out.memory if trace is not None])
    eta = torch.stack([trace.eta for trace in out.memory if trace is not None])
    strength = theta / (1 - eta) / torch.tensor(memory.max_thetas)
    want = (1 + 1000 * strength).log().mean((0, -1, -2))
    assert_close("written", out.written, want, torch.float32)


def test_loss_is_the_mean_over_labels(model):
    ids = torch.randint(11, (2, 9))
    labels = ids.clone()
    labels[:, :4] = -100
    out = model(ids, labels=labels)
    logits = out.logits[:, :-1].flatten(0, 1)
    want = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    assert_close("loss", out.loss, want, torch.float32)
    halved = model(ids, labels=labels, num_items_in_batch=torch.tensor(20)).loss
    assert_close("loss over accumulated batches", halved, want / 2, torch.float32)


def test_inputs_embeds_equal_input_ids(model):
    ids = torch.randint(11, (2, 9))
    got = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
    assert torch.equal(got, model(ids).logits)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_logits_to_keep(model):
    ids = torch.randint(11, (2, 9))
    want = model(ids).logits
    assert_close("last", model(ids, logits_to_keep=2).logits, want[:, -2:])
    picked = model(ids, logits_to_keep=torch.tensor([1, 4])).logits
    assert_close("picked", picked, want[:, [1, 4]])
    with pytest.raises(ValueError, match="leave logits_to_keep at 0"):
        model(ids, labels=ids, logits_to_keep=1)


def test_tied_embeddings(tmp_path):
    model = titans("lmm", tie_word_embeddings=True)()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    loaded = TitansForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_generate_continues_from_a_cache(model):
    """A prompt read before, in a cache, is not read again."""
    ids = torch.randint(1, 11, (1, 9))
    want = model.generate(ids, max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        cache = model(ids[:, :5], use_cache=True).past_key_values
    got = model.generate(ids, past_key_values=copy.deepcopy(cache), max_new_tokens=6, do_sample=False)
    assert torch.equal(got, want)
    cache.reset()
    assert torch.equal(
        model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False), want
    )


def test_sampling_and_beams_run(model):
    ids = torch.randint(1, 11, (2, 5))
    for options in (
        {"do_sample": True},
        {"num_beams": 2},
        {"num_return_sequences": 2, "do_sample": True},
    ):
        rows = 2 * options.get("num_return_sequences", 1)
        assert model.generate(ids, max_new_tokens=3, **options).shape == (rows, 8)


def test_cache_detach_cuts_gradients(model):
    ids = torch.randint(11, (1, 9))
    cache = model(ids[:, :5], use_cache=True).past_key_values
    model(ids[:, 5:], past_key_values=cache.detach(), labels=ids[:, 5:]).loss.backward()


def refused(model, message, **arguments):
    with pytest.raises(ValueError, match=message):
        model(torch.randint(11, (2, 5)), **arguments)


def test_what_is_not_supported_is_refused(model):
    refused(model, r"attention_mask must be \[B, T\]", attention_mask=torch.ones(2, 4))
    refused(model, r"attention_mask must be \[B, T\]", attention_mask=torch.ones(2, 1, 5, 5))
    refused(model, r"attention_mask must be \[B, T\]", attention_mask=torch.ones(2, 9))
    refused(model, "position_ids must be", position_ids=torch.tensor([[0, 1, 0, 1]]))
    refused(model, "position_ids must be", position_ids=torch.zeros(3, 5).long())
    refused(model, "must be a MemoryCache, got DynamicCache", past_key_values=DynamicCache())
    cache = model(torch.randint(11, (1, 3)), use_cache=True).past_key_values
    refused(model, "batch 1 but the input has batch 2", past_key_values=cache)
    other = titans("lmm")().double()(torch.randint(11, (2, 3)), use_cache=True).past_key_values
    refused(model, "1 states but the model 2", past_key_values=other)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="does not hold a memory"):
        model.generate(torch.randint(1, 11, (1, 3)), cache_implementation="static", max_new_tokens=2)


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        ("unknown layer_types", {"layer_types": ["lmm", "mamba"]}),
        ("names 1 layers but num_hidden_layers is 2", {"layer_types": ["lmm"]}),
        ("not a multiple of num_attention_heads", {"num_attention_heads": 7}),
        ("not a multiple of num_key_value_heads", {"num_key_value_heads": 3}),
        ("head_dim must be even", {"head_dim": 3}),
        ("sliding_window must be at least 1", {"sliding_window": 0}),
        ("num_attention_heads must be at least 1", {"num_attention_heads": 0}),
        ("num_hidden_layers must be at least 1", {"num_hidden_layers": 0}),
        ("not a multiple of num_memory_heads", {"num_memory_heads": 3}),
        ("num_memory_heads must be at least 1", {"num_memory_heads": 0}),
        ("memory_write_cost must be at least 0", {"memory_write_cost": -1.0}),
        ("pad_token_id", {"pad_token_id": 32000}),
        ("not a multiple of chunk_size", {"layer_types": ["mac", "lmm"], "segment_length": 100}),
        ("hidden_size", {"hidden_size": "wide"}),
        ("gate_act must be", {"gate_act": "tanh"}),
        ("initial_alpha must lie between 0 and 1, got 5", {"initial_alpha": 5.0}),
        ("initial_alpha must lie between 0 and 1, got 5", {"initial_alpha": [0.1, 5.0]}),
        ("initial_alpha must be a number or two", {"initial_alpha": []}),
        ("initial_alpha must be a number or two", {"initial_alpha": [0.1, 0.2, 0.3]}),
        ("initial_eta must lie between 0 and 1", {"initial_eta": 0.0}),
        ("initial_theta must lie between 0 and 1", {"initial_theta": 1.5}),
    ],
)
def test_configurations_that_do_not_fit(message, fields):
    with pytest.raises(Exception, match=message):
        TitansConfig(**{"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 8} | fields)


def test_writing_has_its_price_in_training_only():
    model = titans("lmm", "sliding_attention", memory_write_cost=0.5)()
    ids = torch.randint(11, (2, 9))
    model.eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(10)  # some labels are likely, some are not
    plain, written = model(ids, labels=ids).loss, model.model(ids).written
    losses = torch.stack([model(row[None], labels=row[None]).loss for row in ids])
    price = 0.5 * (written.mean(1) * torch.exp(-losses)).mean()
    memory = model.model.layers[0].mixer.memory
    x = model.model.layers[0].input_norm(model.model.embed_tokens(ids))
    with memory._rows(x, None) as (_, k, _, _):
        _, strength = memory._gates(x, k, torch.float32)
    told = (1 + 1000 * strength).log().mean((-2, -1))
    assert_close("written", written, told, torch.float32)
    model.train()
    out = model(ids, labels=ids)
    assert_close("loss", out.loss, plain + price, torch.float32)
    assert not torch.allclose(*torch.exp(-losses), rtol=0.01)  # each row waits for itself
    (gradient,) = torch.autograd.grad(out.price, model.lm_head.weight, allow_unused=True)
    assert gradient is None  # the price is no reason to learn less
    # Two accumulated batches of 16 labels each pay together what one batch pays.
    accumulated = model(ids, labels=ids, num_items_in_batch=torch.tensor(32)).loss
    assert_close("accumulated", accumulated, (plain + price) / 2, torch.float32)


def test_the_price_of_a_row_does_not_depend_on_the_rows_beside_it():
    model = titans("lmm", memory_write_cost=20.0)().train()
    ids = torch.randint(11, (3, 9))
    labels = ids.clone()
    labels[0, 2:], labels[1, 5:] = -100, -100
    items = (labels[:, 1:] != -100).sum()
    together = model(ids, labels=labels).loss
    alone = [
        model(row[None], labels=asked[None], num_items_in_batch=items).loss
        for row, asked in zip(ids, labels, strict=True)
    ]
    assert_close("loss", sum(alone), together, torch.float32)


def test_pads_have_no_price_and_count_as_columns():
    model = titans("lmm", memory_write_cost=0.5)().train()
    ids = torch.randint(11, (1, 9))
    padded = torch.nn.functional.pad(ids, (4, 0))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (4, 0))
    labels = torch.nn.functional.pad(ids, (4, 0), value=-100)
    labels[:, 4] = -100  # alone, no one predicts the first token
    want = model(ids, labels=ids).loss
    out = model(padded, attention_mask=mask, labels=labels, use_cache=True)
    assert_close("loss", out.loss, want, torch.float32)
    assert out.past_key_values.get_seq_length() == 13
