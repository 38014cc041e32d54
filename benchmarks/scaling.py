"""What training the papers' sizes costs, by arithmetic: memory, operations, tokens a second.

`python benchmarks/scaling.py --help`. Nothing runs on a GPU here. Notable:

- Parameters are counted on the meta device, from the presets.
- All layers of a preset are alike. One is run on the CPU, in float32, and counted: its matrix products
  (`torch.utils.flop_counter`, forward and backward, as this code does them) and what autograd keeps of
  it for the backward pass. A model is that times its layers, and a head.
- What a GPU makes of it is assumed, and said so: `PEAK` and `SHARES`.
"""

import argparse
import json
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import AutoModel

from everlong.models import LM2Config, TitansConfig
from everlong.models.presets import lm2_preset_fields, preset_fields
from everlong.models.sizes import count_parameters

RESULTS = Path(__file__).parent / "results"
MODELS = {  # tokens of the papers' trainings; LM2's paper does not say how many
    **{f"titans-{block}-340m": 15e9 for block in ("lmm", "mac", "mag", "mal")},
    **{f"titans-{block}-760m": 30e9 for block in ("lmm", "mac", "mag", "mal")},
    "lm2-1.7b": None,
}
BATCH = 2**19  # tokens of a step
GPUS = 8
PEAK = 989e12  # bfloat16 operations a second of an H100 (SXM, dense), by its data sheet
SHARES = (0.4, 0.1)  # of the peak: large matrix products alone; many small ones
STATE_BYTES = 4 + 4 + 8  # of a parameter: float32 weight, gradient, AdamW's two moments
MIB, GIB = 2**20, 2**30


def attention_forward(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """Operations of the CPU's attention, which the counter of torch does not know; shapes."""
    return sdpa_flop_count(q, k, v)


def attention_backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    """The same of its backward pass."""
    return sdpa_backward_flop_count(grad, q, k, v)


ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}


@dataclass
class Cost:
    """Of a whole model; operations are multiplications and additions."""

    name: str
    layers: int
    parameters: int
    forward: float  # operations a token
    backward: float  # operations a token
    kept: float  # bytes a token, of all layers, for the backward pass
    kept_of_layer: float  # bytes a token, of one
    between: int  # bytes a token, of what goes from layer to layer
    head: int  # bytes a token: logits and their gradient, float32
    state: int  # bytes a sequence, to go on reading from

    @property
    def training(self) -> float:
        """Operations a token, forward and backward."""
        return self.forward + self.backward

    @property
    def kept_with_checkpoints(self) -> float:
        """Bytes a token with gradient checkpointing: what goes into each layer, and one layer's own."""
        return self.layers * self.between + self.kept_of_layer


def main() -> None:
    """Count, print the tables, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help="default: %(default)s")
    parser.add_argument("--tokens", type=int, default=1024, help="of a text; default: %(default)s")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder; default: %(default)s")
    options = parser.parse_args()
    costs = [measure(name, options.tokens) for name in options.models.split(",")]
    print(memory_table(costs, options.tokens), time_table(costs), sep="\n\n")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"scaling-{date.today()}.json"
    found = {"tokens": options.tokens, "models": [asdict(cost) for cost in costs]}
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def configuration(name: str) -> Any:
    """The configuration of a preset."""
    if name.startswith("lm2"):
        return LM2Config(**lm2_preset_fields(name))
    return TitansConfig(**preset_fields(name))


def measure(name: str, tokens: int) -> Cost:
    """Count a preset, on one text of so many tokens."""
    config = configuration(name)
    single = configuration(name).to_dict() | {"num_hidden_layers": 1}
    if name.startswith("lm2"):
        single["memory_layers"] = [0]
    else:
        single["layer_types"] = single["layer_types"][:1]
    single["vocab_size"], single["bos_token_id"], single["eos_token_id"] = 8, None, None
    model = AutoModel.from_config(type(config)(**single)).train()
    forward, backward, kept, state = run(model, tokens)
    layers, head = config.num_hidden_layers, config.vocab_size * config.hidden_size
    return Cost(
        name=name,
        layers=layers,
        parameters=count_parameters(config),
        forward=layers * forward / tokens + 2 * head,
        backward=layers * backward / tokens + 4 * head,
        kept=layers * kept / tokens,
        kept_of_layer=kept / tokens,
        between=4 * config.hidden_size,
        head=2 * 4 * config.vocab_size,
        state=layers * state,
    )


def run(model: torch.nn.Module, tokens: int) -> tuple[int, int, int, int]:
    """Operations forward and backward, bytes kept between, and bytes of the state of a text, all of a
    decoder without a head."""
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # held, so that no address is given out twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(8, (1, tokens))
    with (
        FlopCounterMode(display=False, custom_mapping=ON_CPU) as forward,
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        out = model(ids, use_cache=True)
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as backward:
        out.last_hidden_state.sum().backward()
    leaves = [leaf for layer in out.past_key_values.layers for leaf in tree_leaves(layer.state)]
    state = sum(leaf.numel() * leaf.element_size() for leaf in leaves if torch.is_tensor(leaf))
    size = sum(storage.nbytes() for storage in kept.values())
    return forward.get_total_flops(), backward.get_total_flops(), size, state


def memory_table(costs: list[Cost], tokens: int) -> str:
    """What a GPU has to hold."""
    rows = [
        "| model | parameters | weights, gradients, moments | the same, on each of 8 (FSDP2) | "
        f"kept of {tokens:,} tokens | with checkpointing | their logits | state of a sequence |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cost in costs:
        held = STATE_BYTES * cost.parameters
        parts = [
            cost.name,
            f"{cost.parameters / 1e6:,.1f}M",
            f"{held / GIB:.1f} GiB",
            f"{held / GPUS / GIB:.1f} GiB",
            f"{cost.kept * tokens / GIB:.1f} GiB",
            f"{cost.kept_with_checkpoints * tokens / GIB:.1f} GiB",
            f"{cost.head * tokens / GIB:.1f} GiB",
            f"{cost.state / MIB:,.0f} MiB",
        ]
        rows.append(f"| {' | '.join(parts)} |")
    return "\n".join(rows)


def time_table(costs: list[Cost]) -> str:
    """What a GPU could do in a second, and eight in days."""
    shares = " | ".join(f"tokens/s of a GPU at {share:.0%}" for share in SHARES)
    days = " | ".join(f"days on {GPUS} at {share:.0%}" for share in SHARES)
    rows = [
        f"| model | operations a token, forward | and backward | over 6 x parameters | {shares} | "
        f"the paper's tokens | {days} |",
        "|---" * (5 + 2 * len(SHARES)) + "|",
    ]
    for cost in costs:
        speeds = [PEAK * share / cost.training for share in SHARES]
        tokens = MODELS.get(cost.name)
        parts = [
            cost.name,
            f"{cost.forward / 1e9:.2f} G",
            f"{cost.training / 1e9:.2f} G",
            f"{cost.training / (6 * cost.parameters):.2f}",
            *(f"{speed:,.0f}" for speed in speeds),
            "not given" if tokens is None else f"{tokens / 1e9:.0f}B",
            *("" if tokens is None else f"{tokens / speed / GPUS / 86400:.1f}" for speed in speeds),
        ]
        rows.append(f"| {' | '.join(parts)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
