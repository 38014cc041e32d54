"""All benchmarks of speed and memory, one after the other, and what must be shown beside what is.

    python benchmarks/run.py [--full] [--device cuda] [--only layer,training] [--show]

`make bench` takes about five minutes on two cores, `make bench-full` hours. Each benchmark is a process
of its own, writes its own record and may be run by itself; a check of the results comes first.
`--show` tells what the records of this repository say, `--show --out runs/benchmarks` what yours do.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import RESULTS, RUNS, has_device, load, some_of

NAMES = ("layer", "op", "training", "decode", "streaming")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run them, draw, print the summary; 1 if one of them failed."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = made.add_mutually_exclusive_group()
    size.add_argument("--full", dest="size", action="store_const", const="full", help="all sizes")
    size.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="to try the code")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    made.add_argument(
        "--only", type=some_of(NAMES), default=",".join(NAMES), help="default: %(default)s"
    )
    made.add_argument(
        "--out",
        type=Path,
        help=f"folder of the records; {RUNS}, with --show benchmarks/results",
    )
    made.add_argument("--images", type=Path, help="folder of the pictures; default: none")
    made.add_argument("--show", action="store_true", help="measure nothing, tell what the records say")
    made.set_defaults(size="quick")
    options = made.parse_args(arguments)
    options.out = options.out or (RESULTS if options.show else RUNS)
    if not has_device(options.device):
        print("No GPU that torch can use: nothing measured.")
        return 0
    failed = []
    if not options.show:
        failed = [name for name in options.only if not run(name, options)]
    tell(options)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run(name: str, options: Any) -> bool:
    """One benchmark; whether it ended well."""
    command = [sys.executable, str(Path(__file__).parent / f"{name}.py"), "--device", options.device]
    command += [f"--{options.size}"] if options.size != "quick" else []
    command += ["--out", str(options.out)]
    print(f"\n{name}", flush=True)
    return subprocess.run(command).returncode == 0


def tell(options: Any) -> None:
    """Pictures, and the summary."""
    import plots
    import summary

    size = None if options.show and options.size == "quick" else options.size
    records = {name: load(name, options.out, options.device, size) for name in NAMES}
    if options.images:
        for path in plots.draw(records, options.images):
            print(f"Drawn: {path}")
    summary.show(records)


if __name__ == "__main__":
    sys.exit(main())
