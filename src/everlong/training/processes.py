"""Several processes that train one model, as `torchrun` starts them.

The main process (rank 0) owns the run folder and the terminal; the others wait for it where they must.
What stops one process stops all of them: `together`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

USE_ALL = ("titans", "llama", "mistral", "gpt2", "mamba2", "gated_deltanet")


class ProcessLost(ConnectionError):
    """Another process has stopped; its own message says why."""

    def __init__(self) -> None:
        super().__init__("another process of this run has stopped: its own message says why")


def num_processes() -> int:
    """Processes that train together; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this process owns the run folder and the terminal."""
    return os.environ.get("RANK", "0") == "0"


def launch_defaults(model: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of TrainingArguments that the way the processes were started asks for.

    model, fields: a recipe's `model` and `training` parts. Raises ValueError for more processes than
    this machine has GPUs, and for what is sharded without them.
    """
    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    on_cpu = fields.get("use_cpu", gpus == 0)
    if not on_cpu and not gpus:
        raise ValueError(
            "training.use_cpu is false, but this machine has no GPU: leave it out, or give it as true"
        )
    if not on_cpu and here > gpus:
        raise ValueError(
            f"torchrun started {here} processes on a machine with {gpus} GPUs: start it with "
            f"--nproc_per_node={gpus}, or train on the CPU with --training.use_cpu true"
        )
    if fields.get("fsdp"):
        if on_cpu:
            raise ValueError(
                "training.fsdp needs GPUs: leave it out, so that every process holds the whole model, "
                "or shard the model by everlong.training.shard in a loop of your own"
            )
        if "LOCAL_RANK" not in os.environ:
            raise ValueError(
                "training.fsdp divides a model among processes: start them with "
                "torchrun --nproc_per_node=N -m everlong train ..."
            )
    if num_processes() == 1:
        return {}
    return {"use_cpu": on_cpu, "ddp_find_unused_parameters": not _uses_all(model)}


def _uses_all(model: Mapping[str, Any]) -> bool:
    """Whether every parameter has a part in the loss of every text, as processes otherwise have to tell
    each other: the writing of an LM2's bank has none in a text of one segment."""
    inner = model.get("base_config") or {"model_type": "llama"} if model.get("type") == "rmt" else {}
    kind = inner.get("model_type", model.get("type"))
    return kind in USE_ALL and not model.get("memory_read_only", False)


def any_process(flag: bool) -> bool:
    """Whether the flag is set in any process; all of them have to ask."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return flag
    from accelerate import PartialState

    found = torch.tensor(int(flag), device=PartialState().device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def leave() -> None:
    """Part from the other processes, at the end of the work."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """A part that all processes leave together: those for which it went well raise ProcessLost where
    it has failed in another one."""
    try:
        yield
    except Exception:
        any_process(True)
        raise
    if any_process(False):
        raise ProcessLost


@contextmanager
def lost_processes() -> Iterator[None]:
    """Turns what a collective operation says when another process is gone into ProcessLost."""
    try:
        yield
    except RuntimeError as error:
        gone = ("closed by peer", "reset by peer", "remote process exited", "Broken pipe")
        if num_processes() > 1 and any(words in str(error) for words in gone):
            raise ProcessLost from error
        raise
