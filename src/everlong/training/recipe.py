"""Recipes: one YAML file an experiment, checked in full before any work.

model:     `type` (a model type of transformers, such as titans) or `preset` (titans-mag-340m), fields
           of its configuration, and if wanted `parameters`, how many it shall have
           (`everlong.models.model_config`). Or `path`, a model to go on from: a folder or hub id.
           With `type: lm2` or `type: rmt` the model there gets that memory.
data:      `task` (needle, babi, babilong, ruler or text) and fields of its configuration: NeedleConfig,
           BabiConfig, BabilongConfig, RulerConfig or TextConfig
training:  fields of transformers.TrainingArguments
evaluation, guards: see Evaluation and Guards
seed, output_dir, name: see Recipe
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from everlong import strict_yaml
from everlong.data import HAYSTACKS, TASKS, DataConfig, HaystackConfig, NeedleConfig
from everlong.data.config import LONGEST, MOST_SAMPLES
from everlong.data.tokenizer import BYTES
from everlong.files import place, write_file
from everlong.provenance import RECIPE_FILE
from everlong.words import SIZE, check_names, did_you_mean, one_line, size_of

from .arguments import argument_types, build_training_arguments, check_given
from .fit import check_fit, check_lengths
from .model import WRAPPED, build_model_config

NAME = r"(?!\.+$)[^/\\\0]{1,200}"  # of one folder
INNER = "model.base_config."
# Fields of `data` that may name files or folders.
PLACES = ("source", "validation_source", "tokenizer", "folder", "cache_folder")


@dataclass
class Evaluation:
    """What a run measures besides its training loss.

    held_out_samples: samples of held-out data behind each evaluation loss. `training.eval_steps` and
        `training.eval_strategy: steps` ask for such losses.
    tasks: what the trained model is scored on at the end, as by `everlong eval`, into the run
        folder's `evaluation`; such as needle.
    lengths: tokens of those tasks' texts. samples: texts of each length.
    """

    held_out_samples: int = 64
    tasks: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=lambda: [512, 1024, 2048, 4096])
    samples: int = 100

    def __post_init__(self) -> None:
        for name in ("held_out_samples", "samples"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"evaluation.{name} must be at least 1, got {value}")
            if value > MOST_SAMPLES:
                raise ValueError(f"evaluation.{name} must be at most {MOST_SAMPLES:,}, got {value:,}")
        for task in self.tasks:
            if task not in HAYSTACKS:
                raise ValueError(_unknown("evaluation.tasks", task, HAYSTACKS))
        if self.tasks and (not self.lengths or min(self.lengths) < 1):
            raise ValueError(f"evaluation.lengths are token numbers, got {self.lengths}")
        if max(self.lengths, default=0) > LONGEST:
            raise ValueError(
                f"evaluation.lengths are {LONGEST:,} tokens at most, got {max(self.lengths):,}"
            )


@dataclass
class Guards:
    """What stops a run before it is spoilt.

    max_memory: the largest entry that a layer's memory may come to have. (An RMT's, rows behind a norm,
        is not looked at.)
    skipped_steps: how many steps in a row may be left out, because their loss or gradient is not
        finite, before the run stops; 0 stops it at the first. The schedule goes on meanwhile.
    """

    max_memory: float = 1e4
    skipped_steps: int = 0

    def __post_init__(self) -> None:
        if not self.max_memory > 0 or self.skipped_steps < 0:  # NaN is not either
            raise ValueError(
                "guards.max_memory must be positive and guards.skipped_steps at least 0, "
                f"got {self.max_memory} and {self.skipped_steps}"
            )


@dataclass
class Recipe:
    """An experiment.

    model, data, training, evaluation, guards: as this module's docstring says.
    output_dir: the run folder; runs/NAME if not given.
    seed: of the initial weights and of the training samples.
    name: what reports call it; the file's name if not given.

    A folder may be given from the home folder on, as ~/runs.
    """

    model: dict[str, Any]
    data: DataConfig = field(default_factory=NeedleConfig)
    training: dict[str, Any] = field(default_factory=dict)
    evaluation: Evaluation = field(default_factory=Evaluation)
    guards: Guards = field(default_factory=Guards)
    output_dir: str | None = None
    seed: int = 0
    name: str | None = None

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(NAME, self.name):
            raise ValueError(
                "name is that of a folder: without / and \\, not of dots alone, 200 letters at most, "
                f"got {self.name!r}"
            )
        if not 0 <= self.seed < 1 << 32:
            raise ValueError(f"seed must lie in 0 ... {(1 << 32) - 1}, got {self.seed}")
        self._find_home()

    def _find_home(self) -> None:
        """Write ~ out wherever a file or folder is named."""
        if self.output_dir is not None:
            self.output_dir = place(self.output_dir, "output_dir")
        if "path" in self.model:
            self.model = {**self.model, "path": _at_home(self.model["path"])}
        named = {name: getattr(self.data, name, None) for name in PLACES}
        self.data = replace(self.data, **{n: _at_home(value) for n, value in named.items() if value})

    def to_yaml(self) -> str:
        """The recipe with all that its file leaves to defaults but the model's and Trainer's own."""
        return strict_yaml.dump(dataclasses.asdict(self))

    def save(self, folder: str | Path) -> None:
        """Write the recipe to `folder`/recipe.yaml, whence `load_recipe` reads it back."""
        write_file(Path(folder, RECIPE_FILE), self.to_yaml())

    @property
    def run_folder(self) -> Path:
        """The folder that training writes to."""
        return Path(self.output_dir or Path("runs") / (self.name or "unnamed"))


def _at_home(value: Any) -> Any:
    """A name, or each of several, with the home folder in the place of ~; of other values nothing."""
    if isinstance(value, list):
        return [_at_home(each) for each in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def known_recipes() -> dict[str, Path]:
    """The recipes that come with everlong, by name."""
    package = Path(__file__).parents[1]
    # Inside an installed package; beside src/ in a clone.
    folders = [package / "recipes", package.parents[1] / "recipes"]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def find_recipe(recipe: str | Path) -> Path:
    """The file of a recipe, given as a path or as the name of a known one."""
    path = Path(recipe)
    known = known_recipes()
    if "\0" not in str(recipe) and path.is_file():
        return path
    if str(path.parent) in (".", "recipes") and path.suffix in ("", ".yaml") and path.stem in known:
        return known[path.stem]
    near = did_you_mean(path.stem, known)
    raise ValueError(
        f"unknown recipe {str(recipe)!r}"
        + (near or f": give the path of a YAML file, or one of the known names: {', '.join(known)}")
    )


def load_recipe(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe at a path or of a known name, with command-line overrides, checked.

    overrides: such as ["--training.max_steps", "100", "--data.length=256"]; they win over the file.
    Raises ValueError naming the field, and the nearest valid one, for an unknown field, and for a
    value that is of the wrong type or makes no sense.
    """
    path = find_recipe(recipe)
    task = _check_file_names(path)
    pairs = _pairs(overrides)
    _check_override_names(pairs, task)
    values = _parse(path, pairs, task)
    parts = {name: kind(**values.pop(name)) for name, kind in {"data": task, **_PARTS}.items()}
    name = path.stem if values["name"] is None else values["name"]
    loaded = Recipe(**parts, **{**values, "name": name})
    config = build_model_config(loaded)
    if loaded.model.get("type") not in WRAPPED:  # these read all there is
        check_fit(loaded.data, config)
        if loaded.evaluation.tasks:
            check_lengths(loaded.evaluation.lengths, config)
    _check_tasks(loaded)
    build_training_arguments(loaded)
    return loaded


