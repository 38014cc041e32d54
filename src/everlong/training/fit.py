"""Whether a model can read what a recipe gives it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from everlong.data import DataConfig, TextConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def check_fit(data: DataConfig, config: PretrainedConfig) -> None:
    """Refuse a layout of text that models of this configuration cannot read."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from everlong.models.stateful import StatefulPreTrained

    if not isinstance(data, TextConfig) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    has_memory = issubclass(model, StatefulPreTrained)
    if data.layout == "streams" and not has_memory:
        raise ValueError(
            "data.layout: streams carries a memory from row to row, and "
            f"a model of type {config.model_type} has none that everlong can carry: use layout: packed"
        )
    # Recurrent models of transformers read through position_ids that restart.
    if data.documents == "restart" and getattr(model, "_is_stateful", False) and not has_memory:
        raise ValueError(
            f"a model of type {config.model_type} cannot restart at a document within a row: "
            "use data.documents: join"
        )
