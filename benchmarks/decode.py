"""One token at a time: at position 1,000 and far on, in batches, and beside Llama with its cache.

`python benchmarks/decode.py --help`. Notable here:

- Each kind of layer has a process of its own, which reads on and on. Its resident memory is taken at
  each position, after some tokens were decoded there. The places for all caches are taken before.
- Another text is read first: pieces of many sizes leave holes in the heap of the C library, which fill
  up over tens of thousands of tokens and belong to no position.
- Positions are moved up to where segments and chunks stand as at the first: a state that is the same
  size at every such place can be told from one that grows.
- With --full, steps compiled by `torch.compile` take turns with the model's own.
- Llama's cache (`DynamicCache`) is not read but filled with random keys and values of its shape: that
  costs the same a token. After each sample it is cut back to its length.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from checks import check_reading
from common import (
    MIB,
    Step,
    begin,
    fresh_process,
    parser,
    ratio,
    save,
    seconds_of,
    some_of,
    spread,
    table,
    time_in_turns,
    told,
)
from contenders import TINY_SIZES, TITANS, ModelSizes, build_model
from reading import bytes_of, decode, memory_now

POSITIONS = {
    "tiny": (20, 100),
    "quick": (1_000, 100_000),
    "full": (1_000, 10_000, 100_000, 1_000_000),
}
CONTEXTS = {"tiny": (16, 64), "quick": (1024, 32768), "full": (1024, 4096, 16384, 32768, 131072)}
ROWS = {"tiny": (1, 2), "quick": (1, 4, 16), "full": (1, 4, 16)}
KINDS = {"tiny": ("lmm", "mac"), "quick": ("mac",), "full": TITANS}
COMPILED = {"tiny": (), "quick": (), "full": TITANS}  # takes minutes each
BLOCK = 32  # tokens a sample
HEAP_TOKENS = 100_000  # read before, for the heap
LLAMA = "llama"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure positions, batches and Llama; write the record after each, print the tables."""
    made = parser(__doc__, {"tiny": 2, "quick": 15, "full": 40})
    made.add_argument(
        "--kinds", type=some_of(TITANS), help="default: mac; with --full " + ",".join(TITANS)
    )
    made.add_argument(
        "--positions", type=int, nargs="+", help="default: 1000 100000; with --full up to 1000000"
    )
    options = begin("decode", made, arguments)
    kinds = options.kinds or KINDS[options.size]
    positions = options.positions or POSITIONS[options.size]
    sizes = asdict(TINY_SIZES if options.size == "tiny" else ModelSizes())
    options.record |= {"sizes": sizes, "gate": check_reading(kinds, options.device)}
    options.record["positions"] = found = {}
    rounds, device = options.rounds, options.device
    for kind in kinds:
        arguments = (kind, sizes, positions, rounds, device)
        found[kind] = fresh_process("decode", "measure_positions", *arguments)
        save(options)
    show_positions(found)
    options.record["contexts"] = [
        fresh_process("decode", "measure_turns", (*kinds, LLAMA), sizes, context, 1, rounds, device)
        for context in CONTEXTS[options.size]
    ]
    save(options)
    options.record["batches"] = [
        fresh_process("decode", "measure_turns", kinds, sizes, positions[0], rows, rounds, device)
        for rows in ROWS[options.size]
    ]
    save(options)
    options.record["compiled"] = [
        fresh_process("decode", "measure_compiled", kind, sizes, positions[0], rounds, device)
        for kind in COMPILED[options.size]
        if kind in kinds
    ]
    show_turns(options.record)
    save(options, say=True)
    return 0


def measure_positions(
    kind: str, sizes: dict[str, Any], positions: Sequence[int], rounds: int, device: str
) -> list[dict[str, Any]]:
    """Read from position to position; the time of a token, resident memory and state at each."""
    import copy

    import torch

    torch.manual_seed(0)
    shape = ModelSizes(**sizes)
    model = build_model(kind, shape).to(device).eval()
    period = math.lcm(shape.segment, shape.chunk_size)
    positions = [position + (positions[0] - position) % period for position in positions]

    def random_ids(tokens: int) -> Any:
        return torch.randint(shape.vocabulary, (1, tokens), device=device)

    def read(tokens: int, cache: Any = None) -> Any:
        """In one call, of blocks, so that no long text is held."""
        blocks = (random_ids(min(8192, tokens - start)) for start in range(0, tokens, 8192))
        return model.memorize(blocks, cache)

    def resident_after(cache: Any) -> int:
        """While decoding over the borders of chunks, windows and segments."""
        decode(model, copy.deepcopy(cache), random_ids(2 * shape.segment))
        return memory_now(device)

    with torch.inference_mode():
        cache = read(positions[0])
        caches = [copy.deepcopy(cache) for _ in positions]
        # The heap as it will be: beside the copies there is to be room for reading and decoding.
        resident_after(read(min(HEAP_TOKENS, positions[-1])))
        memory, state, before = [], [], positions[0]
        for i, position in enumerate(positions):
            cache = read(position - before, cache)
            caches[i], before = copy.deepcopy(cache), position
            state.append(bytes_of(cache))
            memory.append(resident_after(cache))
        steps: dict[str, Step] = {
            str(position): lambda each=each: decode(model, each, random_ids(BLOCK))
            for position, each in zip(positions, caches, strict=True)
        }
        samples = time_in_turns(steps, rounds, device)
    first = str(positions[0])
    return [
        {
            "position": position,
            "seconds_per_token": spread([s / BLOCK for s in samples[str(position)]]),
            "time_over_first": ratio(samples, first, str(position)),
            "resident_bytes": memory[i],
            "state_bytes": state[i],
            "samples": samples[str(position)],
        }
        for i, position in enumerate(positions)
    ]


