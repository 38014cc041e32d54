"""Forward + backward of the neural memory beside titans-pytorch, in one run: time and memory.

`make bench`, or `python benchmarks/neural_memory.py --help`. Notable here:

- Nothing is timed before the dual form has equalled the per-token reference in float64.
- The contenders take turns, so that a busy machine slows both; medians, with the spread.
- Memory is taken in a fresh process for each: the peak above what the imports left.
- The machine's matrix-product rate is measured in the same rounds. The share of it counts the
  useful operations of the memory alone (three times its forward pass); projections, gates and
  anything recomputed are work that does not count.

The two layers have the same shapes but not the same work: everlong's gates act at every token and
each token reads the memory as it stands then; titans-pytorch averages its gates over a chunk and
reads the weights of the chunk's start.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any

OURS, RIVAL = "everlong", "titans-pytorch"
RIVAL_VERSION = "0.5.5"
RESULTS = Path(__file__).parent / "results"
GATE_TOLERANCE = 1e-10  # relative, float64
MATRIX_SIZE = 1024
SAMPLE_SECONDS = 0.25  # shorter steps are repeated until a sample takes this long
MEMORY_STEPS = 3
MIB = 2**20


@dataclass(frozen=True)
class Shape:
    """What both contenders are built for."""

    batch: int = 2
    tokens: int = 1024
    hidden_size: int = 384
    num_heads: int = 6
    chunk_size: int = 64
    depth: int = 2
    expansion: int = 4

    @property
    def head_dim(self) -> int:
        """K."""
        return self.hidden_size // self.num_heads

    def memory_operations(self) -> int | None:
        """Useful operations of one forward + backward: the memory's products alone."""
        if self.depth != 2:
            return None  # the count below is for two layers
        key, hidden, chunk = self.head_dim, self.expansion * self.head_dim, self.chunk_size
        forward = 22 * key * hidden + 4 * chunk * (key + hidden) + 2 * self.depth * chunk**2
        return 3 * forward * self.num_heads * self.batch * self.tokens


def build(name: str, shape: Shape) -> Callable[[], None]:
    """The contender's training step: forward, and backward to the parameters and the input."""
    import torch

    torch.manual_seed(0)
    if name == OURS:
        from everlong import NeuralMemory

        layer = NeuralMemory(
            hidden_size=shape.hidden_size,
            num_heads=shape.num_heads,
            depth=shape.depth,
            expansion=shape.expansion,
            chunk_size=shape.chunk_size,
        )
    else:
        from titans_pytorch import NeuralMemory as RivalMemory

        layer = RivalMemory(
            dim=shape.hidden_size,
            heads=shape.num_heads,
            dim_head=shape.head_dim,
            chunk_size=shape.chunk_size,
            batch_size=shape.chunk_size,
            default_model_kwargs={
                "depth": shape.depth,
                "expansion_factor": float(shape.expansion),
            },
        )
    x = torch.randn(shape.batch, shape.tokens, shape.hidden_size, requires_grad=True)
    gradient = torch.randn(shape.batch, shape.tokens, shape.hidden_size)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        y, _ = layer(x)
        y.backward(gradient)

    return step


def largest_error() -> float:
    """The dual form against the reference: outputs, states and gradients of every input.

    Returns the largest difference relative to the largest value of the tensor it is in.
    """
    import torch

    from everlong.ops import NeuralMemoryState, chunk_neural_memory, recurrent_neural_memory

    generator = torch.Generator().manual_seed(0)
    batch, heads, size, hidden, layers, chunk = 2, 2, 6, 12, 2, 5
    tokens = 2 * chunk + 3

    def random(*dims: int, scale: float = 1.0) -> torch.Tensor:
        values = scale * torch.randn(*dims, dtype=torch.float64, generator=generator)
        return values.requires_grad_()

    rows = [random(batch, tokens, heads, size) for _ in range(3)]
    logits = [random(batch, tokens, heads, layers) for _ in range(3)]
    shapes = [(batch, heads, size, hidden), (batch, heads, hidden, size)]
    weights = [random(*dims, scale=dims[2] ** -0.5) for dims in shapes]
    momentum = [random(*dims, scale=0.1) for dims in shapes]
    scale = random(heads, size)
    inputs = [*rows, *logits, *weights, *momentum, scale]
    weight_of: list[torch.Tensor] = []

    def run(function: Callable[..., Any]) -> list[torch.Tensor]:
        theta, log_retain, log_eta = logits
        y, state = function(
            *rows,
            0.05 * theta.sigmoid(),
            torch.nn.functional.logsigmoid(log_retain + 3),
            torch.nn.functional.logsigmoid(log_eta),
            state=NeuralMemoryState.initial(weights, chunk, momentum=momentum),
            scale=scale,
        )
        memory, surprise = state.current()
        results = [y, *memory, *surprise]
        if not weight_of:
            weight_of.extend(torch.randn(r.shape, dtype=r.dtype, generator=generator) for r in results)
        total = sum((r * w).sum() for r, w in zip(results, weight_of, strict=True))
        return [*results, *torch.autograd.grad(total, inputs)]

    want = [tensor.detach() for tensor in run(recurrent_neural_memory)]
    got = [tensor.detach() for tensor in run(chunk_neural_memory)]
    errors = [
        (g - w).abs().max() / w.abs().max().clamp(min=1e-30) for g, w in zip(got, want, strict=True)
    ]
    return float(torch.stack(errors).max())  # which keeps NaN, unlike Python's max


