import functools
import importlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, Trainer

from everlong.training import (
    TrainingInterrupted,
    last_checkpoint,
    load_recipe,
    resume,
    train,
)
from everlong.training.progress import TrainingProgress


def run(path, folder, *overrides):
    return load_recipe(path, ["--output_dir", str(folder), *overrides])


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_holds_model_tokenizer_recipe_and_metrics(tiny_recipe, tmp_path):
    folder = tmp_path / "run"
    recipe = run(tiny_recipe("titans"), folder, "--seed=3")
    result = train(recipe)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.config.model_type == "titans"
    assert AutoTokenizer.from_pretrained(folder)("hé")["input_ids"] == list("hé".encode())
    assert load_recipe(folder / "recipe.yaml") == recipe
    assert result == json.loads((folder / "result.json").read_text())
    assert result["parameters"] == model.num_parameters()
    assert (result["steps"], result["tokens"], result["seed"]) == (6, 6 * 2 * 96, 3)
    assert [line["step"] for line in lines(folder)] == [2, 4, 6]
    assert lines(folder)[-1]["tokens"] == 6 * 2 * 96
    assert lines(folder)[-1]["loss"] == result["loss"]
    packages = json.loads((folder / "provenance.json").read_text())["packages"]
    assert {"everlong", "torch", "transformers"} <= set(packages)


@pytest.mark.parametrize("kind", ["titans", "llama"])
def test_models_are_saved_with_the_cache_that_training_goes_without(kind, tiny_recipe, tmp_path):
    folder = tmp_path / "run"
    train(run(tiny_recipe(kind, save_steps=3), folder))
    for saved in (folder, folder / "checkpoint-3"):
        assert json.loads((saved / "config.json").read_text()).get("use_cache", True) is True
        model = AutoModelForCausalLM.from_pretrained(saved)
        assert model(torch.ones(1, 3).long()).past_key_values is not None
        assert model.generation_config.use_cache is not False


def test_the_same_seed_gives_the_same_model_and_another_another(tiny_recipe, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(run(tiny_recipe(), tmp_path / name, f"--seed={seed}"))
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_the_length_curriculum_reaches_the_model(tiny_recipe, tmp_path, monkeypatch):
    shapes = []
    forward = LlamaForCausalLM.forward

    @functools.wraps(forward)
    def spy(self, input_ids, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return forward(self, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", spy)
    options = ["--data.length=192", "--data.start_length=96", "--data.growth_steps=4"]
    accumulate = "--training.gradient_accumulation_steps=2"
    train(run(tiny_recipe(), tmp_path / "run", *options, accumulate))
    assert shapes == [(2, length) for length in (96, 128, 128, 160, 192, 192) for _ in range(2)]
    assert [line["length"] for line in lines(tmp_path / "run")] == [128, 160, 192]


def test_a_run_folder_is_not_overwritten_unasked(tiny_recipe, tmp_path):
    recipe = run(tiny_recipe(max_steps=2), tmp_path / "run")
    train(recipe)
    with pytest.raises(ValueError, match=r"holds a run already: .*--resume .*--overwrite"):
        train(recipe)
    train(recipe, overwrite=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    run(tiny_recipe(), tmp_path / "mine").save(tmp_path / "mine")  # anybody may have such a file
    with pytest.raises(ValueError, match="holds files of no run"):
        train(run(tiny_recipe(), tmp_path / "mine"), overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_a_run_is_not_deleted_for_one_that_cannot_start(tiny_recipe, tmp_path):
    path = tiny_recipe(max_steps=2)
    train(run(path, tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match="/no/such"):
        train(run(path, tmp_path / "run", "--data.source=/no/such"), overwrite=True)
    assert (tmp_path / "run" / "result.json").exists()


def test_evaluation_during_training_is_logged(tiny_recipe, tmp_path):
    train(run(tiny_recipe(eval_strategy="steps", eval_steps=3), tmp_path / "run"))
    found = [line for line in lines(tmp_path / "run") if "eval_loss" in line]
    assert [line["step"] for line in found] == [3, 6]
    assert all(5 < line["eval_loss"] < 6 for line in found)


def test_ctrl_c_saves_a_checkpoint_and_resuming_equals_a_run_without_it(
    tiny_recipe, tmp_path, monkeypatch
):
    path = tiny_recipe("titans", max_steps=8, lr_scheduler_type="cosine")
    train(run(path, tmp_path / "whole"))

    on_step_end = TrainingProgress.on_step_end

    def interrupt(self, args, state, control, **kwargs):
        on_step_end(self, args, state, control, **kwargs)
        if state.global_step == 5:
            signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(TrainingProgress, "on_step_end", interrupt)
    with pytest.raises(TrainingInterrupted, match=r"checkpoint-5\. .*everlong train --resume"):
        train(run(path, tmp_path / "cut"))
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "cut" / "result.json").exists()
    monkeypatch.undo()

    # As if the cut run had logged beyond its checkpoint before it was killed.
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 6, "loss": 0.0, "seconds": 1.0}) + '\n{"step": 7, "lo')
    result = resume(tmp_path / "cut")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert result["tokens"] == 8 * 2 * 96
    assert [line["step"] for line in lines(tmp_path / "cut")] == [2, 4, 6, 8]
    assert all(line["loss"] > 1 for line in lines(tmp_path / "cut"))


def test_ctrl_c_while_the_processes_ask_each_other_counts_at_the_next_step(
    tiny_recipe, tmp_path, monkeypatch
):
    asked = []

    def answer(flag):  # no process had the signal when they asked
        asked.append(flag)
        if len(asked) == 3:
            signal.raise_signal(signal.SIGINT)
        return flag

    monkeypatch.setattr(importlib.import_module("everlong.training.train"), "any_process", answer)
    with pytest.raises(TrainingInterrupted, match="checkpoint-4"):
        train(run(tiny_recipe(max_steps=8), tmp_path / "run"))


def test_a_run_can_be_resumed_for_more_steps(tiny_recipe, tmp_path):
    train(run(tiny_recipe(max_steps=2), tmp_path / "run"))
    assert resume(tmp_path / "run", ["--training.max_steps=4"])["steps"] == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--model.hidden_size=64", r"changed: model.hidden_size \(32 before, 64 now\)"),
        ("--model.rms_norm_eps=1e-4", r"model.rms_norm_eps \('nothing' before, 0.0001 now\)"),
        ("--data.length=128", r"data.length \(96 before, 128 now\)"),
        ("--seed=1", r"seed \(0 before, 1 now\)"),
        ("text", r"the text that data.source names \(.*text\). Undo that, or train anew"),
    ],
)
def test_a_run_goes_on_as_what_it_was(override, message, tiny_recipe, text_folder, tmp_path):
    train(run(tiny_recipe(max_steps=2), tmp_path / "run"))
    overrides = ["--training.max_steps=4"]
    if override == "text":
        (text_folder / "3.txt").write_text("Another text.")
    else:
        overrides.append(override)
    with pytest.raises(ValueError, match=f"run cannot be continued.*{message}"):
        resume(tmp_path / "run", overrides)


