"""Whether a model can read what a recipe gives it, and whether a run finds its data as they were."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from everlong.data import DataConfig, TextConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig

DATA_FILE = "data.json"  # in a run folder


def check_fit(data: DataConfig, config: PretrainedConfig) -> None:
    """Refuse a layout of text that models of this configuration cannot read."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from everlong.models.stateful import StatefulPreTrained

    if not isinstance(data, TextConfig):
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


def check_same_data(folder: Path, fingerprint: str) -> None:
    """Write down the fingerprint of a run's data, or compare it with the one written down.

    Raises ValueError if the data have changed since the run began.
    """
    file = folder / DATA_FILE
    if not file.is_file():
        aside = file.with_name(f"{file.name}.{os.getpid()}")  # other processes write it too
        aside.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
        aside.replace(file)
        return
    before = json.loads(file.read_text(encoding="utf-8"))["fingerprint"]
    if before != fingerprint:
        raise ValueError(
            f"the data are not those that {folder} began with: bring the text back, train anew with "
            f"--overwrite, or delete {file} to go on with other text"
        )
