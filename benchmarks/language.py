"""Kinds of models of equal size on the same two million bytes of text.

`python benchmarks/language.py [RECIPE ...]` (default: all recipes lm-*-cpu). Notable:

- Each recipe is trained with every rate of --rates and the first of --seeds; with the best of them, by
  the held-out text, also with the other seeds. Bits a byte are of held-out plays, behind one pass.
- A run that has ended in --folder is not run again: the command goes on where it stopped.
- Speed and memory are of a few steps of each recipe, in a process of its own, alone on the machine.
  Peak memory is the kernel's count for it, less that of a process that only imports what is needed.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from everlong.provenance import provenance
from everlong.training import known_recipes
from everlong.training.runs import Run, plot_losses

RESULTS = Path(__file__).parent / "results"
IMPORTS = "import transformers, everlong.training.train, everlong.models; import transformers.trainer"
EVERLONG = [sys.executable, "-m", "everlong"]
STEPS = 12  # behind speed and memory
MIB = 2**20


def main() -> None:
    """Train what is not trained yet; print and write the table."""
    names = sorted(name for name in known_recipes() if name.startswith("lm-") and name.endswith("-cpu"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=names, metavar="RECIPE", help=", ".join(names))
    parser.add_argument("--folder", type=Path, default=Path("runs/language"), help="for the runs")
    parser.add_argument("--rates", nargs="+", type=float, default=[2e-3, 4e-3, 8e-3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="trainings at a time")
    parser.add_argument("--out", type=Path, default=RESULTS / f"language-{date.today()}.json")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)

    def train_all(jobs: list[Job]) -> list[Run]:
        with ThreadPoolExecutor(options.workers) as pool:
            return list(pool.map(lambda job: train(job, options.folder), jobs))

    first, *more = options.seeds
    sweep = [Job(name, rate, first) for name in options.recipes for rate in options.rates]
    ended = dict(zip(sweep, train_all(sweep), strict=True))
    best = {
        name: min((job for job in sweep if job.recipe == name), key=lambda job: bits(ended[job]))
        for name in options.recipes
    }
    repeats = [best[name]._replace(seed=seed) for name in options.recipes for seed in more]
    ended |= dict(zip(repeats, train_all(repeats), strict=True))
    imports = peak_memory([sys.executable, "-c", IMPORTS])
    models = [
        {"name": name.removeprefix("lm-").removesuffix("-cpu"), "rate": best[name].rate}
        | {"bits_per_byte": [bits(ended[best[name]._replace(seed=seed)]) for seed in options.seeds]}
        | {"by_rate": {job.rate: bits(ended[job]) for job in sweep if job.recipe == name}}
        | {key: ended[best[name]].result[key] for key in ("parameters", "tokens")}
        | measure(name, imports)
        for name in options.recipes
    ]
    values = {"seeds": options.seeds, "models": models, "provenance": provenance()}
    options.out.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(table(models))
    plot_losses(options.folder / "losses.png", [ended[best[name]] for name in options.recipes])


class Job(NamedTuple):
    """A training: a recipe with another learning rate and seed."""

    recipe: str
    rate: float
    seed: int


def train(job: Job, folder: Path) -> Run:
    """The job's run, made now if it has not been."""
    at = folder / f"{job.recipe}-{job.rate:g}-seed{job.seed}"
    if not Run(at).result:
        options = ["--output_dir", str(at), "--seed", str(job.seed), "--overwrite"]
        options += ["--training.learning_rate", str(job.rate)]
        alone = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(folder / f"{at.name}.log", "w", encoding="utf-8") as log:
            command = [*EVERLONG, "train", job.recipe, *options]
            subprocess.run(command, check=False, env=alone, stdout=log, stderr=log)
        print(f"{at.name}: {bits(Run(at)):.3f} bits a byte", flush=True)
    return Run(at)


def bits(run: Run) -> float:
    """Held-out bits a byte; infinite of a run that a guard stopped."""
    return run.result["bits_per_byte"] if run.result else math.inf


def measure(name: str, imports: int) -> dict[str, Any]:
    """Speed and memory of a recipe's training."""
    with tempfile.TemporaryDirectory() as short:
        options = [f"--training.max_steps={STEPS}", "--training.logging_steps=1", "--overwrite"]
        options += [f"--training.eval_steps={STEPS}", "--evaluation.held_out_samples=8"]
        peak = peak_memory([*EVERLONG, "train", name, "--output_dir", short, *options])
        speeds = [line["tokens_per_second"] for line in Run(Path(short)).metrics if "loss" in line]
    return {
        "tokens_per_second": sorted(speeds[2:]),  # the first steps are slower
        "peak_memory_mib": (peak - imports) / MIB,
    }


def peak_memory(command: list[str]) -> int:
    """Run a command; the most bytes that were resident. Raises RuntimeError if it fails."""
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return usage.ru_maxrss * 1024  # of Linux, in KiB


def table(models: list[dict[str, Any]]) -> str:
    """The figures in Markdown, best first."""
    lines = [
        "| model | rate | bits a byte (least to most) | tokens/s (least to most) | peak memory |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for each in sorted(models, key=lambda model: mean(model["bits_per_byte"])):
        speeds, told = each["tokens_per_second"], each["bits_per_byte"]
        lines.append(
            f"| {each['name']} | {each['rate']:g} "
            f"| {mean(told):.3f} ({min(told):.3f} to {max(told):.3f}) "
            f"| {speeds[len(speeds) // 2]:,.0f} ({speeds[0]:,.0f} to {speeds[-1]:,.0f}) "
            f"| {each['peak_memory_mib']:,.0f} MiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
