"""The command line, end to end on tiny models."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from everlong.cli import main, split_overrides
from everlong.data import byte_tokenizer
from everlong.files import hold
from everlong.models import model_config
from everlong.training import load_recipe
from everlong.training.progress import TrainingProgress


@pytest.fixture(autouse=True)
def _loud_again():
    verbosity = logging.get_verbosity()
    yield
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


@pytest.fixture
def model(tiny_recipe, tmp_path, capsys):
    folder = tmp_path / "model"
    assert main(["train", str(tiny_recipe("titans")), "--output_dir", str(folder)]) == 0
    capsys.readouterr()
    return folder


def error_of(arguments, capsys):
    """The one line on stderr of a command that fails."""
    assert main([str(each) for each in arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("everlong: error: ")
    assert not any("Traceback" in line for line in lines)
    return lines[-1]


def test_no_arguments_print_help(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    for command in ("train", "eval", "generate", "tokenizer", "demo"):
        assert re.search(rf"^ +{command}\b", out, re.MULTILINE)


def test_train_eval_and_generate(tiny_recipe, tmp_path, capsys):
    folder, out = tmp_path / "run", tmp_path / "out"
    arguments = ["train", tiny_recipe("titans"), "--output_dir", folder, "--training.max_steps=4"]
    assert main([str(each) for each in arguments]) == 0
    assert f"The model is in {folder}" in capsys.readouterr().out
    assert json.loads((folder / "result.json").read_text())["steps"] == 4

    arguments = ["eval", folder, folder / "checkpoint-4", "--lengths", "96,128", "--samples", "3"]
    assert main([str(each) for each in [*arguments, "--out", out]]) == 0
    assert "titans lmm+sliding attention" in capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert [each["length"] for each in results["cells"]] == [96, 128] * 2
    assert "everlong eval" in results["settings"]["command"]
    assert results["models"][0]["training_length"] == 96
    table = (out / "results.md").read_text()
    assert "| titans lmm+sliding attention |" in table
    assert "| titans lmm+sliding attention checkpoint-4 |" in table
    assert (out / "needle.png").read_bytes().startswith(b"\x89PNG")

    assert main(["generate", str(folder), "--prompt", "The king", "--max_new_tokens", "5"]) == 0
    assert capsys.readouterr().out.strip("\n")


def test_a_tokenizer_is_trained_and_loads(text_folder, tmp_path, capsys):
    arguments = ["tokenizer", "--source", text_folder, "--vocab_size", 270, "--out", tmp_path / "bpe"]
    assert main([str(each) for each in arguments]) == 0
    assert capsys.readouterr().out.startswith("270 tokens. The tokenizer is in ")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bpe")
    ids = tokenizer("told often")["input_ids"]
    assert tokenizer.decode(ids) == "told often"
    assert len(ids) < len("told often")
    assert f"{tmp_path / 'bpe'} holds a tokenizer already" in error_of(arguments, capsys)
    arguments.append("--overwrite")
    assert "vocab_size must be at least 259" in error_of([*arguments, "--vocab_size", 9], capsys)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "bpe")) == 270
    assert main([str(each) for each in [*arguments, "--vocab_size", 280]]) == 0
    assert len(AutoTokenizer.from_pretrained(tmp_path / "bpe")) == 280
    (tmp_path / "empty.txt").touch()
    arguments = ["tokenizer", "--source", tmp_path / "empty.txt", "--out", tmp_path / "none"]
    assert "holds no text" in error_of(arguments, capsys)


def test_resume(tiny_recipe, tmp_path, capsys):
    folder = str(tmp_path / "run")
    assert main(["train", str(tiny_recipe()), "--output_dir", folder]) == 0
    assert main(["train", "--resume", folder, "--training.max_steps", "8"]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == 8
    assert "holds a run already" in error_of(["train", tiny_recipe(), "--output_dir", folder], capsys)


def test_ctrl_c_in_training_says_how_to_go_on(tiny_recipe, tmp_path, capsys, monkeypatch):
    def interrupt(self, args, state, control, **kwargs):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(TrainingProgress, "on_step_end", interrupt)
    folder = tmp_path / "run"
    assert main(["train", str(tiny_recipe()), "--output_dir", str(folder)]) == 130
    error = capsys.readouterr().err
    assert f"the last checkpoint is {folder / 'checkpoint-1'}" in error
    assert f"everlong train --resume {folder}" in error


def test_a_loss_that_is_not_finite_is_one_line(tiny_recipe, tmp_path, capsys):
    path = tiny_recipe(learning_rate=1e38, lr_scheduler_type="constant")
    assert main(["train", str(path), "--output_dir", str(tmp_path / "run")]) == 1
    assert re.search(
        r"training stopped: the loss is \w+, first of all .* at step 2", capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "give either a recipe or --resume"),
        (["train", "no-such"], "unknown recipe 'no-such': .*needle-attention.*needle-lmm"),
        (["train", "needle-lmm", "--training.max_step", "3"], "did you mean training.max_steps"),
        (["train", "needle-lmm", "--data.source", "/no/such", "--output_dir", "OUT"], "/no/such"),
        (["train", "--resume", "/no/such"], "/no/such is not a run folder"),
        (["eval", "/no/such", "--out", "OUT"], "/no/such does not exist"),
        (
            ["eval", "MODEL", "--out", "OUT", "--tasks", "noodle"],
            "'noodle' is none of everlong's tasks",
        ),
        (["data", "babi-check", "/no/such"], "/no/such has no files of bAbI"),
        (["data", "babi-write", "OUT", "--tasks", "qa0"], "tasks are some of qa1, .* got 'qa0'"),
        (["eval", "MODEL", "--out", "OUT", "--passages", "-4"], "passages must be at least 0, got -4"),
        (["eval", "MODEL", "--out", "OUT", "--lengths", "1k,x"], "512,1k,1m, got 'x'"),
        (["eval", "MODEL", "--out", "OUT", "--lengths", "10"], "length 10 is too short"),
        (["generate", "/no/such", "--prompt", "a"], "does not exist"),
        (["generate", "MODEL", "--prompt", ""], "the prompt is empty"),
        (["generate", "MODEL", "--prompt_file", "/no/such"], "/no/such does not exist"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, model, tmp_path, capsys):
    names = {"MODEL": str(model), "OUT": str(tmp_path / "out")}
    assert re.search(message, error_of([names.get(each, each) for each in arguments], capsys))


def test_an_unfinished_run_is_told_from_a_missing_one(tiny_recipe, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").touch()
    arguments = ["generate", tmp_path / "run", "--prompt", "a"]
    assert "training has not finished" in error_of(arguments, capsys)


def test_a_damaged_model_is_one_line(model, capsys):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be loaded" in error_of(["generate", model, "--prompt", "a"], capsys)


def test_a_prompt_beyond_an_attention_models_limit_is_refused(tiny_recipe, tmp_path, capsys):
    folder = tmp_path / "run"
    limit = "--model.max_position_embeddings=100"
    assert main(["train", str(tiny_recipe()), "--output_dir", str(folder), limit]) == 0
    error = error_of(["generate", folder, "--prompt", "a" * 95, "--max_new_tokens", "9"], capsys)
    assert "are 104 tokens, but this model takes 100 at most" in error
    arguments = ["eval", folder, "--lengths", "96,200", "--out", tmp_path / "out"]
    assert "takes 100 tokens at most, asked are 200" in error_of(arguments, capsys)


def test_a_recipe_says_what_the_trained_model_is_scored_on(tiny_recipe, tmp_path):
    folder = tmp_path / "run"
    asked = ["--evaluation.tasks=[needle]", "--evaluation.lengths=[96, 128]", "--evaluation.samples=2"]
    assert main(["train", str(tiny_recipe()), "--output_dir", str(folder), *asked]) == 0
    results = json.loads((folder / "evaluation" / "results.json").read_text())
    assert [cell["length"] for cell in results["cells"]] == [96, 128]


def test_the_recipe_that_would_be_run_is_printed(tiny_recipe, tmp_path, capsys):
    path = tiny_recipe()
    assert main(["train", str(path), "--data.length=128", "--print_config"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert load_recipe(printed).data == load_recipe(path, ["--data.length=128"]).data
    assert not (tmp_path / "runs").exists()


def test_a_model_is_evaluated_on_a_task_that_it_was_not_trained_on(model, tmp_path, capsys):
    """The length marked in the report is that of its training, not of the other task."""
    story = "1 Mary moved to the bathroom.\n2 Where is Mary? \tbathroom\t1\n"
    (tmp_path / "qa1_single_train.txt").write_text(story)
    (tmp_path / "qa1_single_test.txt").write_text(story)
    out = tmp_path / "out"
    arguments = ["--tasks", "babi", "--stories", str(tmp_path), "--samples", "2", "--out", str(out)]
    assert main(["eval", str(model), "--lengths", "128,256", *arguments]) == 0
    results = json.loads((out / "results.json").read_text())
    assert results["models"][0]["training_length"] == 96
    assert [cell["length"] for cell in results["cells"]] == [128, 256]
    assert (out / "babi.png").is_file()


def test_stories_are_written_and_checked(tmp_path, capsys):
    asked = ["--tasks", "qa1,qa5", "--stories", "10", "--seed", "4"]
    assert main(["data", "babi-write", str(tmp_path), *asked]) == 0
    assert capsys.readouterr().out.count("written: ") == 4
    assert main(["data", "babi-check", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "qa1: 15 / 15\nqa5: 15 / 15\n"
    path = tmp_path / "qa1_single-supporting-fact_test.txt"
    lines = path.read_text().splitlines()
    lines[2] = re.sub(r"\t\w+\t", "\tnowhere\t", lines[2])
    path.write_text("\n".join(lines))
    assert main(["data", "babi-check", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "qa1: 14 / 15\nqa5: 15 / 15\n"


@pytest.mark.parametrize("kind", ["lm2", "rmt", "mamba2", "gated_deltanet"])
def test_models_with_a_memory_take_any_prompt(kind, tmp_path, capsys):
    """Longer than the positions that a field of theirs may name."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    fields = sizes | {"intermediate_size": 16, "max_position_embeddings": 64}
    if kind == "mamba2":
        fields = {"hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    if kind == "lm2":
        fields |= {"segment_length": 32, "num_memory_slots": 4}
    if kind == "rmt":
        fields = {
            "base_config": {"model_type": "llama", **fields},
            "segment_length": 32,
            "num_memory_tokens": 2,
        }
    model = AutoModelForCausalLM.from_config(model_config(kind, vocab_size=259, **fields))
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "--prompt", "ab" * 50, "--max_new_tokens", "3"]) == 0
    assert capsys.readouterr().out


