import json

import pytest

from everlong.demo import FULL, SHORT, Entry, run_demo
from everlong.evaluation.run import SampleCounts
from everlong.training import TrainingInterrupted, known_recipes, load_recipe, train


def test_the_plans_name_recipes_that_exist():
    assert {entry.recipe for entry in SHORT + FULL} <= set(known_recipes())
    assert max(SHORT[0].lengths) == 16 * 1024
    memory = [entry for entry in FULL if entry.recipe == "needle-lmm"]
    assert {seed: max(entry.lengths) >> 20 for entry in memory for seed in entry.seeds} == {
        0: 10,
        1: 2,
        2: 2,
    }
    for entry in SHORT + FULL:
        SampleCounts.parse(entry.samples)


def test_a_small_demo_writes_its_results_and_starts_anew(tiny_recipe, tmp_path, capsys):
    entries = (
        Entry(str(tiny_recipe("titans")), (96, 128), "3"),
        Entry(str(tiny_recipe("llama")), (96,), "3"),
    )
    out = tmp_path / "demo"
    run_demo(entries=entries, out=out)
    text = capsys.readouterr().out
    assert "what training cost" in text
    assert "whole answers right" in text
    results = json.loads((out / "results.json").read_text())
    assert [model["name"] for model in results["models"]] == ["titans lmm+sliding attention", "llama"]
    assert [model["seed"] for model in results["models"]] == [0, 0]
    assert results["models"][0]["about"]["tokens"] == 6 * 2 * 96
    assert set(results["settings"]["phases"]) == {
        f"{phase} {model['name']}" for phase in ("train", "evaluate") for model in results["models"]
    }
    assert results["provenance"]["date"]
    for file in ("needle.png", "results.md", "report.html"):
        assert (out / file).exists(), file

    trained = (out / "tiny-llama-seed0" / "result.json").stat().st_mtime_ns
    run_demo(entries=entries[1:], out=out)
    assert (out / "tiny-llama-seed0" / "result.json").stat().st_mtime_ns > trained


def test_the_full_demo_goes_on_where_it_stopped(tiny_recipe, tmp_path):
    entries = (Entry(str(tiny_recipe(save_steps=2)), (96,), "3", seeds=(0, 1)),)
    out = tmp_path / "demo"
    first = run_demo(full=True, entries=entries, out=out)

    done, cut = out / "tiny-llama-seed0", out / "tiny-llama-seed1"
    times = {path: path.stat().st_mtime_ns for path in done.rglob("*")}
    for left_by_a_stopped_run in ("result.json", "model.safetensors"):
        (cut / left_by_a_stopped_run).unlink()
    checkpoints = {path.name for path in cut.glob("checkpoint-*")}
    second = run_demo(full=True, entries=entries, out=out)
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == times
    assert {path.name for path in cut.glob("checkpoint-*")} == checkpoints
    assert [cell.metrics for cell in second.cells] == [cell.metrics for cell in first.cells]

    tiny_recipe(max_steps=2, save_steps=2)
    more = (Entry(entries[0].recipe, (96, 128), "3", seeds=(0, 1)),)
    with pytest.raises(ValueError, match=r"tiny-llama-seed0 holds a run already.*--overwrite"):
        run_demo(full=True, entries=more, out=out)
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*")} == times
    longer = run_demo(full=True, entries=more, out=out, overwrite=True)
    assert [cell.length for cell in longer.cells] == [96, 128] * 2
    assert (out / "full" / "needle.png").exists()

    third = run_demo(full=True, entries=entries, out=out)
    assert [model.about["steps"] for model in third.models] == [2, 2]


def test_a_stopped_demo_says_what_starts_anew(tiny_recipe, tmp_path, monkeypatch):
    def stopped(run, **options):
        raise TrainingInterrupted("stopped; no checkpoint was saved yet")

    monkeypatch.setattr("everlong.demo._train", stopped)
    entries = (Entry(str(tiny_recipe()), (96,), "3"),)
    with pytest.raises(TrainingInterrupted, match=r"no checkpoint(?s:.)*everlong demo starts anew"):
        run_demo(entries=entries, out=tmp_path / "demo")
    with pytest.raises(TrainingInterrupted, match="--full goes on from there"):
        run_demo(full=True, entries=entries, out=tmp_path / "demo")


@pytest.mark.parametrize("full", [False, True])
def test_the_demo_deletes_nothing_but_its_own(full, tiny_recipe, tmp_path):
    """Neither files of somebody else, nor a run of another recipe."""
    entries = (Entry(str(tiny_recipe()), (96,), "3"),)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "model.safetensors").write_bytes(b"weights")
    if not full:  # whose report has a folder of its own
        with pytest.raises(ValueError, match=r"mine holds files of no evaluation.*model.safetensors"):
            run_demo(full=full, entries=entries, out=mine, overwrite=True)
    place = tmp_path / "demo" / "tiny-llama-seed0"
    place.mkdir(parents=True)
    (place / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"tiny-llama-seed0 holds files of no run.*thesis.txt"):
        run_demo(full=full, entries=entries, out=tmp_path / "demo", overwrite=True)
    assert (place / "thesis.txt").read_text() == "mine"
    (place / "thesis.txt").unlink()
    train(load_recipe(entries[0].recipe, ["--output_dir", str(place), "--training.max_steps=2"]))
    with pytest.raises(ValueError, match=r"tiny-llama-seed0 holds a run already.*--overwrite"):
        run_demo(full=full, entries=entries, out=tmp_path / "demo")
    assert json.loads((place / "result.json").read_text())["steps"] == 2
