"""Recipes that nobody meant: each is one error at once, or the loaded recipe holds what was given."""

import copy
import dataclasses
import math
import re
import sys
import time

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from everlong import strict_yaml
from everlong.training.recipe import find_recipe, load_recipe
from everlong.words import SIZE, parse_size

BASE = {
    "model": {
        "type": "titans",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "layer_types": ["lmm", "sliding_attention"],
        "memory_expansion": 2,
        "chunk_size": 16,
        "sliding_window": 16,
    },
    "data": {"task": "needle", "source": "TEXTS", "length": 96, "start_length": 96, "key_digits": 5},
    "training": {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.001,
        "lr_scheduler_type": "cosine",
        "use_cpu": True,
        "save_strategy": "no",
    },
    "evaluation": {"held_out_samples": 64, "tasks": ["needle"], "lengths": [96], "samples": 3},
    "guards": {"max_memory": 10000.0, "skipped_steps": 0},
    "output_dir": "runs/x",
    "seed": 0,
    "name": "x",
}
INNER = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
OTHERS = [
    {"data": {"task": "babi", "source": "TEXTS", "length": 200, "tasks": ["qa1"], "max_facts": 4}},
    {"data": {"task": "babilong", "source": "TEXTS", "length": 800}},
    {"data": {"task": "text", "source": "TEXTS", "length": 64, "held_out": 0.1, "tokenizer": "bytes"}},
    {"data": {"task": "ruler", "source": "TEXTS", "length": 600, "kinds": ["niah_single_1"]}},
    {"model": {"type": "rmt", "num_memory_tokens": 2, "segment_length": 32, "base_config": INNER}},
    {"model": {"type": "lm2", **INNER, "segment_length": 32, "num_memory_slots": 4}},
    {"model": {"type": "titans", "preset": "titans-mac-170m", "parameters": 200_000_000}},
]
del OTHERS[5]["model"]["model_type"]


