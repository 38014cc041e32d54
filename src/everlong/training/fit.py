"""Whether a model can read what a recipe gives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from everlong.data import DataConfig, TextConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Models of transformers whose attention stays within documents that position_ids tell apart, as tests
# say. Others look beyond (OPT, Falcon), or read recurrently.
RESTART = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "gpt_neox", "gptj", "phi")
LEARNT = ("gpt2", "gpt_neo", "opt", "biogpt")  # positions that are a table


def check_lengths(lengths: Sequence[int], config: PretrainedConfig) -> None:
    """Refuse lengths that models of this configuration cannot be asked for behind their training."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    limit = getattr(config, "max_position_embeddings", None)
    model = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if limit is None or getattr(model, "_is_stateful", False) or max(lengths) <= limit:
        return
    fitting = [each for each in lengths if each <= limit] or [limit]
    raise ValueError(
        f"evaluation.lengths go up to {max(lengths):,} tokens, but this model takes {limit:,} at most: "
        f"set --evaluation.lengths={fitting}, or a larger model.max_position_embeddings"
    )


def check_fit(data: DataConfig, config: PretrainedConfig) -> None:
    """Refuse a layout of text that models of this configuration cannot read."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from everlong.models.stateful import StatefulPreTrained

    longest = getattr(config, "max_position_embeddings", None)
    if config.model_type in LEARNT and longest is not None and data.length > longest:
        name = config.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        raise ValueError(
            f"data.length is {data.length}, but a model of type {config.model_type} has a table of "
            f"{longest} positions: give a larger model.{name}, or a shorter length"
        )
    if not isinstance(data, TextConfig) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    has_memory = issubclass(model, StatefulPreTrained)
    if data.layout == "streams" and not has_memory:
        raise ValueError(
            "data.layout: streams carries a memory from row to row, and "
            f"a model of type {config.model_type} has none that everlong can carry: use layout: packed"
        )
    if data.documents == "restart" and not has_memory and config.model_type not in RESTART:
        raise ValueError(
            f"models of type {config.model_type} are not known to restart at a document within a row: "
            f"use data.documents: join, or one of {', '.join(RESTART)}"
        )
