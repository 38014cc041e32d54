"""Runs listed, compared and drawn."""

import json

import pytest
import yaml
from rich.console import Console

from everlong.cli import main
from everlong.training import load_recipe, train
from everlong.training.runs import Run, find_runs, plot_losses, print_differences, print_runs


@pytest.fixture
def runs(tmp_path):
    """Two runs, one of them not ended."""
    for name, seed, steps in (("a", 0, 20), ("b/c", 1, 7)):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        recipe = {
            "model": {"type": "llama", "hidden_size": 32},
            "training": {"max_steps": 20},
            "seed": seed,
            "name": name,
        }
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        lines = [{"step": i + 1, "loss": 5 / (i + 1), "tokens": 100 * i} for i in range(steps)]
        lines.insert(2, {"step": 2, "eval_loss": 3.5})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "runs" / "a" / "result.json").write_text('{"steps": 20, "parameters": 12345}')
    return find_runs([tmp_path / "runs"])


def shown(function, *arguments):
    console = Console(width=250, record=True)
    function(*arguments, console)
    return console.export_text()


def test_runs_are_found_at_any_depth_and_once(runs, tmp_path):
    assert [run.recipe["name"] for run in runs] == ["a", "b/c"]
    again = find_runs([tmp_path / "runs" / "a", tmp_path / "runs", tmp_path / "runs" / "b" / "c"])
    assert [run.folder for run in again] == [run.folder for run in runs]
    with pytest.raises(ValueError, match="empty holds no run"):
        find_runs([tmp_path / "empty"])


def test_the_list_says_how_far_each_is(runs):
    ended, other = shown(print_runs, runs).splitlines()[3:5]
    for part in ("llama", "12.3K", " 20 ", "1.9K", "0.2500", "3.5000"):
        assert part in ended
    assert "7/20" in other
    narrow = Console(width=80, record=True)
    print_runs(runs, narrow)
    text = narrow.export_text()
    assert "…" not in text
    assert "tokens/s" in text


def test_only_what_differs_is_compared(runs):
    text = shown(print_differences, runs)
    assert "seed" in text
    assert "hidden_size" not in text
    assert "the recipes are the same" in shown(print_differences, runs[:1])


def test_losses_are_drawn_and_nothing_is_drawn_of_nothing(runs, tmp_path):
    assert plot_losses(tmp_path / "new" / "losses.png", runs)
    assert (tmp_path / "new" / "losses.png").stat().st_size > 10_000
    (tmp_path / "none").mkdir()
    assert not plot_losses(tmp_path / "none.png", [Run(tmp_path / "none")])


def test_the_command(runs, tmp_path, capsys):
    picture = tmp_path / "losses.png"
    assert main(["runs", str(tmp_path / "runs"), "--compare", "--picture", str(picture)]) == 0
    assert "seed" in capsys.readouterr().out
    assert picture.is_file()
    assert main(["runs", str(tmp_path / "text")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_run_folder_holds_its_picture_and_logs(tiny_recipe, tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    folder = tmp_path / "run"
    train(load_recipe(tiny_recipe(), ["--output_dir", str(folder)]))
    assert (folder / "loss.png").stat().st_size > 10_000
    [file] = (folder / "tensorboard").iterdir()
    data, tags = file.read_bytes(), set()
    while data:  # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
        size = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + size])
        tags |= {(value.tag, event.step) for value in event.summary.value}
        data = data[16 + size :]
    assert {("train/loss", 2), ("train/loss", 6), ("train/learning_rate", 4)} <= tags
    found = json.loads((folder / "provenance.json").read_text())
    assert len(found["data_fingerprint"]) == 32
    assert found["recipe"]["training"]["max_steps"] == 6


def test_names_are_no_markup(runs, tmp_path):
    evil = tmp_path / "runs" / "[bold]x[" / "]:smile:\x1b[2J"
    evil.mkdir(parents=True)
    recipe = {"model": {"type": "[/nothing]"}, "seed": 7, "name": "$\\q$"}
    (evil / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (evil / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n")
    found = find_runs([tmp_path / "runs"])
    for function in (print_runs, print_differences):
        text = shown(function, found)
        assert "[/nothing]" in text
        assert r"]:smile:\x1b[2J" in text.replace("\n", "")
    assert plot_losses(tmp_path / "losses.png", found)
