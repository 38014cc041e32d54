"""A text that never ends: tokens a second and resident memory while two million tokens are read.

`python benchmarks/streaming.py --full`; it may run in the background, the record is written as it goes.
Notable here:

- Each kind of layer has a process of its own, which reads the text by one call of `memorize`. It tells
  time and resident memory after each block of 10,240 tokens, which are made as they are read.
- The process keeps freed memory (`everlong.allocator`), as in training.
- The first ten blocks are warm-up. Told are resident memory after that, largest over smallest, and the
  median speed of the last ten blocks over that of the first ten after warm-up.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from checks import check_reading
from common import MIB, begin, parser, save, some_of, spread, table, told
from contenders import TINY_SIZES, TITANS, ModelSizes, build_model
from everlong.allocator import keep_freed_memory
from reading import memory_now

BLOCK = {"tiny": 64, "quick": 10_240, "full": 10_240}  # whole pieces of `memorize`
TOKENS = {"tiny": 640, "quick": 307_200, "full": 2_007_040}
SPAN = 10  # blocks at the end, behind the warm-up and before it
KEPT = {"tiny": 2, "quick": SPAN, "full": SPAN}


def main(arguments: Sequence[str] | None = None) -> int:
    """Read with each kind, write the record as it goes, print the table."""
    made = parser(__doc__, {})
    made.add_argument(
        "--kinds",
        type=some_of(TITANS),
        default="mac",
        help=f"of {','.join(TITANS)}; default: %(default)s",
    )
    made.add_argument("--tokens", type=int, help="default: 307,200; with --full 2,007,040")
    options = begin("streaming", made, arguments)
    kinds, span = options.kinds, KEPT[options.size]
    sizes = asdict(TINY_SIZES if options.size == "tiny" else ModelSizes())
    tokens = options.tokens or TOKENS[options.size]
    block = BLOCK[options.size]
    if tokens < 3 * span * block:
        made.error(f"--tokens must be at least {3 * span * block:,}, got {tokens:,}")
    options.record |= {
        "sizes": sizes,
        "gate": check_reading(kinds, options.device),
        "keeps_freed_memory": True,
        "tokens": tokens,
        "block": block,
        "kinds": {},
    }
    for kind in kinds:
        blocks = options.record["kinds"][kind] = {"blocks": []}
        for line in stream(kind, sizes, tokens, block, options.device):
            blocks["blocks"].append(line)
            if len(blocks["blocks"]) % span == 0:
                save(options)
        blocks |= summarise(blocks["blocks"], block, span)
    show(options.record)
    save(options, say=True)
    return 0


def stream(kind: str, sizes: dict[str, Any], tokens: int, block: int, device: str) -> Any:
    """What a process of its own tells, block by block: seconds and resident bytes."""
    command = [sys.executable, __file__, "--child", json.dumps([kind, sizes, tokens, block, device])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            yield json.loads(line)
    if child.returncode:
        raise RuntimeError(f"reading with {kind} ended with {child.returncode}")


def read_on(kind: str, sizes: dict[str, Any], tokens: int, block: int, device: str) -> None:
    """Read a text in one call, print a line for each block of it."""
    import torch

    from everlong.models.reading import default_piece

    keep_freed_memory()
    torch.manual_seed(0)
    shape = ModelSizes(**sizes)
    model = build_model(kind, shape).to(device).eval()
    read, before = 0, clock(device)

    def text() -> Any:
        for _ in range(tokens // block):
            yield torch.randint(shape.vocabulary, (1, block))

    def tell(more: int) -> None:
        nonlocal read, before
        read += more
        if read % block == 0:
            now = clock(device)
            told = {"seconds": now - before, "bytes": memory_now(device)}
            print(json.dumps(told), flush=True)
            before = now

    model.memorize(text(), piece=min(block, default_piece(model.config)), progress=tell)


def clock(device: str) -> float:
    """Seconds, when the device has done what it was given."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def summarise(blocks: Sequence[dict[str, Any]], block: int, span: int) -> dict[str, Any]:
    """Speed of the last `span` blocks over that of the first after `span` of warm-up; memory since."""
    speeds = [block / each["seconds"] for each in blocks]
    memory = [each["bytes"] for each in blocks[span:]]
    first, last = spread(speeds[span : 2 * span]), spread(speeds[-span:])
    return {
        "tokens_per_second": spread(speeds[span:]),
        "first_tokens_per_second": first,
        "last_tokens_per_second": last,
        "speed_of_last_over_first": last["median"] / first["median"],
        "resident_largest_over_smallest": max(memory) / min(memory),
        "resident_bytes": spread(memory),
    }


def parts(blocks: Sequence[dict[str, Any]], block: int, span: int) -> list[tuple[int, float, float]]:
    """Tokens read, median tokens a second and resident bytes, of each `span` blocks."""
    found = []
    for start in range(0, len(blocks) - span + 1, span):
        part = blocks[start : start + span]
        speed = statistics.median(block / each["seconds"] for each in part)
        found.append(((start + span) * block, speed, max(each["bytes"] for each in part)))
    return found


def show(record: dict[str, Any]) -> None:
    """What came of it, as people read it."""
    rows = []
    for kind, found in record["kinds"].items():
        rows.append(
            [
                kind,
                told(found["first_tokens_per_second"]),
                told(found["last_tokens_per_second"]),
                f"{found['speed_of_last_over_first']:.3f}",
                f"{found['resident_bytes']['median'] / MIB:,.0f}",
                f"{found['resident_largest_over_smallest']:.3f}",
            ]
        )
    heads = ["", "first tokens/s", "last tokens/s", "last / first", "resident MiB", "most / least"]
    table(f"{record['tokens']:,} tokens, one after the other", heads, rows)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        read_on(*json.loads(sys.argv[2]))
    else:
        sys.exit(main())
