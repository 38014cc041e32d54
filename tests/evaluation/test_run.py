"""The run: refused before any work, resumed, divided among processes, told in full."""

import contextlib
import json
import math
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from everlong.data import byte_tokenizer
from everlong.evaluation import (
    Estimate,
    Results,
    SampleCounts,
    TaskOptions,
    build_tasks,
    evaluate,
    length_name,
    parse_length,
)
from everlong.evaluation.haystack import HaystackTask
from everlong.evaluation.loading import fingerprint, load_model, load_outline, name_apart
from everlong.evaluation.store import Samples
from everlong.models import model_config


def save(folder, kind="llama", tokenizer=None, **fields):
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 512}
    AutoModelForCausalLM.from_config(model_config(kind, **(sizes | fields))).save_pretrained(folder)
    (tokenizer or byte_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path):
    return save(tmp_path / "model")


@pytest.fixture
def tasks(text_folder):
    return build_tasks(["needle"], [128, 256], TaskOptions(source=str(text_folder)))


def test_results_have_a_cell_for_each_length_and_survive_the_disk(model, tasks, tmp_path):
    results, shown = evaluate([model], tasks, [256, 128], 6, tmp_path / "out", settings={"a": 1})
    assert [(cell.task, cell.length, cell.samples) for cell in results.cells] == [
        ("needle", 128, 6),
        ("needle", 256, 6),
    ]
    assert results.lengths() == [128, 256]
    assert results.cells[0].more["peak_mib"] > 0
    assert len(shown["needle", "model"]) == 10
    results.cells.append(results.cells[0].__class__("needle", "model", None, {"x": Estimate.of([])}))
    results.write(tmp_path / "results.json")
    again = Results.load(tmp_path / "results.json")
    assert math.isnan(again.cells.pop().main.value)
    results.cells.pop()
    assert again == results


def test_a_run_goes_on_where_it_was_stopped(model, tasks, tmp_path, monkeypatch):
    out, asked = tmp_path / "out", []
    whole, _ = evaluate([model], tasks, [128], 7, tmp_path / "other")

    class Stopped(Exception):
        pass

    run = HaystackTask.run

    def stops(self, subject, length, indices, count):
        asked.append(list(indices))
        for i, record in enumerate(run(self, subject, length, indices, count)):
            if i == 3 and len(asked) == 1:
                raise Stopped
            yield record

    monkeypatch.setattr(HaystackTask, "run", stops)
    with pytest.raises(Stopped):
        evaluate([model], tasks, [128], 7, out)
    [path] = (out / "samples" / "model").glob("needle-128-*.jsonl")
    with path.open("a") as file:
        file.write('{"index": 3, "scores": {"exa')  # a line that a killed run was writing
    results, _ = evaluate([model], tasks, [128], 7, out)
    assert asked == [list(range(7)), [3, 4, 5, 6]]
    assert results.cells[0].metrics == whole.cells[0].metrics
    evaluate([model], tasks, [128], 7, out)
    assert len(asked) == 2
    assert len(path.read_text().splitlines()) == 7


def test_another_model_in_the_folder_is_asked_anew(model, tasks, tmp_path):
    out = tmp_path / "out"
    evaluate([model], tasks, [128], 3, out)
    save(model, hidden_size=32)
    evaluate([model], tasks, [128], 3, out)
    evaluate([model], tasks, [128], 4, out)  # its needles stand elsewhere
    assert len(list((out / "samples" / "model").glob("*.jsonl"))) == 3