def _check_tasks(recipe: Recipe) -> None:
    """Refuse tasks to score on at the end that could not be: the training would be over by then."""
    for task in recipe.evaluation.tasks:
        own = isinstance(recipe.data, HAYSTACKS[task])
        if task != "babilong" and getattr(recipe.data, "tokenizer", BYTES) != BYTES:
            raise ValueError(f"evaluation.tasks: {task} is scored on bytes; data.tokenizer is another")
        config = recipe.data if own else HAYSTACKS[task]()
        assert isinstance(config, HaystackConfig)
        replace(config.plain(), length=min(recipe.evaluation.lengths)).datasets(1)


_PARTS = {"evaluation": Evaluation, "guards": Guards}


def _unknown(field: str, value: Any, known: Iterable[str]) -> str:
    listed = f": known are {', '.join(known)}"
    return f"unknown {field} {value!r}{did_you_mean(value, known) or listed}"


def _names(config: type) -> list[str]:
    return [each.name for each in dataclasses.fields(config)]


def _check_file_names(path: Path) -> type[DataConfig]:
    """Refuse a file with names that no recipe has; the configuration of its task."""
    values = strict_yaml.load_file(path)
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a recipe: it must hold {', '.join(_names(Recipe))}")
    check_names(values, _names(Recipe))
    for part in ("model", "data", "training", *_PARTS):
        if not isinstance(values.get(part, {}), dict):
            raise ValueError(f"{path}: {part} must hold fields, got {values[part]!r}")
    data = values.get("data", {})
    task = data.get("task", "needle")
    if not isinstance(task, str) or task not in TASKS:
        raise ValueError(_unknown("data.task", task, TASKS))
    for part, kind in {"data": TASKS[task], **_PARTS}.items():
        check_names(values.get(part, {}), _names(kind), f"{part}.")
        check_given(values.get(part, {}), get_type_hints(kind), f"{part}.")
    check_given(values, get_type_hints(Recipe), "")
    check_given(values.get("training", {}), argument_types(), "training.")
    if "model" not in values:
        raise ValueError(f"{path} has no model: add `model:` with a `type:` and its fields")
    return TASKS[task]


