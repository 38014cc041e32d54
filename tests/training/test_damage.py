"""Damaged checkpoints are named, with the last one that is whole; never gone on from."""

import json
import re
import shutil

import pytest
import torch
import yaml

from everlong.cli import main
from everlong.training import load_recipe, resume, train
from everlong.training.checkpoint import FILES, describe_last
from everlong.training.progress import read_metrics

CUTS = {"empty": lambda size: 0, "half": lambda size: size // 2, "last byte": lambda size: size - 1}
READ = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "memory_0.safetensors")


def run_of(tiny_recipe, tmp_path, *options):
    """A run with the checkpoints 2 and 4, and a memory in each."""
    path = tiny_recipe("titans", max_steps=4, save_steps=2)
    change(path, task="text", layout="streams", cache_folder=str(tmp_path / "cache"))
    train(load_recipe(path, ["--output_dir", str(tmp_path / "run"), *options]))
    return tmp_path / "run"


def change(path, **data):
    """Give the recipe other data."""
    recipe = yaml.safe_load(path.read_text())
    recipe["data"] |= data
    path.write_text(yaml.safe_dump(recipe))


def error_of(folder, capsys, *options):
    """The one line of a `train --resume` for one step more."""
    capsys.readouterr()
    assert main(["train", "--resume", str(folder), "--training.max_steps=5", *options]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.rstrip("\n").rpartition("\n")[2]


def test_each_file_of_a_checkpoint_cut_or_missing_is_named(tiny_recipe, tmp_path, capsys):
    folder = run_of(tiny_recipe, tmp_path)
    last = folder / "checkpoint-4"
    files = sorted(path for path in last.iterdir() if path.name != "trainer_state.json")
    assert {*READ, FILES} <= {path.name for path in files}
    for path in files:
        whole = path.read_bytes()
        for cut in [None, *CUTS.values()]:
            if cut is None:
                path.unlink()
            else:
                path.write_bytes(whole[: cut(len(whole))])
            if path.name == FILES and (cut is None or whole[:-1] == whole[: cut(len(whole))].rstrip()):
                continue  # it holds nothing that is needed
            error = error_of(folder, capsys)
            assert f"{last} has " in error
            assert f" {path.name}" in error
            assert f"delete {last} and resume again, from {folder / 'checkpoint-2'}" in error
            assert describe_last(folder).endswith("checkpoint-2")
        path.write_bytes(whole)
    assert resume(folder, ["--training.max_steps=5"])["steps"] == 5


@pytest.mark.parametrize("cut", CUTS)
def test_the_state_of_a_checkpoint(cut, tiny_recipe, tmp_path, capsys):
    """Which says that it was written to its end: without it, the one before is gone on from."""
    folder = run_of(tiny_recipe, tmp_path)
    state = folder / "checkpoint-4" / "trainer_state.json"
    data = state.read_bytes()
    state.write_bytes(data[: CUTS[cut](len(data))])
    assert "checkpoint-4 has a trainer_state.json that is cut short" in error_of(folder, capsys)
    shutil.rmtree(folder / "checkpoint-2")
    assert f"delete {folder / 'checkpoint-4'} and train anew" in error_of(folder, capsys)
    assert describe_last(folder) == "no checkpoint was saved yet"


@pytest.mark.parametrize("name", READ)
def test_what_is_no_longer_readable_is_said_in_one_line(name, tiny_recipe, tmp_path, capsys):
    """Of the same size, or of a checkpoint that an earlier version wrote."""
    folder = run_of(tiny_recipe, tmp_path)
    file = folder / "checkpoint-4" / name
    size = file.stat().st_size
    file.write_bytes(bytes(size))
    assert str(folder / "checkpoint-4") in error_of(folder, capsys)
    (folder / "checkpoint-4" / FILES).unlink()
    file.write_bytes(file.read_bytes()[: size // 2])
    assert str(folder / "checkpoint-4") in error_of(folder, capsys)


def test_going_on_from_the_one_before_equals_the_run(tiny_recipe, tmp_path):
    folder = run_of(tiny_recipe, tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    shutil.rmtree(folder / "checkpoint-4")
    (folder / "result.json").unlink()
    (folder / "README.md").write_text("mine")
    assert resume(folder)["steps"] == 4
    assert (folder / "model.safetensors").read_bytes() == whole
    assert (folder / "README.md").read_text() == "mine"


def test_a_run_that_is_finished_says_so(tiny_recipe, tmp_path, capsys):
    folder = run_of(tiny_recipe, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    capsys.readouterr()
    assert main(["train", "--resume", str(folder)]) == 0
    assert f"{folder} is finished after 4 steps" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def logged(folder, name):
    return {line["step"]: line[name] for line in read_metrics(folder) if name in line}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "inverse_sqrt"])
def test_more_steps_follow_their_own_schedule_at_once(schedule, tiny_recipe, tmp_path):
    """The learning rates of a run that was to have so many from the start."""
    path = tiny_recipe(logging_steps=1, lr_scheduler_type=schedule)
    for name, steps in (("whole", 8), ("run", 4)):
        options = ["--output_dir", str(tmp_path / name), f"--training.max_steps={steps}"]
        train(load_recipe(path, options))
    resume(tmp_path / "run", ["--training.max_steps=8"])
    want, got = (logged(tmp_path / name, "learning_rate") for name in ("whole", "run"))
    assert {step: got[step] for step in range(5, 9)} == {step: want[step] for step in range(5, 9)}
    assert got[5] > 0


def test_a_changed_learning_rate_and_weight_decay_hold_from_the_next_step(tiny_recipe, tmp_path):
    path = tiny_recipe(logging_steps=1, max_steps=4, lr_scheduler_type="linear")
    folder = tmp_path / "run"
    train(load_recipe(path, ["--output_dir", str(folder)]))
    options = [
        "--training.max_steps=8",
        "--training.learning_rate=0.002",
        "--training.weight_decay=0.3",
    ]
    resume(folder, options)
    assert logged(folder, "learning_rate")[5] == pytest.approx(0.002 * 4 / 8)
    groups = torch.load(folder / "checkpoint-8" / "optimizer.pt")["param_groups"]
    assert sorted({group["weight_decay"] for group in groups}) == [0.0, 0.3]


@pytest.mark.parametrize("task", ["babilong", "text"])
def test_a_changed_tokenizer_is_named(task, tiny_recipe, text_folder, tmp_path, capsys):
    """Not the text, which is as it was; nor is it read as if nothing were."""
    bpe, folder = tmp_path / "bpe", tmp_path / "run"
    command = ["tokenizer", "--source", str(text_folder), "--out", str(bpe), "--vocab_size"]
    assert main([*command, "270"]) == 0
    path = tiny_recipe(max_steps=2)
    own = {"cache_folder": str(tmp_path / "cache"), "length": 32} if task == "text" else {"length": 512}
    change(path, task=task, tokenizer=str(bpe), **own)
    train(load_recipe(path, ["--output_dir", str(folder), "--model.vocab_size=300"]))
    assert main([*command, "280", "--overwrite"]) == 0
    error = error_of(folder, capsys)
    assert f"this changed: the tokenizer that data.tokenizer names ({bpe})" in error
    assert "data.source" not in error


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "option",
    [
        "learning_rate=-1",
        "lr_scheduler_kwargs={foo: 1}",
        "lr_scheduler_kwargs=foo",
        "optim=lomo",
        "report_to=wandb",
        "lr_scheduler_type=warmup_stable_decay",
    ],
)
def test_what_training_cannot_use_leaves_the_folder_as_it_was(option, tiny_recipe, tmp_path, capsys):
    folder, path = tmp_path / "run", tiny_recipe()
    options = ["--output_dir", str(folder), f"--training.{option}"]
    assert main(["train", str(path), *options]) == 2
    assert not folder.exists()
    folder.mkdir()
    (folder / "recipe.yaml").write_text("{}")
    (folder / "provenance.json").write_text("{}")
    before = contents(folder)
    capsys.readouterr()
    assert main(["train", str(path), *options, "--overwrite"]) == 2
    assert contents(folder) == before
    error = capsys.readouterr().err
    assert "training" in error
    assert "Traceback" not in error


def test_a_model_for_which_there_is_no_room(tiny_recipe, tmp_path, capsys):
    options = ["--output_dir", str(tmp_path / "run"), "--model.intermediate_size=1000000000000000"]
    assert main(["train", str(tiny_recipe()), *options]) == 2
    assert "model: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_options_that_cannot_be_resumed_with_are_not_kept(tiny_recipe, tmp_path, capsys):
    folder = run_of(tiny_recipe, tmp_path)
    recipe = (folder / "recipe.yaml").read_bytes()
    assert "learning_rate" in error_of(folder, capsys, "--training.learning_rate=-1")
    assert "training.optim " in error_of(folder, capsys, "--training.optim=sgd")
    optimizer = folder / "checkpoint-4" / "optimizer.pt"
    optimizer.write_bytes(bytes(optimizer.stat().st_size))
    assert "checkpoint-4 is damaged" in error_of(folder, capsys, "--training.learning_rate=1e-5")
    assert (folder / "recipe.yaml").read_bytes() == recipe


def test_a_finished_run_refuses_changes_and_misses_its_model(tiny_recipe, tmp_path, capsys):
    folder = run_of(tiny_recipe, tmp_path)
    for option, told in {
        "--seed=5": "seed (0 before, 5 now)",
        "--model.hidden_size=64": "model.hidden_size (",
        "--evaluation.tasks=[needle]": "evaluation.tasks (",
    }.items():
        capsys.readouterr()
        assert main(["train", "--resume", str(folder), option]) == 2
        assert told in capsys.readouterr().err
    before = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    resume(folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert not (folder / "runs").exists()  # which a second writer of logs would make


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("checkpoint-4/files.json", "[]"),
        ("checkpoint-4/files.json", "5"),
        ("checkpoint-4/files.json", '{"optimizer.pt": "5"}'),
        ("checkpoint-4/files.json", "{}"),
        ("checkpoint-4/files.json", '{"optimizer.pt": 1}'),
        ("checkpoint-4/trainer_state.json", '{"global_step": "4"}'),
        ("provenance.json", '{"recipe": "x"}'),
        ("provenance.json", '{"recipe": {}}'),
        ("provenance.json", "[]"),
    ],
)
def test_a_record_of_another_shape_is_named(name, content, tiny_recipe, tmp_path, capsys):
    folder = run_of(tiny_recipe, tmp_path)
    file = folder / name
    if file.name == "trainer_state.json":  # as long as it was
        content += " " * (file.stat().st_size - len(content))
    file.write_text(content)
    assert file.name in error_of(folder, capsys)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("global_step", 3),
        ("global_step", True),
        ("num_input_tokens_seen", -5),
        ("num_input_tokens_seen", None),
        ("total_flos", 10**400),
        ("epoch", "x"),
        ("log_history", 5),
        ("log_history", [5]),
        ("log_history", {}),
        ("stateful_callbacks", []),
        ("stateful_callbacks", "x"),
        ("is_world_process_zero", "yes"),
        ("best_model_checkpoint", 5),
        ("what_no_state_has", 5),
    ],
)
def test_a_state_of_another_shape_is_named(sealed, name, value, tiny_recipe, tmp_path, capsys):
    folder = run_of(tiny_recipe, tmp_path)
    last = folder / "checkpoint-4"
    file = last / "trainer_state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps(state | {name: value}).ljust(file.stat().st_size))
    if not sealed:  # as an earlier version left it
        (last / FILES).unlink()
    error = error_of(folder, capsys)
    assert f"{last} has a trainer_state.json that is damaged: {name} is " in error
    assert f"delete {last} and resume again, from {folder / 'checkpoint-2'}" in error


