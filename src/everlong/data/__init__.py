"""Data: tokens, texts from files, packages and the hub, and the tasks made from them."""

from .babi import BabiConfig
from .babilong import BabilongConfig
from .config import DataConfig
from .haystack import HaystackConfig, HaystackDataset
from .language import TextConfig
from .needle import NeedleConfig
from .reading import read_pieces
from .rows import PackedDataset, StreamedDataset, StreamsDataset
from .ruler import RulerConfig
from .text import Document, load_text, split
from .tokenizer import (
    byte_tokenizer,
    encode_bytes,
    gives_back,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)

HAYSTACKS: dict[str, type[HaystackConfig]] = {
    "needle": NeedleConfig,
    "babi": BabiConfig,
    "babilong": BabilongConfig,
}
TASKS: dict[str, type[DataConfig]] = {**HAYSTACKS, "text": TextConfig, "ruler": RulerConfig}

__all__ = [
    "HAYSTACKS",
    "TASKS",
    "BabiConfig",
    "BabilongConfig",
    "DataConfig",
    "Document",
    "HaystackConfig",
    "HaystackDataset",
    "NeedleConfig",
    "PackedDataset",
    "RulerConfig",
    "StreamedDataset",
    "StreamsDataset",
    "TextConfig",
    "byte_tokenizer",
    "encode_bytes",
    "gives_back",
    "load_text",
    "load_tokenizer",
    "read_pieces",
    "save_tokenizer",
    "split",
    "train_tokenizer",
]
