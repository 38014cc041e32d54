"""What the benchmarks share: time in turns, memory in processes of their own, records and tables.

- Contenders take turns, so that a busy machine slows all of them, and who goes first changes. A ratio
  is taken within each round; what is told is the median of those, with the smallest and the largest.
- A large matrix product takes its turn with them: the machine's rate, at that time.
- Peak memory is that of a process that does nothing else, above what its imports left; on a GPU, what
  the allocator handed out.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

Step = Callable[[], Any]
Spread = dict[str, float]

RESULTS = Path(__file__).parent / "results"  # records that README and docs tell of
RUNS = Path("runs/benchmarks")
SIZES = ("tiny", "quick", "full")
RIVALS = {  # distribution: module, and the version that the comparison is meant for
    "titans-pytorch": ("titans_pytorch", "0.5.5"),
    "open-titans": ("open_titans", "1.1.0"),
}
MATRIX = "matrix product"
MATRIX_SIZE = {"cpu": 1024, "cuda": 4096}
SAMPLE_SECONDS = 0.25  # shorter steps are repeated until a sample takes this long
MEMORY_STEPS = 2
MIB = 2**20
OURS = "everlong"


def parser(description: str | None, rounds: Mapping[str, int]) -> argparse.ArgumentParser:
    """The options of all benchmarks. rounds: timing samples by size; none, no such option."""
    made = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = made.add_mutually_exclusive_group()
    size.add_argument("--full", dest="size", action="store_const", const="full", help="all sizes")
    size.add_argument("--tiny", dest="size", action="store_const", const="tiny", help="to try the code")
    made.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    if rounds:
        of_sizes = ", ".join(f"{rounds[size]} ({size})" for size in SIZES)
        made.add_argument("--rounds", type=int, help=f"samples of each; default: {of_sizes}")
    made.add_argument(
        "--out", type=Path, default=RUNS, help="folder of the record; default: %(default)s"
    )
    made.set_defaults(size="quick", rounds=None, default_rounds=rounds)
    return made


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """For an option: names of these, divided by commas."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := set(found) - set(known):
            raise argparse.ArgumentTypeError(
                f"unknown: {', '.join(sorted(unknown))}; take some of {','.join(known)}"
            )
        return found

    return names


def begin(name: str, made: argparse.ArgumentParser, arguments: Sequence[str] | None) -> Any:
    """Parse the command line; the options, with `record`, which `save` writes.

    Ends the program where there is no such device, says so where other work is running.
    """
    options = made.parse_args(arguments)
    if options.rounds is None:
        options.rounds = options.default_rounds.get(options.size)
    import torch

    from everlong.ops import current_backend
    from everlong.provenance import provenance

    if not has_device(options.device):
        made.exit(0, f"{name}: no GPU that torch {torch.__version__} can use: nothing measured\n")
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None and load > 0.5:
        print(f"other work is running (load {load:.1f}): times may be worse", file=sys.stderr)
    options.record = {
        "benchmark": name,
        "size": options.size,
        "device": options.device,
        "rounds": options.rounds,
        "backend": current_backend(),
        **provenance(),
        "rivals": {rival: version_of(rival) for rival in RIVALS},
        "load_before": load,
    }
    return options


def has_device(device: str) -> bool:
    """Whether torch can use it."""
    import torch

    return device == "cpu" or torch.cuda.is_available()


def version_of(rival: str) -> str | None:
    """The rival's installed version, None when it is missing."""
    if importlib.util.find_spec(RIVALS[rival][0]) is None:
        return None
    try:
        return importlib.metadata.version(rival)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def installed(names: Sequence[str]) -> list[str]:
    """The contenders without those that are of a missing package; says which, and of other versions."""
    kept = []
    for name in names:
        rival = next((rival for rival in RIVALS if name.startswith(rival)), None)
        version = version_of(rival) if rival else None
        if rival and version is None:
            print(f"{name} left out: {rival} is not installed", file=sys.stderr)
            continue
        if rival and version != RIVALS[rival][1]:
            print(f"{rival} is {version}, meant is {RIVALS[rival][1]}", file=sys.stderr)
        kept.append(name)
    return kept


def record_path(options: Any) -> Path:
    """NAME[-cuda][-SIZE]-DATE.json; a full record has no size in its name."""
    record = options.record
    parts = [record["benchmark"]]
    parts += [record["device"]] if record["device"] != "cpu" else []
    parts += [record["size"]] if record["size"] != "full" else []
    return options.out / f"{'-'.join(parts)}-{date.today()}.json"


def save(options: Any, say: bool = False) -> Path:
    """Write the record as it is now."""
    path = record_path(options)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(options.record, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(path)
    if say:
        print(f"Written: {path}", flush=True)
    return path


def load(
    name: str, folder: Path, device: str = "cpu", size: str | None = None
) -> dict[str, Any] | None:
    """The newest record of a benchmark, of a size; None if there is none.

    Without a size: the newest full one, or the newest quick one if there is no full one.
    """
    sizes = [size] if size else ["full", "quick"]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(f"{name}-*.json")]
    for wanted in sizes:
        key = {"benchmark": name, "device": device, "size": wanted}
        fitting = [record for record in records if key.items() <= _facts(record).items()]
        if fitting:
            return max(fitting, key=lambda record: str(record["date"]))
    return None


