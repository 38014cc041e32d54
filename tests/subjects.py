"""What the laws are tried on: a new model or layer joins by one line in SUBJECTS."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from everlong import NeuralMemory, TitansConfig, TitansForCausalLM
from everlong.models import LM2Config, LM2ForCausalLM, RMTConfig, RMTForCausalLM

DEVICE = os.environ.get("EVERLONG_DEVICE", "cpu")  # where the laws are tried
VOCABULARY = 11
CHUNK = 4  # chunk of every memory below
WINDOW = 6  # window of every sliding attention below
SEGMENT = 8  # segment of every memory as context below


@dataclass(frozen=True)
class Subject:
    """Something that reads a sequence and can go on where it stopped.

    precision: Llama's own norms and angles are float32, whatever the parameters are.
    """

    name: str
    build: Callable[[], nn.Module]
    is_model: bool = True
    precision: torch.dtype = torch.float64

    def make(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The module, the same each time, with parameters away from their symmetric start."""
        torch.manual_seed(0)
        module = self.build().to(DEVICE, dtype)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return module.eval()

    def inputs(
        self, batch: int, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float64
    ) -> torch.Tensor:
        """Token ids for a model, rows for a layer."""
        generator = torch.Generator().manual_seed(seed)
        if self.is_model:
            return torch.randint(VOCABULARY, (batch, tokens), generator=generator).to(DEVICE)
        x = torch.randn(batch, tokens, 8, generator=generator, dtype=torch.float64)
        return x.to(DEVICE, dtype)

    def changed(self, x: torch.Tensor, at: int) -> torch.Tensor:
        """x with another token at one place."""
        other = x.clone()
        other[:, at] = (x[:, at] + 1) % VOCABULARY if self.is_model else x[:, at] + 1
        return other

    def read(self, module: nn.Module, x: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        """Logits or rows, and the state to go on from."""
        if not self.is_model:
            return module(x, state)
        out = module(x, past_key_values=state, use_cache=True)
        return out.logits, out.past_key_values

    def read_rows(
        self,
        module: nn.Module,
        x: torch.Tensor,
        mask: torch.Tensor,
        starts: torch.Tensor,
        state: Any = None,
    ) -> tuple[torch.Tensor, Any]:
        """As `read`, of rows with pads (0 in mask) and documents that start where `starts` holds."""
        if not self.is_model:
            return module(x, state, mask=mask, restart=starts)
        positions = torch.where(starts, 0, 1)
        out = module(x, mask, positions, past_key_values=state, use_cache=True)
        return out.logits, out.past_key_values

    def leaves(self, state: Any) -> list[torch.Tensor]:
        """The tensors of a state."""
        if self.is_model:
            state = [layer.state for layer in state.layers]
        leaves = torch.utils._pytree.tree_leaves(state)
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def select(self, state: Any, rows: list[int]) -> Any:
        """The state of some rows (a model's cache changes in place)."""
        if not self.is_model:
            return state.select(rows)
        state.batch_select_indices(torch.tensor(rows))
        return state


def layer(**options: Any) -> Callable[[], nn.Module]:
    """A bare neural memory of width 8."""
    defaults = {"expansion": 2, "chunk_size": CHUNK}
    return lambda: NeuralMemory(8, 2, **defaults | options)


def titans(*layer_types: str, **options: Any) -> Callable[[], nn.Module]:
    """A small Titans model with these layers."""
    return lambda: TitansForCausalLM(
        TitansConfig(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 8,
                "intermediate_size": 12,
                "num_hidden_layers": len(layer_types),
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "layer_types": list(layer_types),
                "sliding_window": WINDOW,
                "segment_length": SEGMENT,
                "num_persistent_tokens": 3,
                "chunk_size": CHUNK,
                "memory_expansion": 2,
            }
            | options
        )
    )


def lm2(**options: Any) -> Callable[[], nn.Module]:
    """A small LM2 of two layers."""
    return lambda: LM2ForCausalLM(
        LM2Config(
            **{
                "vocab_size": VOCABULARY,
                "hidden_size": 8,
                "intermediate_size": 12,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
                "segment_length": SEGMENT,
            }
            | options
        )
    )


def rmt(**options: Any) -> Callable[[], nn.Module]:
    """A small Llama, or model of another model_type, with two rows of memory."""
    own = ("backprop_segments", "segment_length")
    outer = {"segment_length": SEGMENT} | {n: options.pop(n) for n in own if n in options}
    small = GPT2 if options.get("model_type") == "gpt2" else LLAMA
    base = {"vocab_size": VOCABULARY, "eos_token_id": None, **small, **options}
    return lambda: RMTForCausalLM(RMTConfig(base_config=dict(base), num_memory_tokens=2, **outer))


LLAMA = {
    "model_type": "llama",
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
GPT2 = {
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": SEGMENT + 4,
    **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
}

SUBJECTS = [
    Subject("layer", layer(), is_model=False),
    Subject("layer-linear", layer(depth=1), is_model=False),
    Subject("layer-deep", layer(depth=3, gate_by_key=True, conv_kernel=6), is_model=False),
    Subject("layer-bare", layer(conv_kernel=0, momentum=False, decay=False), is_model=False),
    Subject("lmm", titans("lmm", "lmm")),
    Subject("mac", titans("mac", "mac")),
    Subject("mag", titans("mag", "mag")),
    Subject("mal", titans("mal", "mal")),
    Subject("sliding", titans("sliding_attention", "sliding_attention")),
    Subject("full", titans("full_attention")),
    Subject("mac-alone", titans("mac", num_persistent_tokens=0, conv_kernel=0)),
    Subject("hybrid", titans("lmm", "sliding_attention", "full_attention")),
    Subject("hybrid-mac", titans("mac", "sliding_attention", "mag", memory_gate_by_key=True)),
    Subject("hybrid-mal", titans("mal", "full_attention", "mac", memory_depth=1)),
    Subject("lm2", lm2(num_memory_slots=5), precision=torch.float32),
    Subject(
        "lm2-top-k",
        lm2(num_memory_slots=5, memory_top_k=2, num_memory_heads=2),
        precision=torch.float32,
    ),
    Subject(
        "lm2-first-layer",
        lm2(num_memory_slots=5, memory_layers=1, initial_memory_scale=0.5),
        precision=torch.float32,
    ),
    Subject("lm2-identity", lm2(num_memory_slots=9, identity_slots=True), precision=torch.float32),
    Subject("lm2-positions", lm2(memory_addressing="positions"), precision=torch.float32),
    Subject(
        "lm2-released", lm2(memory_addressing="released", num_memory_heads=2), precision=torch.float32
    ),
    Subject("rmt", rmt(), precision=torch.float32),
    Subject("rmt-gpt2", rmt(model_type="gpt2"), precision=torch.float32),
]

# The same with chunks of a usual length, for very long texts.
LONG = [
    Subject("layer", layer(chunk_size=64), is_model=False),
    Subject("layer-linear", layer(depth=1, chunk_size=64), is_model=False),
    Subject("layer-deep", layer(depth=3, chunk_size=64), is_model=False),
    Subject("lmm", titans("lmm", "lmm", chunk_size=64)),
    Subject("mac", titans("mac", chunk_size=64, segment_length=512)),
    Subject("mag", titans("mag", chunk_size=64, sliding_window=512)),
    Subject("mal", titans("mal", chunk_size=64, sliding_window=512)),
    Subject("lm2", lm2(num_memory_slots=5, segment_length=512), precision=torch.float32),
    Subject("rmt", rmt(segment_length=512), precision=torch.float32),
]
