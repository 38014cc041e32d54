"""Data: byte-level tokens, texts from files and packages, and the tasks generated from them."""

from .babi import BabiConfig
from .haystack import HaystackConfig, HaystackDataset
from .needle import NeedleConfig
from .text import Document, load_text, split
from .tokenizer import byte_tokenizer, encode_bytes

TASKS: dict[str, type[HaystackConfig]] = {"needle": NeedleConfig, "babi": BabiConfig}

__all__ = [
    "TASKS",
    "BabiConfig",
    "Document",
    "HaystackConfig",
    "HaystackDataset",
    "NeedleConfig",
    "byte_tokenizer",
    "encode_bytes",
    "load_text",
    "split",
]
