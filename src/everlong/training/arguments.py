"""The `training` part of a recipe: the arguments of `transformers.Trainer`."""

from __future__ import annotations

import copy
import dataclasses
import enum
import math
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from everlong.data.config import MOST_SAMPLES
from everlong.words import check_names, one_line

from .processes import launch_defaults

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from .recipe import Recipe

STRATEGIES = ("save_strategy", "eval_strategy", "logging_strategy")
ELSEWHERE = "it has no effect here"
PUSH = "push the finished folder instead"
NO_BEST = "the best checkpoint is not kept apart: evaluate the checkpoints instead"
PLAIN = (bool, int, float, str, type(None), dict, list, enum.Enum)
MOST_STEPS = 10**12  # beyond, their samples could not be counted
# The least value of an argument, and whether it may be that. None of them is infinite.
LEAST = {
    "adam_epsilon": (0, True),
    "dataloader_num_workers": (0, True),
    "eval_delay": (0, True),
    "eval_steps": (0, False),
    "gradient_accumulation_steps": (1, True),
    "learning_rate": (0, True),
    "logging_steps": (0, False),
    "max_grad_norm": (0, True),
    "per_device_eval_batch_size": (1, True),
    "per_device_train_batch_size": (1, True),
    "save_steps": (0, False),
    "save_total_limit": (1, True),
    "warmup_steps": (0, True),
    "weight_decay": (0, True),
}
# The largest: beyond, the work of one step would not fit into any machine.
MOST = {
    "dataloader_num_workers": 1 << 10,
    "gradient_accumulation_steps": MOST_SAMPLES,
    "per_device_eval_batch_size": MOST_SAMPLES,
    "per_device_train_batch_size": MOST_SAMPLES,
}
# Arguments that would do something else than they say, and why.
REFUSED = {
    "accelerator_config": "samples would be divided in another way than the recipe counts them",
    "auto_find_batch_size": "samples would be divided in another way than the recipe counts them",
    "data_seed": "set seed at the top of the recipe instead",
    "disable_tqdm": "everlong has a bar of its own",
    "do_eval": ELSEWHERE,
    "do_predict": ELSEWHERE,
    "do_train": ELSEWHERE,
    "greater_is_better": NO_BEST,
    "hub_model_id": PUSH,
    "hub_strategy": PUSH,
    "ignore_data_skip": "a resumed run would read the first samples again",
    "include_for_metrics": "held-out losses are the only metric",
    "include_num_input_tokens_seen": "tokens are counted always",
    "label_names": "labels have one name",
    "label_smoothing_factor": "the Trainer's own loss leaves out what writing costs",
    "length_column_name": ELSEWHERE,
    "load_best_model_at_end": NO_BEST,
    "metric_for_best_model": NO_BEST,
    "num_train_epochs": "samples are made as training goes: give max_steps",
    "output_dir": "set output_dir at the top of the recipe instead",
    "push_to_hub": PUSH,
    "remove_unused_columns": ELSEWHERE,
    "resume_from_checkpoint": "everlong train --resume RUN_FOLDER does that",
    "save_only_model": "such a run could not be resumed",
    "seed": "set seed at the top of the recipe instead",
    "train_sampling_strategy": "samples come in the order of training steps",
    "use_cache": "documents in a row would see each other",
}


def argument_types() -> dict[str, Any]:
    """The types of the `training` part's fields."""
    from transformers import TrainingArguments

    # fsdp is a flag, for which transformers still takes its old words.
    return {**get_type_hints(TrainingArguments), "fsdp": bool | str | None}


