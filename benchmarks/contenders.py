"""What is measured: layers and models of everlong and of the others, at equal sizes.

The layers and models have the same shapes, not the same work. everlong's gates act at every token and
each token reads the memory as it stands then; titans-pytorch and OpenTitans average their gates over a
chunk and read the weights of the chunk's start. Mamba2 and Gated DeltaNet are the pure PyTorch code of
`transformers`: their state is a matrix, where the memory here is a network.
"""

from dataclasses import dataclass
from typing import Any

from common import OURS, Step, memory_operations

# The most that a step of titans-pytorch's or OpenTitans' memory takes. At 1, which they have by
# themselves, they may overflow within a text of random tokens; the work is the same.
RIVAL_RATE = 0.1
TITANS = ("lmm", "mac", "mag", "mal")
LAYERS = (OURS, "titans-pytorch", "mamba2", "gated-deltanet")
MODELS = (
    "llama",
    "mac",
    "mag",
    "mal",
    "lmm",
    "lm2",
    "titans-pytorch-mac",
    "open-titans-mac",
    "open-titans-mag",
    "mamba2",
    "gated-deltanet",
)


@dataclass(frozen=True)
class LayerCase:
    """A layer and its input, [batch, tokens, hidden_size]."""

    batch: int = 2
    tokens: int = 1024
    hidden_size: int = 384
    num_heads: int = 6
    chunk_size: int = 64
    depth: int = 2
    expansion: int = 4

    @property
    def head_dim(self) -> int:
        """K."""
        return self.hidden_size // self.num_heads

    def training_operations(self) -> int:
        """Useful operations of a forward and backward pass of the memory alone."""
        return 3 * memory_operations(
            tokens=self.batch * self.tokens,
            heads=self.num_heads,
            head_dim=self.head_dim,
            depth=self.depth,
            expansion=self.expansion,
            chunk=self.chunk_size,
        )


@dataclass(frozen=True)
class ModelSizes:
    """Of all models; what a kind of model does not have, it leaves out."""

    hidden_size: int = 256
    intermediate_size: int = 688
    layers: int = 4
    heads: int = 4
    vocabulary: int = 256
    memory_heads: int = 4
    depth: int = 2
    expansion: int = 4
    chunk_size: int = 64
    segment: int = 512
    window: int = 512
    persistent: int = 4
    slots: int = 64  # of LM2's bank

    @property
    def head_dim(self) -> int:
        """Of the attention."""
        return self.hidden_size // self.heads


TINY_SIZES = ModelSizes(32, 64, 2, 2, 32, 2, 2, 2, 8, 16, 16, 2, 4)


def layer_step(name: str, case: LayerCase, device: str) -> Step:
    """The contender's training step: forward, and backward to the parameters and the input."""
    import torch

    torch.manual_seed(0)
    layer = build_layer(name, case).to(device).train()
    shape = (case.batch, case.tokens, case.hidden_size)
    x = torch.randn(shape, device=device, requires_grad=True)
    gradient = torch.randn(shape, device=device)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x.grad = None
        y = layer(x)
        (y[0] if isinstance(y, tuple) else y).backward(gradient)

    return step


def build_layer(name: str, case: LayerCase) -> Any:
    """A layer by its name, one of LAYERS."""
    if name == OURS:
        from everlong import NeuralMemory

        return NeuralMemory(
            hidden_size=case.hidden_size,
            num_heads=case.num_heads,
            depth=case.depth,
            expansion=case.expansion,
            chunk_size=case.chunk_size,
        )
    if name == "titans-pytorch":
        from titans_pytorch import NeuralMemory as RivalMemory

        return RivalMemory(
            dim=case.hidden_size,
            heads=case.num_heads,
            dim_head=case.head_dim,
            chunk_size=case.chunk_size,
            batch_size=case.chunk_size,
            default_step_transform_max_lr=RIVAL_RATE,
            default_model_kwargs=network_of(case),
        )
    if name == "mamba2":
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

        quiet_transformers()
        config = mamba2_config(case.hidden_size, case.chunk_size, num_hidden_layers=1)
        return Mamba2Mixer(config, layer_idx=0)
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    from everlong.models.gated_deltanet import GatedDeltaNetConfig

    quiet_transformers()
    return Qwen3NextGatedDeltaNet(
        GatedDeltaNetConfig(
            hidden_size=case.hidden_size, num_attention_heads=case.num_heads, num_hidden_layers=1
        ),
        layer_idx=0,
    )


def network_of(sizes: LayerCase | ModelSizes) -> dict[str, Any]:
    """The memory network as titans-pytorch and OpenTitans have it."""
    return {"depth": sizes.depth, "expansion_factor": float(sizes.expansion)}


def mamba2_config(hidden_size: int, chunk_size: int, **fields: Any) -> Any:
    """Mamba2 of a width, twice as wide within, otherwise as its paper has it."""
    from transformers import Mamba2Config

    head_dim = min(64, 2 * hidden_size)
    fields = {"state_size": 128, "n_groups": 1, **fields}
    return Mamba2Config(
        hidden_size=hidden_size,
        head_dim=head_dim,
        num_heads=2 * hidden_size // head_dim,
        expand=2,
        chunk_size=chunk_size,
        **fields,
    )


def quiet_transformers() -> None:
    """Without the hints that faster kernels may be installed."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def titans_config(kind: str, sizes: ModelSizes) -> Any:
    """everlong's configuration of a model all of whose layers are of one kind, one of TITANS."""
    from everlong import TitansConfig

    return TitansConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden_size,
        intermediate_size=sizes.intermediate_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        layer_types=[kind] * sizes.layers,
        sliding_window=sizes.window,
        segment_length=sizes.segment,
        num_persistent_tokens=sizes.persistent,
        num_memory_heads=sizes.memory_heads,
        memory_depth=sizes.depth,
        memory_expansion=sizes.expansion,
        chunk_size=sizes.chunk_size,
    )


