"""What stops a run, or makes it leave a step out."""

import json
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from everlong.training import NonFiniteError, load_recipe, resume, train
from everlong.training.guards import Watch, first_not_finite
from everlong.training.model import build_model
from everlong.training.progress import TrainingProgress
from everlong.training.recipe import Guards
from everlong.training.train import EverlongTrainer
from subjects import SEGMENT, SUBJECTS, VOCABULARY, titans


def run(path, folder, *overrides):
    return load_recipe(path, ["--output_dir", str(folder), *overrides])


def fail_at(monkeypatch, spoil, *steps):
    """Spoil the model by `spoil(model, inputs)` before the forward pass of these steps, from 1."""
    plain = EverlongTrainer.training_step

    def step(self, model, inputs, *args, **kwargs):
        if self.state.global_step + 1 in steps:
            inputs = spoil(model, inputs)
        return plain(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(EverlongTrainer, "training_step", step)


def embed_nan(model, inputs):
    x = model.get_input_embeddings()(inputs["input_ids"])
    return {"labels": inputs["labels"], "inputs_embeds": x * torch.nan}


def test_a_loss_that_is_not_finite_stops_the_run(tiny_recipe, tmp_path, monkeypatch):
    """With the step and the layer."""

    def spoil(model, inputs):
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
        return inputs

    fail_at(monkeypatch, spoil, 3)
    message = r"loss is nan, first of all the output of model.layers.1.mlp.down_proj at step 3; .*-2\."
    with pytest.raises(NonFiniteError, match=message):
        train(run(tiny_recipe("titans", save_steps=1), tmp_path / "run"))
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_weights_that_the_last_update_has_spoilt_are_not_written(
    strategy, tiny_recipe, tmp_path, monkeypatch
):
    """Neither as a checkpoint nor as a finished model."""
    on_step_end = TrainingProgress.on_step_end

    def spoil(self, args, state, control, model, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 6:
            with torch.no_grad():
                model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan

    monkeypatch.setattr(TrainingProgress, "on_step_end", spoil)
    path = tiny_recipe("titans", save_steps=2, save_strategy=strategy)
    last = "-4" if strategy == "steps" else "no checkpoint was saved yet"
    message = rf"model.layers.1.mlp.down_proj.weight is not finite at step 6; .*{last}\. A lower"
    with pytest.raises(NonFiniteError, match=message):
        train(run(path, tmp_path / "run"))
    names = {each.name for each in (tmp_path / "run").iterdir()}
    assert names.isdisjoint({"checkpoint-6", "model.safetensors", "result.json"})


def test_a_memory_that_explodes_stops_the_run_with_its_layer(tiny_recipe, tmp_path, monkeypatch):
    def spoil(model, inputs):
        with torch.no_grad():
            # Above the guard's 1e4 by so much as is forgotten until the text's end.
            model.model.layers[0].mixer.memory.memory_init[0].weight[0, 0, 0] = 1e5
        return inputs

    fail_at(monkeypatch, spoil, 4)
    path = tiny_recipe("titans", save_steps=1)
    message = r"memory of layer 0 has an entry of .*e\+04, .* guards.max_memory \(1.*\) at step 4"
    with pytest.raises(NonFiniteError, match=message):
        train(run(path, tmp_path / "run"))
    wide = ["--guards.max_memory=1e9"]
    assert train(run(path, tmp_path / "wide", *wide))["steps"] == 6


def test_steps_are_left_out_where_the_recipe_allows_it(tiny_recipe, tmp_path, monkeypatch):
    """The weights are then those of a run without that step's gradient."""
    fail_at(monkeypatch, embed_nan, 2, 3)
    path = tiny_recipe("titans", logging_steps=1, save_steps=1, lr_scheduler_type="constant")
    folder = tmp_path / "run"
    train(run(path, folder, "--guards.skipped_steps=2", "--training.save_total_limit=6"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    left_out = [line for line in lines if "skipped" in line]
    assert [line["step"] for line in left_out] == [2, 3]
    assert "the gradient of model" in left_out[0]["skipped"]
    assert [line["step"] for line in lines if 1 < line.get("loss", 0) < 6] == [1, 4, 5, 6]

    def weights(step):
        return AutoModelForCausalLM.from_pretrained(folder / f"checkpoint-{step}").state_dict()

    first, third, fourth = weights(1), weights(3), weights(4)
    assert all(torch.equal(first[name], third[name]) for name in first)
    assert any(not torch.equal(third[name], fourth[name]) for name in first)
    with pytest.raises(NonFiniteError, match="at step 3"):
        train(run(path, tmp_path / "strict", "--guards.skipped_steps=1"))


@pytest.mark.parametrize("bad", [1, 2, 4])
def test_the_logged_loss_is_that_of_the_other_steps(bad, tiny_recipe, tmp_path, monkeypatch):
    path = tiny_recipe("titans", max_steps=4, logging_steps=4, learning_rate=1e-9)
    good = train(run(path, tmp_path / "good"))["loss"]
    fail_at(monkeypatch, embed_nan, bad)
    found = train(run(path, tmp_path / "bad", "--guards.skipped_steps=1"))["loss"]
    assert found == pytest.approx(good, rel=0.02)  # the mean of three steps for that of four


def test_a_memory_that_is_carried_starts_anew_where_a_step_is_left_out(
    tiny_recipe, tmp_path, monkeypatch, text_folder
):
    def spoil(model, inputs):
        x = embed_nan(model, inputs)
        return {**x, "position_ids": inputs["position_ids"]}

    fail_at(monkeypatch, spoil, 2)
    recipe = yaml.safe_load(tiny_recipe("titans", logging_steps=1).read_text())
    recipe["data"] |= {"task": "text", "layout": "streams", "cache_folder": str(tmp_path / "cache")}
    path = tmp_path / "text.yaml"
    path.write_text(yaml.safe_dump(recipe))
    train(run(path, tmp_path / "run", "--guards.skipped_steps=1"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "skipped" in line] == [2]
    resumed = run(path, tmp_path / "cut", "--guards.skipped_steps=1", "--training.max_steps=2")
    train(resumed)  # and a checkpoint at that step can be gone on from
    monkeypatch.undo()
    assert resume(tmp_path / "cut", ["--training.max_steps=3"])["steps"] == 3
    assert [line["step"] for line in lines if 1 < line.get("loss", 0) < 6] == [1, 3, 4, 5, 6]


def test_a_gradient_that_is_not_finite_is_named_before_it_reaches_the_weights(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    for each in model.parameters():
        each.grad = torch.zeros_like(each)
    arguments = SimpleNamespace(fp16=False, output_dir=str(tmp_path))
    state = SimpleNamespace(global_step=7)
    watch = Watch(Guards(), None)
    watch.check_gradient(model, arguments, state)
    model[1].weight.grad[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match=r"gradient of 1\.weight is nan at step 8; no checkp"):
        watch.check_gradient(model, arguments, state)


@pytest.mark.parametrize("clipped", ["1.0", "0.0"])
def test_a_norm_that_overflows_is_seen_before_the_trainer_clips(clipped, tiny_recipe, tmp_path):
    """Each gradient is finite, their norm is not: clipping would make zeros of them."""
    steep = ["--model.memory_write_cost=1e25", f"--training.max_grad_norm={clipped}"]
    path = tiny_recipe("titans", save_steps=1)
    with pytest.raises(NonFiniteError, match="the gradient's norm is inf at step 1; no checkpoint"):
        train(run(path, tmp_path / "run", *steep))
    folder = tmp_path / "lenient"
    train(run(path, folder, *steep, "--guards.skipped_steps=6"))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "skipped" in line] == [1, 2, 3, 4, 5, 6]


def test_the_gradient_that_is_named_is_the_one_that_is_not_finite(tiny_recipe, tmp_path, monkeypatch):
    """Of accumulated batches too, at the step that they end."""
    backward, seen = EverlongTrainer.training_step, []

    def step(self, model, inputs, *args, **kwargs):
        seen.append(self.state.global_step)
        if len(seen) == 4:  # the last of the second step
            weight = model.get_parameter("model.layers.1.mlp.down_proj.weight")
            weight.register_hook(lambda grad: grad * torch.nan)
        return backward(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(EverlongTrainer, "training_step", step)
    path = tiny_recipe("titans", save_steps=1, gradient_accumulation_steps=2)
    named = r"gradient of model\.layers\.1\.mlp\.down_proj\.weight is nan at step 2; .*checkpoint-1"
    with pytest.raises(NonFiniteError, match=named):
        train(run(path, tmp_path / "run"))


def test_a_sound_model_has_nothing_to_name():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    assert first_not_finite(model, {"input": torch.ones(2)}) is None
    assert first_not_finite(model, {"input": torch.ones(2) * torch.nan}) == "0"


@pytest.mark.parametrize("kind", [s.name for s in SUBJECTS if s.is_model and "rmt" not in s.name])
def test_every_layer_with_a_memory_is_watched(kind):
    [subject] = [each for each in SUBJECTS if each.name == kind]
    model = subject.make()
    watch = Watch(Guards(max_memory=1e-9), None)
    watch.on_train_begin(None, None, None, model=model)
    model(subject.inputs(2, 9))
    assert sorted(watch._largest) == list(range(len(model.model.layers)))
    assert "memory of layer 0 has an entry of" in watch._memory()
    watch.on_train_end(None, None, None)
    model(subject.inputs(2, 9))
    assert watch._memory() is None


def test_every_piece_of_a_text_is_watched():
    """The largest entry counts, wherever in the text the memory had it."""
    model = titans("lmm", backprop_segments=1)().train()
    watch = Watch(Guards(), None)
    watch.on_train_begin(None, None, None, model=model)
    found = []
    model.model.layers[0].register_forward_hook(
        lambda _, __, out: found.append(out.state.momentum[0].abs().max().item())
    )
    model(torch.randint(VOCABULARY, (1, 4 * SEGMENT)))
    assert len(found) == 4
    assert watch._largest[0] >= max(found)


def test_weight_decay_pulls_at_matrices_alone(tiny_recipe):
    model = build_model(load_recipe(tiny_recipe("titans"), ["--model.tie_word_embeddings=true"]))
    decayed = EverlongTrainer.get_decay_parameter_names(None, model)
    every = model.named_parameters(remove_duplicate=False)
    sizes = {name: each.ndim for name, each in every}
    others = {name for name in sizes if name not in decayed}
    assert {sizes[name] for name in decayed} == {2, 3}  # initial memories have a matrix for each head
    assert {name.rsplit(".")[-2] for name in others if sizes[name] > 1} == {"memory_scale"}
    assert "model.layers.0.mixer.memory.memory_init.0.weight" in decayed
    assert "model.layers.0.mixer.memory.theta_proj.bias" in others
