"""A disk that is full at any moment of a run costs what was done since the last checkpoint, no more."""

import errno
import itertools
import json
import os
import re
import subprocess

import pytest
import yaml

from everlong.cli import main
from everlong.training import last_checkpoint, train
from everlong.training.recipe import load_recipe

PAGE = 4096
SIZE = 64 << 20
MODEL = {
    "type": "titans",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "layer_types": ["lmm", "lmm"],
    "memory_depth": 1,
    "chunk_size": 16,
}


@pytest.fixture
def recipe(tiny_recipe):
    path = tiny_recipe("titans", max_steps=4, save_steps=2, logging_steps=1, save_total_limit=2)
    values = yaml.safe_load(path.read_text())
    values["model"] = MODEL
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def whole(recipe, tmp_path):
    """A run undisturbed."""
    train(load_recipe(recipe, ["--output_dir", str(tmp_path / "whole")]))
    return tmp_path / "whole"


@pytest.fixture
def disk(tmp_path):
    """A disk of 64 MiB: a function that leaves so many pages of it free, or all."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(place)]
    if os.name == "nt" or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a disk is mounted for this, which only root may do")

    def leave(pages=None):
        fill = place / "fill"
        fill.unlink(missing_ok=True)
        if pages is not None:
            with fill.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, PAGE * (os.statvfs(place).f_bfree - pages))
            assert os.statvfs(place).f_bfree == pages
        return place

    yield leave
    subprocess.run(["umount", str(place)], check=True)


def logged(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "grad_norm", "learning_rate", "tokens", "eval_loss")
    return [{name: line[name] for name in names if name in line} for line in lines]


def check_equal(folder, whole):
    assert (folder / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert logged(folder) == logged(whole)
    assert {path.name for path in folder.iterdir()} | {"loss.png"} == {
        path.name for path in whole.iterdir()
    }
    for path in whole.glob("*.json"):  # each is whole
        assert (
            json.loads((folder / path.name).read_text()).keys() == json.loads(path.read_text()).keys()
        )


def start(recipe, folder, capsys):
    """Train, or go on where there is a run: the exit code and the last line on stderr."""
    begun = (folder / "provenance.json").is_file()
    arguments = ["--resume", str(folder)] if begun else [str(recipe), "--output_dir", str(folder)]
    code = main(["train", *arguments])
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert "Exception" not in error
    return code, error.rstrip("\n").rpartition("\n")[2]


def check_failed(error, folder):
    """One line with the file, the cause, and what is left; nothing half written."""
    assert re.match(r"everlong: error: .*could not be written \(.*No space left on device", error), (
        error
    )
    kept = last_checkpoint(folder)
    if kept is not None:
        assert f"the last checkpoint is {kept}. Make room" in error
    assert not [path.name for path in folder.glob("*unfinished*")]
    assert not list(folder.glob(".*"))


def fill_at(pages, recipe, whole, disk, capsys):
    """Run with so many pages free, then with room: the error in between, None if there was none."""
    folder = disk(pages) / f"run-{pages}"
    code, error = start(recipe, folder, capsys)
    if code:
        assert code == 2
        check_failed(error, folder)
        before = {path.name: path.read_bytes() for path in folder.glob("*.json")}
        if "provenance.json" in before and pages % 10 == 0:  # again, as full as it is
            disk(0)
            again, text = start(recipe, folder, capsys)
            assert again == 2
            check_failed(text, folder)
            assert {path.name: path.read_bytes() for path in folder.glob("*.json")} == before
    disk()
    if code:
        assert start(recipe, folder, capsys)[0] == 0
    check_equal(folder, whole)
    subprocess.run(["rm", "-r", str(folder)], check=True)
    return error if code else None


@pytest.mark.parametrize("pages", [3, 60])
def test_a_full_disk_is_gone_on_from(pages, recipe, whole, disk, capsys):
    assert fill_at(pages, recipe, whole, disk, capsys) is not None


def test_a_disk_that_is_full_of_tokens_is_named(tiny_recipe, tmp_path, disk, capsys):
    path = tiny_recipe(max_steps=2)
    values = yaml.safe_load(path.read_text())
    (tmp_path / "long.txt").write_text("Words upon words.\n" * 10_000)
    cache = disk(10) / "cache"
    values["data"] |= {"task": "text", "source": str(tmp_path / "long.txt"), "cache_folder": str(cache)}
    path.write_text(yaml.safe_dump(values))
    code, error = start(path, tmp_path / "run", capsys)
    assert code == 2
    wanted = f"the tokenised text could not be written to {cache} (No space left on device); "
    assert wanted + "data.cache_folder names another place" in error
    assert not [*cache.iterdir()]
    disk()
    assert start(path, tmp_path / "run", capsys)[0] == 0


@pytest.mark.slow
def test_a_disk_that_is_full_at_any_write_is_gone_on_from(recipe, whole, disk, capsys):
    """One page more each time: each file in turn is the one that has no room."""
    named = set()
    for pages in itertools.count():
        error = fill_at(pages, recipe, whole, disk, capsys)
        if error is None:
            break
        inside = re.search(r"\(([^():]+): [^;]*No space", error)  # of a checkpoint or the model
        named.add((inside or re.search(r"([^/]+) could not be written \(No space", error))[1])
    parts = {"provenance.json", "metrics.jsonl", "optimizer.pt", "trainer_state.json", "files.json"}
    assert {*parts, "model.safetensors", "tokenizer.json", "result.json"} <= named


@pytest.mark.parametrize("share", [0.0, 0.6, 0.97])
def test_whatever_file_cannot_be_brought_to_the_disk(share, recipe, tmp_path, capsys, monkeypatch):
    """Where no disk can be mounted."""
    calls, fails_at = 0, None

    def failing(plain):
        def call(*arguments):
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return plain(*arguments)

        return call

    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, failing(getattr(os, name)))
    whole, folder = tmp_path / "whole", tmp_path / "run"
    assert start(recipe, whole, capsys)[0] == 0
    calls, fails_at = 0, 1 + int(calls * share)
    code, error = start(recipe, folder, capsys)
    if code:
        check_failed(error, folder)
        assert start(recipe, folder, capsys)[0] == 0
    else:  # all that may be lost
        assert not (folder / "loss.png").exists()
    check_equal(folder, whole)