def time_in_turns(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of each, `rounds` samples; who goes first changes from round to round."""
    repeats = {}
    for name, step in steps.items():
        step()
        start = time.perf_counter()
        step()
        took = time.perf_counter() - start
        repeats[name] = max(1, round(SAMPLE_SECONDS / took))
    samples: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        for name in order:
            start = time.perf_counter()
            for _ in range(repeats[name]):
                steps[name]()
            samples[name].append((time.perf_counter() - start) / repeats[name])
        order.append(order.pop(0))
    return samples


def matrix_product() -> Callable[[], None]:
    """A large square float32 product: what the machine's matrix units give at best."""
    import torch

    a, b = torch.randn(2, MATRIX_SIZE, MATRIX_SIZE).unbind()
    out = torch.empty_like(a)

    def product() -> None:
        torch.mm(a, b, out=out)

    return product


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


def measure_memory(name: str, shape: Shape) -> dict[str, int | None]:
    """Bytes above the imports' of a few steps: the system's peak, and the highest sample seen.

    The first is exact but misses what fits below a peak that the imports left behind; the second
    counts from the size after the imports, but may miss a short peak.
    """
    import torch  # noqa: F401

    if name == OURS:
        import everlong  # noqa: F401
    else:
        import titans_pytorch  # noqa: F401
    try:
        import psutil
    except ModuleNotFoundError:
        process = None
    else:
        process = psutil.Process()
    after_imports = process.memory_info().rss if process else 0
    peak_of_imports = peak_bytes()

    highest, done = after_imports, threading.Event()

    def sample() -> None:
        nonlocal highest
        while process and not done.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    step = build(name, shape)
    for _ in range(MEMORY_STEPS):
        step()
    peak = peak_bytes()
    done.set()
    sampler.join()
    return {
        "peak": peak - peak_of_imports,
        "sampled": highest - after_imports if process else None,
    }


def memory_in_fresh_processes(name: str, shape: Shape, runs: int) -> list[dict[str, int | None]]:
    """`measure_memory` in processes of its own."""
    command = [sys.executable, __file__, "--memory-of", name, *shape_arguments(shape)]
    results = []
    for _ in range(runs):
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    return results


def shape_arguments(shape: Shape) -> list[str]:
    """The command line that gives `shape`."""
    return [text for key, value in asdict(shape).items() for text in (option_of(key), str(value))]


def option_of(field: str) -> str:
    """batch -> --batch; hidden_size -> --hidden-size."""
    return "--" + field.replace("_", "-")


def spread(values: list[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rival_version() -> str | None:
    """The rival's installed version, None when it is missing."""
    if importlib.util.find_spec("titans_pytorch") is None:
        return None
    return importlib.metadata.version(RIVAL)


def summarise(
    shape: Shape,
    seconds: dict[str, list[float]],
    products: list[float],
    memory: dict[str, list[dict[str, int | None]]],
) -> dict[str, Any]:
    """The figures of the table, from the samples."""
    tokens = shape.batch * shape.tokens
    product_rate = spread([2 * MATRIX_SIZE**3 / s for s in products])
    contenders: dict[str, Any] = {}
    for name, samples in seconds.items():
        sampled = [run["sampled"] for run in memory[name] if run["sampled"] is not None]
        contenders[name] = {
            "tokens_per_second": spread([tokens / s for s in samples]),
            "milliseconds_per_step": spread([1000 * s for s in samples]),
            "peak_bytes_above_imports": spread([run["peak"] or 0 for run in memory[name]]),
            "sampled_bytes_above_imports": spread(sampled) if sampled else None,
        }
    operations = shape.memory_operations()
    if operations is not None:
        rate = operations / statistics.median(seconds[OURS])
        contenders[OURS]["share_of_matrix_product_rate"] = rate / product_rate["median"]
    summary = {
        "useful_operations_per_step": operations,
        "matrix_product_operations_per_second": product_rate,
        "contenders": contenders,
    }
    if RIVAL in seconds:
        turns = zip(seconds[RIVAL], seconds[OURS], strict=True)
        peaks = [contenders[n]["peak_bytes_above_imports"]["median"] for n in (OURS, RIVAL)]
        summary["speed_ratio"] = spread([theirs / ours for theirs, ours in turns])
        summary["memory_ratio"] = peaks[0] / peaks[1]
    return summary


def show(shape: Shape, summary: dict[str, Any], threads: int) -> None:
    """The table, as people read it."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 100)
    console.print(
        f"NeuralMemory, forward + backward, float32, {threads} threads: "
        + ", ".join(f"{key} {value}" for key, value in asdict(shape).items()),
        highlight=False,
    )
    table = Table()
    table.add_column("implementation")
    for head in ("tokens/s (min..max)", "ms a step", "peak MiB", "sampled MiB", "of matmul rate"):
        table.add_column(head, justify="right")
    for name, figures in summary["contenders"].items():
        rate = figures["tokens_per_second"]
        sampled = figures["sampled_bytes_above_imports"]
        share = figures.get("share_of_matrix_product_rate")
        table.add_row(
            name,
            f"{rate['median']:,.0f} ({rate['min']:,.0f}..{rate['max']:,.0f})",
            f"{figures['milliseconds_per_step']['median']:,.1f}",
            f"{figures['peak_bytes_above_imports']['median'] / MIB:,.0f}",
            f"{sampled['median'] / MIB:,.0f}" if sampled else "-",
            f"{share:.0%}" if share is not None else "-",
        )
    console.print(table)
    product = summary["matrix_product_operations_per_second"]
    console.print(
        f"matrix products ({MATRIX_SIZE} x {MATRIX_SIZE}): {product['median'] / 1e9:,.0f} GFLOP/s "
        f"({product['min'] / 1e9:,.0f}..{product['max'] / 1e9:,.0f})",
        highlight=False,
    )
    if "speed_ratio" in summary:
        ratio = summary["speed_ratio"]
        console.print(
            f"{OURS} has {ratio['median']:.2f}x the tokens/s of {RIVAL} "
            f"({ratio['min']:.2f}..{ratio['max']:.2f} by round) "
            f"and {summary['memory_ratio']:.2f} of its peak memory",
            highlight=False,
        )


def write(folder: Path, record: dict[str, Any]) -> Path:
    """Keep the record under today's date."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"neural_memory-{date.today().isoformat()}.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Speed and memory of everlong.NeuralMemory beside titans-pytorch."
    )
    for field in fields(Shape):
        parser.add_argument(option_of(field.name), type=int, default=field.default)
    parser.add_argument("--rounds", type=int, default=9, help="timing samples of each")
    parser.add_argument("--memory-runs", type=int, default=3, help="fresh processes for each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON record")
    parser.add_argument("--memory-of", choices=[OURS, RIVAL], help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run it all; 1 when the dual form is wrong, else 0."""
    options = parse(arguments)
    shape = Shape(**{field.name: getattr(options, field.name) for field in fields(Shape)})
    if options.memory_of:
        print(json.dumps(measure_memory(options.memory_of, shape)))
        return 0

    error = largest_error()
    passed = error <= GATE_TOLERANCE  # False for NaN
    print(f"dual form against the reference, float64: {error:.1e} (at most {GATE_TOLERANCE:.0e})")
    if not passed:
        print("the dual form is wrong: nothing was timed", file=sys.stderr)
        return 1

    import torch

    from everlong.provenance import provenance

    version = rival_version()
    names = [OURS] if version is None else [OURS, RIVAL]
    if version is None:
        print(
            f"{RIVAL} is not installed, measuring {OURS} alone: `make bench` installs it, "
            "or pip install -c constraints.txt -e '.[bench]'",
            file=sys.stderr,
        )
    elif version != RIVAL_VERSION:
        print(f"{RIVAL} is {version}, the comparison is meant for {RIVAL_VERSION}", file=sys.stderr)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    if load is not None and load > 0.5:
        print(f"other work is running (load {load:.1f}): the times may be worse", file=sys.stderr)

    memory = {name: memory_in_fresh_processes(name, shape, options.memory_runs) for name in names}
    steps = {name: build(name, shape) for name in names}
    samples = time_in_turns({**steps, "matrix_product": matrix_product()}, options.rounds)
    products = samples.pop("matrix_product")
    summary = summarise(shape, samples, products, memory)
    show(shape, summary, torch.get_num_threads())
    record = {
        "benchmark": "neural_memory",
        **provenance(),
        "rival": {RIVAL: version},
        "load_before": load,
        "shape": asdict(shape),
        "gate": {"largest_relative_error": error, "tolerance": GATE_TOLERANCE},
        "summary": summary,
        "samples": {
            "seconds_per_step": samples,
            "seconds_per_matrix_product": products,
            "bytes_above_imports": memory,
        },
    }
    print(f"written to {write(options.out, record)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
