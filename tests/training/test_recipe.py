import dataclasses

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from everlong import TitansConfig
from everlong.models.sizes import count_parameters
from everlong.training.arguments import REFUSED, build_training_arguments
from everlong.training.model import build_model, build_model_config
from everlong.training.recipe import (
    find_recipe,
    known_recipes,
    load_recipe,
)


def test_overrides_win_over_the_file_and_keep_the_rest(tiny_recipe):
    overrides = ["--training.max_steps", "9", "--data.length=128", "--model.hidden_size=64"]
    recipe = load_recipe(tiny_recipe(), [*overrides, "--seed", "3"])
    assert recipe.training["max_steps"] == 9
    assert recipe.training["per_device_train_batch_size"] == 2
    assert (recipe.data.length, recipe.data.key_digits, recipe.seed) == (128, 5, 3)
    assert recipe.model["hidden_size"] == 64
    assert recipe.model["intermediate_size"] == 32
    assert recipe.run_folder.as_posix() == "runs/tiny-llama"


def test_a_saved_recipe_loads_as_the_same(tiny_recipe, tmp_path):
    recipe = load_recipe(tiny_recipe("titans"), ["--training.learning_rate=1e-4"])
    recipe.save(tmp_path)
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_training_arguments_are_those_of_the_recipe(tiny_recipe):
    arguments = build_training_arguments(
        load_recipe(tiny_recipe(), ["--training.learning_rate", "1e-4", "--seed", "5"])
    )
    assert arguments.learning_rate == 1e-4
    assert arguments.seed == 5
    assert arguments.report_to == []


def test_the_vocabulary_is_that_of_bytes(tiny_recipe):
    config = build_model_config(load_recipe(tiny_recipe()))
    assert (config.vocab_size, config.pad_token_id, config.eos_token_id) == (259, 256, 258)


RMT = """model: {type: rmt, num_memory_tokens: 2, segment_length: 32, base_config: {model_type: llama,
  hidden_size: 16, intermediate_size: 16, num_hidden_layers: 1, num_attention_heads: 2}}
training: {max_steps: 1}
"""


def test_fields_of_a_model_inside_another(tmp_path):
    path = tmp_path / "rmt.yaml"
    path.write_text(RMT)
    config = build_model_config(load_recipe(path, ["--model.base_config.hidden_size", "32"]))
    assert (config.hidden_size, config.base.intermediate_size, config.vocab_size) == (32, 16, 259)
    for override, message in [
        ("hiden_size=3", "model.base_config.hiden_size: did you mean model.base_config.hidden_size?"),
        ("vocab_size=100", "vocab_size must be at least 259.*got 100"),
        ("model_type=lama", "unknown model.base_config.model_type 'lama': did you mean"),
        ("model_type=bert", "a model of type 'bert' cannot be in base_config"),
    ]:
        with pytest.raises(ValueError, match=message.replace("?", r"\?")):
            load_recipe(path, [f"--model.base_config.{override}"])


def test_a_preset_is_the_published_model(tmp_path):
    path = tmp_path / "preset.yaml"
    path.write_text("{model: {preset: titans-mac-170m, chunk_size: 32}, training: {max_steps: 1}}")
    config = build_model_config(load_recipe(path))
    want = TitansConfig.from_preset("titans-mac-170m")
    assert config.layer_types == want.layer_types
    assert (config.hidden_size, config.vocab_size) == (want.hidden_size, 32000)
    assert (config.chunk_size, config.eos_token_id) == (32, 258)  # the recipe's, the tokenizer's
    for preset, message in [
        ("titans-mac-7b", "unknown preset 'titans-mac-7b': use one of titans-lmm-170m"),
        ("llama-1b", "there are presets of titans, lm2, none of llama"),
        ("3", "model.type must be a model type"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_recipe(path, [f"--model.preset={preset}"])


def from_path(tmp_path, **fields):
    recipe = tmp_path / "recipe.yaml"
    model = {"path": str(tmp_path / "llama"), **fields}
    recipe.write_text(yaml.safe_dump({"model": model, "training": {"max_steps": 1}}))
    return load_recipe(recipe)


@pytest.fixture
def llama(tiny_recipe, tmp_path):
    model = build_model(load_recipe(tiny_recipe()))
    model.save_pretrained(tmp_path / "llama")
    return model


def test_a_model_at_a_path_goes_on(llama, tmp_path):
    model = build_model(from_path(tmp_path, attention_dropout=0.5))
    want = llama.state_dict()
    assert all(torch.equal(each, want[name]) for name, each in model.state_dict().items())
    assert model.config.attention_dropout == 0.5
    with pytest.raises(ValueError, match=r"weights of a model with other layers \(model.layers.1"):
        build_model(from_path(tmp_path, num_hidden_layers=2))


@pytest.mark.parametrize("fields", [{}, {"type": "lm2", "segment_length": 16, "num_memory_slots": 4}])
def test_half_precision_at_a_path_is_trained_in_full(fields, llama, tmp_path):
    llama.to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    assert {each.dtype for each in build_model(from_path(tmp_path, **fields)).parameters()} == {
        torch.float32
    }


@pytest.mark.parametrize(
    ("kind", "fields"), [("lm2", {"num_memory_slots": 4}), ("rmt", {"num_memory_tokens": 2})]
)
def test_a_model_at_a_path_gets_a_memory(kind, fields, llama, tmp_path):
    model = build_model(from_path(tmp_path, type=kind, segment_length=16, **fields))
    assert model.config.model_type == kind
    assert torch.equal(model.get_input_embeddings().weight, llama.get_input_embeddings().weight)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"path": "nowhere/at-all"}, "model.path nowhere/at-all holds no model"),
        ({"attention_drop": 0.5}, "model.attention_drop: did you mean model.attention_dropout"),
        ({"type": "mistral"}, "leave type out to go on.*one of lm2, rmt"),
        ({"type": "lm2", "slots": 3}, "unknown field model.slots"),
        ({"parameters": 1000}, "model.parameters: the model at model.path has its size"),
        ({"path": 5}, "model.path is a folder or hub id, got 5"),
    ],
)
def test_a_model_at_a_path_that_cannot_be_had(fields, message, llama, tmp_path):
    with pytest.raises(ValueError, match=message):
        from_path(tmp_path, **fields)


