"""The chunked memory alone, `chunk_neural_memory`: over length, chunk, depth, head size and heads.

`python benchmarks/op.py --help`. Notable here:

- Each back end that works here takes its turn; forward under inference mode, and forward + backward.
- The share of the matrix product's rate counts useful operations: three times the forward pass for
  training, whatever is computed again.
- A forward pass over more than 65,536 tokens is several calls, each going on from the last one's state,
  as a model reads a long text.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from checks import backends, check_op
from common import (
    MATRIX,
    Step,
    begin,
    matrix_product,
    memory_operations,
    parser,
    product_rate,
    save,
    share,
    some_of,
    spread,
    table,
    time_in_turns,
    told,
)

CALL = 65_536  # tokens of a call at most
THETA, LOG_RETAIN, LOG_ETA = 0.01, -1e-3, -0.7


@dataclass(frozen=True)
class OpCase:
    """Sizes of the op's input; training: forward and backward."""

    batch: int = 1
    tokens: int = 4096
    heads: int = 4
    head_dim: int = 64
    depth: int = 2
    expansion: int = 4
    chunk: int = 64
    training: bool = False

    def operations(self) -> int:
        """Useful ones of a step."""
        forward = memory_operations(
            tokens=self.batch * self.tokens,
            heads=self.heads,
            head_dim=self.head_dim,
            depth=self.depth,
            expansion=self.expansion,
            chunk=self.chunk,
        )
        return 3 * forward if self.training else forward


# What is varied, and its values by size. Lengths are different in training; they are at the end.
BASE = OpCase()
SWEEPS: dict[str, dict[str, list[dict[str, int]]]] = {
    "quick": {
        "tokens": [{"tokens": n} for n in (1024, 16384, 65536)],
        "chunk": [{"chunk": n} for n in (16, 64)],
        "depth": [{"depth": n} for n in (1, 2)],
        "head_dim": [{"head_dim": n, "heads": 384 // n} for n in (64, 384)],
        "heads": [{"heads": n} for n in (1, 12)],
    },
    "full": {
        "tokens": [{"tokens": 1024 * 4**n} for n in range(6)],
        "chunk": [{"chunk": n} for n in (16, 32, 64, 128, 256)],
        "depth": [{"depth": n} for n in (1, 2, 3)],
        "head_dim": [{"head_dim": n, "heads": 384 // n} for n in (32, 64, 128, 384)],
        "heads": [{"heads": n} for n in (1, 2, 4, 8, 16)],
    },
    "tiny": {
        "tokens": [{"tokens": n} for n in (32, 64)],
        "depth": [{"depth": n} for n in (1, 3)],
    },
}
LONGEST_TRAINING = 16_384
TINY = OpCase(tokens=32, heads=2, head_dim=8, expansion=2, chunk=8)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure sweep after sweep, write the record after each, print a table of each."""
    made = parser(__doc__, {"tiny": 1, "quick": 3, "full": 7})
    made.add_argument(
        "--sweeps", type=some_of([*SWEEPS["full"]]), help=f"of {','.join(SWEEPS['full'])}; default: all"
    )
    made.add_argument(
        "--backends", type=some_of(("eager", "native")), help="default: all that work here"
    )
    options = begin("op", made, arguments)
    options.record["gate"] = check_op(options.device)
    names = options.backends or backends(options.device)
    options.record["sweeps"] = found = {}
    wanted = options.sweeps or list(SWEEPS[options.size])
    for sweep in wanted:
        rows = found[sweep] = []
        for case in cases(sweep, options.size):
            rows.append(measure(case, names, options))
            save(options)
        show(sweep, rows)
    save(options, say=True)
    return 0


def cases(sweep: str, size: str) -> list[OpCase]:
    """Forward passes, then forward and backward."""
    base = TINY if size == "tiny" else BASE
    made = [replace(base, **change) for change in SWEEPS[size][sweep]]
    training = [replace(case, training=True) for case in made if case.tokens <= LONGEST_TRAINING]
    return made + training


def measure(case: OpCase, names: Sequence[str], options: Any) -> dict[str, Any]:
    """One case by all back ends."""
    steps = {name: op_step(case, name, options.device) for name in names}
    steps[MATRIX] = matrix_product(options.device)
    samples = time_in_turns(steps, options.rounds, options.device)
    tokens, operations = case.batch * case.tokens, case.operations()
    return {
        "case": asdict(case),
        "operations": operations,
        "matrix_product_rate": product_rate(samples[MATRIX], options.device),
        "tokens_per_second": {name: spread([tokens / s for s in samples[name]]) for name in names},
        "share": {name: share(operations, samples, name, options.device) for name in names},
        "samples": samples,
    }


def op_step(case: OpCase, backend: str, device: str) -> Step:
    """A call of the op on random input, with gates as a fresh model has them."""
    import torch

    from everlong.ops import NeuralMemoryState, chunk_neural_memory, use_backend

    torch.manual_seed(0)
    piece = min(case.tokens, CALL)
    rows = torch.randn(3, case.batch, piece, case.heads, case.head_dim, device=device)
    q, k, v = torch.nn.functional.normalize(rows, dim=-1)
    gates = [
        torch.full((case.batch, piece, case.heads, case.depth), value, device=device)
        for value in (THETA, LOG_RETAIN, LOG_ETA)
    ]
    hidden = case.expansion * case.head_dim
    sizes = [case.head_dim, *[hidden] * (case.depth - 1), case.head_dim]
    weights = [
        torch.randn(case.batch, case.heads, *pair, device=device) * pair[0] ** -0.5
        for pair in pairwise(sizes)
    ]
    scale = torch.ones(case.heads, case.head_dim, device=device)
    inputs = [q.contiguous(), k.contiguous(), v.contiguous(), *gates, *weights, scale]
    if case.training:
        inputs = [tensor.requires_grad_() for tensor in inputs]
    gradient = torch.randn_like(q)

    def call(state: Any) -> Any:
        return chunk_neural_memory(*inputs[:6], state=state, scale=inputs[-1])

    def fresh() -> Any:
        return NeuralMemoryState.initial(inputs[6:-1], case.chunk)

    def train() -> None:
        with use_backend(backend):
            y, _ = call(fresh())
            torch.autograd.grad(y, inputs, gradient)

    @torch.inference_mode()
    def read() -> None:
        with use_backend(backend):
            state = fresh()
            for _ in range(-(-case.tokens // piece)):
                _, state = call(state)

    return train if case.training else read


def show(sweep: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A sweep as people read it."""
    lines = []
    for row in rows:
        case = row["case"]
        for name, speed in row["tokens_per_second"].items():
            lines.append(
                [
                    f"{case[sweep]:,}" + (f" ({case['heads']} heads)" if sweep == "head_dim" else ""),
                    "forward + backward" if case["training"] else "forward",
                    name,
                    told(speed),
                    told(row["share"][name], ".0%"),
                ]
            )
    base = ", ".join(f"{key} {value}" for key, value in asdict(BASE).items() if key != "training")
    table(
        f"Op over {sweep} (otherwise {base})",
        [sweep, "", "back end", "tokens/s", "of the products' rate"],
        lines,
    )


if __name__ == "__main__":
    sys.exit(main())
