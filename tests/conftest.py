"""A text and recipes small enough to train in a second."""

import os

import pytest
import torch
import yaml

TINY_MODELS = {
    "llama": {
        "type": "llama",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "titans": {
        "type": "titans",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "layer_types": ["lmm", "sliding_attention"],
        "memory_expansion": 2,
        "chunk_size": 16,
        "sliding_window": 16,
    },
}


if "sanitize" in os.environ.get("EVERLONG_NATIVE_FLAGS", ""):

    @pytest.fixture(autouse=True)
    def exact_buffers(monkeypatch):
        """Nothing behind what a kernel is given, or what it does there would not be seen."""
        from everlong.ops.native import library

        def scratch(self, size):
            self._own.scratch = torch.empty(size, dtype=self.dtype)
            return self._own.scratch

        monkeypatch.setattr(library, "SPARE", 0)
        monkeypatch.setattr(library.Library, "scratch", scratch)


@pytest.fixture
def text_folder(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.txt").write_text(f"The {i}th of ten short texts, told often. " * 20)
    return folder


@pytest.fixture
def tiny_recipe(tmp_path, text_folder):
    """tiny_recipe("llama", max_steps=4, ...) writes a recipe and returns its path."""

    def write(model="llama", **training):
        recipe = {
            "model": TINY_MODELS[model],
            "data": {"source": str(text_folder), "length": 96},
            "training": {
                "max_steps": 6,
                "per_device_train_batch_size": 2,
                "logging_steps": 2,
                "learning_rate": 0.001,
                "use_cpu": True,
                **training,
            },
        }
        path = tmp_path / f"tiny-{model}.yaml"
        path.write_text(yaml.safe_dump(recipe))
        return path

    return write
