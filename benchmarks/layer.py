"""Forward + backward of the neural memory as a layer, beside its rivals: time and memory.

`python benchmarks/layer.py --help`. Notable here:

- The share of the matrix product's rate counts the useful operations of the memory alone (three times
  its forward pass); projections, gates and anything recomputed are work that does not count.
- titans-pytorch in all cases; Mamba2 and Gated DeltaNet, which have no chunks of the reader's choice
  and no network for a memory, in the first.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from checks import check_op
from common import (
    MATRIX,
    MIB,
    OURS,
    begin,
    fresh_process,
    installed,
    matrix_product,
    parser,
    peak_of_steps,
    product_rate,
    ratio,
    save,
    share,
    some_of,
    spread,
    table,
    time_in_turns,
    told,
)
from contenders import LAYERS, LayerCase, layer_step

RIVAL = "titans-pytorch"
CASES = {
    "6 heads of 64, chunk 64": LayerCase(),
    "1 head of 384, chunk 64": LayerCase(num_heads=1),
    "6 heads of 64, chunk 16": LayerCase(chunk_size=16),
}
TINY = {"batch": 1, "tokens": 32, "hidden_size": 16, "expansion": 2}
MEMORY_RUNS = {"tiny": 1, "quick": 1, "full": 3}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure each case, write the record after each, print the table."""
    made = parser(__doc__, {"tiny": 2, "quick": 5, "full": 9})
    made.add_argument(
        "--cases", type=some_of("123"), default="1,2,3", help="by number; default: %(default)s"
    )
    options = begin("layer", made, arguments)
    options.record["gate"] = check_op(options.device)
    options.record["cases"] = found = {}
    for number, (title, case) in enumerate(cases(options.size).items(), 1):
        if str(number) in options.cases:
            names = installed(LAYERS if number == 1 else LAYERS[:2])
            found[title] = measure(names, case, options)
            save(options)
            show(title, found[title])
    save(options, say=True)
    return 0


def cases(size: str) -> dict[str, LayerCase]:
    """The cases by name; small ones, of the same names, to try the code."""
    if size != "tiny":
        return CASES
    heads = {case: min(case.num_heads, 2) for case in CASES.values()}
    return {
        title: LayerCase(**TINY, num_heads=heads[case], chunk_size=case.chunk_size // 8)
        for title, case in CASES.items()
    }


def measure(names: Sequence[str], case: LayerCase, options: Any) -> dict[str, Any]:
    """Peak memory of each in processes of their own, then their times in turns."""
    device, runs = options.device, range(MEMORY_RUNS[options.size])
    memory = {
        name: [fresh_process("layer", "memory_of", name, asdict(case), device) for _ in runs]
        for name in names
    }
    steps = {name: layer_step(name, case, device) for name in names}
    samples = time_in_turns({**steps, MATRIX: matrix_product(device)}, options.rounds, device)
    return {
        "case": asdict(case),
        **summarise(case, samples, memory, device),
        "samples": {"seconds_per_step": samples, "bytes_above_imports": memory},
    }


def memory_of(name: str, case: Mapping[str, Any], device: str) -> int:
    """Peak bytes of a few steps above what the imports left; for a process of its own."""
    import torch  # noqa: F401

    if name == RIVAL:
        import titans_pytorch  # noqa: F401
    elif name == OURS:
        import everlong
    else:
        import transformers.models.qwen3_next.modeling_qwen3_next  # noqa: F401

        import everlong.models.gated_deltanet  # noqa: F401
    return peak_of_steps(lambda: layer_step(name, LayerCase(**case), device), device)


def summarise(
    case: LayerCase,
    samples: Mapping[str, Sequence[float]],
    memory: Mapping[str, Sequence[int]],
    device: str,
) -> dict[str, Any]:
    """What the table shows, from the samples."""
    tokens, operations = case.batch * case.tokens, case.training_operations()
    peaks = {name: spread(runs) for name, runs in memory.items()}
    rivals = [name for name in memory if name != OURS]
    return {
        "operations_per_step": operations,
        "matrix_product_rate": product_rate(samples[MATRIX], device),
        "tokens_per_second": {name: spread([tokens / s for s in samples[name]]) for name in memory},
        "peak_bytes_above_imports": peaks,
        "share_of_matrix_product_rate": share(operations, samples, OURS, device),
        "speed_ratio": {name: ratio(samples, OURS, name) for name in rivals},
        "memory_ratio": {name: peaks[OURS]["median"] / peaks[name]["median"] for name in rivals},
    }


def show(title: str, found: Mapping[str, Any]) -> None:
    """A case as people read it."""
    rate = found["matrix_product_rate"]["median"] / 1e9
    rows = []
    for name, speed in found["tokens_per_second"].items():
        ours = name == OURS
        memory = found["memory_ratio"].get(name)
        rows.append(
            [
                name,
                told(speed),
                f"{found['peak_bytes_above_imports'][name]['median'] / MIB:,.0f}",
                told(found["speed_ratio"].get(name), ".2f", "x"),
                "-" if memory is None else f"{memory:.2f}",
                told(found["share_of_matrix_product_rate"], ".0%") if ours else "-",
            ]
        )
    table(
        f"Layer, forward + backward: {title} (matrix products: {rate:,.0f} GFLOP/s)",
        ["", "tokens/s", "peak MiB", "everlong is faster by", "its memory", "of the products' rate"],
        rows,
    )


if __name__ == "__main__":
    sys.exit(main())
