"""Runs listed, compared and drawn."""

import json
import math
import re

import pytest
import yaml
from rich.console import Console

from everlong.cli import main
from everlong.training import load_recipe, train
from everlong.training.runs import Run, find_runs, plot_losses, print_differences, print_runs
from legible import faults


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


def many_runs(folder, losses, models=None, name="needle-lmm"):
    """Runs of nine models under one recipe's name, with these losses, in folders with long names."""
    runs = []
    for i, model in enumerate(models or MODELS):
        place = folder / f"runs-of-november/a-recipe-with-a-long-name-{i}"
        place.mkdir(parents=True)
        training = {"per_device_train_batch_size": 2 + i, "learning_rate": 0.1 * 3 / (1 + i)}
        recipe = {"model": model, "training": training, "name": name}
        (place / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        lines = [
            {"step": 20_000 * (j + 1), "loss": loss + i / 100, "tokens": 10**9}
            for j, loss in enumerate(losses)
        ]
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs.append(Run(place))
    return runs


MODELS = [
    *({"type": "titans", "layer_types": [kind] * 2} for kind in ("lmm", "mac", "mag", "mal")),
    *({"type": kind} for kind in ("lm2", "llama", "mamba2")),
    {"preset": "titans-mac-340m"},
    {"type": "lm2", "path": "HuggingFaceTB/SmolLM2-135M"},
]


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn last."""
    kept = []
    monkeypatch.setattr("everlong.training.runs.save_figure", lambda figure, path: kept.append(figure))
    return kept


@pytest.mark.parametrize(
    "losses",
    [
        [5.5, 3.1, 1.2],
        [5.5, 0.4, 0.03],
        [5.5, 1e-3, 1e-9],
        [2.3],
        [2.301, 2.3005, 2.3],
        [2e6, 1e6, 9e5],
        [math.nan, 2.0, 1.0],
    ],
)
def test_losses_of_any_size_can_be_read(losses, tmp_path, figures):
    assert plot_losses(tmp_path / "losses.png", many_runs(tmp_path, losses))
    assert faults(figures[0]) == []
    low, high = sorted(figures[0].axes[0].get_ylim())
    ticks = figures[0].axes[0].get_yticks()
    assert sum(low <= tick <= high for tick in ticks) >= 3
    shown = [line for line in figures[0].axes[0].lines if line.get_linewidth() > 1]
    assert all(line.get_marker() or len(line.get_xdata()) > 1 for line in shown)


def test_legends_name_models_and_folders_where_those_are_alike(tmp_path, figures):
    plot_losses(tmp_path / "a.png", many_runs(tmp_path / "a", [3.0, 2.0]))
    names = {text.get_text() for text in figures[0].axes[0].get_legend().get_texts()}
    assert {"titans lmm", "titans mac", "llama", "titans-mac-340m"} <= names
    assert "lm2 from SmolLM2-135M" in names
    twins = many_runs(tmp_path / "b", [3.0, 2.0], [{"type": "lm2"}] * 2)
    plot_losses(tmp_path / "b.png", twins)
    names = [text.get_text() for text in figures[1].axes[0].get_legend().get_texts()]
    assert [name[:6] + name[-2:] for name in names] == ["lm2, /-1", "lm2, /-0"]
    plot_losses(tmp_path / "c.png", many_runs(tmp_path / "c", [3.0, 2.0], MODELS * 5))
    assert faults(figures[2]) == []


def test_many_runs_are_compared_on_a_narrow_terminal(tmp_path, monkeypatch):
    runs = many_runs(tmp_path, [3.0])
    monkeypatch.chdir(tmp_path)
    runs = [Run(run.folder.relative_to(tmp_path)) for run in runs]
    narrow = Console(width=80, record=True)
    print_differences(runs, narrow)
    text = narrow.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "training.per_device_train_batch_size" in text
    assert all(run.folder.name in text for run in runs)  # whole, none of it on another line
    assert not re.search(r"\d{9}", text)
    assert "0.0333333" in text


def test_values_that_differ_late_are_told_in_full(tmp_path):
    runs = many_runs(tmp_path, [3.0], [{"type": "lm2", "rms_norm_eps": e} for e in (0.1, 0.1 + 1e-9)])
    assert "0.100000001" in shown(print_differences, runs)


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


@pytest.mark.parametrize(
    ("name", "text", "note"),
    [
        ("metrics.jsonl", '5\n{"step": 1, "loss": 2.5}\n', "metrics.jsonl: 1 lines are no log"),
        ("metrics.jsonl", '{"step": 1, "loss": "x"}\n{"loss": 2.5}\n', "metrics.jsonl: 2 lines"),
        ("recipe.yaml", "model: {type: titans, layer_types: 5}\ntraining: {max_steps: x}", "titans 5"),
        ("recipe.yaml", "a: [", "recipe.yaml is damaged"),
        ("result.json", '{"steps": "x", "parameters": "many"}', "damaged: parameters is 'many'"),
        ("result.json", '{"parameters": .inf}', "damaged: parameters is inf"),
        ("result.json", "{", "result.json is damaged"),
    ],
)
def test_a_damaged_run_does_not_hide_the_others(name, text, note, runs, tmp_path):
    (runs[0].folder / name).write_text(text)
    runs = find_runs([tmp_path / "runs"])
    listed = shown(print_runs, runs)
    assert note in listed
    assert "7/20" in listed
    shown(print_differences, runs)
    assert plot_losses(tmp_path / "losses.png", runs)
