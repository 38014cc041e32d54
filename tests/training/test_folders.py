"""Folders as users name them: the home folder, what is no name, and what a run may delete."""

import json
import re

import pytest
import yaml

from everlong import cli
from everlong.cli import main
from everlong.training import load_recipe, resume, train


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, and a place without a folder that is called ~."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def error_of(arguments, capsys):
    """The one line on stderr of a command that is refused."""
    assert main([str(each) for each in arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("everlong: error: ")
    return line


def test_a_tilde_is_the_home_folder_wherever_a_recipe_names_one(
    home, tiny_recipe, text_folder, tmp_path
):
    text_folder.rename(home / "text")
    path = tiny_recipe(max_steps=2)
    train(load_recipe(path, ["--output_dir=~/first", "--data.source=~/text"]))
    assert (home / "first" / "checkpoint-2").is_dir()
    assert resume("~/first", ["--training.max_steps=3"])["steps"] == 3
    recipe = yaml.safe_load(path.read_text())
    recipe |= {"model": {"path": "~/first"}, "output_dir": "~/second"}
    recipe["data"] |= {"task": "text", "source": ["~/text"], "cache_folder": "~/cache"}
    recipe["data"] |= {"tokenizer": "~/first", "validation_source": "~/text/0.txt"}
    path.write_text(yaml.safe_dump(recipe))
    train(load_recipe(path))
    assert (home / "second" / "result.json").is_file()
    assert not (tmp_path / "~").exists()


def test_a_tilde_is_the_home_folder_in_options(home, tiny_recipe, text_folder, tmp_path, capsys):
    text_folder.rename(home / "text")
    recipe = ["--output_dir=~/run", "--data.source=~/text"]
    assert main(["train", str(tiny_recipe(max_steps=2)), *recipe]) == 0
    assert main(["train", "--resume=~/run", "--training.max_steps=3"]) == 0
    assert main(["runs", "~/run", "--picture=~/loss.png"]) == 0
    asked = ["--lengths=96", "--samples=1", "--source=~/text"]
    assert main(["eval", "~/run", *asked, "--out=~/scores"]) == 0
    assert main(["tokenizer", "--source=~/text", "--vocab_size=270", "--out=~/bpe"]) == 0
    asked = ["--prompt_file=~/text/0.txt", "--max_new_tokens=1"]
    assert main(["generate", "~/run", *asked]) == 0
    for name in ("run/result.json", "loss.png", "scores/results.json", "bpe/tokenizer.json"):
        assert (home / name).is_file()
    assert not (tmp_path / "~").exists()


def test_a_folder_whose_name_is_no_text_is_refused_before_the_work(
    tiny_recipe, text_folder, tmp_path, capsys, monkeypatch
):
    """Its model could not be written: safetensors and tokenizers take UTF-8 alone."""
    bad = tmp_path / "half\udcff"
    monkeypatch.chdir(tmp_path)
    train = ["train", tiny_recipe()]
    tokenizer = ["tokenizer", "--source", text_folder, "--vocab_size", "270", "--out", bad]
    for command in ([*train, "--output_dir", bad], [*train, "--name", bad.name], tokenizer):
        assert r"half\udcff is no UTF-8: give the folder another name" in error_of(command, capsys)
    assert not bad.exists()
    bad.mkdir()
    monkeypatch.chdir(bad)  # the name of what it stands for
    error = error_of([*train, "--output_dir", "."], capsys)
    assert r"half\udcff is no UTF-8: give the folder another name" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "RECIPE", "--output_dir="], "output_dir is empty: name a file or folder"),
        (["train", "RECIPE", "--name="], "name is that of a folder: .*got ''"),
        (["runs", ""], "argument FOLDER: the name is empty"),
        (["runs", ".", "--picture", ""], "argument --picture: the name is empty"),
        (["eval", "m", "--out="], "argument --out: the name is empty"),
        (["tokenizer", "--source=s", "--out="], "argument --out: the name is empty"),
        (["demo", "--out="], "argument --out: the name is empty"),
        (["generate", "m", "--prompt_file="], "argument --prompt_file: the name is empty"),
        (["data", "babi-check", ""], "argument FOLDER: the name is empty"),
        (["data", "babi-write", ""], "argument FOLDER: the name is empty"),
    ],
)
def test_an_empty_name_of_a_folder_is_no_default(
    arguments, message, tiny_recipe, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    arguments = [str(tiny_recipe()) if each == "RECIPE" else each for each in arguments]
    assert re.search(message, error_of(arguments, capsys))


def finished(tiny_recipe, tmp_path, model="titans", **training):
    """A run that has ended, and the command that would put another in its place."""
    path = tiny_recipe(model, **{"max_steps": 2, **training})
    command = ["train", str(path), "--output_dir", str(tmp_path / "run")]
    asked = ["--evaluation.tasks=[needle]", "--evaluation.lengths=[96]", "--evaluation.samples=1"]
    assert main([*command, *asked]) == 0
    return tmp_path / "run", [*command, "--overwrite"]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("model", ["titans", "llama"])
def test_all_that_a_run_writes_is_its_own(model, tiny_recipe, tmp_path):
    folder, command = finished(tiny_recipe, tmp_path, model)
    assert (folder / "evaluation" / "results.json").exists()
    assert main([*command, "--training.save_strategy=no"]) == 0
    assert not (folder / "evaluation").exists()
    assert not (folder / "checkpoint-2").exists()


@pytest.mark.parametrize(
    "name",
    [
        "thesis.txt",
        "README.md",
        "other/recipe.yaml",
        "checkpoint-2/notes.md",
        "checkpoint-2/again/recipe.yaml",
        "evaluation/notes.md",
        "evaluation/samples/mine.txt",
        "tensorboard/notes.md",
        "checkpoint-old/model.safetensors",
        "link",
    ],
)
def test_a_run_folder_with_something_else_in_it_is_not_overwritten(name, tiny_recipe, tmp_path, capsys):
    folder, command = finished(tiny_recipe, tmp_path)
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "link":
        path.symlink_to(tmp_path / "text")
    else:
        path.write_text("mine")
    before = contents(folder)
    what = "another run" if name.endswith("recipe.yaml") else "no part of its run"
    assert f"{folder} holds {name}, which is {what}" in error_of(command, capsys)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model.path", "."),
        ("model.path", "checkpoint-2"),
        ("data.tokenizer", "."),
        ("data.source", "text"),
        ("data.source", "text/1.txt"),
        ("data.source", "text/*.txt"),
        ("data.source", "hub:text"),
        ("data.validation_source", "text"),
        ("data.validation_source", "../link"),
    ],
)
def test_what_a_recipe_reads_is_not_overwritten(
    field, value, tiny_recipe, text_folder, tmp_path, capsys, monkeypatch
):
    folder, command = finished(tiny_recipe, tmp_path)
    texts = text_folder.rename(folder / "text") if "text" in value or "link" in value else text_folder
    (tmp_path / "link").symlink_to(folder / "text")
    recipe = yaml.safe_load((tmp_path / "tiny-titans.yaml").read_text())
    recipe["data"] |= {"task": "text", "source": str(texts), "cache_folder": str(tmp_path / "cache")}
    part, _, name = field.partition(".")
    if part == "model":
        recipe["model"] = {}
    hub, _, place = value.rpartition(":")
    recipe[part][name] = f"{hub}{':' if hub else ''}{folder / place}"
    (tmp_path / "tiny-titans.yaml").write_text(yaml.safe_dump(recipe))
    before = contents(folder)
    error = error_of(command, capsys)
    assert re.search(rf"data.source|{re.escape(field)}", error)
    assert f"lies in {folder}, which --overwrite would delete" in error
    assert contents(folder) == before


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_holds_its_folder_until_it_is_scored(resumed, tiny_recipe, tmp_path, capsys, monkeypatch):
    folder, command = finished(tiny_recipe, tmp_path)
    score, errors = cli._score, []

    def scored_while_another_starts(place):
        monkeypatch.setattr(cli, "_score", score)
        errors.append(error_of(command, capsys))
        score(place)

    monkeypatch.setattr(cli, "_score", scored_while_another_starts)
    assert main(["train", "--resume", str(folder)] if resumed else command) == 0
    assert f"{folder} is being written to by process" in errors[0]


def test_an_end_that_was_not_told_in_full_is_told_anew(tiny_recipe, tmp_path, capsys):
    folder, _ = finished(tiny_recipe, tmp_path)
    file = folder / "result.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({"steps": 2}))
    assert main(["train", "--resume", str(folder)]) == 0
    assert json.loads(file.read_text())["parameters"] == whole["parameters"]
    assert f"{whole['parameters']:,} parameters" in capsys.readouterr().out
