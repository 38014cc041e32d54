"""Configurations by name, of models that have as many parameters as they are given.

The models that a memory is judged against are those of `transformers`: `"llama"`, `"mistral"` (a
Llama with a window, `sliding_window`), `"mamba2"`, `"gated_deltanet"`; beside `"titans"`, `"lm2"` and
`"rmt"`, and any other causal language model whose MLP's width is a field of its configuration.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

# The width of the MLP where it has another name.
WIDTHS = {"gpt2": "n_inner", "opt": "ffn_dim"}


def model_config(kind: str, parameters: int | None = None, **fields: Any) -> PreTrainedConfig:
    """The configuration of a model type with these fields.

    parameters: how many the model shall have, embeddings included: the width of its MLP
    (`intermediate_size`) is chosen for that. Mamba2 has no MLP: its width (`hidden_size`) is chosen,
    then `state_size` for what is left; its heads follow from its width.
    Raises ValueError if fields name what `parameters` decides, or leave no room.
    """
    if kind == "mamba2":
        return _mamba2(parameters, fields)
    inner = fields
    if kind == "rmt":
        given = fields.get("base_config") or {"model_type": "llama"}
        inner = given if isinstance(given, dict) else given.to_dict()
    name = WIDTHS.get(inner.get("model_type", kind), "intermediate_size")

    def build(width: int | None) -> PreTrainedConfig:
        chosen = inner if width is None else {**inner, name: width}
        whole = {**fields, "base_config": chosen} if kind == "rmt" else chosen
        return AutoConfig.for_model(kind, **whole)

    if parameters is None:
        return build(None)
    if name in inner:
        raise ValueError(f"give either parameters or {name}: parameters decides {name}")
    return build(_nearest(lambda n: count_parameters(build(n)), parameters, name))


def count_parameters(config: PreTrainedConfig) -> int:
    """Parameters of the causal language model of a configuration, which is not built."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def _mamba2(parameters: int | None, fields: dict[str, Any]) -> PreTrainedConfig:
    def build(width: int | None = None, state: int | None = None) -> PreTrainedConfig:
        given = {"head_dim": 64, "expand": 2, "hidden_size": 4096, "n_groups": 1, **fields}
        if width is not None:
            given["hidden_size"] = width * step
        if state is not None:
            given["state_size"] = state
        inner = given["expand"] * given["hidden_size"]
        if inner % given["head_dim"]:
            raise ValueError(
                f"head_dim ({given['head_dim']}) must divide expand times hidden_size ({inner})"
            )
        return AutoConfig.for_model("mamba2", **({"num_heads": inner // given["head_dim"]} | given))

    if parameters is None:
        return build()
    for name in ("hidden_size", "state_size", "num_heads"):
        if name in fields:
            raise ValueError(f"give either parameters or {name}: parameters decides {name}")
    step = max(fields.get("head_dim", 64) // fields.get("expand", 2), 1)
    width = _nearest(lambda n: count_parameters(build(n, 64)), parameters, f"hidden_size {step}")
    while count_parameters(build(width, 16)) > parameters and width > 1:
        width -= 1
    state = _nearest(lambda n: count_parameters(build(width, n)), parameters, "state_size")
    return build(width, state)


def _nearest(count: Callable[[int], int], wanted: int, name: str) -> int:
    """The number whose count comes nearest to the wanted one; count grows with it."""
    low, high = 1, 2
    if count(low) == count(high):
        raise ValueError(
            f"{name} does not decide how many parameters this model has: leave parameters out"
        )
    if count(low) > wanted:
        raise ValueError(
            f"even with the least {name} the model has {count(low):,} parameters, more than "
            f"{wanted:,}: give it a smaller width or fewer layers"
        )
    while count(high) <= wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= wanted else (low, middle)
    return low if wanted - count(low) <= count(high) - wanted else high
