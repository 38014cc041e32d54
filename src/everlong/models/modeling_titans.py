"""Titans as `transformers` models: a Llama decoder whose layers carry a neural memory."""

from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama.modeling_llama import LlamaMLP

from everlong.layers import Gate, RMSNorm
from everlong.layers.weight import OwnStart
from everlong.models.configuration_titans import TitansConfig
from everlong.models.stateful import (
    BlockOutput,
    StatefulCausalLM,
    StatefulDecoder,
    StatefulPreTrained,
    cut_pieces,
    join_pieces,
)
from everlong.models.titans_blocks import BLOCKS
from everlong.ops import swiglu
from everlong.ops.recompute import recomputed


class TitansMLP(LlamaMLP):
    """Llama's, with its gate in one pass where that is SiLU."""

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, D]."""
        if self.config.hidden_act != "silu":
            return super().forward(x)
        with recomputed(swiglu, self.gate_proj(x), self.up_proj(x)) as y:
            return self.down_proj(y)


class TitansLayer(GradientCheckpointingLayer):
    """x + block(norm(x)), then x + MLP(norm(x)).

    With gradient checkpointing a layer is computed again in the backward pass, and of that layer a
    segment again: its activations are never there for more than one segment.
    """

    def __init__(self, config: TitansConfig, layer_type: str) -> None:
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer = BLOCKS[layer_type](config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = TitansMLP(config)
        # Keys of full attention would be kept once for each segment.
        self.segment = None if layer_type == "full_attention" else config.segment_length

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        lengths: Tensor | None = None,
        fresh: Tensor | None = None,
        trace: bool = False,
    ) -> BlockOutput:
        """x: [B, T, D]. As the block, whose output it gives with its own y."""
        whole = self.segment is None or x.shape[1] <= self.segment
        if whole or not (self.gradient_checkpointing and self.training):
            return self._read(x, state, lengths, fresh, trace)
        assert self.segment is not None
        pieces: list[BlockOutput] = []
        for piece, count in cut_pieces(x, lengths, self.segment):
            pieces.append(
                self._gradient_checkpointing_func(self._read, piece, state, count, fresh, trace)
            )
            state, fresh = pieces[-1].state, None
        return join_pieces(pieces)

    def _read(
        self,
        x: Tensor,
        state: Any,
        lengths: Tensor | None,
        fresh: Tensor | None,
        trace: bool,
    ) -> BlockOutput:
        with self.input_norm.unkept(x) as normed:
            output = self.mixer(normed, state, lengths, fresh, trace)
        x = x + output.y
        with self.mlp_norm.unkept(x) as normed:
            return output._replace(y=x + self.mlp(normed))


class TitansPreTrainedModel(StatefulPreTrained, PreTrainedModel):
    """Initialisation and the facts that `transformers` asks of a model family."""

    config_class = TitansConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["TitansLayer"]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, Gate):
            module.reset_parameters(self.config.initializer_range)
        elif isinstance(module, OwnStart):
            module.reset_parameters()


class TitansModel(StatefulDecoder, TitansPreTrainedModel):
    """The decoder without a head."""

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(TitansLayer(config, kind) for kind in config.layer_types or [])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()


class TitansForCausalLM(StatefulCausalLM, TitansPreTrainedModel, GenerationMixin):
    """The decoder with a language-model head: trains, saves, loads and generates as Llama does."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        self.model = TitansModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