def build_training_arguments(recipe: Recipe) -> TrainingArguments:
    """The recipe's `training` part as transformers knows it, over everlong's own defaults."""
    import torch
    from transformers import TrainingArguments

    fields = recipe.training
    hints = argument_types()
    valid = {each.name for each in dataclasses.fields(TrainingArguments) if each.init}
    check_names(fields, valid, "training.")
    _check_refused(fields)
    for name in fields:
        if not _is_plain(hints[name]):  # jsonargparse would import the class that a text names
            raise ValueError(f"training.{name} is an object, which no recipe can hold; leave it out")
    check_given(fields, hints, "training.")
    _check_ranges(fields)
    defaults = {
        **launch_defaults(recipe.model, fields),
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "include_for_metrics": "held-out losses are the only metric",
        "include_num_input_tokens_seen": "non_padding",
        "logging_steps": 10,
        # Everlong stops at a loss that is not finite; transformers would log the last good one.
        "logging_nan_inf_filter": False,
        "save_total_limit": 2,
        # Samples come in the order of training steps: their lengths follow it.
        "train_sampling_strategy": "sequential",
    }
    try:
        # A copy: transformers fills fsdp_config in place, and the recipe is to stay as it is.
        given = copy.deepcopy({name: value for name, value in fields.items() if name not in STRATEGIES})
        typed = _typed(given, {name: hints[name] for name in given})
        for name in STRATEGIES:
            if name in fields:  # YAML takes "no" for False
                typed[name] = "no" if fields[name] is False else fields[name]
        arguments = TrainingArguments(
            output_dir=str(recipe.run_folder), seed=recipe.seed, **{**defaults, **typed}
        )
    except Exception as error:  # transformers raises several kinds, all of them about the fields
        raise ValueError(f"training: {one_line(error)}") from error
    _check_values(arguments)
    return arguments


def _is_plain(hint: Any) -> bool:
    """Whether a type is one of values that YAML can hold."""
    if hint is Any or get_origin(hint) is Literal:
        return True
    if get_args(hint):  # a union, or a dict or list of something
        return all(map(_is_plain, get_args(hint)))
    return isinstance(hint, type) and issubclass(hint, PLAIN)


def _check_refused(fields: dict[str, Any]) -> None:
    for name, reason in REFUSED.items():
        if name in fields:
            raise ValueError(f"training.{name}: {reason}; leave it out")
    reports = fields.get("report_to") or []
    if "tensorboard" in ([reports] if isinstance(reports, str) else reports):
        raise ValueError("training.report_to: TensorBoard has its logs in any run folder; leave it out")
    if str(fields.get("save_strategy")) == "best":
        raise ValueError("training.save_strategy: checkpoints are kept by their steps: use steps")
    if "eval_steps" in fields and str(fields.get("eval_strategy")) != "steps":
        raise ValueError(
            "training.eval_steps changes nothing without eval_strategy: steps: give that too, or leave "
            "it out"
        )


def _check_values(arguments: TrainingArguments) -> None:
    if arguments.max_steps <= 0:
        raise ValueError(
            "training.max_steps must be given and positive: samples are made as training goes, "
            f"there are no epochs of them; got {arguments.max_steps}"
        )
    if arguments.max_steps > MOST_STEPS:
        raise ValueError(f"training.max_steps must be at most {MOST_STEPS:,}")


def _check_ranges(values: dict[str, Any]) -> None:
    for name, (least, itself) in LEAST.items():
        value = values.get(name)
        if not isinstance(value, (int, float)):  # jsonargparse says what it must be
            continue
        if not (least < value < math.inf or (itself and value == least)):  # NaN is not either
            words = "at least" if itself else "more than"
            raise ValueError(f"training.{name} must be {words} {least}, got {value}: give a finite one")
        if value > MOST.get(name, math.inf):
            raise ValueError(f"training.{name} must be at most {MOST[name]:,}, got {value:,}")


def check_given(values: dict[str, Any], types: dict[str, Any], prefix: str) -> None:
    """Refuse None where the type has none, and a text where it has none: jsonargparse takes the first
    for any type, or for the text null, and reads numbers in the second."""
    for name, value in values.items():
        if name not in types:  # which is said elsewhere
            continue
        kinds = {get_origin(each) or each for each in get_args(types[name]) or (types[name],)}
        if value is None and kinds.isdisjoint((type(None), Any)):
            raise ValueError(f"{prefix}{name} has no value: give one, or leave it out for its default")
        if isinstance(value, str) and kinds <= {bool, int, float, type(None)}:
            wanted = " or ".join(sorted(each.__name__ for each in kinds - {type(None)}))
            raise ValueError(
                f"{prefix}{name} must be {wanted}, got the text {value!r}: give one, without quotes"
            )


def _typed(values: dict[str, Any], types: dict[str, Any]) -> dict[str, Any]:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    for name, type_ in types.items():
        parser.add_argument(f"--{name}", type=type_)
    return parser.parse_object(values).as_dict()