def test_a_long_prompt_is_read_behind_a_bar_and_changes_no_text(model, capsys):
    prompt = "Tell me, " * 300
    assert main(["generate", str(model), "--prompt", prompt, "--max_new_tokens", "20"]) == 0
    out, err = capsys.readouterr()
    assert "reading" in err
    loaded, tokenizer = (auto.from_pretrained(model) for auto in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(prompt, return_tensors="pt")
    asked = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "prefill_chunk_size": 9999}
    whole = loaded.generate(**ids, **asked)[0, ids["input_ids"].shape[1] :]
    assert out.strip() == tokenizer.decode(whole, skip_special_tokens=True).strip()
    assert main(["generate", str(model), "--prompt", "Tell me", "--max_new_tokens", "2"]) == 0
    assert "reading" not in capsys.readouterr().err


def test_prompts_come_from_stdin_and_files_and_sampling_follows_its_seed(
    model, tmp_path, capsys, monkeypatch
):
    def generated(*options):
        assert main(["generate", str(model), "--max_new_tokens", "20", *options]) == 0
        return capsys.readouterr().out

    prompt = "Tell me, " * 300
    (tmp_path / "prompt.txt").write_text(prompt)
    monkeypatch.setattr("sys.stdin", io.StringIO(prompt))
    assert generated("--prompt", "-") == generated("--prompt", prompt)
    assert generated("--prompt_file", str(tmp_path / "prompt.txt")) == generated("--prompt", prompt)
    assert generated("--prompt", "a")  # of which nothing is read before generate
    warm = ["--prompt", "a", "--temperature", "1", "--seed"]
    assert generated(*warm, "1") == generated(*warm, "1")
    assert generated(*warm, "1") != generated(*warm, "2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian r", "unknown command 'trian': did you mean train"),
        ("generate m --promt a", "unknown option --promt: did you mean --prompt"),
        ("eval m --out o --lenghts 4", "unknown option --lenghts: did you mean --lengths"),
        ("data babi-chek f", "unknown action 'babi-chek': did you mean babi-check"),
        ("eval m --out o --setting trained-so", "unknown setting 'trained-so': did you mean trained"),
        ("eval m --out o --tasks nedle", "'nedle' is none .*did you mean needle"),
        ("train needle-lm", "'needle-lm': did you mean needle-lmm"),
        ("train needle-lmm --evaluation.task [x]", "evaluation.task: did you mean evaluation.tasks"),
        ("train needle-lmm --model.chunk_siz 3", "model.chunk_siz: did you mean model.chunk_size"),
        ("eval m", "required: --out"),
        ("data", "required: ACTION"),
        ("eval m --out o --lengths 99999999999k", "64M at most, got '99999999999k'"),
        ("eval m --out o --lengths 1.5k", "got '1.5k'"),
        ("eval m --out o --lengths=-1", "got '-1'"),
        ("eval m --out o --lengths=", "got ''"),
        ("eval m --out o --samples 0", "got '0'"),
        ("eval m --out o --samples ²", "got '²'"),
        ("eval m --out o --samples 99999999m", "got '99999999m'"),
        ("eval m --out o --tokens_per_forward 0", "--tokens_per_forward must be at least 1, got 0"),
        ("eval m --out o --num_fewshot=-1", "--num_fewshot must be at least 0, got -1"),
        ("eval m --out o --seed=-1", "--seed must be at least 0 .*got -1"),
        ("generate m --prompt a --temperature nan", "--temperature must be .*got nan"),
        ("generate m --prompt a --temperature=-1", "--temperature must be .*got -1"),
        ("generate m --prompt a --temperature inf", "--temperature must be .*got inf"),
        ("generate m --prompt a --top_p 0", "--top_p must be .*at most 1, got 0"),
        ("generate m --prompt a --top_p 1.1", "--top_p must be .*at most 1, got 1.1"),
        ("generate m --prompt a --top_k=-1", "--top_k must be .*got -1"),
        ("generate m --prompt a --max_new_tokens 0", "--max_new_tokens must be .*got 0"),
        ("generate m --prompt a --max_new_tokens x", "--max_new_tokens: .*got 'x'"),
        ("generate m --prompt a --seed 99999999999", "--seed must be .*got 99999999999"),
        ("generate m --prompt a --seed 3", "--seed changes nothing here: give --temperature too"),
        ("generate m --prompt a --top_k 0", "--top_k changes nothing here: give --temperature too"),
        ("generate m --prompt a --top_p 1 --temperature 0", "--top_p changes nothing here"),
        ("tokenizer --source a.txt --out o --split test", "--split changes nothing here: .*on the hub"),
        (
            "tokenizer --source a.txt --out o --subset en",
            "--subset changes nothing here",
        ),
        ("tokenizer --source a.txt --out o --text_column x", "--text_column changes nothing here"),
        ("generate m --prompt half\udcff", "the prompt is no text: letter 4"),
        ("tokenizer --source s --out o --vocab_size=-3", "--vocab_size must be .*got -3"),
        ("tokenizer --source s --out o --vocab_size 999999m", "at most 16,777,216, got 999999m"),
        ("train --hlp", "unknown option --hlp: did you mean --help"),
        ("train needle-lmm --owerwrite", "unknown option --owerwrite: did you mean --overwrite"),
        ("generate m --prompt a --temperature 1e-40", "--temperature must be .*got 1e-40"),
        ("eval m --out o --lengths 1024m", "64M at most, got '1024m'"),
        ("eval m --out o --samples=-1", "16k:100,128k:20, got '-1'$"),
        ("eval m --out o --samples 4k:1,x", "in '4k:1,x', got 'x'"),
        ("eval m --out o --babilong nosuch", "--babilong nosuch changes nothing in needle"),
        ("eval m --out o --stories x", "--stories x changes nothing in needle"),
        ("eval m --out o --data_dir nosuch", "--data_dir nosuch changes nothing in needle"),
        ("eval m --out o --num_fewshot 0", "--num_fewshot 0 changes nothing in needle"),
        ("eval m --out o --chat_template", "--chat_template .*changes nothing in needle"),
        ("eval m --out o --setting trained", "--setting trained changes nothing in needle"),
        ("eval m --out o --source=", "--source is empty"),
        ("train --resume=", "--resume has no run folder"),
        ("generate  --prompt a", "a model has no name"),
        ("eval  --out o", "a model has no name"),
        ("data babi-write f --stories=-1", "--stories must be .*got -1"),
    ],
)
def test_a_mistake_in_an_option_is_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    assert main(arguments.split(" ")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"everlong: error: .*{message}", line)