def test_steps_of_another_size_are_refused(tiny_recipe, tmp_path):
    train(run(tiny_recipe(max_steps=2), tmp_path / "run"))
    overrides = ["--training.max_steps=4", "--training.per_device_train_batch_size=1"]
    with pytest.raises(ValueError, match=r"with 2 samples a step by 1 .* now it would be 1 by 1"):
        resume(tmp_path / "run", overrides)
    overrides.append("--training.gradient_accumulation_steps=2")
    assert resume(tmp_path / "run", overrides)["steps"] == 4


def test_an_edited_recipe_is_seen_and_what_may_change_is_said(tiny_recipe, tmp_path, capsys):
    folder = tmp_path / "run"
    train(run(tiny_recipe(max_steps=2), folder))
    recipe = folder / "recipe.yaml"
    text = recipe.read_text()
    recipe.write_text(text.replace("hidden_size: 32", "hidden_size: 64"))
    with pytest.raises(ValueError, match="since this changed: model"):
        resume(folder, ["--training.max_steps=4"])
    recipe.write_text(text.replace("max_steps: 2", "max_steps: 4"))
    assert resume(folder)["steps"] == 4
    assert "changed: training.max_steps (2 before, 4 now)" in " ".join(capsys.readouterr().err.split())


def test_weights_of_another_model_are_refused(tiny_recipe, tmp_path):
    train(run(tiny_recipe(max_steps=2), tmp_path / "run"))
    train(run(tiny_recipe(max_steps=2), tmp_path / "other", "--model.hidden_size=64"))
    file = "checkpoint-2/model.safetensors"
    (tmp_path / "run" / file).write_bytes((tmp_path / "other" / file).read_bytes())
    with pytest.raises(ValueError, match=r"checkpoint-2 does not fit the recipe's model: .*size"):
        resume(tmp_path / "run", ["--training.max_steps=4"])


def test_a_checkpoint_that_is_cut_short_is_named(tiny_recipe, tmp_path):
    train(run(tiny_recipe(max_steps=2), tmp_path / "run"))
    file = tmp_path / "run" / "checkpoint-2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut short .* delete .*checkpoint-2"):
        resume(tmp_path / "run", ["--training.max_steps=4"])


def test_resuming_nothing_is_refused(tiny_recipe, tmp_path):
    with pytest.raises(ValueError, match=r"is not a run folder: it has no recipe\.yaml"):
        resume(tmp_path)
    run(tiny_recipe(), tmp_path).save(tmp_path)
    with pytest.raises(ValueError, match=r"is not a run folder: it has no provenance\.json"):
        resume(tmp_path)
    (tmp_path / "provenance.json").write_text("{}")
    (tmp_path / "result.json").touch()
    with pytest.raises(ValueError, match="holds no checkpoint to resume from"):
        resume(tmp_path)
    with pytest.raises(ValueError, match="resumed in its own folder"):
        resume(tmp_path, ["--output_dir=elsewhere"])


