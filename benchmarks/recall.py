"""Does a memory learn to recall, and are its gradients bounded? Small models on two made-up tasks.

`python benchmarks/recall.py --help`. One line of JSON for each training, written as it ends.

- copy: 32 symbols of 24, then the same again; the loss is that of the second half (chance 3.178).
- mqar: N pairs of a key and a value (64 symbols each, or N), then every key in another order; the loss
  is that of the values behind them (multi-query associative recall, arXiv 2312.04927; chance 1 in 64,
  or in N).
- A model has two layers, as wide as --head_dim times --heads, and is trained with AdamW, batches of 32
  rows (of mqar: 512 pairs), 20 steps of warm-up and a cosine; `accuracy` and `loss` are those of eight
  such batches not seen.
- `gradients`: norms of the trained model's gradients on 512, 4,096 and 16,384 random symbols.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from everlong.models import model_config
from everlong.provenance import provenance

TITANS = ("lmm", "mac", "mag", "mal")
MODELS = (*TITANS, "mamba2", "gated_deltanet", "attention")
COPIED, PAIRED = 24, 64  # symbols of copy, and of mqar's keys and values at least
BATCH, WARMUP, UNSEEN = 32, 20, 256
LENGTHS = (512, 4096, 16384)


def copy_batch(generator: torch.Generator, rows: int, pairs: int) -> tuple[Tensor, Tensor]:
    """ids [B, 64] and labels, -100 where nothing is asked."""
    half = torch.randint(COPIED, (rows, 32), generator=generator)
    labels = torch.cat([torch.full_like(half, -100), half], 1)
    return torch.cat([half, half], 1), labels


def mqar_batch(generator: torch.Generator, rows: int, pairs: int) -> tuple[Tensor, Tensor]:
    """ids [B, 4 pairs] and labels: each value behind its key in the second half."""
    kinds = max(PAIRED, pairs)

    def shuffled(count: int) -> Tensor:
        return torch.stack([torch.randperm(count, generator=generator)[:pairs] for _ in range(rows)])

    keys = shuffled(kinds)
    values = torch.randint(kinds, 2 * kinds, (rows, pairs), generator=generator)
    order = shuffled(pairs)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], 2).flatten(1)
    labels = asked.clone()
    labels[:, ::2] = -100
    told = torch.stack([keys, values], 2).flatten(1)
    return torch.cat([told, asked], 1), torch.cat([torch.full_like(told, -100), labels], 1)


BATCHES = {"copy": copy_batch, "mqar": mqar_batch}


def rows(job: dict[str, Any], of_16: int) -> int:
    """Rows of a batch that asks for as much as so many rows of 16 pairs."""
    return of_16 if job["task"] == "copy" else max(1, of_16 * 16 // job["pairs"])


def build(job: dict[str, Any]) -> torch.nn.Module:
    """The job's model, with fresh weights."""
    from transformers import AutoModelForCausalLM

    width, kind = job["head_dim"] * job["heads"], job["model"]
    fields: dict[str, Any] = {
        "vocab_size": COPIED if job["task"] == "copy" else 2 * max(PAIRED, job["pairs"]),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": job["heads"],
    }
    if kind in TITANS:
        length = 32 if job["task"] == "copy" else max(32, job["chunk_size"])
        fields |= {
            "layer_types": [kind] * 2,
            "chunk_size": job["chunk_size"],
            "memory_depth": job["depth"],
            "segment_length": length,
            "sliding_window": length,
            "num_persistent_tokens": 0 if kind == "lmm" else 4,
            **job["set"],
        }
        return AutoModelForCausalLM.from_config(model_config("titans", **fields))
    like = build(job | {"model": "lmm", "set": {}})
    size = sum(p.numel() for p in like.parameters())
    name = "llama" if kind == "attention" else kind
    del fields["intermediate_size"]  # which the size decides
    if name == "mamba2":
        del fields["hidden_size"], fields["num_attention_heads"]
    return AutoModelForCausalLM.from_config(model_config(name, size, **fields))


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train the job's model; the job and what came out."""
    torch.set_num_threads(1)
    torch.manual_seed(job["seed"])
    model, start = build(job), time.perf_counter()
    generator = torch.Generator().manual_seed(job["seed"] + 1)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=job["learning_rate"], weight_decay=0.01, betas=(0.9, 0.95)
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * step / job["steps"])) / 2,
    )
    largest, lost = 0.0, 0
    for step in range(job["steps"]):
        loss = loss_of(model, *BATCHES[job["task"]](generator, rows(job, BATCH), job["pairs"]))[0]
        optimizer.zero_grad()
        loss.backward()
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        if math.isfinite(norm):
            optimizer.step()
            largest = max(largest, norm if step >= 50 else 0)
        else:
            lost += 1
        schedule.step()
    model.eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1 << 20)
        unseen = BATCHES[job["task"]](generator, rows(job, UNSEEN), job["pairs"])
        loss, right = loss_of(model, *unseen)
    return job | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "accuracy": round(float(right), 4),
        "loss": round(float(loss), 4),
        "largest_gradient": round(largest, 2),
        "lost_steps": lost,
        "gradients": gradients(model),
        "seconds": round(time.perf_counter() - start),
    }


def loss_of(model: torch.nn.Module, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and share of right answers among those that are asked."""
    logits, wanted = model(ids).logits[:, :-1], labels[:, 1:]
    asked = wanted != -100
    right = (logits.argmax(-1) == wanted)[asked].float().mean()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten()), right


def gradients(model: torch.nn.Module) -> dict[str, float]:
    """Norm of the gradient of the loss on random symbols, by their number."""
    norms = {}
    for length in LENGTHS:
        generator = torch.Generator().manual_seed(length)
        ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        norms[str(length)] = float(f"{float(torch.stack(squares).sum().sqrt()):.4g}")
    return norms


def main(arguments: Sequence[str] | None = None) -> None:
    """Train every combination of what the options name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )

    def several(name: str, default: list[Any], of: Any = int, **more: Any) -> None:
        parser.add_argument(f"--{name}", nargs="+", type=of, default=default, **more)

    several("task", ["mqar"], str, choices=BATCHES)
    several("model", ["lmm"], str, choices=MODELS)
    several("pairs", [16], help="of mqar")
    several("depth", [2], help="of the memory")
    several("head_dim", [32])
    several("heads", [2])
    several("chunk_size", [16])
    several("steps", [500])
    several("learning_rate", [3e-3], float)
    several("seed", [0])
    parser.add_argument("--set", type=json.loads, default={}, help="more fields of TitansConfig, JSON")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    options = vars(parser.parse_args(arguments))
    out, workers, more = options.pop("out"), options.pop("workers"), options.pop("set")
    jobs = [
        dict(zip(options, values, strict=True)) | {"set": more} for values in product(*options.values())
    ]
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"recall-{date.today()}.jsonl"
    with ProcessPoolExecutor(workers) as pool, path.open("a", encoding="utf-8") as file:
        print(json.dumps({"benchmark": "recall", **provenance()}), file=file)
        for result in pool.map(train, jobs):
            print(json.dumps(result), file=file, flush=True)
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