def test_sizes_are_understood_wherever_numbers_are(tiny_recipe, capsys):
    fields = ["--data.length=1k", "--training.max_steps", "2k"]
    assert main(["train", str(tiny_recipe()), *fields, "--print_config"]) == 0
    out = capsys.readouterr().out
    assert "length: 1024" in out
    assert "max_steps: 2048" in out


def test_what_a_terminal_would_act_on_is_written_out(capsys, tmp_path):
    place = tmp_path / "\x1b[31mred\x07\u202e"
    place.mkdir()
    assert main(["runs", str(place)]) == 2
    assert r"\x1b[31mred\x07\u202e holds no run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "nowhere", "--print_config"], "nowhere is not a run folder"),
        (["--resume", "nowhere", "--overwrite"], "give one of them"),
        (["RECIPE", "--training.bf16", "--seed", "1"], "--training.bf16 has no value"),
    ],
)
def test_options_of_train_that_make_no_sense(arguments, message, tiny_recipe, capsys):
    arguments = [str(tiny_recipe()) if each == "RECIPE" else each for each in arguments]
    assert message in error_of(["train", *arguments], capsys)


def test_fields_of_the_recipe_are_told_from_options():
    known = ["train", "--resume", "a", "--overwrite"]
    fields = ["--training.max_steps", "8", "--model.x=-1", "--model.y", "-1", "--seed", "3"]
    mixed = ["train", *fields[:2], *known[1:3], *fields[2:], "--overwrite"]
    assert split_overrides(mixed) == (known, fields)
    assert split_overrides(["train", "r", "--x"]) == (["train", "r"], ["--x"])
    assert split_overrides(["eval", "--x", "3"]) == (["eval", "--x", "3"], [])


