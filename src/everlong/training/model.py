"""The `model` part of a recipe: a configuration, and the model with its first weights."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from everlong.hub import from_hub
from everlong.words import check_names, nearest, one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from .recipe import Recipe


def build_model_config(recipe: Recipe) -> PretrainedConfig:
    """The transformers configuration of the recipe's model.

    The vocabulary and the special tokens are those of the recipe's tokenizer unless it names others.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from everlong.models import model_config

    for name in ("type", "preset", "path"):
        value = recipe.model.get(name, "")
        if isinstance(value, (list, dict)):
            raise ValueError(f"model.{name} is one name, got {value!r}")
    if "path" in recipe.model:
        return _config_at(recipe)
    fields = {**recipe.model}
    preset = fields.pop("preset", None)
    kind = fields.pop("type", None if preset is None else str(preset).split("-")[0])
    if kind not in CONFIG_MAPPING:
        raise ValueError(
            f"model.type must be a model type of transformers, got {kind!r}"
            f"{nearest(str(kind), CONFIG_MAPPING.keys())}"
        )
    parameters = fields.pop("parameters", None)
    fields = {**_preset_fields(kind, preset), **_config_fields(kind, fields)}
    owner = fields  # of what every model has
    if kind == "rmt":
        owner = fields["base_config"] = _base_config(fields.get("base_config"))
    tokenizer = recipe.data.build_tokenizer()
    owner.setdefault("vocab_size", len(tokenizer))
    for token in ("pad_token_id", "bos_token_id", "eos_token_id"):
        owner.setdefault(token, getattr(tokenizer, token))
    _check_vocabulary(owner["vocab_size"], len(tokenizer), "leave it out")
    try:
        return model_config(kind, parameters, **fields)
    except Exception as error:  # transformers raises several kinds, all of them about the fields
        raise ValueError(f"model: {one_line(error)}") from error


def build_model(recipe: Recipe) -> PreTrainedModel:
    """The recipe's model, with fresh weights, or with those at `model.path`."""
    import torch
    from transformers import AutoModelForCausalLM

    from everlong.models.stateful import cast_parameters

    if "path" not in recipe.model:
        config = build_model_config(recipe)
        try:
            return AutoModelForCausalLM.from_config(config)
        except Exception as error:  # of several kinds; no room for its weights is a RuntimeError
            raise ValueError(f"model: it cannot be built: {one_line(error)}") from error
    fields = {**recipe.model}
    path, kind = fields.pop("path"), fields.pop("type", None)
    config = build_model_config(recipe)
    if kind == config.model_type:
        kind = None
    try:
        if kind is not None:
            model = from_hub(path, lambda: WRAPPED[kind](path, fields))
        else:
            model, loading = from_hub(
                path,
                lambda: AutoModelForCausalLM.from_pretrained(
                    path, config=config, output_loading_info=True
                ),
            )
    except Exception as error:  # transformers raises several kinds, all of them about files and fields
        if kind is None and "ignore_mismatched_sizes" in str(error):
            raise ValueError(
                f"model.path {path} holds weights of other sizes than the recipe's fields of `model` "
                f"say: leave out those of {', '.join(fields)} that change sizes"
            ) from error
        raise ValueError(f"model.path {path} cannot be loaded: {one_line(error)}") from error
    if kind is None:
        other = sorted([*loading["missing_keys"], *loading["unexpected_keys"]])
        if other:
            raise ValueError(
                f"model.path {path} holds the weights of a model with other layers ({other[0]} and "
                f"{len(other) - 1} more do not fit): leave out the fields that change them"
            )
    # Weights that are stored in half precision are trained in full.
    return cast_parameters(model, torch.float32)


def _lm2_from(path: str, fields: dict[str, Any]) -> PreTrainedModel:
    from everlong.models import LM2ForCausalLM

    return LM2ForCausalLM.from_llama(path, **fields)


def _rmt_from(path: str, fields: dict[str, Any]) -> PreTrainedModel:
    from everlong.models import RMTForCausalLM

    return RMTForCausalLM.from_causal_lm(path, **fields)


# Memories that a model at a path can be given.
WRAPPED = {"lm2": _lm2_from, "rmt": _rmt_from}


def _config_at(recipe: Recipe) -> PretrainedConfig:
    """The configuration of the model at `model.path`, with the recipe's fields."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    fields = {**recipe.model}
    path, kind = fields.pop("path"), fields.pop("type", None)
    for name in ("parameters", "preset"):
        if name in fields:
            raise ValueError(f"model.{name}: the model at model.path has its size; leave it out")
    if not isinstance(path, str):
        raise ValueError(f"model.path is a folder or hub id, got {path!r}")
    try:
        found = from_hub(path, lambda: AutoConfig.from_pretrained(path))
        if kind == found.model_type:  # the model there is one already
            kind = None
    except (OSError, ValueError) as error:
        raise ValueError(f"model.path {path} holds no model: {one_line(error)}") from error
    named = "name the tokenizer of that model as data.tokenizer"
    _check_vocabulary(found.vocab_size, len(recipe.data.build_tokenizer()), named)
    if kind is None:
        fields = _config_fields(found.model_type, fields)
        return from_hub(path, lambda: AutoConfig.from_pretrained(path, **fields))
    if kind not in WRAPPED:
        raise ValueError(
            f"model.type {kind!r} with model.path: leave type out to go on from the model there, or "
            f"name its own type, or the memory it shall get, one of {', '.join(WRAPPED)}"
        )
    types = [each.name for each in dataclasses.fields(CONFIG_MAPPING[kind]) if each.init]
    check_names(fields, types, "model.")
    return found


def _check_vocabulary(size: Any, tokens: int, advice: str) -> None:
    if not isinstance(size, int) or size < tokens:
        raise ValueError(
            f"model.vocab_size must be at least {tokens}, which is the vocabulary of the recipe's "
            f"tokenizer, got {size}: {advice}"
        )


def _config_fields(kind: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a model type's configuration, checked by name; 0 is a fine number for one that
    may be 0.1."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    types = {each.name: each.type for each in dataclasses.fields(CONFIG_MAPPING[kind]) if each.init}
    check_names(fields, [*types, "parameters"], "model.")
    numbers = (float, float | None)
    return {
        name: float(value) if type(value) is int and types[name] in numbers else value
        for name, value in fields.items()
    }


def _preset_fields(kind: str, preset: str | None) -> dict[str, Any]:
    """What a preset sets but its special tokens: those are the tokenizer's."""
    from everlong.models.presets import lm2_preset_fields, preset_fields

    if preset is None:
        return {}
    known = {"titans": preset_fields, "lm2": lm2_preset_fields}
    if kind not in known:
        raise ValueError(f"model.preset: there are presets of {', '.join(known)}, none of {kind}")
    fields = known[kind](preset)
    return {name: value for name, value in fields.items() if not name.endswith("_token_id")}


def _base_config(given: Any) -> dict[str, Any]:
    """The fields of the model inside an RMT, by their names."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if not isinstance(given or {}, dict):
        raise ValueError(f"model.base_config must hold fields, got {given!r}")
    inner = {"model_type": "llama", **(given or {})}
    kind = inner["model_type"]
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise ValueError(
            f"unknown model.base_config.model_type {kind!r}{nearest(str(kind), CONFIG_MAPPING.keys())}"
        )
    config_class = CONFIG_MAPPING[kind]
    names = [each.name for each in dataclasses.fields(config_class) if each.init]
    known = ["model_type", *names, *config_class.attribute_map]
    check_names(inner, known, "model.base_config.")
    return inner
