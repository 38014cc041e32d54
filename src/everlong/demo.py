"""The demo: a memory and a Transformer of the same size look for a pass key in real text, far
beyond the length they were trained at.

`everlong demo` starts anew each time. `everlong demo --full` takes hours, so it goes on where it was
stopped: a model that is trained, and one that is evaluated, is left as it is.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers.trainer_utils import get_last_checkpoint

from everlong.evaluation import (
    NeedleReport,
    evaluate_needle_folder,
    plot_needle,
    print_needle_table,
    write_markdown,
    write_results,
)
from everlong.provenance import RECIPE_FILE, RESULT_FILE
from everlong.training import Recipe, load_recipe, resume, train

SCORES_FILE = "needle.json"
K = 1024


@dataclass(frozen=True)
class Entry:
    """A recipe of the demo, the seeds it is trained with, and the lengths it is evaluated at."""

    recipe: str
    lengths: tuple[int, ...]
    seeds: tuple[int, ...] = (0,)


TO_16K = (512, 1 * K, 2 * K, 4 * K, 8 * K, 16 * K)
TO_128K = (*TO_16K, 32 * K, 64 * K, 128 * K)
SHORT = (Entry("needle-lmm", TO_16K), Entry("needle-attention", TO_16K))
# Full attention stops at 32K: its time a sample grows with the square of the length.
FULL = (
    Entry("needle-lmm-full", TO_128K, seeds=(0, 1, 2)),
    Entry("needle-attention-full", TO_128K, seeds=(0, 1, 2)),
    Entry("needle-full-attention-full", (*TO_16K, 32 * K), seeds=(0, 1, 2)),
)


def run_demo(
    *,
    full: bool = False,
    out: Path | None = None,
    entries: tuple[Entry, ...] | None = None,
    samples: int = 100,
) -> list[NeedleReport]:
    """Train and evaluate the entries; print the tables, write results.json, needle.md, needle.png.

    full: the long plan, which goes on where an earlier run stopped. out: runs/demo or
    runs/demo-full if not given. entries: other ones than the plan's. samples: for each length.
    """
    started = time.perf_counter()
    entries = entries or (FULL if full else SHORT)
    out = out or Path("runs") / ("demo-full" if full else "demo")
    console = Console(soft_wrap=True, highlight=False)
    reports: list[NeedleReport] = []
    for entry in entries:
        for seed in entry.seeds:
            name = Path(entry.recipe).stem
            folder = out / f"{name}-seed{seed}"
            if not full and folder.exists():
                shutil.rmtree(folder)
            console.print(f"[bold]{name}[/], seed {seed}: training")
            _train(entry.recipe, seed, folder)
            console.print(f"[bold]{name}[/], seed {seed}: evaluating")
            reports.append(_evaluate(folder, entry.lengths, samples))
            write_results(
                out / "results.json",
                reports,
                full=full,
                phases=_phases(reports),
                seconds=time.perf_counter() - started,
            )
    _print_costs(reports, console)
    print_needle_table(reports)
    write_markdown(out / "needle.md", reports)
    plot_needle(out / "needle.png", reports)
    console.print(
        f"{(time.perf_counter() - started) / 60:.1f} minutes in all. "
        f"Written: {out / 'needle.png'}, {out / 'needle.md'}, {out / 'results.json'}"
    )
    return reports


def _train(name: str, seed: int, folder: Path) -> None:
    """Train, resume, or leave as it is what is there of the same recipe."""
    recipe = load_recipe(name, ["--seed", str(seed), "--output_dir", str(folder)])
    if _holds(folder, recipe) and (folder / RESULT_FILE).is_file():
        return
    if _holds(folder, recipe) and get_last_checkpoint(str(folder)):
        resume(folder)
    else:
        train(recipe, overwrite=True)


def _holds(folder: Path, recipe: Recipe) -> bool:
    """Whether the folder holds a run of just this recipe."""
    if not (folder / RECIPE_FILE).is_file():
        return False
    try:
        return load_recipe(folder / RECIPE_FILE) == recipe
    except ValueError:  # a run of a version that had other fields
        return False


def _evaluate(folder: Path, lengths: tuple[int, ...], samples: int) -> NeedleReport:
    """Evaluate, or read the scores that are there for the same lengths and samples."""
    path = folder / SCORES_FILE
    if path.is_file():
        report = NeedleReport.from_json(json.loads(path.read_text(encoding="utf-8")))
        wanted = [(length, samples) for length in lengths]
        if [(score.length, score.exact.samples) for score in report.scores] == wanted:
            return report
    report = evaluate_needle_folder(folder, lengths, samples)
    path.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    return report


def _phases(reports: list[NeedleReport]) -> dict[str, float]:
    """Seconds of each phase, by its name."""
    phases = {}
    for report in reports:
        name = f"{report.name}, seed {report.seed}"
        phases[f"train {name}"] = report.about["seconds"]
        phases[f"evaluate {name}"] = sum(score.seconds for score in report.scores)
    return phases


def _print_costs(reports: list[NeedleReport], console: Console) -> None:
    table = Table(title="what training cost")
    for name in ("model", "seed", "parameters", "minutes", "tokens", "tokens/s", "last loss"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for report in reports:
        cost = report.about
        table.add_row(
            report.name,
            str(report.seed),
            f"{cost['parameters']:,}",
            f"{cost['seconds'] / 60:.1f}",
            f"{cost['tokens']:,}",
            f"{cost['tokens_per_second']:,.0f}",
            f"{cost['loss']:.3f}",
        )
    console.print(table)
