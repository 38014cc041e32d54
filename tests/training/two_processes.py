"""What test_processes.py runs in processes of its own, as `torchrun [...] two_processes.py FOLDER`.

Every part runs in as many processes as there are and writes what came out to FOLDER, by the number of
processes: test_processes.py compares.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from everlong.data import NeedleConfig
from everlong.models import model_config
from everlong.training import Recipe, shard, train

STEPS = 20
HALF = STEPS // 2
ROWS = 4  # of a step, of all processes
EPSILON = 1e-5  # where gradients are next to nothing, a smaller one makes steps out of their rounding
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TITANS = {
    "type": "titans",
    **SMALL,
    "chunk_size": 8,
    "segment_length": 32,
    "sliding_window": 16,
    "memory_expansion": 2,
    "num_persistent_tokens": 2,
    # At this width training with more is chaos: every step makes rounding ten times as large.
    "max_memory_learning_rate": 0.1,
    "memory_write_cost": 0.01,
}
BANK = {"type": "lm2", **SMALL, "segment_length": 32}
MODELS = {
    "lmm": {**TITANS, "layer_types": ["lmm", "lmm"]},
    "mac": {**TITANS, "layer_types": ["mac", "mac"]},
    "mag": {**TITANS, "layer_types": ["mag", "mag"]},
    "mal": {**TITANS, "layer_types": ["mal", "mal"]},
    "hybrid": {**TITANS, "layer_types": ["lmm", "sliding_attention"], "tie_word_embeddings": True},
    "lm2": {**BANK, "num_memory_slots": 6},
    "lm2-short": {**BANK, "num_memory_slots": 6, "segment_length": 128},
    "lm2-positions": {**BANK, "memory_addressing": "positions"},
    "rmt": {
        "type": "rmt",
        "base_config": {"model_type": "llama", **SMALL},
        "num_memory_tokens": 2,
        "segment_length": 32,
    },
    "llama": {"type": "llama", **SMALL},
    "mamba2": {
        "type": "mamba2",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "head_dim": 8,
        "state_size": 8,
        "chunk_size": 16,
    },
    "gated_deltanet": {"type": "gated_deltanet", **SMALL},
}


def processes():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def save(folder, name, tensors):
    """The whole tensors, written by the main process."""
    held = {key: (t.full_tensor() if hasattr(t, "full_tensor") else t) for key, t in tensors.items()}
    if rank() == 0:
        unshared = {key: t.detach().clone().contiguous() for key, t in held.items()}
        save_file(unshared, folder / f"{name}-{processes()}.safetensors")


def by_the_trainer(folder, name):
    """Train as `everlong train` does; the run folder holds what came out."""
    each = ROWS // int(os.environ.get("WORLD_SIZE", 1))
    recipe = Recipe(
        model=MODELS[name],
        data=NeedleConfig(source=str(folder / "text"), length=96, text_loss=0.5),
        training={
            "max_steps": STEPS,
            "per_device_train_batch_size": each,
            "learning_rate": 1e-3,
            "adam_epsilon": EPSILON,
            "logging_steps": 1,
            "use_cpu": True,
            "save_strategy": "no",
        },
        output_dir=str(folder / f"{name}-{os.environ.get('WORLD_SIZE', 1)}"),
    )
    train(recipe)


def build(name):
    fields = {**MODELS[name]}
    inner = fields["base_config"] = {**fields["base_config"]} if "base_config" in fields else fields
    inner |= {"vocab_size": 32, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if inner is fields:
        del fields["base_config"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(fields.pop("type"), None, **fields))
    return model.train()


def batch(step):
    """This process's rows of a step's."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(32, (ROWS, 96), generator=generator)
    return rows.chunk(processes())[rank()]


def steps(model, optimizer, numbers):
    for step in numbers:
        rows = batch(step)
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=EPSILON, weight_decay=0.0)


def by_fully_shard(folder, name):
    """Twenty steps in a loop; after ten, weights and moments are written in pieces."""
    model = build(name)
    if dist.is_initialized():
        shard(model)
        whole = [key for key, p in model.named_parameters() if not isinstance(p, DTensor)]
        assert not whole, f"not divided: {whole}"
    optimizer = adamw(model)
    steps(model, optimizer, range(HALF))
    weights, moments = get_state_dict(model, optimizer)
    dcp.save(
        {"model": weights, "optimizer": moments}, checkpoint_id=folder / f"{name}-dcp-{processes()}"
    )
    steps(model, optimizer, range(HALF, STEPS))
    save(folder, f"{name}-sharded", get_model_state_dict(model))


def from_the_others(folder, name):
    """Go on from what as many processes as there are not have written, to the same end."""
    torch.manual_seed(1)
    model = build(name)
    if dist.is_initialized():
        shard(model)
    optimizer = adamw(model)
    weights, moments = get_state_dict(model, optimizer)
    with torch.no_grad():
        for weight in weights.values():
            weight.fill_(float("nan"))
    held = {"model": weights, "optimizer": moments}
    dcp.load(held, checkpoint_id=folder / f"{name}-dcp-{3 - processes()}")
    set_state_dict(model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    steps(model, optimizer, range(HALF, STEPS))
    save(folder, f"{name}-loaded", get_model_state_dict(model))


def by_accelerate(folder, name):
    """The gradients of a step, the model divided as the Trainer divides it on GPUs."""
    model = build(name)
    if dist.is_initialized():
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
        )
        accelerator = SimpleNamespace(
            state=SimpleNamespace(fsdp_plugin=plugin), mixed_precision="no", is_main_process=True
        )
        model = fsdp2_prepare_model(accelerator, model)
    rows = batch(0)
    model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
    grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    save(folder, f"{name}-accelerate", grads)


PARTS = {
    "trainer": by_the_trainer,
    "shard": by_fully_shard,
    "load": from_the_others,
    "accelerate": by_accelerate,
}


def main(folder, parts, names):
    for part in parts.split(","):
        if "WORLD_SIZE" in os.environ and part != "trainer" and not dist.is_initialized():
            dist.init_process_group("gloo")
        for name in names:
            PARTS[part](Path(folder), name)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:] or list(MODELS))
