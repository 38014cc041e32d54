"""Pretrained models of `transformers` that are given a memory: how they are loaded, and where the new
model goes."""

import copy
import warnings
from collections.abc import Collection
from os import PathLike
from typing import Any, TypeVar

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)

# What `from_pretrained` takes: for the model that is there, and for where the new one goes.
LOADING = {
    *("attn_implementation", "cache_dir", "code_revision", "disable_mmap", "dtype"),
    *("force_download", "gguf_file", "ignore_mismatched_sizes", "key_mapping", "local_files_only"),
    *("proxies", "revision", "subfolder", "token", "torch_dtype", "tqdm_class"),
    *("trust_remote_code", "use_safetensors", "variant", "weights_only"),
}
PLACING = {"device_map", "max_memory", "offload_buffers", "offload_folder"}
# What is of a model as it is saved.
LATER = {
    *("config", "device_mesh", "distributed_config", "fusion_config", "kernel_config"),
    *("output_loading_info", "quantization_config", "state_dict", "tp_plan", "tp_size", "use_kernels"),
}


def load_pretrained(
    source: str | PathLike[str] | PreTrainedModel,
    options: dict[str, Any],
    kinds: Collection[str],
    instead: str,
) -> tuple[PreTrainedModel, dict[str, Any], dict[str, Any]]:
    """A causal language model from a folder, a hub id, or as it is; and of the options those that are
    fields of the new model's configuration, and those for `place`.

    Raises ValueError for a model whose type is none of `kinds` (`instead`: what there is for those),
    one that is no whole causal language model, and options that do not go with it.
    """
    loading = {name: options[name] for name in options.keys() & LOADING}
    placing = {name: options[name] for name in options.keys() & PLACING}
    fields = {name: options[name] for name in options.keys() - LOADING - PLACING}
    later = ", ".join(sorted(options.keys() & LATER))
    if later:
        raise ValueError(
            f"{later} cannot be given to a model that is put together: leave it out, save the new "
            "model, and give it to from_pretrained of that"
        )
    if isinstance(source, PreTrainedModel):
        name, kind = f"the {type(source).__name__}", source.config.model_type
    elif isinstance(source, (str, PathLike)):
        name, kind = str(source), AutoConfig.from_pretrained(source, **loading).model_type
    else:
        raise ValueError(f"wanted is a folder, a hub id or a model, got a {type(source).__name__}")
    if kind not in kinds:
        raise ValueError(f"{name} is a {kind}{instead}")
    if not isinstance(source, PreTrainedModel):
        return load_whole(source, **loading), fields, placing
    if loading:
        raise ValueError(
            f"{', '.join(sorted(loading))} say how a model is loaded, and this {type(source).__name__} "
            "is loaded already: leave them out"
        )
    if source.get_output_embeddings() is None:
        raise ValueError(f"{name} has no head for language modelling: give a causal language model")
    if any(parameter.is_meta for parameter in source.parameters()):
        raise ValueError(f"{name} is not all in memory: load it without device_map, or give its folder")
    return source, fields, placing


def load_whole(source: str | PathLike[str], **loading: Any) -> PreTrainedModel:
    """A causal language model with all its weights as they are stored. loading: as of
    `from_pretrained`, which fills in what is not stored at random, and says so only in its log.

    Raises ValueError where weights of the model are not stored; warns of stored ones that it has no
    place for.
    """
    model, info = AutoModelForCausalLM.from_pretrained(source, **loading, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{len(missing)} of the model's weights are not in its files ({_some(missing)}): save or "
            "download it anew"
        )
    extra = sorted(info["unexpected_keys"])
    if extra:
        warnings.warn(
            f"{source}: {len(extra)} stored weights have no place in a {model.config.model_type}, and "
            f"are left out ({_some(extra)})",
            stacklevel=2,
        )
    return model


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def place(model: Model, source: PreTrainedModel, placing: dict[str, Any]) -> Model:
    """The new model where it was wanted: where its source is, if nothing was said; and the source's way
    to generate."""
    model.generation_config = copy.deepcopy(source.generation_config)
    if not placing:
        return model.to(source.device)
    placed = type(model).from_pretrained(
        None,
        config=model.config,
        state_dict=model.state_dict(),
        dtype=model.dtype,
        **placing,
    )
    placed.generation_config = model.generation_config
    return placed.train(model.training)