def test_a_model_at_a_path_may_be_named_by_its_own_type(llama, tmp_path):
    model = build_model(from_path(tmp_path, type="llama"))
    assert torch.equal(model.get_input_embeddings().weight, llama.get_input_embeddings().weight)
    with pytest.raises(ValueError, match=r"weights of other sizes.*intermediate_size"):
        build_model(from_path(tmp_path, type="llama", intermediate_size=24))


def test_a_memory_that_cannot_be_given_is_one_error(llama, tmp_path):
    recipe = from_path(tmp_path, type="lm2", segment_length=16, num_memory_slots=0)
    with pytest.raises(ValueError, match=r"cannot be loaded: .*num_memory_slots"):
        build_model(recipe)


def test_a_whole_number_is_a_number(tiny_recipe):
    recipe = load_recipe(tiny_recipe(), ["--model.initializer_range", "1"])
    assert build_model_config(recipe).initializer_range == 1.0


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--training.max_step=3", "training.max_step: did you mean training.max_steps?"),
        ("--training.max_steps=many", "max_steps.*int.*many"),
        ("--training.max_steps=0", "training.max_steps must be given and positive.*got 0"),
        ("--training.lr_scheduler_type=cosin", "cosin is not a valid.*cosine"),
        ("--evaluation.task=[x]", "evaluation.task: did you mean evaluation.tasks?"),
        ("--evaluation.tasks=[x]", "unknown evaluation.tasks 'x': known are needle, babi"),
        ("--evaluation.samples=0", "evaluation.samples must be at least 1, got 0"),
        ("--guards.max_memory=0", "guards.max_memory must be positive.*got 0.0 and 0"),
        ("--training.gradient_accumulation_steps=0", "steps must be at least 1, got 0"),
        ("--training.report_to=tensorboard", "report_to: TensorBoard has its logs"),
        ("--training.save_strategy=best", "save_strategy: checkpoints are kept by their steps"),
        ("--training.save_strategy=often", "often"),
        ("--training.hub_model_id=a/b", "hub_model_id: push the finished folder instead; leave it out"),
        ("--training.include_for_metrics=[loss]", "include_for_metrics: held-out losses"),
        ("--training.length_column_name=x", "length_column_name: it has no effect here; leave it out"),
        ("--training.disable_tqdm=false", "disable_tqdm: everlong has a bar of its own"),
        ("--training.metric_for_best_model=loss", "metric_for_best_model: the best checkpoint is not"),
        ("--training.eval_steps=3", "eval_steps changes nothing without eval_strategy: steps"),
        ("--guards.skip=1", "unknown field guards.skip"),
        ("--training.seed=1", "set seed at the top"),
        ("--model.hiden_size=3", "model.hiden_size: did you mean model.hidden_size?"),
        ("--model.hidden_size=wide", "hidden_size.*expected int, got str"),
        ("--model.hidden_size=33", "33.*not a multiple"),
        ("--model.type=lama", "model.type.*got 'lama': did you mean"),
        ("--model.vocab_size=100", "vocab_size must be at least 259.*got 100"),
        ("--data.lenth=3", "data.lenth: did you mean data.length?"),
        ("--data.length=long", "data.length.*int.*long"),
        ("--data.task=babi", "data.task decides what a recipe is"),
        ("--data.key_digits=0", "key_digits must be at least 1, got 0"),
        ("--sed=3", "unknown field sed: did you mean seed?"),
        ("--data=5", "data holds fields: give one of them, as --data.FIELD=VALUE"),
        ("--guards=5", "guards holds fields: give one of them, as --guards.FIELD=VALUE"),
        ("--training.=5", "training holds fields: give one of them, as --training.FIELD=VALUE"),
        ("--seed=few", "seed.*int.*few"),
    ],
)
def test_a_wrong_field_is_named(tiny_recipe, override, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")) as error:
        load_recipe(tiny_recipe(), [override])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {type: llama}\ndat: {}", "unknown field dat: did you mean data?"),
        ("model: {type: llama}\ndata: {lenth: 3}", "data.lenth: did you mean data.length?"),
        ("data: {}", "has no model"),
        ("model: llama", "model must hold fields, got 'llama'"),
        ("just text", "is not a recipe"),
        ("model: [", "is not YAML"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path, text, message):
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        load_recipe(path)


def test_an_unknown_recipe_lists_the_known():
    with pytest.raises(ValueError, match=r"unknown recipe 'no-such'.*needle-attention, needle-"):
        find_recipe("no-such")


@pytest.mark.parametrize("name", sorted(known_recipes()))
def test_shipped_recipes_load_by_name(name):
    data = []
    if "hub:" in find_recipe(name).read_text():  # whose tokenizer is there too
        data = ["--data.tokenizer=bytes", "--training.bf16=false"]
    assert load_recipe(name, data).name == name
    assert find_recipe(f"recipes/{name}.yaml") is not None


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_arguments_that_would_not_do_what_they_say_are_refused(name, tiny_recipe):
    with pytest.raises(ValueError, match=rf"training.{name}: .*leave it out"):
        load_recipe(tiny_recipe(), [f"--training.{name}=1"])


def test_no_is_a_strategy(tiny_recipe):
    recipe = load_recipe(tiny_recipe(), ["--training.save_strategy=no", "--training.eval_strategy=no"])
    arguments = build_training_arguments(recipe)
    assert (arguments.save_strategy, arguments.eval_strategy) == ("no", "no")


def test_the_language_models_are_of_equal_size_and_read_the_same():
    small = [load_recipe(name) for name in sorted(known_recipes()) if name.endswith("-cpu")]
    assert len(small) == 9
    sizes = [count_parameters(build_model_config(recipe)) for recipe in small]
    assert max(sizes) < 1.05 * min(sizes)
    assert min(sizes) > 1e6
    assert max(sizes) < 2e6
    for recipe in small:
        assert (recipe.data, recipe.training) == (small[0].data, small[0].training)


def test_the_rivals_have_as_many_parameters_and_as_many_steps():
    kinds = ("lmm", "attention", "full-attention", "mamba2", "gated-deltanet")
    recipes = [load_recipe(f"needle-{kind}") for kind in kinds]
    memory, *rivals = [sum(each.numel() for each in _model(recipe).parameters()) for recipe in recipes]
    for rival in rivals:
        assert abs(rival - memory) < 0.005 * memory
    tasks = [dataclasses.replace(recipe.data.plain(), length=512) for recipe in recipes]
    assert tasks == [tasks[0]] * len(kinds)
    steps = [recipe.training["max_steps"] for recipe in recipes]
    assert min(steps) == steps[0], "the rivals get no fewer steps than the memory"


def _model(recipe):
    return AutoModelForCausalLM.from_config(build_model_config(recipe))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["lengths=[96, 200, 300]"], r"up to 300 tokens.*takes 256 .*lengths=\[96, 200\]"),
        ([], r"lengths go up to 4,096 tokens.*takes 256 at most: set --evaluation.lengths=\[256\]"),
        (["lengths=[99999999]"], "lengths are 67,108,864 tokens at most, got 99,999,999"),
        (["samples=2m"], "samples must be at most 1,048,576, got 2,097,152"),
        (["held_out_samples=2m"], "held_out_samples must be at most 1,048,576"),
    ],
)
def test_what_the_model_could_not_be_scored_on_is_refused_before_training(
    overrides, message, tiny_recipe
):
    asked = ["--evaluation.tasks=[needle]", *(f"--evaluation.{each}" for each in overrides)]
    path = tiny_recipe()
    with pytest.raises(ValueError, match=message):
        load_recipe(path, ["--model.max_position_embeddings=256", *asked])
    load_recipe(path, ["--model.max_position_embeddings=256"])
    load_recipe(tiny_recipe("titans"), ["--evaluation.tasks=[needle]"])  # which has no limit


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--training.per_device_train_batch_size=100000000", "must be at most 1,048,576"),
        ("--training.per_device_eval_batch_size=2000000", "must be at most 1,048,576"),
        ("--training.gradient_accumulation_steps=2000000", "must be at most 1,048,576"),
        ("--training.dataloader_num_workers=100000", "must be at most 1,024, got 100,000"),
        ("--data.length=999999999m", "length must be at most 67,108,864 tokens"),
    ],
)
def test_sizes_that_no_machine_holds_are_refused(override, message, tiny_recipe):
    with pytest.raises(ValueError, match=message):
        load_recipe(tiny_recipe(), [override])