def bomb():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    return "\n".join([*lines, "model: {type: llama, x: *a9}"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(), "alias.*line 2"),
        ("model: &m {type: llama}\ndata: {source: *m}", "alias"),
        ("model: {type: llama}\nmodel: {type: titans}", "'model' twice.*line 2"),
        ("model: {type: llama, type: titans}", "'type' twice"),
        ("model: " + "[" * 21 + "]" * 21, "20 levels"),
        ("[" * 200_000, "20 levels"),
        ("model: {type: !!python/name:os.system}", "tag"),
        ("model: {type: llama}\ntraining: {optim: {class_path: os.path, init_args: {}}}", "class_path"),
        ("model: {type: llama, <<: {class_path: os.path}}", "merge.*line 1"),
        ("model: {type: llama}\0", "wrong.yaml is not YAML"),
        ("", "is not a recipe"),
        ("- model", "is not a recipe"),
        ("# " + "x" * (1 << 20), "1,048,576 bytes"),
        ("model: {type: [llama]}", r"model.type.*\['llama'\]"),
        ("model: {preset: [llama]}", r"model.preset.*\['llama'\]"),
        ("model: {type: rmt, base_config: [llama]}", r"model.base_config.*\['llama'\]"),
        ("model: {type: rmt, base_config: {model_type: [llama]}}", r"model_type \['llama'\]"),
        ("model: {type: llama, vocab_size: [1]}", r"vocab_size.*\[1\]"),
        ("model: {type: llama, 1: 2}", "model.1"),
        ("model: {type: llama}\n1: 2", "unknown field 1"),
        ("model: {type: llama}\ndata: {task: [needle]}", r"data.task \['needle'\]"),
        ("model: {type: llama}\ndata: {task: needl}", "'needl': did you mean needle"),
        ("model: {type: llama}\nname: ../../x", "name .*'../../x'"),
        ("model: {type: llama}\nname: ..", "name .*'..'"),
        ("model: {type: llama}\nseed: -1", "seed .*-1"),
        ("model: {type: llama}\nseed: 9" + "9" * 5000, "wrong.yaml"),
        ("model: {type: llama}\nguards: {max_memory: .nan}", "guards.max_memory.*nan"),
    ],
)
def test_a_wrong_file_is_one_error_at_once(text, message, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    started = time.perf_counter()
    with pytest.raises(ValueError, match=message) as error:
        load_recipe(path)
    assert "\n" not in str(error.value)
    assert time.perf_counter() - started < 5


def test_many_names_take_no_longer_each():
    started = time.perf_counter()
    assert len(strict_yaml.load("\n".join(f"a{i}: 1" for i in range(60_000)))) == 60_000
    assert time.perf_counter() - started < 10


@pytest.mark.parametrize("value", ["imported_by_a_recipe.C", "{size: 2}"])
def test_no_field_of_a_recipe_imports_a_module(value, tiny_recipe, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "imported_by_a_recipe.py").write_text("C = 1")
    with pytest.raises(ValueError, match=r"training\.parallelism_config"):
        load_recipe(tiny_recipe(), [f"--training.parallelism_config={value}"])
    with pytest.raises(ValueError, match=r"training\.parallelism_config"):
        load_recipe(tiny_recipe(parallelism_config=value))
    assert "imported_by_a_recipe" not in sys.modules


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("save_steps", 0),
        ("logging_steps", -1),
        ("eval_steps", 0),
        ("save_total_limit", 0),
        ("max_grad_norm", -1),
        ("weight_decay", -0.1),
        ("learning_rate", math.inf),
        ("learning_rate", math.nan),
        ("warmup_steps", -1),
        ("max_steps", 99999999999999999999999),
        ("max_steps", "4"),
        ("use_cpu", "true"),
    ],
)
def test_training_arguments_out_of_their_range(name, value, tiny_recipe):
    with pytest.raises(ValueError, match=rf"^training\.{name}"):
        load_recipe(tiny_recipe(**{name: value}))


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("data: {source: null}", "data.source"),
        ("data: {length: '96'}", "data.length"),
        ("evaluation: {held_out_samples: '4'}", "evaluation.held_out_samples"),
        ("guards: {max_memory: '4'}", "guards.max_memory"),
        ("seed: '4'", "seed"),
    ],
)
def test_no_value_and_a_text_are_no_number_and_no_name(text, field, tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(f"model: {{type: llama}}\n{text}")
    with pytest.raises(ValueError, match=f"^{re.escape(field)} "):
        load_recipe(path)


def test_files_in_other_encodings(tmp_path, tiny_recipe):
    path = tiny_recipe()
    text = path.read_text()
    path.write_text(text, encoding="utf-8-sig")
    assert load_recipe(path).data.length == 96
    path.write_text(f"# ü\n{text}", encoding="latin1")
    with pytest.raises(ValueError, match=rf"{path.name} .*0xfc in position 2"):
        load_recipe(path)


def test_values_of_the_command_line_are_read_as_those_of_the_file(tiny_recipe):
    path = tiny_recipe()
    for override, message in {
        "--model.type=[titans]": r"model.type.*\['titans'\]",
        "--model.type=&a [*a]": "model.type",
        "--model.base_config.x=*a": "model.base_config.x.*alias",
        "--name=../x": r"name .*'\.\./x'",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_recipe(path, [override])


def test_sizes_are_read_wherever_numbers_are(tiny_recipe):
    path = tiny_recipe("titans")
    path.write_text(path.read_text().replace("length: 96", "length: 4k"))
    overrides = ["--training.max_steps=2k", "--model.max_position_embeddings=1m", "--name=4k"]
    recipe = load_recipe(path, [*overrides, "--training.learning_rate", "1e-4"])
    assert (recipe.data.length, recipe.training["max_steps"]) == (4096, 2048)
    assert recipe.model["max_position_embeddings"] == 1 << 20
    assert recipe.training["learning_rate"] == 1e-4
    assert recipe.name == "4k"
    recipe.save(path.parent)
    assert load_recipe(path.parent / "recipe.yaml") == recipe


def test_what_is_written_is_read_back():
    values = {"a": ["4k", "1e-4", "1.5", "no", "2026-01-01", "x: y", "\x1b", "ü", None, 4096, 1e-5]}
    assert strict_yaml.load(strict_yaml.dump(values)) == values
    assert yaml.safe_load(strict_yaml.dump(values)) == values


@pytest.mark.parametrize(
    ("name", "message"),
    [("needle-lm", "mean needle-lmm"), ("/no/such/needle-lmm", "/no/such"), ("a\0b", r"a\\x00b")],
)
def test_a_recipe_that_is_not_there(name, message):
    with pytest.raises(ValueError, match=message) as error:
        find_recipe(name)
    assert len(str(error.value)) < 300 or "did you mean" not in str(error.value)


def places(values, prefix=()):
    """The path of every field of a recipe."""
    for name, value in values.items():
        yield (*prefix, name)
        if isinstance(value, dict):
            yield from places(value, (*prefix, name))


def put(values, place, value):
    *way, last = place
    for name in way:
        values = values[name]
    values[last] = value


def standing(values, place):
    for name in place:
        values = values[name]
    return values


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.integers(-3, 200)
    | st.floats()
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
    | st.sampled_from(
        ["4k", "nan", "../x", "[bold]", "needle", "\x1b[31m", "1e400", "x" * 300, "~", "\0"]
    )
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.sampled_from(["modle", "hidden_sise", "type", "path", "seed", "", "task"]) | st.text(
    max_size=5
)


@st.composite
def wrong_recipes(draw):
    """A recipe with one to three fields changed, dropped, or put where they do not belong; and the
    change, if it is one changed field."""
    values = copy.deepcopy({**BASE, **draw(st.sampled_from([{}, *OTHERS]))})
    if values["data"]["task"] != "needle":
        del values["evaluation"]
    changes = draw(st.integers(1, 3))
    changed = None
    for _ in range(changes):
        place = draw(st.sampled_from(sorted(places(values), key=str)))
        kind = draw(st.sampled_from(["change", "change", "change", "drop", "add"]))
        if kind == "drop":
            del standing(values, place[:-1])[place[-1]]
        elif kind == "add":
            put(values, (*place[:-1], draw(NAMES)), draw(VALUES))
        else:
            value = draw(VALUES)
            put(values, place, value)
            changed = (place, value)
    return values, changed if changes == 1 else None


def same(found, given):
    """Whether a value stands for what was given, a whole number for a number and so on."""
    if isinstance(found, float) and isinstance(given, (int, float)):
        return found == given or (math.isnan(found) and math.isnan(given))
    if isinstance(given, dict) and isinstance(found, dict):  # with its defaults
        return all(name in found and same(found[name], each) for name, each in given.items())
    if isinstance(found, int) and isinstance(given, str) and re.fullmatch(SIZE, given):
        return found == parse_size(given)
    return found == given and isinstance(found, bool) == isinstance(given, bool)


def check_wrong_recipe(case, folder):
    values, changed = case
    data = values.get("data")
    if isinstance(data, dict) and data.get("source") == "TEXTS":
        data["source"] = str(folder / "text")
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    message = ""
    try:
        recipe = load_recipe(path)
    except ValueError as error:
        message = str(error)
    if message:
        assert "\n" not in message
        return
    if changed is not None:
        place, value = changed
        told = standing(dataclasses.asdict(recipe), place)
        assert value is None or same(told, value), (place, value, told)
    again = folder / "again.yaml"
    again.write_text(recipe.to_yaml(), encoding="utf-8")
    assert repr(load_recipe(again)) == repr(recipe)


def with_texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "text").mkdir()
    for i in range(3):
        (folder / "text" / f"{i}.txt").write_text("A few short words, told often. " * 20)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return with_texts(tmp_path_factory)


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
RELAXED = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]


@given(case=wrong_recipes())
@settings(max_examples=40, deadline=None, suppress_health_check=RELAXED, derandomize=True)
def test_a_wrong_recipe_is_an_error_or_stands(case, folder):
    check_wrong_recipe(case, folder)


@pytest.mark.slow
@given(case=wrong_recipes())
@settings(max_examples=1000, deadline=None, suppress_health_check=RELAXED)
def test_a_thousand_wrong_recipes(case, folder):
    check_wrong_recipe(case, folder)


@pytest.mark.slow
@given(
    data=st.binary(max_size=300)
    | st.text(max_size=300).map(lambda text: text.encode("utf-8", "ignore"))
)
@settings(max_examples=300, deadline=None, suppress_health_check=RELAXED)
def test_any_bytes_are_an_error(data, folder):
    path = folder / "bytes.yaml"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"bytes\.yaml|unknown field") as error:
        load_recipe(path)
    assert "\n" not in str(error.value)
