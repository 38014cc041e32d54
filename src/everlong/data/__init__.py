"""Data: byte-level tokens, texts from files and packages, and the tasks generated from them."""

from .needle import NeedleConfig, NeedleDataset, needle_datasets
from .text import Document, load_text, split
from .tokenizer import byte_tokenizer, encode_bytes

__all__ = [
    "Document",
    "NeedleConfig",
    "NeedleDataset",
    "byte_tokenizer",
    "encode_bytes",
    "load_text",
    "needle_datasets",
    "split",
]
