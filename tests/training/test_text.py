"""Training on text: packed rows, memories carried along streams, tokenizers."""

import json
import math

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from conftest import TINY_MODELS
from everlong.data import TextConfig, train_tokenizer
from everlong.models import MemoryCache, TitansForCausalLM
from everlong.training import load_recipe, resume, train
from everlong.training.carry import MemoryTrainer
from everlong.training.fit import RESTART
from everlong.training.model import build_model_config

MODELS = {
    **TINY_MODELS,
    "lm2": {**TINY_MODELS["llama"], "type": "lm2", "num_memory_slots": 4, "segment_length": 16},
    "rmt": {
        "type": "rmt",
        "num_memory_tokens": 2,
        "segment_length": 16,
        "base_config": {**TINY_MODELS["llama"], "model_type": "llama"},
    },
    "mamba2": {
        "type": "mamba2",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_heads": 4,
        "head_dim": 16,
    },
    "gated_deltanet": {**TINY_MODELS["llama"], "type": "gated_deltanet"},
}
MODELS["rmt"]["base_config"].pop("type")


@pytest.fixture
def recipe(tmp_path, text_folder):
    """recipe("titans", {"layout": "streams"}, max_steps=3, ...) writes one; the path."""

    def write(model="titans", data=None, **training):
        path = tmp_path / f"text-{model}.yaml"
        fields = {
            "model": MODELS[model],
            "data": {
                "task": "text",
                "source": str(text_folder),
                "length": 40,
                "cache_folder": str(tmp_path / "cache"),
                **(data or {}),
            },
            "training": {
                "max_steps": 6,
                "per_device_train_batch_size": 2,
                "logging_steps": 1,
                "learning_rate": 0.01,
                "use_cpu": True,
                **training,
            },
        }
        path.write_text(yaml.safe_dump(fields))
        return path

    return write


def run(path, folder, *overrides):
    return load_recipe(path, ["--output_dir", str(folder), *overrides])


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.mark.parametrize("model", ["llama", "titans", "lm2", "rmt"])
def test_a_document_in_a_packed_row_has_the_logits_it_has_alone(recipe, tmp_path, model):
    loaded = run(recipe(model, {"length": 900, "held_out": 0.2}, max_steps=1), tmp_path / "run")
    train(loaded)
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    row = next(row for row in loaded.data.datasets(20)[0] if (row["position_ids"] == 0).sum() > 1)
    ids, positions = row["input_ids"][None], row["position_ids"][None]
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    with torch.no_grad():
        packed = network(ids, position_ids=positions, use_cache=False).logits[0]
        for start, end in zip(starts, [*starts[1:], 900], strict=True):
            alone = network(ids[:, start:end], use_cache=False).logits[0]
            torch.testing.assert_close(packed[start:end], alone, atol=1e-4, rtol=1e-3)
        assert not torch.allclose(packed, network(ids, use_cache=False).logits[0], atol=1e-2)


@pytest.mark.parametrize("documents", ["restart", "join"])
@pytest.mark.parametrize("model", ["titans", "lm2", "rmt"])
def test_the_memory_is_carried_from_step_to_step(recipe, tmp_path, model, documents, monkeypatch):
    """A learning rate of zero: each step's loss is that of one call over the whole stream."""
    options = {"layout": "streams", "documents": documents, "start_length": 24, "growth_steps": 3}
    path = recipe(model, options, learning_rate=0.0, gradient_accumulation_steps=2, weight_decay=0.0)
    seen = []
    step = MemoryTrainer.training_step

    def spy(self, network, inputs, *args, **kwargs):
        seen.append((inputs, self.memory.layers[0].seen, network))
        loss = step(self, network, inputs, *args, **kwargs)
        assert all(not leaf.requires_grad for leaf in leaves(self.memory))
        return loss

    monkeypatch.setattr(MemoryTrainer, "training_step", spy)
    train(run(path, tmp_path / "run"))
    assert len(seen) == 12
    lengths = [inputs["input_ids"].shape[1] for inputs, _, _ in seen]
    assert len(set(lengths)) > 1
    assert [past for _, past, _ in seen] == [sum(lengths[:i]) for i in range(12)]

    network = seen[0][2].eval()
    ids = torch.cat([inputs["input_ids"] for inputs, _, _ in seen], 1)
    positions = None
    if documents == "restart":
        positions = torch.cat([inputs["position_ids"] for inputs, _, _ in seen], 1)
        assert ((positions == 0).sum(1) > 0).any(), "no document begins within a stream"
    with torch.no_grad():
        logits = network(ids, position_ids=positions, use_cache=False).logits
    found, start = losses(tmp_path / "run"), 0
    eos = network.config.eos_token_id
    for index in range(6):
        nll, count = 0.0, 0
        for length in lengths[2 * index : 2 * index + 2]:
            targets = ids[:, start + 1 : start + length].clone()
            targets[ids[:, start : start + length - 1] == eos] = -100
            part = logits[:, start : start + length - 1]
            nll += torch.nn.functional.cross_entropy(
                part.flatten(0, 1), targets.flatten(), reduction="sum"
            ).item()
            count += int((targets != -100).sum())
            start += length
        assert found[index] == pytest.approx(nll / count, rel=1e-4)
    # It would be seen if the memory were not there.
    with torch.no_grad():
        last = network(ids[:, -lengths[-1] :], use_cache=False).logits
    assert not torch.allclose(last, logits[:, -lengths[-1] :], atol=1e-5)