def _pairs(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Names and values of ["--training.max_steps", "100", "--data.length=256"]."""
    pairs = []
    rest = iter(overrides)
    for option in rest:
        name, equals, value = option.partition("=")
        given = value if equals else next(rest, None)
        if given is None or not name.startswith("--"):
            raise ValueError(f"{option} has no value: give {option}=VALUE")
        pairs.append((name[2:], given))
    return pairs


def _check_override_names(overrides: Sequence[tuple[str, str]], task: type[DataConfig]) -> None:
    for option, _ in overrides:
        part, _, name = option.partition(".")
        check_names([part], _names(Recipe))
        if part in ("model", "data", "training", *_PARTS) and not name:
            raise ValueError(f"{part} holds fields: give one of them, as --{part}.FIELD=VALUE")
        if part == "data" and name == "task":
            raise ValueError("data.task decides what a recipe is: take another recipe, or edit it")
        if part in ("data", *_PARTS):
            check_names([name], _names({"data": task, **_PARTS}[part]), f"{part}.")


def _in_digits(option: str, value: str, task: type[DataConfig]) -> str:
    """4k as 4096 where a whole number is wanted."""
    part, _, name = option.rpartition(".")
    kind = {"": Recipe, "data": task, **_PARTS}.get(part)
    hint = get_type_hints(kind).get(name) if kind else None
    is_size = int in (hint, *get_args(hint)) and re.fullmatch(SIZE, value)
    return str(size_of(value)) if is_size else value


def _parse(path: Path, overrides: list[tuple[str, str]], task: type[DataConfig]) -> dict[str, Any]:
    """The file's values and the overrides, typed."""
    from jsonargparse import ActionConfigFile, ArgumentError, ArgumentParser, set_loader

    set_loader("strict", strict_yaml.load, (yaml.YAMLError,))
    parser = ArgumentParser(exit_on_error=False, parser_mode="strict")
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_class_arguments(Recipe, skip={"data"})
    parser.add_class_arguments(task, "data")
    outer = [
        f"--{option}={_in_digits(option, value, task)}"
        for option, value in overrides
        if not option.startswith(INNER)
    ]
    try:
        values = parser.parse_args(["--config", str(path), *outer]).as_dict()
    except ArgumentError as error:
        raise ValueError(f"{path.name}: {one_line(error)}") from error
    values.pop("config")
    for part, kind in {"": Recipe, "data": task, **_PARTS}.items():
        check_given(values[part] if part else values, get_type_hints(kind), f"{part}." if part else "")
    inner = _inner_fields(overrides)
    if inner:
        values["model"]["base_config"] = {**(values["model"].get("base_config") or {}), **inner}
    return values


def _inner_fields(overrides: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Overrides of fields of model.base_config."""
    fields = {}
    for option, value in overrides:
        if option.startswith(INNER):
            try:
                fields[option.removeprefix(INNER)] = strict_yaml.load(value)
            except yaml.YAMLError as error:
                raise ValueError(f"{option}: {one_line(error)}") from error
    return fields
