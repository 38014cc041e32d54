"""Training whole models of equal width, beside the others: tokens a second and peak memory.

`python benchmarks/training.py --help`. Notable here:

- A step is forward, loss, backward, AdamW (fused, as the Trainer takes it) and zero_grad, on random
  tokens. Four layers of width 256, vocabulary 256; `contenders.py` says what else. Models of equal
  width have not equally many parameters: the record tells how many.
- The process keeps freed memory, as `everlong train` does, for all contenders (--allocator default:
  it does not).
- Over lengths, MAG is set beside two full-attention Llamas of as many parameters: one is wider all
  over, in Llama's proportions, the other has the same width and a wider MLP alone.
- A contender that fails is told and left out. Memory is measured of a few alone, of all with --full.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from checks import check_reading
from common import (
    MATRIX,
    MIB,
    Step,
    begin,
    fresh_process,
    installed,
    matrix_product,
    parser,
    peak_of_steps,
    product_rate,
    ratio,
    save,
    some_of,
    spread,
    table,
    time_in_turns,
    told,
)
from contenders import (
    MODELS,
    TINY_SIZES,
    ModelSizes,
    build_model,
    model_of,
    quiet_transformers,
    same_shape_llama,
    same_size_llama,
    titans_config,
)
from everlong.allocator import keep_freed_memory

BASE, RIVAL, WIDE_MLP = "llama", "titans-pytorch-mac", "llama with a wider MLP alone"
CHECKED = ("mac", "mag", "mal", "lmm", "lm2")
BATCH = {"tiny": (2, 48), "quick": (2, 2048), "full": (2, 2048)}
LENGTHS = {
    "tiny": (32, 64),
    "quick": (4096, 16384),
    "full": (1024, 2048, 4096, 8192, 16384, 32768),
}
LONG, LONG_ROUNDS = 8192, 3  # from so many tokens on, so many samples suffice
MEMORY_RUNS = {"tiny": 1, "quick": 1, "full": 3}
MEMORY_OF = {  # starting a process takes seconds
    "tiny": (BASE, "mac", RIVAL),
    "quick": (BASE, "mac", "mag", "lmm", RIVAL),
    "full": MODELS,
}
PARTS = ("models", "lengths")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure the models, then the lengths; write the record after each, print the tables."""
    made = parser(__doc__, {"tiny": 2, "quick": 3, "full": 7})
    made.add_argument(
        "--models", type=some_of(MODELS), default=",".join(MODELS), help="default: %(default)s"
    )
    made.add_argument(
        "--parts", type=some_of(PARTS), default=",".join(PARTS), help="default: %(default)s"
    )
    made.add_argument("--allocator", choices=("keep", "default"), default="keep")
    options = begin("training", made, arguments)
    options.record["keeps_freed_memory"] = options.allocator == "keep" and keep_freed_memory()
    sizes = TINY_SIZES if options.size == "tiny" else ModelSizes()
    options.record |= {"sizes": asdict(sizes), "gate": check_reading(CHECKED, options.device)}
    if "models" in options.parts:
        names = installed(options.models)
        options.record["models"] = found = measure_models(names, sizes, options)
        save(options)
        show_models(found)
    if "lengths" in options.parts:
        options.record["lengths"] = lengths = []
        for tokens in LENGTHS[options.size]:
            lengths.append(measure_length(tokens, sizes, options))
            save(options)
        show_lengths(lengths)
    save(options, say=True)
    return 0


def measure_models(names: Sequence[str], sizes: ModelSizes, options: Any) -> dict[str, Any]:
    """Peak memory of each in processes of their own, then their times in turns."""
    device, (batch, tokens) = options.device, BATCH[options.size]
    steps: dict[str, Step] = {}
    memory: dict[str, list[int]] = {}
    parameters = {}
    for name in names:
        arguments = (name, asdict(sizes), batch, tokens, device, options.allocator)
        runs = range(MEMORY_RUNS[options.size] if name in MEMORY_OF[options.size] else 0)
        try:
            peaks = [fresh_process("training", "memory_of", *arguments) for _ in runs]
            step, count = model_step(name, sizes, batch, tokens, device)
            if not peaks:
                step()  # whether it works
        except Exception as error:
            print(f"{name} left out: {error}", file=sys.stderr)
            continue
        steps[name], parameters[name] = step, count
        if peaks:
            memory[name] = peaks
    steps[MATRIX] = matrix_product(device)
    samples = time_in_turns(steps, options.rounds, device)
    return {
        "batch": batch,
        "tokens": tokens,
        "parameters": parameters,
        **summarise(batch * tokens, samples, memory, device),
        "samples": {"seconds_per_step": samples, "bytes_above_imports": memory},
    }


def model_step(name: str, sizes: ModelSizes, batch: int, tokens: int, device: str) -> tuple[Step, int]:
    """A training step of a model, and how many parameters that has."""
    import torch

    torch.manual_seed(0)
    model = build_model(name, sizes)
    step = training_step(name, model, batch, tokens, sizes.vocabulary, device)
    return step, sum(parameter.numel() for parameter in model.parameters())


