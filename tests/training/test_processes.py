"""Several processes train as one does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from two_processes import MODELS, STEPS

from everlong.cli import main
from everlong.files import hold
from everlong.training import load_recipe, resume, shard, train
from everlong.training.processes import ProcessLost, launch_defaults, lost_processes, together
from everlong.training.sharding import check_kind

HERE = Path(__file__).parent
# On a port that is free: another worker may have started its own.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
# One worker makes what most of these tests look at.
pytestmark = pytest.mark.xdist_group("processes")
SHORT = "lm2-short"  # what is never used has no moments in one process, and moments of zero in pieces


def start(command, **options):
    """A command in an environment without the traces of another launch."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=env, **pipes, **options)


def finish(process, code=0):
    out, err = process.communicate(timeout=900)
    assert process.returncode == code, err[-4000:]
    return out, err


def everlong(*arguments, processes=2, code=0):
    """`everlong` in so many processes: its output."""
    launcher = TORCHRUN if processes == 2 else [sys.executable]
    return finish(start([*launcher, "-m", "everlong", *map(str, arguments)]), code)


def difference(got, want):
    got, want = load_file(got), load_file(want)
    assert got.keys() == want.keys()
    return max((got[name] - want[name]).abs().max().item() for name in want)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process and what two have made of every model."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "text").mkdir()
    for i in range(10):
        (folder / "text" / f"{i}.txt").write_text(f"The {i}th of ten short texts, told often. " * 20)
    worker, parts = str(HERE / "two_processes.py"), "trainer,shard,accelerate"
    loadable = [name for name in MODELS if name != SHORT]
    finish(start([sys.executable, worker, str(folder), parts]))
    finish(start([*TORCHRUN, worker, str(folder), parts]))
    finish(start([*TORCHRUN, worker, str(folder), "load", *loadable]))
    finish(start([sys.executable, worker, str(folder), "load", *loadable]))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_two_processes_train_as_one_with_twice_the_batch(folder, name):
    losses = []
    for processes in (1, 2):
        lines = (folder / f"{name}-{processes}" / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    one, two = losses
    assert len(one) == len(two) == STEPS
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 1e-5
    assert one[-1] < one[0]
    file = "model.safetensors"
    assert difference(folder / f"{name}-2" / file, folder / f"{name}-1" / file) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_sharded_model_trains_as_a_whole_one(folder, name):
    got, want = (folder / f"{name}-sharded-{n}.safetensors" for n in (2, 1))
    assert difference(got, want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_trainers_way_to_shard_gives_the_same_gradients(folder, name):
    got, want = (folder / f"{name}-accelerate-{n}.safetensors" for n in (2, 1))
    assert difference(got, want) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", [name for name in MODELS if name != SHORT])
def test_what_some_processes_have_written_in_pieces_others_go_on_from(folder, name, processes):
    got = folder / f"{name}-loaded-{processes}.safetensors"
    assert difference(got, folder / f"{name}-sharded-{3 - processes}.safetensors") < 1e-5


@pytest.mark.slow
def test_the_main_process_has_the_folder_and_the_terminal(tiny_recipe, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoint-1").mkdir(parents=True)
    for name in ("recipe.yaml", "provenance.json"):
        (run / name).touch()
    path = tiny_recipe("titans", eval_strategy="steps", eval_steps=3)
    out, err = everlong("train", path, "--overwrite", "--output_dir", run)
    assert out.count("The model is in") == 1
    assert [err.count(f"step      {n}  loss") for n in (2, 4, 6)] == [1, 1, 1]
    assert not (run / "checkpoint-1").exists()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 6]
    assert json.loads((run / "result.json").read_text())["tokens"] == 6 * 2 * 2 * 96
    assert json.loads((run / "provenance.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_what_is_wrong_is_said_once(tiny_recipe, tmp_path):
    _, err = everlong("train", tiny_recipe(), "--training.max_step", "3", code=1)
    assert err.count("everlong: error: unknown field training.max_step") == 1
    _, err = everlong("train", tiny_recipe(), "--data.source", "/no/such", code=1)
    assert err.count("everlong: error:") == 1
    overflow = ["--training.learning_rate", "1e30", "--training.max_grad_norm", "0"]
    _, err = everlong("train", tiny_recipe(), *overflow, "--output_dir", tmp_path / "run", code=1)
    assert err.count("everlong: training stopped: ") == 1


@pytest.mark.slow
def test_a_norm_that_overflows_stops_all_processes(tiny_recipe, tmp_path):
    steep, folder = ["--model.memory_write_cost", "1e25"], tmp_path / "run"
    _, err = everlong("train", tiny_recipe("titans"), *steep, "--output_dir", folder, code=1)
    assert "everlong: training stopped: the gradient's norm is inf at step 1" in err
    assert not (folder / "result.json").exists()


@pytest.mark.slow
def test_ctrl_c_stops_all_processes_at_one_step_and_any_number_goes_on(tiny_recipe, tmp_path):
    path = tiny_recipe("titans", max_steps=200, lr_scheduler_type="cosine", save_total_limit=1)
    everlong("train", path, "--output_dir", tmp_path / "whole")
    process = start(
        [*TORCHRUN, "-m", "everlong", "train", str(path), "--output_dir", str(tmp_path / "cut")]
    )
    metrics = tmp_path / "cut" / "metrics.jsonl"
    while not metrics.is_file() or not metrics.read_text():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert err.count("Continue with: everlong train --resume") == 1, err[-4000:]
    assert list((tmp_path / "cut").glob("checkpoint-*"))
    assert not (tmp_path / "cut" / "result.json").exists()
    _, err = everlong("train", "--resume", tmp_path / "cut", processes=1, code=2)
    assert "trained with 4 samples a step by 2 processes" in err
    twice = ["--training.per_device_train_batch_size", "4"]
    everlong("train", "--resume", tmp_path / "cut", *twice, processes=1)
    got, want = (tmp_path / name / "model.safetensors" for name in ("cut", "whole"))
    assert difference(got, want) < 1e-3


def launch(monkeypatch, here, everywhere=None, gpus=0):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    monkeypatch.setenv("WORLD_SIZE", str(everywhere or here))
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    launch(monkeypatch, here=4, gpus=2)
    with pytest.raises(ValueError, match=r"4 processes on a machine with 2 GPUs.*--nproc_per_node=2"):
        launch_defaults({"type": "titans"}, {})
    assert launch_defaults({"type": "titans"}, {"use_cpu": True})["use_cpu"]
    launch(monkeypatch, here=2, everywhere=4, gpus=2)
    assert not launch_defaults({"type": "titans"}, {})["use_cpu"]


def test_without_a_gpu_several_processes_train_on_the_cpu(monkeypatch):
    launch(monkeypatch, here=2)
    assert launch_defaults({"type": "titans"}, {})["use_cpu"]
    launch(monkeypatch, here=1)
    assert launch_defaults({"type": "titans"}, {}) == {}


@pytest.mark.parametrize(
    ("model", "wanted"),
    [
        ({"type": "titans"}, False),
        ({"type": "titans", "memory_read_only": True}, True),
        ({"type": "lm2"}, True),
        ({"type": "rmt"}, False),
        ({"type": "rmt", "base_config": {"model_type": "mixtral"}}, True),
        ({"type": "mixtral"}, True),
    ],
    ids=str,
)
def test_parameters_without_a_part_in_the_loss_are_looked_for_where_there_are(
    monkeypatch, model, wanted
):
    launch(monkeypatch, here=2)
    assert launch_defaults(model, {})["ddp_find_unused_parameters"] is wanted


def test_a_gpu_that_is_not_there_is_said_to_be_missing(monkeypatch, tiny_recipe):
    launch(monkeypatch, here=1, gpus=0)
    with pytest.raises(ValueError, match=r"use_cpu is false, but this machine has no GPU: leave it"):
        load_recipe(tiny_recipe(use_cpu=False))


def test_what_is_sharded_wants_gpus_and_torchrun(monkeypatch, tiny_recipe):
    with pytest.raises(ValueError, match=r"training\.fsdp needs GPUs"):
        load_recipe(tiny_recipe(fsdp=True))
    launch(monkeypatch, here=1, gpus=1)
    with pytest.raises(ValueError, match="torchrun --nproc_per_node"):
        launch_defaults({"type": "titans"}, {"fsdp": True})
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert launch_defaults({"type": "titans"}, {"fsdp": True}) == {}


@pytest.mark.parametrize("fsdp", [True, "full_shard"])
def test_a_recipe_takes_the_trainers_fsdp_and_stays_as_it_is(monkeypatch, tiny_recipe, fsdp):
    from everlong.training import arguments

    monkeypatch.setattr(arguments, "launch_defaults", lambda model, fields: {})
    config = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
    loaded = load_recipe(tiny_recipe(fsdp=fsdp, fsdp_config=dict(config)))
    built = arguments.build_training_arguments(loaded)
    assert built.fsdp_plugin_args["fsdp_version"] == 2
    assert built.fsdp_plugin_args["state_dict_type"] == "SHARDED_STATE_DICT"
    assert loaded.training["fsdp_config"] == config


def test_steps_of_another_size_are_not_gone_on_with(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe(max_steps=2), ["--output_dir", str(tmp_path / "run")])
    train(recipe)
    more = ["--training.max_steps=4"]
    with pytest.raises(ValueError, match=r"2 samples a step by 1 processes, now it would be 4"):
        resume(tmp_path / "run", [*more, "--training.per_device_train_batch_size=4"])
    same = ["--training.per_device_train_batch_size=1", "--training.gradient_accumulation_steps=2"]
    assert resume(tmp_path / "run", [*more, *same])["steps"] == 4


def test_a_checkpoint_in_pieces_and_a_whole_one_are_told_apart(tmp_path):
    check_kind(str(tmp_path), sharded=False)
    with pytest.raises(ValueError, match=r"without training\.fsdp: leave it out"):
        check_kind(str(tmp_path), sharded=True)
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    check_kind(str(tmp_path), sharded=True)
    with pytest.raises(ValueError, match=r"with training\.fsdp: give it again"):
        check_kind(str(tmp_path), sharded=False)


def test_a_model_without_layers_is_not_sharded():
    from transformers import LlamaConfig, LlamaModel

    model = LlamaModel(LlamaConfig(vocab_size=8, hidden_size=32, num_hidden_layers=0))
    with pytest.raises(ValueError, match=r"LlamaModel has no layers to divide"):
        shard(model)


def test_a_lost_process_is_told_from_other_errors(monkeypatch):
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:5")
    with pytest.raises(RuntimeError, match="closed by peer"), lost_processes():
        raise gone
    launch(monkeypatch, here=2)
    with pytest.raises(ProcessLost, match="another process"), lost_processes():
        raise gone
    with pytest.raises(RuntimeError, match="size mismatch"), lost_processes():
        raise RuntimeError("size mismatch")
    with pytest.raises(KeyError), together():
        raise KeyError("mine")


def test_of_several_processes_the_main_one_tells_at_once(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for world, rank, waits in (("1", "0", 0), ("2", "0", 0), ("2", "1", 1)):
        monkeypatch.setenv("WORLD_SIZE", world)
        monkeypatch.setenv("RANK", rank)
        assert main(["train", "/no/such.yaml"]) == 2
        assert len(waited) == waits
    assert "unknown recipe" in capsys.readouterr().err


def test_the_processes_of_a_job_share_its_folder_and_score_the_model(tiny_recipe, tmp_path):
    """And another run of theirs is kept out of one that is held."""
    folder = tmp_path / "run"
    asked = ["--evaluation.tasks=[needle]", "--evaluation.lengths=[96]", "--evaluation.samples=3"]
    arguments = ["train", tiny_recipe(max_steps=2), "--output_dir", folder, *asked]
    with hold(folder):
        _, error = everlong(*arguments, code=1)
    assert f"{folder} is being written to by process {os.getpid()} on " in error
    everlong(*arguments)
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    assert [cell["length"] for cell in results["cells"]] == [96]
    assert not list(folder.rglob(".lock"))
