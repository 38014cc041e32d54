"""Evaluation: long-context tasks for any causal language model of transformers, and reports."""

from .folders import evaluate_needle_folder, load_model, longest_text, name_apart
from .needle import NeedleScore, attention_reach, evaluate_needle
from .report import (
    NeedleReport,
    length_name,
    plot_needle,
    print_needle_table,
    write_markdown,
    write_results,
)

__all__ = [
    "NeedleReport",
    "NeedleScore",
    "attention_reach",
    "evaluate_needle",
    "evaluate_needle_folder",
    "length_name",
    "load_model",
    "longest_text",
    "name_apart",
    "plot_needle",
    "print_needle_table",
    "write_markdown",
    "write_results",
]
