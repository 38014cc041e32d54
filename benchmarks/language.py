"""Kinds of models of equal size on the same two million bytes of text, trained one after the other.

`python benchmarks/language.py [RECIPE ...]` (default: all recipes lm-*-cpu). Notable:

- Each recipe is trained by `everlong train` in a process of its own, alone on the machine. Its peak
  memory is the kernel's count for that process, less that of one that only imports what is needed.
- Bits a byte are of held-out plays. Tokens a second are of training, evaluations and checkpoints apart.
- A run that has ended in --folder is not run again; another seed takes another folder.
"""

import argparse
import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from everlong.provenance import provenance
from everlong.training import known_recipes
from everlong.training.runs import Run, plot_losses

RESULTS = Path(__file__).parent / "results"
IMPORTS = "import transformers, everlong.training.train, everlong.models; import transformers.trainer"
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
    imports = peak_memory([sys.executable, "-c", IMPORTS])
    models: list[dict[str, Any]] = []
    for name in options.recipes:
        models.append(measure(name, options.folder / name, options.seed, imports))
        values = {"seed": options.seed, "models": models, "provenance": provenance()}
        options.out.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        print(table(models), flush=True)
    plot_losses(
        options.out.with_suffix(".png"), [Run(options.folder / name) for name in options.recipes]
    )


def measure(name: str, folder: Path, seed: int, imports: int) -> dict[str, Any]:
    """Train a recipe if it has not been, and what that came to."""
    memory = folder / "peak_memory.json"
    if not memory.is_file():
        command = [sys.executable, "-m", "everlong", "train", name, "--overwrite"]
        peak = peak_memory([*command, "--output_dir", str(folder), "--seed", str(seed)])
        memory.write_text(json.dumps({"bytes": peak - imports}) + "\n", encoding="utf-8")
    run = Run(folder)
    # The median of what was logged: one number for a run that something may have disturbed.
    speeds = sorted(line["tokens_per_second"] for line in run.metrics if "tokens_per_second" in line)
    return {
        "name": name.removeprefix("lm-").removesuffix("-cpu"),
        "parameters": run.result["parameters"],
        "tokens": run.result["tokens"],
        "bits_per_byte": run.result["bits_per_byte"],
        "tokens_per_second": speeds[len(speeds) // 2],
        "minutes": run.result["seconds"] / 60,
        "peak_memory_mib": json.loads(memory.read_text(encoding="utf-8"))["bytes"] / MIB,
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
        "| model | parameters | bits a byte | tokens/s | peak memory | minutes |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in sorted(models, key=lambda model: model["bits_per_byte"]):
        lines.append(
            f"| {each['name']} | {each['parameters']:,} | {each['bits_per_byte']:.3f} "
            f"| {each['tokens_per_second']:,.0f} | {each['peak_memory_mib']:,.0f} MiB "
            f"| {each['minutes']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
