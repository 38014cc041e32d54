"""One token at a time at position 1,000 and at position 100,000: time and resident memory.

`make bench-decode`, or `python benchmarks/decode.py --help`. Notable here:

- Each kind of layer has a process of its own, which reads on and on; its resident memory is taken at
  the first position, after some tokens were decoded there, and at the last.
- Another text as long is read before: pieces of many sizes leave holes in the heap of the C library,
  which fill up over tens of thousands of tokens and belong to no position.
- The time of a token is taken from two caches in turn, one at each position, so that a busy machine
  slows both; medians of blocks of tokens.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

KINDS = ("lmm", "mac", "mag", "mal")
RESULTS = Path(__file__).parent / "results"
PIECE = 1000  # tokens a call while reading
BLOCK = 32  # tokens a sample
MIB = 2**20


def main() -> None:
    """Measure each kind in a process of its own; print a table, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kinds", default=",".join(KINDS), help="default: %(default)s")
    parser.add_argument("--first", type=int, default=1_000, help="default: %(default)s")
    parser.add_argument("--last", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=40, help="samples of each; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: %(default)s")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child, options.first, options.last, options.rounds)))
        return
    found = {}
    print(
        f"{'layers':8} {'ms at first':>12} {'ms at last':>12} {'ratio':>6} {'MiB growth':>11} {'of':>6}"
    )
    for kind in options.kinds.split(","):
        command = [sys.executable, __file__, "--child", kind, "--rounds", str(options.rounds)]
        command += ["--first", str(options.first), "--last", str(options.last)]
        child = subprocess.run(command, check=True, capture_output=True, text=True)
        found[kind] = row = json.loads(child.stdout.splitlines()[-1])
        print(
            f"{kind:8} {row['first_ms']:12.2f} {row['last_ms']:12.2f} {row['time_ratio']:6.3f} "
            f"{row['last_mib'] - row['first_mib']:11.1f} {row['first_mib']:6.0f}",
            flush=True,
        )
    about = {"date": str(date.today()), "cores": os.cpu_count(), "command": " ".join(sys.argv)}
    path = options.out / f"decode-{date.today()}.json"
    path.write_text(
        json.dumps({**about, "first": options.first, "last": options.last, "kinds": found}, indent=2)
    )
    print(f"Written: {path}")


def measure(kind: str, first: int, last: int, rounds: int) -> dict[str, Any]:
    """Read to `first` and on to `last`; times of a token in milliseconds, resident memory in MiB."""
    import copy

    import psutil
    import torch

    from everlong import TitansConfig, TitansForCausalLM

    torch.manual_seed(0)
    config = TitansConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        layer_types=[kind] * 4,
        sliding_window=512,
        segment_length=512,
        chunk_size=64,
        num_persistent_tokens=4,
    )
    model = TitansForCausalLM(config).eval()
    process = psutil.Process()

    @torch.inference_mode()
    def read(cache: Any, tokens: int, piece: int) -> Any:
        for start in range(0, tokens, piece):
            ids = torch.randint(256, (1, min(piece, tokens - start)))
            cache = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values
        return cache

    def resident_after(cache: Any) -> int:
        """While decoding over the borders of chunks, windows and segments."""
        read(copy.deepcopy(cache), 2 * 512, 1)
        return process.memory_info().rss

    fresh_memory = resident_after(read(None, first, PIECE))
    read(None, last, PIECE)
    early = read(None, first, PIECE)
    first_memory = resident_after(early)
    late = read(copy.deepcopy(early), last - first, PIECE)
    last_memory = resident_after(late)
    times: dict[str, list[float]] = {"first": [], "last": []}
    for _ in range(rounds):
        for name, cache in (("first", early), ("last", late)):
            started = time.perf_counter()
            read(cache, BLOCK, 1)
            times[name].append((time.perf_counter() - started) / BLOCK * 1e3)
    medians = {name: statistics.median(samples) for name, samples in times.items()}
    return {
        "first_ms": medians["first"],
        "last_ms": medians["last"],
        "time_ratio": medians["last"] / medians["first"],
        "fresh_mib": fresh_memory / MIB,
        "first_mib": first_memory / MIB,
        "last_mib": last_memory / MIB,
        "memory_ratio": last_memory / first_memory,
        "first_spread_ms": [min(times["first"]), max(times["first"])],
        "last_spread_ms": [min(times["last"]), max(times["last"])],
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