def test_one_row_for_seeds_of_one_recipe_and_for_nothing_else(tiny_recipe, tmp_path, capsys):
    for name, options in {
        "a": [],
        "b": ["--seed=1"],
        "deeper": ["--seed=2", "--model.memory_depth=1"],
    }.items():
        folder = ["--output_dir", str(tmp_path / name)]
        assert main(["train", str(tiny_recipe("titans")), *folder, *options]) == 0

    def labels(*names):
        out = tmp_path / "-".join(names)
        models = [str(tmp_path / name) for name in names]
        assert main(["eval", *models, "--lengths", "96", "--samples", "2", "--out", str(out)]) == 0
        return len({each["label"] for each in json.loads((out / "results.json").read_text())["models"]})

    assert labels("a", "b") == 1
    assert labels("a", "deeper") == 2
    assert labels("a", "a") == 1  # one folder, twice


def test_a_file_in_place_of_the_results_is_named_before_the_work(model, tmp_path, capsys):
    (tmp_path / "file").touch()
    arguments = ["eval", model, "--lengths", "96", "--out", tmp_path / "file"]
    assert "file is a file: name a folder" in error_of(arguments, capsys)


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize("command", ["eval", "tokenizer", "train"])
def test_a_folder_with_something_else_is_left_alone(
    command, overwrite, model, text_folder, tiny_recipe, tmp_path, capsys
):
    """A trained model among it."""
    arguments = {
        "eval": ["eval", model, "--lengths", "96", "--samples", "2", "--out"],
        "tokenizer": ["tokenizer", "--source", text_folder, "--vocab_size", "270", "--out"],
        "train": ["train", tiny_recipe(), "--output_dir"],
    }[command]
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").touch()
    for place in [mine] if command == "train" else [mine, model]:
        before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
        message = rf"{place.name} holds files of no (run|evaluation|tokenizer) of everlong \("
        assert re.search(message, error_of([*arguments, place, *overwrite], capsys))
        assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_an_evaluation_goes_on_or_begins_anew(model, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["eval", str(model), "--lengths", "96", "--samples", "2", "--out", str(out)]
    assert main(arguments) == 0
    [samples] = (out / "samples").rglob("*.jsonl")
    before = samples.stat().st_ino
    assert main(arguments) == 0
    assert samples.stat().st_ino == before
    assert main([*arguments, "--samples", "1", "--overwrite"]) == 0
    assert len(list((out / "samples").rglob("*.jsonl"))) == 1
    assert not (out / ".lock").exists()
    with hold(out):
        error = error_of(arguments, capsys)
    assert f"{out} is being written to by process {os.getpid()} on " in error
    with hold(tmp_path / "run"):
        other = ["train", "needle-lmm", "--output_dir", tmp_path / "run"]
        assert "run is being written to by process" in error_of(other, capsys)


def test_whoever_reads_the_output_may_stop(tiny_recipe):
    command = [sys.executable, "-m", "everlong", "train", str(tiny_recipe()), "--print_config"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith("everlong 0.")


TINY = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture
def tiny(tmp_path):
    """A saved model, not trained, and its folder."""
    folder = tmp_path / "tiny"
    made = AutoModelForCausalLM.from_config(model_config("llama", intermediate_size=16, **TINY))
    made.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def rewrite(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_weights_that_are_not_stored_are_not_made_up(command, tiny, tmp_path, capsys):
    weights = load_file(tiny / "model.safetensors")
    lost = weights.pop("model.norm.weight")
    more = {"eval": ["--lengths", "96", "--samples", "2", "--out", tmp_path / "out"]}
    arguments = [command, tiny, *more.get(command, ["--prompt", "a", "--max_new_tokens", "2"])]
    save_file(weights, tiny / "model.safetensors", {"format": "pt"})
    assert re.search(r"tiny cannot .*1 .*model\.norm\.weight", error_of(arguments, capsys))
    save_file(
        {**weights, "model.norm.weight": lost, "other.weight": lost.clone()},
        tiny / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.warns(UserWarning, match=r"tiny: 1 .*other\.weight"):
        assert main([str(each) for each in arguments]) == 0


def test_a_model_of_nan_continues_no_text(tiny, capsys):
    weights = load_file(tiny / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, tiny / "model.safetensors", {"format": "pt"})
    for warm in ([], ["--temperature", "1"]):
        assert "tiny cannot be evaluated: it gives logits of nan" in error_of(
            ["generate", tiny, "--prompt", "a", *warm], capsys
        )


@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(command, tiny, tmp_path, capsys):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens([f"<more-{i}>" for i in range(42)])
    tokenizer.save_pretrained(tiny)
    more = {"eval": ["--lengths", "96", "--samples", "2", "--out", tmp_path / "out"]}
    arguments = [command, tiny, *more.get(command, ["--prompt", "a"])]
    error = error_of(arguments, capsys)
    assert "tiny has a tokenizer of 301 tokens, but its model has a vocabulary of 300" in error


@pytest.mark.parametrize("size", [0, 1, 200])
def test_results_that_are_cut_short_are_named_and_made_anew(size, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["eval", str(tiny), "--lengths", "96", "--samples", "1", "--out", str(out)]
    assert main(arguments) == 0
    file = out / "results.json"
    file.write_bytes(file.read_bytes()[:size])
    error = error_of(arguments, capsys)
    assert f"{file} is damaged or cut short: delete it, and what is scored already" in error
    assert main([*arguments, "--overwrite"]) == 0
    assert json.loads(file.read_text())["cells"]
    file.write_text("mine: [")
    assert "holds files of no evaluation" in error_of([*arguments, "--overwrite"], capsys)


def test_how_a_model_generates_is_checked_or_set_aside(tiny, capsys):
    file = tiny / "generation_config.json"
    rewrite(file, lambda values: values.update(num_beams=2, min_length="x"))
    arguments = ["generate", str(tiny), "--prompt", "a", "--max_new_tokens", "2"]
    assert main(arguments) == 0
    rewrite(file, lambda values: values.update(eos_token_id="x"))
    assert "eos_token_id is a token id or a list of such, got 'x'" in error_of(arguments, capsys)


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    "names",
    [("samples/x.wav", "report.html"), ("samples/x.wav",), ("results.json",), ("samples/a/b.jsonl",)],
)
def test_a_folder_of_others_is_no_evaluation(names, overwrite, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    arguments = ["eval", tiny, "--lengths", "96", "--samples", "2", "--out", out, *overwrite]
    assert "out holds files of no evaluation of everlong" in error_of(arguments, capsys)
    assert [(out / name).read_text() for name in names] == ["{}"] * len(names)


def test_an_evaluation_is_known_by_its_samples_and_deletes_no_others(tiny, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["eval", str(tiny), "--lengths", "96", "--samples", "2", "--out", str(out)]
    assert main(arguments) == 0
    (out / "samples" / "mine.txt").touch()
    assert main([*arguments, "--overwrite"]) == 0
    assert (out / "samples" / "mine.txt").exists()
    (out / "samples" / "mine.txt").unlink()
    for path in out.iterdir():
        if path.is_file():
            path.unlink()
    assert main(arguments) == 0  # as if it had been stopped before its first results


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: [record.pop(name) for name in [*record] if name != "index"], "no .*scores"),
        (lambda record: record.update(tokens=None), "tokens None"),
        (lambda record: record["scores"].update(exact=7), "exact 7"),
        (lambda record: record["scores"].update(tokens=float("nan")), "tokens nan"),
        (lambda record: record["scores"].pop("exact"), "exact None"),
        (lambda record: record.update(depth="x"), "depth 'x'"),
        (lambda record: record.update(tokens=-1), "tokens -1"),
        (lambda record: record.update(tokens=True), "tokens True"),
        (lambda record: record.update(tokens=10**400), "tokens 1000"),
        (lambda record: record.update(seconds=-0.5), "seconds -0.5"),
        (lambda record: record.pop("distance"), "no distance"),
    ],
)
def test_damaged_samples_are_named(change, message, tiny, tmp_path, capsys):
    arguments = ["eval", str(tiny), "--lengths", "96", "--samples", "1", "--out", str(tmp_path / "o")]
    assert main(arguments) == 0
    [file] = (tmp_path / "o" / "samples").rglob("*.jsonl")
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record) + "\n")
    assert re.search(
        f"{re.escape(file.name)} is damaged: sample 0 has {message}", error_of(arguments, capsys)
    )


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("result.json", '{"steps": "x"}', "result.json is damaged: .*'x'"),
        ("trainer_state.json", "{", "trainer_state.json is damaged"),
        ("recipe.yaml", "{data: {length: 96}, training: 5}", "recipe.yaml: training is no dict: '5'"),
        ("recipe.yaml", "training: {max_steps: x}", "training.max_steps is no int: 'x'"),
        ("recipe.yaml", "data: {lenght: 3}", "tiny: data .*data.lenght: did you mean data.length"),
        ("recipe.yaml", "data: {length: 9, start_length: x}", "tiny: data .*recipe.yaml"),
    ],
)
def test_damaged_files_of_a_model_are_named(name, text, message, tiny, tmp_path, capsys):
    (tiny / "recipe.yaml").write_text("data: {length: 96}")
    (tiny / name).write_text(text)
    arguments = ["eval", tiny, "--lengths", "96", "--samples", "1", "--out", tmp_path / "o"]
    assert re.search(message, error_of(arguments, capsys))