def test_a_run_killed_before_its_first_checkpoint_starts_anew(tiny_recipe, tmp_path):
    """And leaves alone what somebody has put beside it."""
    run(tiny_recipe(), tmp_path).save(tmp_path)
    (tmp_path / "provenance.json").write_text("{}")
    (tmp_path / "thesis.txt").write_text("mine")
    assert resume(tmp_path)["steps"] == 6
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_that_lacks_a_part_is_refused(name, tiny_recipe, tmp_path):
    train(run(tiny_recipe(max_steps=2), tmp_path / "run"))
    (tmp_path / "run" / "checkpoint-2" / name).unlink()
    with pytest.raises(ValueError, match=f"checkpoint-2 has no {re.escape(name)}: delete .*train anew"):
        resume(tmp_path / "run", ["--training.max_steps=4"])


def test_a_run_is_not_resumed_to_its_past(tiny_recipe, tmp_path):
    train(run(tiny_recipe(max_steps=4, save_steps=2), tmp_path / "run"))
    with pytest.raises(ValueError, match=r"checkpoint-4 is past training.max_steps = 3"):
        resume(tmp_path / "run", ["--training.max_steps=3"])


def test_the_last_loss_is_logged_wherever_the_logs_fall(tiny_recipe, tmp_path):
    result = train(run(tiny_recipe(max_steps=6, logging_steps=4), tmp_path / "run"))
    assert [line["step"] for line in lines(tmp_path / "run")] == [4, 6]
    assert lines(tmp_path / "run")[-1]["loss"] == result["loss"]


def test_resuming_what_has_ended_logs_nothing_twice(tiny_recipe, tmp_path):
    recipe = tiny_recipe(max_steps=4, eval_strategy="steps", eval_steps=2)
    train(run(recipe, tmp_path / "run"))
    before = [(line["step"], sorted(line)) for line in lines(tmp_path / "run")]
    resume(tmp_path / "run")
    assert [(line["step"], sorted(line)) for line in lines(tmp_path / "run")] == before


def test_a_checkpoint_that_was_not_finished_is_passed_over(tiny_recipe, tmp_path):
    path = tiny_recipe(max_steps=4, save_steps=2)
    train(run(path, tmp_path / "run"))
    (tmp_path / "run" / "checkpoint-4" / "trainer_state.json").unlink()
    (tmp_path / "run" / "unfinished" / "checkpoint-6").mkdir(parents=True)
    assert last_checkpoint(tmp_path / "run") == str(tmp_path / "run" / "checkpoint-2")
    assert resume(tmp_path / "run")["steps"] == 4
    assert not (tmp_path / "run" / "unfinished").exists()


def test_a_full_disk_leaves_the_last_checkpoint(tiny_recipe, tmp_path, monkeypatch):
    folder, save = tmp_path / "run", Trainer._save_rng_state

    def fail(self, output_dir):
        if self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        save(self, output_dir)

    monkeypatch.setattr(Trainer, "_save_rng_state", fail)
    with pytest.raises(OSError, match=r"checkpoint-4 could not be written .*No space.*checkpoint-2"):
        train(run(tiny_recipe(max_steps=6, save_steps=2, save_total_limit=1), folder))
    assert {path.name for path in folder.glob("*check*")} == {"checkpoint-2"}
    assert not (folder / "unfinished").exists()
    monkeypatch.undo()
    assert resume(folder)["steps"] == 6
    assert {path.name for path in folder.glob("*check*")} == {"checkpoint-6"}


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on_to_the_same_weights(tiny_recipe, tmp_path):
    """kill -9 at five random moments; what is lost is less than save_steps.

    Moments are counted in steps and then in milliseconds: how long a step takes is the machine's.
    """
    path = tiny_recipe("titans", max_steps=120, save_steps=3, logging_steps=1)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def start(*arguments):
        command = [sys.executable, "-m", "everlong", "train", *map(str, arguments)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)

    assert start(path, "--output_dir", whole).wait() == 0
    generator, killed_at = random.Random(0), []
    process = start(path, "--output_dir", cut)
    for _ in range(5):
        until = step_of(cut) + generator.randint(1, 12)
        while step_of(cut) < until:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        time.sleep(generator.uniform(0, 0.04))
        process.kill()
        process.wait()
        killed_at.append(step_of(cut))
        checkpoint = last_checkpoint(cut)
        kept = int(checkpoint.rpartition("-")[2]) if checkpoint else 0
        assert killed_at[-1] - kept <= 4  # save_steps, and a step that was not saved yet
        process = start("--resume", cut)
    assert process.wait() == 0
    assert len(set(killed_at)) > 2
    want, got = weights(whole), weights(cut)
    assert all(torch.equal(want[name], got[name]) for name in want)
    losses = [[(line["step"], line["loss"]) for line in lines(folder)] for folder in (whole, cut)]
    assert losses[0] == losses[1]


def step_of(folder):
    """The last step that a run has logged."""
    try:
        return max((line["step"] for line in lines(folder)), default=0)
    except (OSError, ValueError):  # not there yet, or a line half written
        return 0