def _facts(record: Any) -> dict[str, Any]:
    """The record's plain facts; none of another script's list."""
    if not isinstance(record, dict):
        return {}
    return {key: value for key, value in record.items() if isinstance(value, (str, int, float))}


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def seconds_of(step: Step, repeats: int, device: str) -> float:
    """Seconds of a call, the mean of so many one after the other."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def time_in_turns(steps: Mapping[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of a call of each, a sample a round; who goes first changes from round to round."""
    repeats = {}
    for name, step in steps.items():
        took = seconds_of(step, 1, device)  # the first call is slower, but tells the long ones
        if took < 4 * SAMPLE_SECONDS:
            took = seconds_of(step, 1, device)
        repeats[name] = max(1, round(SAMPLE_SECONDS / took))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        for name in order:
            samples[name].append(seconds_of(steps[name], repeats[name], device))
        order.append(order.pop(0))
    return samples


def matrix_product(device: str) -> Step:
    """A large square float32 product: what the machine's matrix units give at best."""
    import torch

    size = MATRIX_SIZE[device]
    a, b = torch.randn(2, size, size, device=device).unbind()
    out = torch.empty_like(a)
    return lambda: torch.mm(a, b, out=out)


def product_rate(samples: Sequence[float], device: str) -> Spread:
    """Operations a second of the matrix product, from its seconds."""
    return spread([2 * MATRIX_SIZE[device] ** 3 / seconds for seconds in samples])


def spread(values: Sequence[float]) -> Spread:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(samples: Mapping[str, Sequence[float]], of: str, to: str) -> Spread:
    """How many times as fast `of` is as `to`, by round."""
    return spread([theirs / ours for ours, theirs in zip(samples[of], samples[to], strict=True)])


def share(operations: float, samples: Mapping[str, Sequence[float]], name: str, device: str) -> Spread:
    """The share of the matrix product's rate that useful operations reach, by round."""
    of_product = 2 * MATRIX_SIZE[device] ** 3
    return spread(
        [
            operations / seconds / (of_product / product)
            for seconds, product in zip(samples[name], samples[MATRIX], strict=True)
        ]
    )


def memory_operations(
    *, tokens: int, heads: int, head_dim: int, depth: int, expansion: int, chunk: int
) -> int:
    """Useful operations of a forward pass through a neural memory: its products alone.

    Of a token and head, with P the number of weights, P_1 of them in the first layer: 2 P through the
    keys' network, 2 (P - P_1) back through it, 2 P each to read and to write M and S, and products
    with the chunk's rows and coefficients. Training is three times that; recomputation does not count.
    """
    hidden = expansion * head_dim
    sizes = [head_dim, *[hidden] * (depth - 1), head_dim]
    layers = list(pairwise(sizes))
    weights = [wide * narrow for wide, narrow in layers]
    products = 10 * sum(weights) + 2 * (sum(weights) - weights[0])
    within = sum(2 * chunk * (wide + narrow) for wide, narrow in layers) + 2 * depth * chunk**2
    return (products + within) * tokens * heads


class PeakMemory:
    """The most memory of this process (of the GPU, where that is the device) since this was made."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
        else:
            reset_peak()
        self.before = self.now()

    def now(self) -> int:
        """The peak so far, in bytes."""
        if self.device == "cuda":
            import torch

            return torch.cuda.max_memory_allocated()
        return peak_bytes()

    def above(self) -> int:
        """Bytes above what there was."""
        return self.now() - self.before


def reset_peak() -> None:
    """Let the highest resident size start at the present one, where the system can do that."""
    # Where it cannot, only what goes above the peak of the imports is seen.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The highest resident size of this process so far."""
    try:
        # Not getrusage: its figure starts at the parent's peak, not at zero.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_of_steps(build: Callable[[], Step], device: str) -> int:
    """Bytes that building something and a few steps of it take; call it in a fresh process."""
    memory = PeakMemory(device)
    step = build()
    for _ in range(MEMORY_STEPS):
        step()
    return memory.above()


def fresh_process(module: str, function: str, *arguments: Any) -> Any:
    """What `module.function(*arguments)` returns in a process of its own; all of it JSON values."""
    command = [sys.executable, __file__, module, function, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table, its first column to the left."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 130)
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for i, head in enumerate(heads):
        made.add_column(head, justify="right" if i else "left")
    for row in rows:
        made.add_row(*row)
    console.print(made)


def told(values: Spread | None, form: str = ",.0f", unit: str = "") -> str:
    """A median with its smallest and largest value."""
    if values is None:
        return "-"
    low, high = format(values["min"], form), format(values["max"], form)
    return f"{values['median']:{form}}{unit} ({low}..{high})"


if __name__ == "__main__":
    called = getattr(importlib.import_module(sys.argv[1]), sys.argv[2])
    print(json.dumps(called(*json.loads(sys.argv[3]))))
