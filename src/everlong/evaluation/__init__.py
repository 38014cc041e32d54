"""Evaluation of causal language models: long-context tasks, lm-eval's tasks, and reports."""

from .haystack import attention_reach
from .loading import load_model, load_subject, longest_text
from .results import Cell, Estimate, Metric, ModelInfo, Results, TaskInfo
from .run import SampleCounts, evaluate, length_name, parse_length
from .subject import Subject
from .task import Task
from .tasks import TaskOptions, build_tasks

__all__ = [
    "Cell",
    "Estimate",
    "Metric",
    "ModelInfo",
    "Results",
    "SampleCounts",
    "Subject",
    "Task",
    "TaskInfo",
    "TaskOptions",
    "attention_reach",
    "build_tasks",
    "evaluate",
    "length_name",
    "load_model",
    "load_subject",
    "longest_text",
    "parse_length",
]
