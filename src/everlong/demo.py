"""The demo: a memory and a Transformer of the same size look for a pass key in real text, far
beyond the length they were trained at.

`everlong demo` starts anew each time. `everlong demo --full` has three seeds of the memory, which read
up to 2M tokens and one of them 10M, every block with a memory and every rival. It goes on from what is
there, the demo's own models among it, and from where it was stopped: a trained model and a scored
sample stay as they are. A run of another recipe in one of its folders is refused, unless it is to be
overwritten.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from everlong import words
from everlong.evaluation import Results, evaluate
from everlong.evaluation.haystack import HaystackTask
from everlong.evaluation.report import print_tables, write_report
from everlong.evaluation.run import RESULTS_FILE, SampleCounts, evaluation_folder
from everlong.files import check_output
from everlong.provenance import RECIPE_FILE, RESULT_FILE, is_run
from everlong.training import Recipe, TrainingInterrupted, last_checkpoint, load_recipe, resume, train
from everlong.training.folder import check_deletable

OUT = Path("runs/demo")
K, M = 1024, 1024 * 1024


@dataclass(frozen=True)
class Entry:
    """A recipe of the demo, the lengths it is evaluated at with how many samples (`SampleCounts`), and
    the seeds it is trained with."""

    recipe: str
    lengths: tuple[int, ...]
    samples: str = "16k:100,128k:20"
    seeds: tuple[int, ...] = (0,)


TO_16K = (96, 128, 256, 512, 1 * K, 2 * K, 4 * K, 8 * K, 16 * K)
FAR = (512, 2 * K, 16 * K, 128 * K)
NEAR = (96, 128, 256, 512, 2 * K, 16 * K)
SHORT = (Entry("needle-lmm", TO_16K), Entry("needle-attention", TO_16K))
OFTEN = "128k:100,2m:20,10m:5"
# Attention is at chance long before 16K, and with full attention the time of a sample grows with the
# square of the length.
FULL = (
    Entry("needle-lmm", (*FAR, 1 * M, 2 * M, 10 * M), OFTEN),
    Entry("needle-lmm", (*FAR, 1 * M, 2 * M), OFTEN, seeds=(1, 2)),
    *(Entry(f"needle-{block}", FAR) for block in ("mac", "mag", "mal")),
    *(Entry(f"needle-{rival}", FAR) for rival in ("mamba2", "gated-deltanet")),
    Entry("needle-attention", NEAR),
    Entry("needle-full-attention", NEAR),
)


@dataclass(frozen=True)
class _Run:
    """A model of the demo: its recipe, its folder and the lengths and samples to score."""

    recipe: Recipe
    folder: Path
    lengths: tuple[int, ...]
    samples: SampleCounts

    def __str__(self) -> str:
        return f"{self.recipe.name}, seed {self.recipe.seed}"


def run_demo(
    *,
    full: bool = False,
    out: Path | None = None,
    entries: tuple[Entry, ...] | None = None,
    overwrite: bool = False,
) -> Results:
    """Train and evaluate the entries; print the tables, write the report (`write_report`).

    full: the long plan, which goes on from what is there, and whose report is in the folder `full`.
    out: instead of runs/demo. entries: other ones than the plan's.
    overwrite: replace runs of other recipes in the entries' folders. Raises ValueError for such a run
    without it, and for a folder that holds something else, before any work.
    """
    started = time.perf_counter()
    out = out or OUT
    place = out / "full" if full else out
    console = Console(soft_wrap=True, highlight=False)
    runs = [
        _plan(entry, seed, out)
        for entry in entries or (FULL if full else SHORT)
        for seed in entry.seeds
    ]
    with evaluation_folder(place, beside=("*-seed*", "full")):
        for run in runs:
            _check(run, overwrite=overwrite)
        for run in runs:
            console.print(words.shown(run, "bold").append(": training", "not bold"))
            try:
                _train(run, anew=not full)
            except TrainingInterrupted as stopped:
                again = "demo --full goes on from there" if full else "demo starts anew"
                text = f"{stopped}\nThat is this model alone; everlong {again}."
                raise TrainingInterrupted(text) from None
        results, shown = evaluate(
            [str(run.folder) for run in runs],
            [HaystackTask("needle")],
            {str(run.folder): run.lengths for run in runs},
            {str(run.folder): run.samples for run in runs},
            place,
            settings={"command": f"everlong demo{' --full' if full else ''}"},
            on_results=lambda results: results.write(place / RESULTS_FILE),
        )
        results.settings |= {"phases": _phases(results), "seconds": time.perf_counter() - started}
        _print_costs(results, console)
        print_tables(results)
        files = write_report(results, place, shown)
    console.print(
        f"{(time.perf_counter() - started) / 60:.1f} minutes in all. "
        f"Written: {', '.join(map(words.plain, files))}",
        markup=False,
    )
    return results


def _plan(entry: Entry, seed: int, out: Path) -> _Run:
    folder = out / f"{Path(entry.recipe).stem}-seed{seed}"
    recipe = load_recipe(entry.recipe, ["--seed", str(seed), "--output_dir", str(folder)])
    return _Run(recipe, folder, entry.lengths, SampleCounts.parse(entry.samples))


def _check(run: _Run, *, overwrite: bool) -> None:
    """Refuse a folder that holds anything but this run, unless it is to be overwritten."""
    if not _holds(run):
        check_output(run.folder, "run", is_run, overwrite=overwrite)
        check_deletable(run.recipe, run.folder)


def _train(run: _Run, *, anew: bool) -> None:
    """Train; unless anew, resume or leave as it is what is there of the same recipe."""
    if not anew and _holds(run) and (run.folder / RESULT_FILE).is_file():
        return
    if not anew and _holds(run) and last_checkpoint(run.folder):
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


def _phases(results: Results) -> dict[str, float]:
    """Seconds of each phase, by its name."""
    phases = {}
    for model in results.models:
        cells = results.find("needle", model.name)
        phases[f"train {model.name}"] = model.about["seconds"]
        phases[f"evaluate {model.name}"] = sum(cell.seconds for cell in cells)
    return phases


def _print_costs(results: Results, console: Console) -> None:
    table = Table(title="what training cost")
    for name in ("model", "parameters", "minutes", "tokens", "tokens/s", "last loss"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for model in results.models:
        cost = model.about
        table.add_row(
            words.shown(model.name),
            f"{cost['parameters']:,}",
            f"{cost['seconds'] / 60:.1f}",
            f"{cost['tokens']:,}",
            f"{cost['tokens_per_second']:,.0f}",
            f"{cost['loss']:.3f}",
        )
    console.print(table)
