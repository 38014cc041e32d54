"""Models whose parameters lie in pieces on many devices (FSDP2, `fully_shard`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer

Model = TypeVar("Model", bound=PreTrainedModel)


def shard(model: Model, mesh: DeviceMesh | None = None, **options: Any) -> Model:
    """Divide a model's parameters among the processes, layer by layer, in place.

    For loops without the Trainer, which does it where a recipe says `training.fsdp`. Make the optimizer
    afterwards: its moments are divided likewise.

    mesh: devices, one dimension (FSDP) or two (copies of what is divided, HSDP); all of the default
    group's if None. options: as of `torch.distributed.fsdp.fully_shard`, such as mp_policy.
    Returns the model. Raises ValueError for a model that does not say what its layers are.
    """
    names = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no layers to divide: its _no_split_modules are {sorted(names)}"
        )
    for layer in layers:
        fully_shard(layer, mesh=mesh, **options)
    root: Any = fully_shard(model, mesh=mesh, **options)
    # Texts of different lengths write a bank in one process and not in another: without a gradient of
    # zero for it, these would reduce tensors of different sizes.
    if hasattr(root, "set_reduce_scatter_unused_params"):  # torch 2.13
        root.set_reduce_scatter_unused_params(True)
    return model


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, put together if it lies in pieces; all processes have to ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_whole_model(trainer: Trainer, folder: Path) -> None:
    """Write the model to a folder, for `from_pretrained`, however it is divided."""
    if trainer.is_fsdp_enabled:
        # With checkpoints in pieces the Trainer writes no model at all.
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(folder))


def check_kind(checkpoint: str, *, sharded: bool) -> None:
    """Refuse a checkpoint of a sharded run for one that is not, and the other way round."""
    from accelerate.utils.constants import FSDP_MODEL_NAME

    if any(Path(checkpoint).glob(f"{FSDP_MODEL_NAME}*")) != sharded:
        how, then = ("without", "leave it out") if sharded else ("with", "give it again")
        raise ValueError(f"{checkpoint} was written {how} training.fsdp: {then} to resume from it")
