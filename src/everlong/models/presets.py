"""The sizes of the papers as configurations.

Titans (CR table 5): blocks, width, heads, window 2,048, segment 512, chunk 16, 128 persistent tokens
and the vocabulary are the paper's (the 400M's shape is not in it: taken as the 340M's). The width of
the MLP is not: it is chosen so that the parameters are those of the name, with tied embeddings and as
many memory heads as attention heads.
"""

from typing import Any

_SHAPES = {  # layers, hidden_size, heads
    "170m": (12, 768, 16),
    "340m": (24, 1024, 16),
    "400m": (24, 1024, 16),
    "760m": (24, 1536, 16),
    "1.3b": (18, 2048, 8),
}
_MLP = {  # intermediate_size of LMM, and of MAC, MAG and MAL, whose layers have attention too
    "170m": (3776, 2752),
    "340m": (2208, 832),
    "400m": (3008, 1664),
    "760m": (3520, 1472),
    "1.3b": (7008, 4256),
}
_BLOCKS = ("lmm", "mac", "mag", "mal")
PRESETS = tuple(f"titans-{block}-{size}" for block in _BLOCKS for size in _SHAPES)


def preset_fields(name: str) -> dict[str, Any]:
    """The fields of `TitansConfig` that a preset sets. Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}: use one of {', '.join(PRESETS)}")
    _, block, size = name.split("-")
    layers, width, heads = _SHAPES[size]
    return {
        "vocab_size": 32000,
        "hidden_size": width,
        "intermediate_size": _MLP[size][block != "lmm"],
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_memory_heads": heads,
        "layer_types": [block] * layers,
        "sliding_window": 2048,
        "segment_length": 512,
        "chunk_size": 16,
        "num_persistent_tokens": 128,
        # The tokens of a fresh second layer are alike: at 0.8 MAL's of 340M overshoots.
        "initial_theta": 0.6,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


# LM2: Llama-3.2-1B with 2,048 slots in every layer.
_LM2: dict[str, dict[str, Any]] = {
    "lm2-1.7b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": True,
        "segment_length": 2048,
        "num_memory_slots": 2048,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
    },
    "lm2-small": {
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "tie_word_embeddings": True,
        "segment_length": 512,
        "num_memory_slots": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}


def lm2_preset_fields(name: str) -> dict[str, Any]:
    """The fields of `LM2Config` that a preset sets. Raises ValueError for an unknown name."""
    if name not in _LM2:
        raise ValueError(f"unknown preset {name!r}: use one of {', '.join(_LM2)}")
    return dict(_LM2[name])