def leaves(cache):
    found = torch.utils._pytree.tree_leaves([layer.state for layer in cache.layers])
    return [leaf for leaf in found if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("model", ["titans", "lm2", "rmt"])
def test_a_resumed_run_on_streams_is_the_uninterrupted_one(recipe, tmp_path, model, monkeypatch):
    options = {"layout": "streams", "start_length": 24, "growth_steps": 4}
    path = recipe(
        model, options, save_steps=3, gradient_accumulation_steps=2, eval_strategy="steps", eval_steps=2
    )
    train(run(path, tmp_path / "whole"))

    step = MemoryTrainer.training_step

    def killed(self, *args, **kwargs):
        if self.state.global_step == 4:
            raise SystemExit
        return step(self, *args, **kwargs)

    monkeypatch.setattr(MemoryTrainer, "training_step", killed)
    with pytest.raises(SystemExit):
        train(run(path, tmp_path / "cut"))
    monkeypatch.undo()
    resume(tmp_path / "cut")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    states = [
        MemoryCache.load(tmp_path / name / "checkpoint-6" / "memory_0.safetensors")
        for name in ("whole", "cut")
    ]
    for a, b in zip(*map(leaves, states), strict=True):
        assert torch.equal(a, b)


def test_evaluation_leaves_the_memory_alone(recipe, tmp_path):
    for name, steps in (("without", 100), ("with", 1)):
        path = recipe("titans", {"layout": "streams"}, eval_strategy="steps", eval_steps=steps)
        train(run(path, tmp_path / name))
    a, b = weights(tmp_path / "without"), weights(tmp_path / "with")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_memory_that_is_missing_or_of_other_rows_is_refused(recipe, tmp_path):
    path, folder = recipe("titans", {"layout": "streams"}, max_steps=2), tmp_path / "run"
    train(run(path, folder))
    more = "--training.max_steps=4"
    halves = ["per_device_train_batch_size=1", "gradient_accumulation_steps=2"]
    with pytest.raises(ValueError, match="the memory of 2 rows, but a batch has 1"):
        resume(folder, [more, *(f"--training.{each}" for each in halves)])
    (folder / "checkpoint-2" / "memory_0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-2 has no memory_0\.safetensors.*--overwrite"):
        resume(folder, [more])


@pytest.mark.parametrize("model", ["llama", "mamba2", "gated_deltanet"])
def test_streams_want_a_memory(recipe, model):
    with pytest.raises(
        ValueError, match=f"streams carries a memory.* {model} has none.*layout: packed"
    ):
        load_recipe(recipe(model, {"layout": "streams", "documents": "join"}))


@pytest.mark.parametrize("model", ["mamba2", "gated_deltanet"])
def test_models_that_cannot_restart_read_joined_documents(recipe, tmp_path, model):
    with pytest.raises(ValueError, match=f"{model} are not known to restart .* data.documents: join"):
        load_recipe(recipe(model))
    assert train(run(recipe(model, {"documents": "join"}, max_steps=1), tmp_path / "run"))["steps"] == 1


def test_the_recipes_tokenizer_is_the_models_and_the_runs(recipe, tmp_path):
    folder, run_folder = tmp_path / "bpe", tmp_path / "run"
    train_tokenizer(["The first of ten short texts, told often. "] * 9, 270).save_pretrained(folder)
    path = recipe("titans", {"tokenizer": str(folder)}, max_steps=1)
    config = build_model_config(load_recipe(path))
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (270, 0, 2)
    train(run(path, run_folder))
    saved = AutoTokenizer.from_pretrained(run_folder)
    assert len(saved) == 270
    assert saved.decode(saved("told often")["input_ids"]) == "told often"
    with pytest.raises(ValueError, match=r"vocab_size must be at least 270.*got 259: leave it out"):
        load_recipe(path, ["--model.vocab_size=259"])


def test_a_run_whose_text_has_changed_is_not_gone_on_with(recipe, tmp_path, text_folder):
    train(run(recipe(max_steps=2), tmp_path / "run"))
    (text_folder / "0.txt").write_text("Something else. " * 50)
    more = ["--training.max_steps=3"]
    with pytest.raises(ValueError, match="changed: the text that"):
        resume(tmp_path / "run", more)


def test_fields_are_checked(recipe, tmp_path, text_folder):
    path = recipe()
    for override, message in [
        ("--data.lenght=3", r"data.lenght: did you mean data.length\?"),
        ("--data.layout=rows", "layout.*rows"),
        ("--data.key_digits=3", "unknown field data.key_digits"),
        ("--data.held_out=2", "held_out is a share"),
        ("--data.tokenizer=/no/such", "no tokenizer can be loaded"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_recipe(path, [override])
    loaded = run(path, tmp_path / "x", "--data.streaming", "true", "--data.max_bytes=5000")
    assert loaded.data.streaming
    loaded.save(tmp_path)
    assert load_recipe(tmp_path / "recipe.yaml") == loaded
    listed = recipe("titans", {"source": [str(text_folder / "0.txt"), str(text_folder / "1.txt")]})
    assert isinstance(load_recipe(listed).data, TextConfig)


def test_a_streamed_text_is_trained_on_and_resumed(recipe, tmp_path):
    path = recipe("llama", {"streaming": True}, max_steps=4, save_steps=2)
    train(run(path, tmp_path / "whole"))
    train(
        run(path, tmp_path / "cut", "--training.max_steps=2", "--training.lr_scheduler_type=constant")
    )
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")[:2]


def test_a_memory_is_read_where_gradients_are_computed_again(recipe, tmp_path):
    """With activation checkpointing the run is the same."""
    for name, again in (("a", False), ("b", True)):
        path = recipe("titans", {"layout": "streams"}, max_steps=3, activation_checkpointing=again)
        train(run(path, tmp_path / name))
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-5)
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "b"), TitansForCausalLM)


