"""What our configurations check besides what `transformers` does: a field is one that there is, a
number is a finite one, and where one may be 0.5 it may be 1."""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import wraps
from typing import Any, TypeVar, get_args

from huggingface_hub.dataclasses import strict
from transformers import GenerationConfig, PreTrainedConfig

from everlong.words import nearest

Config = TypeVar("Config", bound=PreTrainedConfig)
# What `transformers` takes, or has written into a config.json in some version, without a field for it.
COMMON = {
    "num_labels",
    "torch_dtype",
    "name_or_path",
    "output_attentions",
    "attn_implementation",
    "experts_implementation",
    "per_layer_config",
    "tie_last_hidden_states",
    "model_type",
    "auto_map",
    "custom_pipelines",
    "quantization_config",
    "transformers_weights",
    "distributed_config",
    "adapter_config",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "sep_token_id",
    "cls_token_id",
    "mask_token_id",
    "unk_token_id",
    "decoder_start_token_id",
    "tokenizer_class",
    "prefix",
    "task_specific_params",
    "finetuning_task",
    "use_cache",
    "tie_word_embeddings",
    "tie_encoder_decoder",
    "is_decoder",
    "add_cross_attention",
    "cross_attention_hidden_size",
    "pruned_heads",
    "torchscript",
    "use_bfloat16",
    "tf_legacy_loss",
    "use_return_dict",
    "output_past",
}
ROTARY = {"rope_theta", "rope_scaling", "partial_rotary_factor"}  # parts of rope_parameters


def checked(cls: type[Config]) -> type[Config]:
    """`strict`, for a configuration that also refuses fields that it does not have, naming the nearest,
    and numbers that are not finite; whole numbers are taken for others. Raises ValueError."""
    cls = strict(cls)
    made: Any = cls
    known, init, assign = known_fields(cls), made.__init__, made.__setattr__
    fractions = fractional_fields(cls)

    @wraps(init)
    def checked_init(self: Config, *args: Any, **given: Any) -> None:
        check_fields(given, known)
        init(self, *args, **given)

    @wraps(assign)
    def checked_assign(self: Config, name: str, value: Any) -> None:
        for where, number in _numbers(name, value):
            if not math.isfinite(number):
                raise ValueError(f"{where} must be a finite number, got {number}")
        assign(self, name, float(value) if name in fractions and type(value) is int else value)

    made.__init__, made.__setattr__ = checked_init, checked_assign
    return cls


def known_fields(cls: type[PreTrainedConfig]) -> set[str]:
    """The names that a configuration is made with: its own, and those of any version of
    `transformers`."""
    own = {each.name for each in dataclasses.fields(cls)} | set(cls.attribute_map)
    own |= {
        name
        for each in cls.__mro__
        if not each.__module__.startswith("transformers.")
        for name, value in vars(each).items()
        if isinstance(value, property) and value.fset is not None
    }
    generation = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    return own | COMMON | generation | (ROTARY if "rope_parameters" in own else set())


def check_fields(given: Iterable[str], known: set[str]) -> None:
    """Refuse names of fields that there are not; those that begin with _ are `transformers`' own."""
    for name in given:
        if name not in known and not name.startswith("_"):
            raise ValueError(f"unknown field {name}{nearest(name, known)}")


def fractional_fields(cls: type[PreTrainedConfig]) -> set[str]:
    """The fields that hold numbers which need not be whole."""
    types = {each.name: {each.type, *get_args(each.type)} for each in dataclasses.fields(cls)}
    return {name for name, kinds in types.items() if float in kinds and int not in kinds}


def _numbers(name: str, value: Any) -> Iterator[tuple[str, float]]:
    """Numbers with a fraction in a field, wherever in it."""
    if isinstance(value, float):
        yield name, value
    elif isinstance(value, (Mapping, PreTrainedConfig)):
        inner = value if isinstance(value, Mapping) else vars(value)
        for key, each in inner.items():
            yield from _numbers(f"{name}.{key}", each)
    elif isinstance(value, (list, tuple)):
        for index, each in enumerate(value):
            yield from _numbers(f"{name}[{index}]", each)