NUMBERS = ("step", "loss", "eval_loss", "seconds", "tokens", "tokens_per_second")


@pytest.mark.parametrize("number", ["9" * 400, "1e999", "NaN"])
def test_numbers_that_cannot_be_reckoned_with_stop_nothing(number, tiny_recipe, tmp_path, capsys):
    folder = run_of(tiny_recipe, tmp_path)
    with (folder / "metrics.jsonl").open("a") as file:
        for name in NUMBERS:
            file.write(f'{{"step": 4, "{name}": {number}}}\n')
        file.write("[" * 100_000 + "\n")
    picture = tmp_path / "loss.png"
    assert main(["runs", str(folder), "--compare", "--picture", str(picture)]) == 0
    assert re.search(r"metrics.jsonl: \d lines are no log", capsys.readouterr().out)
    assert resume(folder, ["--training.max_steps=5"])["steps"] == 5
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result).replace(str(result["tokens"]), number))
    assert main(["runs", str(folder)]) == 0
    assert "result.json is damaged: tokens is" in capsys.readouterr().out


def test_lines_and_results_that_are_no_records_are_left_out(tiny_recipe, tmp_path, capsys):
    folder = run_of(tiny_recipe, tmp_path)
    kept = read_metrics(folder)
    with (folder / "metrics.jsonl").open("a") as file:
        for line in ("5", '{"loss": 3}', '{"step": "x"}', '{"step": 4, "loss": null}', '{"step": 4}'):
            file.write(line + "\n")
    assert read_metrics(folder) == [*kept, {"step": 4}]
    (folder / "result.json").write_text("[]")
    assert resume(folder, ["--training.max_steps=5"])["steps"] == 5