def measure_turns(
    kinds: Sequence[str], sizes: dict[str, Any], context: int, rows: int, rounds: int, device: str
) -> dict[str, Any]:
    """Models that take turns behind so many tokens, with a batch of so many rows."""
    import torch

    torch.manual_seed(0)
    shape = ModelSizes(**sizes)
    steps: dict[str, Step] = {}
    state = {}
    with torch.inference_mode():
        for kind in kinds:
            model = build_model(kind, shape).to(device).eval()
            if kind == LLAMA:
                cache = filled_cache(model, rows, context)
            else:
                cache = model.memorize(torch.randint(shape.vocabulary, (rows, context), device=device))
            state[kind] = bytes_of(cache)
            steps[kind] = block_step(model, cache, rows, shape.vocabulary, kind == LLAMA)
        samples = time_in_turns(steps, rounds, device)
    found: dict[str, Any] = {
        "context": context,
        "rows": rows,
        "seconds_per_token": {kind: spread([s / BLOCK for s in samples[kind]]) for kind in kinds},
        "tokens_per_second": {
            kind: spread([rows * BLOCK / s for s in samples[kind]]) for kind in kinds
        },
        "state_bytes": state,
        "samples": samples,
    }
    if LLAMA in kinds:
        found["speed_over_llama"] = {kind: ratio(samples, kind, LLAMA) for kind in kinds}
    return found


def measure_compiled(
    kind: str, sizes: dict[str, Any], context: int, rounds: int, device: str
) -> dict[str, Any]:
    """A model's own steps and those that `torch.compile` makes of it, in turns."""
    import copy

    import torch

    torch.manual_seed(0)
    shape = ModelSizes(**sizes)
    model = build_model(kind, shape).to(device).eval()
    compiled = torch.compile(model, dynamic=True)
    with torch.inference_mode():
        cache = model.memorize(torch.randint(shape.vocabulary, (1, context), device=device))
        more = torch.randint(shape.vocabulary, (1, 2 * shape.segment), device=device)
        # Over the borders of chunks and segments, each of which is compiled.
        seconds = seconds_of(lambda: decode(compiled, copy.deepcopy(cache), more), 1, device)
        steps = {
            name: block_step(read, copy.deepcopy(cache), 1, shape.vocabulary, False)
            for name, read in ((kind, model), (f"{kind}, compiled", compiled))
        }
        samples = time_in_turns(steps, rounds, device)
    return {
        "context": context,
        "rows": 1,
        "seconds_to_compile": seconds,
        "seconds_per_token": {name: spread([s / BLOCK for s in samples[name]]) for name in samples},
        "speed_over_eager": {name: ratio(samples, name, kind) for name in samples},
        "samples": samples,
    }


def filled_cache(model: Any, rows: int, context: int) -> Any:
    """A cache of a Llama as if it had read so many tokens: random keys and values."""
    import torch
    from transformers import DynamicCache

    config = model.config
    shape = (rows, config.num_key_value_heads, context, config.head_dim)
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        cache.update(*torch.randn(2, *shape, device=model.device).unbind(), layer)
    if cache.get_seq_length() != context:
        raise RuntimeError(f"the cache holds {cache.get_seq_length()} tokens, not {context}")
    return cache


def block_step(model: Any, cache: Any, rows: int, vocabulary: int, cut: bool) -> Step:
    """Decode a block; cut: and take it out of the cache again."""
    import torch

    def step() -> None:
        decode(model, cache, torch.randint(vocabulary, (rows, BLOCK), device=model.device))
        if cut:
            cache.crop(-BLOCK)

    return step


def show_positions(found: dict[str, list[dict[str, Any]]]) -> None:
    """Positions as people read them."""
    rows = []
    for kind, places in found.items():
        for place in places:
            growth = place["resident_bytes"] - places[0]["resident_bytes"]
            rows.append(
                [
                    f"{kind} at {place['position']:,}",
                    milliseconds(place["seconds_per_token"]),
                    told(place["time_over_first"], ".3f", "x"),
                    f"{place['resident_bytes'] / MIB:,.0f} ({growth / MIB:+.1f})",
                    f"{place['state_bytes'] / MIB:.2f}",
                ]
            )
    table("Decoding", ["", "ms a token", "of the first", "resident MiB", "state MiB"], rows)


def show_turns(record: dict[str, Any]) -> None:
    """Contexts and batches as people read them."""
    heads = ["", "rows", "ms a step", "tokens/s", "faster than Llama by", "state MiB"]
    rows = []
    for found in record["compiled"]:
        for name, seconds in found["seconds_per_token"].items():
            faster = told(found["speed_over_eager"][name], ".2f", "x")
            rows.append([name, "1", milliseconds(seconds), "", f"({faster} of its own steps)", ""])
    for found in [*record["contexts"], *record["batches"]]:
        for kind, seconds in found["seconds_per_token"].items():
            rows.append(
                [
                    f"{kind} behind {found['context']:,}",
                    str(found["rows"]),
                    milliseconds(seconds),
                    told(found["tokens_per_second"][kind]),
                    told(found.get("speed_over_llama", {}).get(kind), ".2f", "x"),
                    f"{found['state_bytes'][kind] / MIB:,.1f}",
                ]
            )
    table("Decoding, beside Llama and in batches", heads, rows)


def milliseconds(seconds: dict[str, float]) -> str:
    """Of a spread of seconds."""
    return told({key: 1000 * value for key, value in seconds.items()}, ".2f")


if __name__ == "__main__":
    sys.exit(main())