def test_bits_a_byte_are_those_of_the_text_whatever_the_tokens_are(recipe, tmp_path):
    folder = tmp_path / "bpe"
    train_tokenizer(["The first of ten short texts, told often. "] * 9, 270).save_pretrained(folder)
    path = recipe("llama", {"tokenizer": str(folder), "documents": "join"}, eval_strategy="steps")
    loaded = run(path, tmp_path / "run", "--training.eval_steps=2", "--evaluation.held_out_samples=4")
    result = train(loaded)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run").eval()
    held_out = loaded.data.datasets(1)[1]
    nats = text = 0
    for index in range(4):
        ids = held_out[index]["input_ids"]
        with torch.no_grad():
            logits = model(ids[None], use_cache=False).logits[0]
        labels = held_out[index]["labels"][1:]
        nats += torch.nn.functional.cross_entropy(logits[:-1], labels, reduction="sum").item()
        text += len(AutoTokenizer.from_pretrained(folder).decode(ids[1:]).encode())
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / text, rel=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [line["step"] for line in lines if "bits_per_byte" in line]
    assert found == [2, 4, 6]


@pytest.mark.parametrize("kind", RESTART)
def test_models_of_transformers_that_restart(kind):
    """What a packed document gives does not depend on the one before it."""
    names = {"gpt2": ("n_embd", "n_layer", "n_head"), "gptj": ("n_embd", "n_layer", "n_head")}
    width, layers, heads = names.get(kind, ("hidden_size", "num_hidden_layers", "num_attention_heads"))
    fields = {width: 32, layers: 2, heads: 2, "vocab_size": 50}
    if kind in ("gpt2", "gptj"):
        fields |= {"n_positions": 64} | ({"rotary_dim": 8} if kind == "gptj" else {})
    else:
        fields |= {"intermediate_size": 32}
    if kind in ("llama", "mistral", "qwen2", "qwen3"):
        fields |= {"num_key_value_heads": 2, "head_dim": 16}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **fields)).eval()
    ids, positions = torch.randint(50, (1, 20)), torch.cat([torch.arange(8), torch.arange(12)])[None]
    other = ids.clone()
    other[:, :8] = torch.randint(50, (1, 8))
    with torch.no_grad():
        a, b = (model(x, position_ids=positions, use_cache=False).logits[:, 8:] for x in (ids, other))
    assert torch.equal(a, b)


def test_a_table_of_positions_that_is_too_short_is_named(tiny_recipe, tmp_path):
    path = tmp_path / "gpt2.yaml"
    path.write_text("{model: {type: gpt2, n_positions: 64}, training: {max_steps: 1}}")
    with pytest.raises(ValueError, match=r"length is 512, but .* gpt2 has a table of 64 positions"):
        load_recipe(path)