def test_models_are_told_apart_by_what_they_are(model, tmp_path):
    """Two kinds of models under one recipe's name, and two seeds of one of them."""
    kinds = {"a": ["lmm", "lmm"], "b": ["mac", "mac"], "c": ["mac", "mac"], "d": ["mac", "mac"]}
    for seed, (name, layers) in enumerate(kinds.items()):
        shutil.copytree(model, tmp_path / name)
        recipe = {"name": "one", "model": {"type": "titans", "layer_types": layers}}
        recipe |= {"seed": seed, "data": {"length": 512 if name != "d" else 96}}
        (tmp_path / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    infos = [load_outline(tmp_path / name).info for name in kinds]
    assert [each.label for each in name_apart(infos[:2])] == ["titans lmm", "titans mac"]
    assert [each.name for each in name_apart(infos[1:3])] == [
        "titans mac, seed 1",
        "titans mac, seed 2",
    ]
    assert [each.name for each in name_apart(infos[2:])] == [
        f"titans mac {tmp_path / 'c'}",
        f"titans mac {tmp_path / 'd'}",
    ]
    assert infos[0].about["recipe"] == "one"


@pytest.mark.parametrize(
    ("steps", "length"),
    [(None, 512), (100, 96), (300, 96), (301, 96), (425, 224), (551, 512), (9000, 512)],
)
def test_the_training_length_is_the_longest_that_was_seen(model, steps, length, tmp_path):
    """Of the curriculum 96 ... 512 after so many steps; in a run's folder and in its checkpoint's."""
    data = {"length": 512, "start_length": 96, "hold_steps": 300, "growth_steps": 250}
    recipe = {"name": "one", "data": {"task": "needle", **data}, "training": {"max_steps": 800}}
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoint"):
        shutil.copytree(model, place)
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    for file in ("recipe.yaml", "result.json"):
        (tmp_path / "run" / "checkpoint" / file).unlink(missing_ok=True)
    (tmp_path / "run" / "result.json").unlink(missing_ok=True)
    if steps is not None:
        (tmp_path / "run" / "result.json").write_text(json.dumps({"steps": steps}))
        state = tmp_path / "run" / "checkpoint" / "trainer_state.json"
        state.write_text(json.dumps({"global_step": steps}))
    for place in (tmp_path / "run", tmp_path / "run" / "checkpoint"):
        assert load_outline(place).info.training_length == length


@pytest.mark.parametrize("name", ["needle", "babilong_qa1", "niah_single_2", "perplexity", "context"])
def test_samples_of_another_text_are_not_taken_for_those_asked(model, name, tmp_path, text_folder):
    """The folder's name is the same, the text in it another: what was scored on the old one is no
    answer. The unchanged text is not read again."""
    save(model, max_position_embeddings=1024)
    source, out = text_folder, tmp_path / "out"
    length = {"perplexity": 200, "context": 300}.get(name, 900)

    setting = "trained" if name == "babilong_qa1" else "auto"

    def files():
        tasks = build_tasks([name], [length], TaskOptions(source=str(source), setting=setting))
        evaluate([model], tasks, [length], 2, out)
        return {(path, path.stat().st_mtime_ns) for path in (out / "samples" / "model").glob("*.jsonl")}

    first = files()
    assert files() == first
    for path in source.glob("*.txt"):
        path.write_text(path.read_text().replace("e", "E"))
    assert first < files()


def test_a_model_is_known_by_all_that_its_answers_depend_on(model):
    """How its tokenizer begins a text and writes a chat, and which tokens end an answer."""
    seen = {fingerprint(model)}
    for name in ("tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        with (model / name).open("a") as file:
            file.write(" ")
        seen.add(fingerprint(model))
    assert len(seen) == 4
    (model / "notes.txt").write_text("not of the model")
    assert fingerprint(model) in seen


def test_everything_that_cannot_be_asked_is_said_before_any_work(model, tmp_path, text_folder):
    tasks = build_tasks(["needle", "perplexity"], [1000], TaskOptions(source=str(text_folder)))
    with pytest.raises(ValueError, match="takes 512 tokens at most") as error:
        evaluate([model], tasks, [1000], 3, tmp_path / "out")
    assert "asked are 1,000" in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"nowhere does not exist: train it first"):
        evaluate(["nowhere"], tasks, [100], 3, tmp_path / "out")
    with pytest.raises(ValueError, match=r"'nedle' is none of everlong's tasks \(needle"):
        build_tasks(["nedle"], [100], TaskOptions())


@pytest.mark.parametrize("kind", ["mamba", "rwkv"])
def test_a_model_that_forgets_between_pieces_is_refused(kind, tasks, tmp_path):
    """Of several tokens Mamba goes on as if it had read nothing, RWKV's state has another name. Should
    a version of transformers mend one of them, take it out here."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=259, hidden_size=32, num_hidden_layers=2)
    with contextlib.suppress(AttributeError):
        config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    forgetful = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # what a fresh model says hardly depends on what it has read
        for parameter in forgetful.parameters():
            parameter.mul_(3.0)
    forgetful.save_pretrained(tmp_path / kind)
    byte_tokenizer().save_pretrained(tmp_path / kind)
    with pytest.raises(ValueError, match=rf"{kind}\) cannot be evaluated: .* in pieces. Leave it out"):
        evaluate([tmp_path / kind], tasks, [128], 2, tmp_path / "out")


def test_a_hub_out_of_reach_says_what_to_download(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="hf download someone/model --local-dir FOLDER"):
        load_model("someone/model")


def test_two_processes_ask_what_one_asks(model, tmp_path, text_folder):
    """Each its share; their files together are the samples."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "from everlong.cli import main\n"
        f"sys.exit(main(['eval', {str(model)!r}, '--source', {str(text_folder)!r}, '--lengths', '128',"
        f" '--samples', '5', '--out', {str(tmp_path / 'two')!r}]))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert main_of(model, text_folder, tmp_path / "one") == 0
    one, two = (Results.load(tmp_path / name / "results.json") for name in ("one", "two"))
    assert one.cells[0].metrics == two.cells[0].metrics
    files = sorted((tmp_path / "two" / "samples" / "model").glob("*.jsonl"))
    assert [len(path.read_text().splitlines()) for path in files] == [3, 2]


def main_of(model, source, out):
    from everlong.cli import main

    options = ["--lengths", "128", "--samples", "5", "--source", str(source), "--out", str(out)]
    return main(["eval", str(model), *options])


def test_samples_are_kept_a_line_each(tmp_path):
    first, second = (Samples(tmp_path, "name[1]", rank, count=3) for rank in (0, 1))
    first.append({"index": 1, "scores": {}})
    second.append({"index": 0, "answer": "ä"})
    assert list(first.load()) == [0, 1]
    with first.path.open("ab") as file:
        file.write(b'not json\n{"index": 7')
    first.append({"index": 2})
    assert list(first.load()) == [0, 1, 2]
    assert json.loads(second.path.read_text())["answer"] == "ä"


@pytest.mark.parametrize("index", ["-1", "3", "true", "1.0", '"1"', "null", "1e999", "9" * 400])
def test_a_sample_that_is_none_of_those_asked_is_damage(index, tmp_path):
    samples = Samples(tmp_path, "name", count=3)
    samples.append({"index": 1})
    with samples.path.open("a") as file:
        file.write(f'{{"index": {index}}}\n')
    with pytest.raises(ValueError, match=r"name\.0\.jsonl is damaged: a sample has the index "):
        samples.load()


def test_numbers_of_samples():
    plan = SampleCounts.parse("16k:100,128k:20,1m:5")
    assert [plan.at(1 << n) for n in (0, 14, 15, 17, 18, 20, 24)] == [100, 100, 20, 20, 5, 5, 5]
    assert SampleCounts.parse("7").at(None) == SampleCounts.parse("7").at(10**9) == 7
    assert SampleCounts.parse("1k:9,3").at(2048) == 3
    for wrong in ("", "0", "a", "1k:", ":3", "4k:1,1k:2", "3,1k:2", "1k:2,1k:3"):
        with pytest.raises(ValueError, match="samples"):
            SampleCounts.parse(wrong)


def test_lengths():
    assert [parse_length(each) for each in ("512", "1k", " 2K", "1m", "0k")] == [
        512,
        1024,
        2048,
        1 << 20,
        0,
    ]
    assert [length_name(each) for each in (0, 512, 2048, 1 << 20, 1500)] == [
        "0K",
        "512",
        "2K",
        "1M",
        "1,500",
    ]
    for wrong in ("", "k", "1g", "-5", "1.5k"):
        with pytest.raises(ValueError, match="lengths are token numbers"):
            parse_length(wrong)


def test_estimates():
    assert Estimate.of([1, 0] * 50).low == pytest.approx(0.4038, abs=1e-4)
    assert Estimate.of([0] * 10).high == pytest.approx(0.2775, abs=1e-4)
    assert (Estimate.of([]).low, Estimate.of([]).high) == (0.0, 1.0)
    assert math.isnan(Estimate.of([]).value)
    mean = Estimate.of([0.2, 0.4, 0.9])
    assert mean.value == pytest.approx(0.5)
    assert mean.high - mean.value == pytest.approx(1.96 * 0.36056 / 3**0.5, rel=1e-3)
    share = Estimate.of([0.75, 1.0], is_share=True)
    assert share.low < 0.875 < share.high == 1.0
    assert (Estimate.of([0.5], is_share=True).low, Estimate.of([0.5], is_share=True).high) == (0, 1)
    ratio = Estimate.of([1.0, 3.0], [3, 1])
    assert ratio.value == pytest.approx(1.5)
    assert ratio.low < 1.5 < ratio.high
