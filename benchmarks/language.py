"""Kinds of models of equal size on the same two million bytes of text, trained one after the other.

`python benchmarks/language.py [RECIPE ...]` (default: all recipes lm-*-cpu). Notable:

- Bits a byte are of held-out plays, behind one pass over the text. A run that has ended in --folder is
  not run again: trainings may be made beforehand, several at a time.
- Speed and memory are of a few steps of each recipe, in a process of its own, alone on the machine.
  Peak memory is the kernel's count for it, less that of a process that only imports what is needed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from everlong.provenance import provenance
from everlong.training import known_recipes
from everlong.training.runs import Run, plot_losses

RESULTS = Path(__file__).parent / "results"
IMPORTS = "import transformers, everlong.training.train, everlong.models; import transformers.trainer"
EVERLONG = [sys.executable, "-m", "everlong"]
STEPS = 12  # behind speed and memory
MIB = 2**20


def main() -> None:
    """Train what is not trained yet; print and write the table after each."""
    names = sorted(name for name in known_recipes() if name.startswith("lm-") and name.endswith("-cpu"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipes", nargs="*", default=names, metavar="RECIPE", help=", ".join(names))
    parser.add_argument("--folder", type=Path, default=Path("runs/language"), help="for the runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / f"language-{date.today()}.json")
    options = parser.parse_args()
    for name in options.recipes:
        train(name, options.folder / name, options.seed)
    imports = peak_memory([sys.executable, "-c", IMPORTS])
    models: list[dict[str, Any]] = []
    for name in options.recipes:
        models.append(measure(name, options.folder / name, imports))
        values = {"seed": options.seed, "models": models, "provenance": provenance()}
        options.out.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    print(table(models))
    runs = [Run(options.folder / name) for name in options.recipes]
    plot_losses(options.folder / "losses.png", runs)


def train(name: str, folder: Path, seed: int) -> None:
    """Train a recipe if it has not been."""
    result = Run(folder).result
    if result and result["seed"] != seed:
        raise ValueError(f"{folder} holds seed {result['seed']}: give another --folder")
    if not result:
        places = ["--output_dir", str(folder), "--seed", str(seed)]
        subprocess.run([*EVERLONG, "train", name, "--overwrite", *places], check=True)


def measure(name: str, folder: Path, imports: int) -> dict[str, Any]:
    """Speed and memory of a recipe, and what its training came to."""
    with tempfile.TemporaryDirectory() as short:
        options = [f"--training.max_steps={STEPS}", "--training.logging_steps=1", "--overwrite"]
        options += [f"--training.eval_steps={STEPS}", "--evaluation.held_out_samples=8"]
        peak = peak_memory([*EVERLONG, "train", name, "--output_dir", short, *options])
        speeds = [line["tokens_per_second"] for line in Run(Path(short)).metrics if "loss" in line]
    result = Run(folder).result
    return {
        "name": name.removeprefix("lm-").removesuffix("-cpu"),
        "parameters": result["parameters"],
        "tokens": result["tokens"],
        "bits_per_byte": result["bits_per_byte"],
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
        "| model | parameters | bits a byte | tokens/s, median (least to most) | peak memory |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for each in sorted(models, key=lambda model: model["bits_per_byte"]):
        speeds = each["tokens_per_second"]
        lines.append(
            f"| {each['name']} | {each['parameters']:,} | {each['bits_per_byte']:.3f} "
            f"| {speeds[len(speeds) // 2]:,.0f} ({speeds[0]:,.0f} to {speeds[-1]:,.0f}) "
            f"| {each['peak_memory_mib']:,.0f} MiB |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
