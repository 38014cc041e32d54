"""The demo: a memory and a Transformer of the same size look for a pass key in real text, far
beyond the length they were trained at.

`everlong demo` starts anew each time. `everlong demo --full` trains the memory longer, with three
seeds. It goes on from what is there, the demo's own Transformer among it, and from where it was
stopped: a trained model and a scored length stay as they are.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from everlong.evaluation import (
    NeedleReport,
    evaluate_needle_folder,
    length_name,
    plot_needle,
    print_needle_table,
    write_markdown,
    write_results,
)
from everlong.provenance import RECIPE_FILE, RESULT_FILE
from everlong.training import Recipe, TrainingInterrupted, last_checkpoint, load_recipe, resume, train

SCORES_FILE = "needle.json"
OUT = Path("runs/demo")
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
# Windowed attention is at chance long before 16K. Full attention stops there: its time a sample
# grows with the square of the length, and it fails at a few times its training length.
FULL = (
    Entry("needle-lmm-long", TO_128K, seeds=(0, 1, 2)),
    Entry("needle-attention", TO_16K, seeds=(0, 1, 2)),
    Entry("needle-full-attention", TO_16K),
)


@dataclass(frozen=True)
class _Run:
    """A model of the demo: its recipe, its folder and the lengths to score."""

    recipe: Recipe
    folder: Path
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.recipe.name}, seed {self.recipe.seed}"


def run_demo(
    *,
    full: bool = False,
    out: Path | None = None,
    entries: tuple[Entry, ...] | None = None,
    samples: int = 100,
) -> list[NeedleReport]:
    """Train and evaluate the entries; print the tables, write results.json, needle.md, needle.png.

    full: the long plan, which goes on from what is there; its files are called results-full.json,
    needle-full.md and needle-full.png. out: instead of runs/demo. entries: other ones than the
    plan's. samples: for each length. Short lengths come first, in all models, and the results are
    written after each.
    """
    started = time.perf_counter()
    out = out or OUT
    console = Console(soft_wrap=True, highlight=False)
    runs = [
        _plan(entry, seed, out)
        for entry in entries or (FULL if full else SHORT)
        for seed in entry.seeds
    ]
    for run in runs:
        if not full and run.folder.exists():
            shutil.rmtree(run.folder)
        console.print(f"[bold]{run}[/]: training")
        try:
            _train(run)
        except TrainingInterrupted as stopped:
            again = "everlong demo --full goes on from there" if full else "everlong demo starts anew"
            raise TrainingInterrupted(f"{stopped}\nThat is this model alone; {again}.") from None
    suffix = "-full" if full else ""
    for length in sorted({length for run in runs for length in run.lengths}):
        for run in runs:
            if length in run.lengths:
                console.print(f"[bold]{run}[/]: {length_name(length)} tokens")
                _evaluate(run, length, samples)
        reports = [_report(run) for run in runs]
        write_results(
            out / f"results{suffix}.json",
            reports,
            full=full,
            phases=_phases(reports),
            seconds=time.perf_counter() - started,
        )
        write_markdown(out / f"needle{suffix}.md", reports)
        plot_needle(out / f"needle{suffix}.png", reports)
    _print_costs(reports, console)
    print_needle_table(reports)
    files = [out / f"needle{suffix}.png", out / f"needle{suffix}.md", out / f"results{suffix}.json"]
    console.print(
        f"{(time.perf_counter() - started) / 60:.1f} minutes in all. "
        f"Written: {', '.join(map(str, files))}"
    )
    return reports


def _plan(entry: Entry, seed: int, out: Path) -> _Run:
    folder = out / f"{Path(entry.recipe).stem}-seed{seed}"
    recipe = load_recipe(entry.recipe, ["--seed", str(seed), "--output_dir", str(folder)])
    return _Run(recipe, folder, entry.lengths)


def _train(run: _Run) -> None:
    """Train, resume, or leave as it is what is there of the same recipe."""
    if _holds(run) and (run.folder / RESULT_FILE).is_file():
        return
    if _holds(run) and last_checkpoint(run.folder):
        resume(run.folder)
    else:
        train(run.recipe, overwrite=True)


def _holds(run: _Run) -> bool:
    """Whether the folder holds a run of just this recipe."""
    if not (run.folder / RECIPE_FILE).is_file():
        return False
    try:
        return load_recipe(run.folder / RECIPE_FILE) == run.recipe
    except ValueError:  # a run of a version that had other fields
        return False


def _report(run: _Run) -> NeedleReport:
    """The scores that are there, of the lengths that are wanted."""
    report = NeedleReport.from_json(json.loads((run.folder / SCORES_FILE).read_text(encoding="utf-8")))
    return replace(report, scores=[s for s in report.scores if s.length in run.lengths])


def _evaluate(run: _Run, length: int, samples: int) -> None:
    """Score one length, unless its score is there for as many samples."""
    path = run.folder / SCORES_FILE
    scores = []
    if path.is_file():
        scores = NeedleReport.from_json(json.loads(path.read_text(encoding="utf-8"))).scores
        if any(score.length == length and score.exact.samples == samples for score in scores):
            return
    new = evaluate_needle_folder(run.folder, (length,), samples)
    kept = [score for score in scores if score.length != length]
    report = replace(new, scores=sorted((*kept, *new.scores), key=lambda score: score.length))
    path.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")


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
