"""BABILong's qa1 to qa5 for LM2, RMT, Titans' MAC and a Llama, trained alike on simulated stories.

`python benchmarks/babilong.py [RECIPE ...]` (default: all recipes babilong-*). Notable:

- 50 samples of each task and length up to 16K tokens, 20 above, held-out stories in held-out plays; the
  same ones for all models.
- What is there is not done again: trainings, and samples. Several of these may run side by side, each
  with another recipe; a last one with all of them puts the report together.
- Full attention takes time that grows with the square of a length: --longest babilong-llama=16k leaves
  longer ones out for a model, and its row has dashes there.
"""

import argparse
import shlex
import subprocess
import sys
from datetime import date
from pathlib import Path

from everlong.evaluation import SampleCounts, TaskOptions, build_tasks, evaluate, parse_length
from everlong.evaluation.report import print_tables, write_report
from everlong.provenance import RESULT_FILE
from everlong.training import known_recipes

RESULTS = Path(__file__).parent / "results"
LENGTHS = [parse_length(each) for each in ("0k", "1k", "2k", "4k", "8k", "16k", "32k", "64k")]
COUNTS = SampleCounts.parse("16k:50,64k:20")


def main() -> None:
    """Train what is not trained yet, ask what was not asked, write the report and the results."""
    names = sorted(name for name in known_recipes() if name.startswith("babilong-"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=names, metavar="RECIPE", help=", ".join(names))
    parser.add_argument("--longest", action="append", default=[], metavar="RECIPE=LENGTH")
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="for the models")
    parser.add_argument("--out", type=Path, default=Path("runs/babilong"), help="for the report")
    options = parser.parse_args()
    longest = {name: parse_length(length) for name, length in (e.split("=") for e in options.longest)}
    folders = {name: options.folder / name for name in options.recipes}
    for name, folder in folders.items():
        if not (folder / RESULT_FILE).is_file():
            command = [sys.executable, "-m", "everlong", "train", name, "--output_dir", str(folder)]
            subprocess.run([*command, "--overwrite"], check=True)
    results, samples = evaluate(
        list(folders.values()),
        build_tasks(["babilong"], LENGTHS, TaskOptions()),
        {
            str(folder): [each for each in LENGTHS if each <= longest.get(name, max(LENGTHS))]
            for name, folder in folders.items()
        },
        COUNTS,
        options.out,
        settings={"command": shlex.join(["python", *sys.argv])},
    )
    print_tables(results)
    write_report(results, options.out, samples)
    if set(options.recipes) == set(names):
        results.write(RESULTS / f"babilong-{date.today()}.json")
        table = (options.out / "results.md").read_text(encoding="utf-8")
        (RESULTS / f"babilong-{date.today()}.md").write_text(_without_pictures(table), encoding="utf-8")


def _without_pictures(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.startswith("![")) + "\n"


if __name__ == "__main__":
    main()