def loss_of(name: str, model: Any) -> Callable[[Any], Any]:
    """The loss of ids [B, T]; a model that takes the last token for a label gets one more."""
    if name == "titans-pytorch-mac":
        return lambda ids: model(with_label(ids), return_loss=True)
    if name.startswith("open-titans"):
        return lambda ids: model(with_label(ids), return_loss=True).loss
    return lambda ids: model(input_ids=ids, labels=ids, use_cache=False).loss


def with_label(ids: Any) -> Any:
    """Ids and one more."""
    import torch

    return torch.cat([ids, ids[:, :1]], 1)


def training_step(name: str, model: Any, batch: int, tokens: int, vocabulary: int, device: str) -> Step:
    """Forward, loss, backward, AdamW, zero_grad on random tokens."""
    import torch

    model = model.to(device).train()
    for parameter in model.parameters():
        # Heads of titans-pytorch and OpenTitans share memory at first; AdamW wants their own.
        parameter.data = parameter.data.contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(vocabulary, (batch, tokens), device=device)
    loss = loss_of(name, model)

    def step() -> None:
        loss(ids).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def memory_of(
    name: str, sizes: Mapping[str, Any], batch: int, tokens: int, device: str, allocator: str
) -> int:
    """Peak bytes of a few steps above what the imports left; for a process of its own."""
    if allocator == "keep":
        keep_freed_memory()
    # A small step first: it brings in whatever else is imported late.
    model_step(name, TINY_SIZES, *BATCH["tiny"], device)[0]()
    return peak_of_steps(
        lambda: model_step(name, ModelSizes(**sizes), batch, tokens, device)[0], device
    )


def summarise(
    tokens: int,
    samples: Mapping[str, Sequence[float]],
    memory: Mapping[str, Sequence[int]],
    device: str,
) -> dict[str, Any]:
    """What the table shows, from the samples."""
    peaks = {name: spread(runs) for name, runs in memory.items()}
    names = [name for name in samples if name != MATRIX]
    found: dict[str, Any] = {
        "matrix_product_rate": product_rate(samples[MATRIX], device),
        "tokens_per_second": {name: spread([tokens / s for s in samples[name]]) for name in names},
        "peak_bytes_above_imports": peaks,
    }
    for base in (BASE, RIVAL):
        if base in names:
            found[f"speed_over_{base}"] = {name: ratio(samples, name, base) for name in names}
    if BASE in peaks:
        base_peak = peaks[BASE]["median"]
        found["bytes_above_llama"] = {name: peak["median"] - base_peak for name, peak in peaks.items()}
    return found


def measure_length(tokens: int, sizes: ModelSizes, options: Any) -> dict[str, Any]:
    """MAG and Llamas of as many parameters, on one text of so many tokens."""
    import torch

    quiet_transformers()
    torch.manual_seed(0)
    mag = titans_config("mag", sizes)
    llamas = {BASE: same_shape_llama(mag, sizes), WIDE_MLP: same_size_llama(mag, sizes)}
    configs = {"mag": mag, **llamas}
    models = {name: model_of(config) for name, config in configs.items()}
    steps = {
        name: training_step(name, model, 1, tokens, sizes.vocabulary, options.device)
        for name, model in models.items()
    }
    rounds = min(options.rounds, LONG_ROUNDS) if tokens >= LONG else options.rounds
    samples = time_in_turns(steps, rounds, options.device)
    return {
        "tokens": tokens,
        "parameters": {name: model.num_parameters() for name, model in models.items()},
        "tokens_per_second": {name: spread([tokens / s for s in samples[name]]) for name in steps},
        "shapes": {name: [c.hidden_size, c.intermediate_size] for name, c in configs.items()},
        "speed_over": {name: ratio(samples, "mag", name) for name in llamas},
        "samples": samples,
    }


def show_models(found: Mapping[str, Any]) -> None:
    """The models as people read them."""
    rows = []
    for name, speed in found["tokens_per_second"].items():
        above = found.get("bytes_above_llama", {}).get(name)
        peak = found["peak_bytes_above_imports"].get(name)
        rows.append(
            [
                name,
                f"{found['parameters'][name] / 1e6:.2f}M",
                told(speed),
                *(
                    told(found.get(f"speed_over_{base}", {}).get(name), ".2f", "x")
                    for base in (BASE, RIVAL)
                ),
                "-" if peak is None else f"{peak['median'] / MIB:,.0f}",
                "-" if above is None else f"{above / MIB:+,.0f}",
            ]
        )
    heads = ["", "parameters", "tokens/s", "of llama's", f"of {RIVAL}'s", "peak MiB", "over llama's"]
    table(f"A training step of {found['batch']} x {found['tokens']:,} tokens", heads, rows)


def show_lengths(lengths: Sequence[Mapping[str, Any]]) -> None:
    """The lengths as people read them."""
    names = ("mag", BASE, WIDE_MLP)
    rows = [
        [f"{row['tokens']:,}"]
        + [told(row["tokens_per_second"][name]) for name in names]
        + [told(row["speed_over"][name], ".2f", "x") for name in names[1:]]
        for row in lengths
    ]
    counts = ", ".join(f"{count:,}" for count in lengths[0]["parameters"].values())
    heads = ["tokens", "MAG, tokens/s", "Llama", "its MLP wider", "MAG is faster by", "and by"]
    table(f"A training step on one text; parameters: {counts}", heads, rows)


if __name__ == "__main__":
    sys.exit(main())