def config_of(name: str, sizes: ModelSizes) -> Any:
    """The configuration of a model that is one of `transformers`; full attention for "llama"."""
    if name in TITANS:
        return titans_config(name, sizes)
    common = {
        "vocab_size": sizes.vocabulary,
        "num_hidden_layers": sizes.layers,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if name == "mamba2":
        return mamba2_config(sizes.hidden_size, sizes.chunk_size, **common)
    common |= {
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_attention_heads": sizes.heads,
        "tie_word_embeddings": False,
    }
    if name == "gated-deltanet":
        from everlong.models.gated_deltanet import GatedDeltaNetConfig

        return GatedDeltaNetConfig(**common)
    if name == "lm2":
        from everlong import LM2Config

        return LM2Config(
            **common,
            segment_length=sizes.segment,
            num_memory_slots=sizes.slots,
            num_memory_heads=sizes.memory_heads,
        )
    from transformers import LlamaConfig

    return LlamaConfig(**common, max_position_embeddings=1 << 20)


def same_shape_llama(other: Any, sizes: ModelSizes) -> Any:
    """As `same_size_llama`, wider by as many heads as keep the MLP's width in proportion."""
    proportion = sizes.intermediate_size / sizes.hidden_size
    found = [same_size_llama(other, sizes)]
    for more in range(1, 4):
        try:
            found.append(same_size_llama(other, sizes, heads=sizes.heads + more))
        except ValueError:  # too wide for so few parameters
            break
    return min(found, key=lambda c: abs(c.intermediate_size / c.hidden_size - proportion))


def same_size_llama(
    other: Any, sizes: ModelSizes, within: float = 0.01, heads: int | None = None
) -> Any:
    """A full-attention Llama with the parameters and vocabulary of another configuration.

    heads: how many it has, each as wide as there (default: as many). Its MLP is as wide as the count
    takes. Raises ValueError if the counts are further apart than `within`.
    """
    from everlong.models.sizes import count_parameters, model_config

    wanted = count_parameters(other)
    fields = config_of("llama", sizes).to_dict()
    for name in ("intermediate_size", "model_type", "transformers_version", "architectures"):
        fields.pop(name, None)
    if heads is not None:
        width = sizes.hidden_size // sizes.heads
        fields |= {"hidden_size": heads * width, "head_dim": width}
        fields |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    config = model_config("llama", parameters=wanted, **fields)
    found = count_parameters(config)
    if abs(found - wanted) > within * wanted:
        raise ValueError(f"no Llama of {wanted:,} parameters at this width: the nearest has {found:,}")
    return config


def build_model(name: str, sizes: ModelSizes) -> Any:
    """A model by its name, one of MODELS."""
    quiet_transformers()
    if name == "titans-pytorch-mac":
        return titans_pytorch_mac(sizes)
    if name.startswith("open-titans"):
        return open_titans(name, sizes)
    return model_of(config_of(name, sizes))


def model_of(config: Any) -> Any:
    """The causal language model of a configuration."""
    from transformers import AutoModelForCausalLM

    import everlong.models  # noqa: F401  (registers its own)

    return AutoModelForCausalLM.from_config(config)


def titans_pytorch_mac(sizes: ModelSizes) -> Any:
    """titans-pytorch's model, a memory in every layer; what is not said here is its default."""
    from titans_pytorch import MemoryAsContextTransformer

    return MemoryAsContextTransformer(
        num_tokens=sizes.vocabulary,
        dim=sizes.hidden_size,
        depth=sizes.layers,
        heads=sizes.heads,
        dim_head=sizes.head_dim,
        segment_len=sizes.segment,
        num_persist_mem_tokens=sizes.persistent,
        neural_memory_segment_len=sizes.chunk_size,
        neural_memory_batch_size=sizes.chunk_size,
        neural_memory_kwargs=memory_arguments(sizes),
    )


def open_titans(name: str, sizes: ModelSizes) -> Any:
    """OpenTitans' MAC or MAG, a memory in every layer.

    Its MAC's memory has segments for chunks. What that memory gives is added to long-term tokens alone,
    of which there are none by default: here there are as many as persistent ones.
    """
    common = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": 4 * sizes.hidden_size,  # which it multiplies by 2/3
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "dim_head": sizes.head_dim,
        "num_persist_mem_tokens": sizes.persistent,
        "neural_memory_layers": list(range(1, sizes.layers + 1)),
    }
    if name == "open-titans-mac":
        from open_titans.models.titans_mac.configuration_mac import TitansMACConfig
        from open_titans.models.titans_mac.modeling_mac import TitansMACModel

        config = TitansMACConfig(
            segment_len=sizes.segment, num_longterm_mem_tokens=sizes.persistent, **common
        )
        return TitansMACModel(config, **memory_arguments(sizes))
    from open_titans.models.titans_mag.configuration_mag import TitansMAGConfig
    from open_titans.models.titans_mag.modeling_mag import TitansMAGModel

    config = TitansMAGConfig(
        window_size=sizes.window,
        neural_memory_segment_len=sizes.chunk_size,
        neural_memory_batch_size=sizes.chunk_size,
        **common,
    )
    return TitansMAGModel(config, **memory_arguments(sizes))


def memory_arguments(sizes: ModelSizes) -> dict[str, Any]:
    """The memory of a layer as titans-pytorch and OpenTitans have it."""
    heads = sizes.memory_heads
    head_dim = sizes.hidden_size // heads
    return {
        "heads": heads,
        "dim_head": head_dim,
        "default_step_transform_max_lr": RIVAL_RATE,
        "default_model_kwargs": network_of(sizes),
    }
