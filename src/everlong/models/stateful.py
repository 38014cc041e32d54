"""What every model with a memory does the same way, whatever its layers are.

A layer reads rows from where its state stopped and hands out a state: `BlockOutput`. Here: states in
a cache, documents in rows of their own, gradients cut where that is wanted, `memorize` and `generate`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from everlong.layers.weight import OwnStart
from everlong.models.cache import MemoryCache
from everlong.models.card import write_card
from everlong.models.keywords import check_keywords, document_starts, mask_behind
from everlong.models.reading import Told, cut_text, default_piece, show_reading, text_length
from everlong.ops import current_backend, use_backend
from everlong.ops.documents import Documents
from everlong.ops.state import INTEGERS, State, check_kind

Own = TypeVar("Own", bound=State)
Module = TypeVar("Module", bound=nn.Module)
FAINT = 1e-3  # of the full strength of writing: below it the price of `memory_write_cost` fades


class BlockOutput(NamedTuple):
    """y [B, T, D], the state to go on from, how strongly each token was written ([B, T, H, L], None
    without a memory), and what the memory did, where that was asked."""

    y: Tensor
    state: Any
    strength: Tensor | None = None
    trace: Any = None

    def map(self, function: Callable[[Tensor], Tensor]) -> "BlockOutput":
        """With `function` applied to all that is [B, T, ...]."""
        return join_pieces([self], lambda parts: function(parts[0]))


def cast_parameters(model: Module, dtype: torch.dtype) -> Module:
    """The model with parameters of another type, in place. Its buffers stay as they are: rotary
    frequencies are not to be rounded."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def begin(
    x: Tensor,
    state: Any,
    kind: type[Own],
    initial: Callable[[Tensor], Own],
    fresh: Tensor | None,
) -> Own:
    """The state of each row of x to go on from: `initial` without one, and in rows where `fresh`
    [B] (on the CPU) holds. Raises ValueError for a state of another kind."""
    if state is None:
        return initial(x).expand(x.shape[0])
    check_kind("kind", state, kind)
    if state.first.device != x.device:
        raise ValueError(
            f"the state is on {state.first.device}, the input on {x.device}: use "
            f"cache.to({str(x.device)!r})"
        )
    if fresh is not None and bool(fresh.any()):
        return state.restart(fresh, initial(x).expand(x.shape[0]))
    return state


def cut_pieces(x: Tensor, lengths: Tensor | None, size: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """x [B, T, D] in pieces of `size` tokens, at least one, and how many of each are real in each row
    ([B]; None: all)."""
    for start in range(0, max(x.shape[1], 1), size):
        count = None if lengths is None else (lengths - start).clamp(0, size)
        yield x[:, start : start + size], count


def join_pieces(
    outputs: list[BlockOutput], join: Callable[[list[Tensor]], Tensor] | None = None
) -> BlockOutput:
    """One output from those of pieces in a row; `join` puts a tensor's pieces together (one behind
    the other if None)."""
    if join is None:
        if len(outputs) == 1:
            return outputs[0]
        join = lambda parts: torch.cat(parts, 1)  # noqa: E731
    # Pieces without a token have nothing to say of any.
    strengths = [out.strength for out in outputs if out.strength is not None]
    traces = [out.trace for out in outputs if out.trace is not None]
    strength = join(strengths) if strengths else None
    trace = None
    if traces:
        trace = type(traces[0])(*(_join_field(parts, join) for parts in zip(*traces, strict=True)))
    return BlockOutput(join([out.y for out in outputs]), outputs[-1].state, strength, trace)


def _join_field(parts: Sequence[Any], join: Callable[[list[Tensor]], Tensor]) -> Any:
    """A trace's field of pieces in a row: a tensor, None, or a tuple of what happened now and then."""
    if isinstance(parts[0], tuple):
        return sum(parts, ())
    return None if parts[0] is None else join(list(parts))


@dataclass
class StatefulModelOutput(BaseModelOutputWithPast):
    """As the base class, and what the memories did.

    written: [B, T], how strongly each token was written: the mean over all memories of
    log(1 + s / 0.001), s = `BlockOutput.strength`, 0 at pads; None where no memory tells.
    memory: with output_memory=True, for each layer what its memory did, token by token: a `MemoryTrace`
    (Titans) or `BankTrace` (LM2), [B, T, ...] each, or None where it has none.
    """

    written: Tensor | None = None
    memory: tuple[Any, ...] | None = None


@dataclass
class StatefulCausalLMOutput(CausalLMOutputWithPast):
    """As the base class, with `memory` as in `StatefulModelOutput`.

    price: in training with `memory_write_cost`, what writing costs. `loss` has it in it; a loss of
    one's own is to be given it. Without labels it is the full price from the first step on.
    """

    memory: tuple[Any, ...] | None = None
    price: Tensor | None = None


class _Priced(torch.autograd.Function):
    """Hidden states and what was written for them, as they are: no gradient reaches the first unless
    one reaches the other, so that nobody's loss can leave out the price of writing without a word."""

    @staticmethod
    def forward(hidden: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
        return hidden.view_as(hidden), written.view_as(written)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if grads[1] is None:
            raise ValueError(
                "the loss lacks the price of writing that memory_write_cost asks for: give the model "
                "labels and take the loss that it returns (without label smoothing or a loss of the "
                "trainer's own), add `price` of its output to another loss, or set "
                "model.config.memory_write_cost = 0"
            )
        return grads


@torch.no_grad()
def _likelihood(logits: Tensor, labels: Tensor, ignored: int) -> Tensor:
    """exp of minus the mean loss of each row, [B], of logits [B, T, V] and labels [B, T]."""
    labels = labels.to(logits.device)
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=ignored, reduction="none"
    )
    asked = (labels != ignored).sum(1)
    return torch.exp(-losses.view_as(labels).float().sum(1) / asked.clamp(min=1))


class StatefulPreTrained:
    """Mixin of model families, before `PreTrainedModel`."""

    config: Any
    num_parameters: Callable[[], int]
    _init_weights: Callable[[nn.Module], None]
    # Of a call: what counts tokens stays on the CPU, wherever a layer is.
    _skip_keys_device_placement = ["past_key_values", "lengths", "fresh"]
    _is_stateful = True  # a memory cannot be rolled back: no assisted decoding

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in `transformers`, and a model card (README.md) where there is none."""
        super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", True):
            write_card(save_directory, self.config, self.num_parameters())

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """As in `transformers`; our layers take no other rules than those of our models."""
        if isinstance(module, OwnStart) and module.lacks_start:
            self._init_weights(module)
            module.is_started = True
        super()._initialize_weights(module, is_custom_code)  # type: ignore[misc]

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        function = kwargs.get("gradient_checkpointing_func")
        if getattr(function, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant=True cannot checkpoint a layer that hands out its memory: leave it out, "
                "or say use_reentrant=False"
            )
        if function is not None:
            kwargs["gradient_checkpointing_func"] = partial(_by_one_backend, function)
        super()._set_gradient_checkpointing(*args, **kwargs)  # type: ignore[misc]


def _by_one_backend(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
    """checkpoint(function, *args), which is computed again by the back end of the forward pass: others
    keep other tensors."""
    if not torch.compiler.is_compiling():
        function = partial(_by, current_backend(), function)
    return checkpoint(function, *args)


def _by(backend: str, function: Callable[..., Any], *args: Any) -> Any:
    with use_backend(backend):
        return function(*args)


class _WithAll(torch.autograd.Function):
    """y, on whose way back parameters come by, without a gradient of it."""

    @staticmethod
    def forward(y: Tensor, *parameters: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.count = len(inputs) - 1

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy, *[None] * ctx.count


def _with_all(model: nn.Module, y: Tensor) -> Tensor:
    """y; in training in several processes with every parameter behind it.

    `DistributedDataParallel` waits for each, and some have no part in a call: what writes a bank in a
    text of one segment, where a memory starts in a text that goes on.
    """
    parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not (parallel and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return y
    return _WithAll.apply(y, *(p for p in model.parameters() if p.requires_grad))


class StatefulDecoder:
    """Mixin of decoders: `layers` that read (x, state, lengths, fresh, trace)."""

    config: Any
    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    training: bool

    @property
    def num_states(self) -> int:
        """States in a cache: one for each layer."""
        return len(self.layers)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_memory: bool = False,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> StatefulModelOutput:
        """Read tokens; `past_key_values` of one call continues in the next, any number of tokens each.

        Args:
            input_ids: [B, T], or inputs_embeds: [B, T, D].
            attention_mask: [B, T], or [B, past + T] with the past's columns first; 0 at pads, on
                either side. Pads are not read: a row is read as it would be alone.
            position_ids: [B, T]; a 0 at a real token starts a document, whose memory is empty and
                whose attention sees nothing before it. Positions themselves are counted here.
            past_key_values: the states to go on from; changed in place.
            use_cache: make states for a next call where none are given; default the config's.
            output_memory: also return what each memory did, token by token (slow).
            output_hidden_states: also return what enters the first layer and what leaves each, the
                last one's normed.
            kwargs: what `transformers` passes to any model: return_dict=False for a tuple, and where
                packed documents begin (cu_seq_lens_q, seq_idx), as position_ids of 0 would say it.

        Raises ValueError for a cache of another model or batch, and for keywords with another meaning
        than those above, by name.
        """
        check_keywords(self, kwargs, output_hidden_states)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        if x.dim() != 3 or x.shape[2] != self.config.hidden_size:
            raise ValueError(
                f"inputs_embeds must be [B, T, {self.config.hidden_size}], got {list(x.shape)}"
            )
        position_ids = document_starts(position_ids, kwargs, x, past_key_values)
        outputs, cache = self.read(
            x, attention_mask, position_ids, past_key_values, use_cache, output_memory
        )
        if isinstance(cache, MemoryCache):
            cache.note_ids(input_ids, x.shape[1])
        y = outputs[-1].y
        strengths = [_price(out.strength).to(y.device) for out in outputs if out.strength is not None]
        written = torch.stack(strengths).mean(0) if strengths else None
        last = _with_all(self, self.norm(y))  # type: ignore[arg-type]
        cost = getattr(self.config, "memory_write_cost", 0.0)
        if self.training and cost and written is not None and written.requires_grad:
            last, written = _Priced.apply(last, written)
        hidden = (x, *(out.y for out in outputs[:-1]), last)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        return StatefulModelOutput(
            last_hidden_state=last,
            past_key_values=cache,
            hidden_states=hidden if output_hidden_states else None,
            written=written,
            memory=tuple(out.trace for out in outputs) if output_memory else None,
        )

    def embed(self, input_ids: Tensor | None) -> Tensor:
        """input_ids [B, T] as vectors [B, T, D]. Raises ValueError for one outside the vocabulary, on
        the CPU; elsewhere nobody looks, which would cost a wait for the device."""
        if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.dtype not in INTEGERS:
            got = (
                f"{input_ids.dtype} {list(input_ids.shape)}"
                if isinstance(input_ids, Tensor)
                else "none"
            )
            raise ValueError(
                f"input_ids must be a tensor [B, T] of int64 or int32 token ids, got {got}"
            )
        try:
            return self.embed_tokens(input_ids)
        except IndexError as error:
            assert input_ids is not None
            raise ValueError(
                f"input_ids must lie in 0 ... {self.config.vocab_size - 1}, the vocabulary, got "
                f"{int(input_ids.min())} ... {int(input_ids.max())}: take the model's own tokenizer"
            ) from error

    def read(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: MemoryCache | None,
        use_cache: bool | None,
        trace: bool,
    ) -> tuple[list[BlockOutput], MemoryCache | None]:
        """The output of each layer for x [B, T, D], and the cache, which is changed in place.

        Arguments as those of the model's `forward`. Raises ValueError for a cache of another model
        or batch.
        """
        use_cache = self.config.use_cache if use_cache is None else use_cache
        cache = past_key_values
        if cache is None and use_cache:
            cache = MemoryCache(self.num_states)
        states: list[State | None] = [None] * self.num_states
        past = 0
        if cache is not None:
            self.check_cache(cache, x.shape[0])
            states = [layer.state for layer in cache.layers]
            past = cache.get_seq_length()
        documents = _documents(x, attention_mask, position_ids, past, states[0] is not None)
        outputs = self._read(x, states, documents, trace)
        if cache is not None:
            for cached, out in zip(cache.layers, outputs, strict=True):
                cached.state = out.state
                cached.seen += x.shape[1]
        return outputs, cache

    def _read(
        self, x: Tensor, states: list[State | None], documents: Documents | None, trace: bool
    ) -> list[BlockOutput]:
        """All layers over all tokens, [B, T, ...]: each document in a row of its own."""
        if documents is None:
            return self._run(x, states, None, trace)
        read = []
        for group in documents.groups():
            begin = [group.begin(state) for state in states]
            outputs = self._run(group.gather(x), begin, group, trace)
            read.append([(group, out) for out in outputs])
        return [
            join_pieces([out.map(group.scatter) for group, out in layer], _sum)._replace(
                state=Documents.end([(group, out.state) for group, out in layer])
            )
            for layer in zip(*read, strict=True)
        ]

    def _run(
        self, x: Tensor, states: list[State | None], group: Documents | None, trace: bool
    ) -> list[BlockOutput]:
        """All layers over rows aligned left, with the gradients cut where the config wants it."""
        pieces = []
        fresh, lengths = (None, None) if group is None else (group.fresh, group.lengths)
        for piece, count in self._pieces(x, lengths):
            if self.config.backprop_segments and torch.is_grad_enabled():
                states = [None if state is None else state.detach() for state in states]
            outputs = self.through_layers(piece, states, count, fresh, trace)
            states, fresh = [out.state for out in outputs], None
            pieces.append(outputs)
        return [join_pieces(list(parts)) for parts in zip(*pieces, strict=True)]

    def through_layers(
        self,
        x: Tensor,
        states: Sequence[Any],
        lengths: Tensor | None,
        fresh: Tensor | None,
        trace: bool,
        *more: Any,
    ) -> list[BlockOutput]:
        """All layers over rows aligned left; `more`: what each layer wants to know besides."""
        outputs: list[BlockOutput] = []
        for layer, state in zip(self.layers, states, strict=True):
            outputs.append(layer(x, state, *more, lengths=lengths, fresh=fresh, trace=trace))
            x = outputs[-1].y
        return outputs

    def _pieces(self, x: Tensor, lengths: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Tokens, and the rows' lengths, between one cut of the gradients and the next."""
        segments = self.config.backprop_segments
        if not segments or not torch.is_grad_enabled():
            yield x, lengths
            return
        yield from cut_pieces(x, lengths, segments * self.config.segment_length)

    def check_cache(self, cache: Any, batch: int) -> None:
        """Refuse, with a ValueError, a cache of another kind, model or batch."""
        if not isinstance(cache, MemoryCache):
            raise ValueError(
                f"past_key_values must be a MemoryCache, got {type(cache).__name__}: pass None for an "
                "empty memory, or the past_key_values that an earlier call of this model returned"
            )
        if len(cache.layers) != self.num_states:
            raise ValueError(
                f"the cache has {len(cache.layers)} states but the model {self.num_states}: it belongs "
                "to another model"
            )
        cache.check_states()
        held = cache.batch_size
        if (
            held != -1 and held != batch
        ):  # one by one, or a compiler takes a batch of its own for another
            raise ValueError(
                f"the cache was built for batch {cache.batch_size} but the input has batch {batch}: "
                "take rows with cache.batch_select_indices(rows), or pass None for an empty memory"
            )
        cache.check(self.config.state_fields())


def _price(strength: Tensor) -> Tensor:
    """[B, T] of [B, T, H, L]: each e-fold of a strength above `FAINT` costs the same.

    A price that is linear fades together with the strength, long before a text of a hundred thousand
    tokens is faint enough; and it is dearest where writing is wanted.
    """
    return torch.log1p(strength / FAINT).mean((-1, -2))


def _sum(parts: list[Tensor]) -> Tensor:
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]


def _new_columns(attention_mask: Tensor, batch: int, tokens: int, past: int) -> Tensor:
    """[B, T] of a mask that may have the past's columns first."""
    if not isinstance(attention_mask, Tensor):
        raise ValueError(f"attention_mask must be a tensor, got a {type(attention_mask).__name__}")
    shape = list(attention_mask.shape)
    if shape not in ([batch, tokens], [batch, past + tokens]):
        raise ValueError(
            f"attention_mask must be [B, T] = {[batch, tokens]} or [B, past + T] = "
            f"{[batch, past + tokens]}, 1 at tokens and 0 at pads, got {shape}"
        )
    return attention_mask[:, shape[1] - tokens :]


def _documents(
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    past: int,
    continued: bool,
) -> Documents | None:
    """The documents in x [B, T, D]; None where each row is one that goes on."""
    batch, tokens = x.shape[:2]
    if attention_mask is None and position_ids is None:
        return None
    real = torch.ones(batch, tokens, dtype=torch.bool, device="cpu")
    if attention_mask is not None:
        columns = _new_columns(attention_mask, batch, tokens, past).cpu()
        real = columns == 1
        if not bool((real | (columns == 0)).all()):
            raise ValueError(
                f"attention_mask must be 1 at tokens and 0 at pads, got {columns.unique().tolist()[:8]}"
            )
    starts = torch.zeros_like(real)
    if position_ids is not None:
        if list(position_ids.shape) not in ([batch, tokens], [1, tokens]):
            raise ValueError(
                f"position_ids must be [B, T] = {[batch, tokens]}, got {list(position_ids.shape)}"
            )
        starts = (position_ids == 0).cpu().expand(batch, -1)
    return Documents.of(real, starts, continued)


class StatefulCausalLM:
    """Mixin of causal language models, before all others: `model` is a `StatefulDecoder`."""

    config: Any
    device: torch.device
    generation_config: Any
    loss_function: Callable[..., Tensor]
    model: Any
    lm_head: nn.Linear
    training: bool
    vocab_size: int

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: MemoryCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_memory: bool = False,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> StatefulCausalLMOutput:
        """As the decoder's `forward`, with logits and, where `labels` [B, T] are given, the loss.

        In training, `memory_write_cost` of a configuration that has one adds its price to the loss; a
        backward pass from another loss, without `price` of the output in it, raises ValueError.
        Labels are token ids, -100 where nothing is asked; they are shifted here. logits_to_keep: how
        many last positions get logits (0: all), or their indices; with labels it must be 0.
        """
        check_keywords(self, kwargs, output_hidden_states)
        if labels is not None and not (isinstance(logits_to_keep, int) and logits_to_keep == 0):
            raise ValueError("labels ask for the logits of all tokens: leave logits_to_keep at 0")
        if isinstance(logits_to_keep, int) and logits_to_keep < 0:
            raise ValueError(f"logits_to_keep must be at least 0, got {logits_to_keep}")
        outputs = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            output_memory,
            output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss, price = None, self._price(outputs.written, logits, labels, attention_mask, kwargs)
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.vocab_size, **kwargs)
            loss = loss if price is None else loss + price.to(loss.device)
        return StatefulCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            memory=outputs.memory,
            price=price,
        )

    def _price(
        self,
        written: Tensor | None,
        logits: Tensor,
        labels: Tensor | None,
        mask: Tensor | None,
        loss: dict[str, Any],
    ) -> Tensor | None:
        """What writing costs in training, a token; `loss`: what the loss was told besides.

        Each row's mean counts as its labels do in the loss (all that is read, without labels), and as
        likely as the row's labels are: however rows are divided into accumulated batches and among
        processes, all of them pay the same.
        """
        cost = getattr(self.config, "memory_write_cost", 0.0)
        if not self.training or not cost or written is None:
            return None
        tokens = written.shape[1]
        real = torch.ones_like(written) if mask is None else mask[:, mask.shape[1] - tokens :]
        read = asked = real.sum(1).to(written.device)
        ignored = loss.get("ignore_index", -100)
        shifted = loss.get("shift_labels")
        if shifted is None and labels is not None:
            shifted = F.pad(labels[:, 1:], (0, 1), value=ignored)
        mean = written.sum(1) / read.clamp(min=1)
        if shifted is not None:
            asked = (shifted != ignored).sum(1).to(written.device)
        if shifted is not None and labels is not None:  # then there are logits of all tokens
            mean = mean * _likelihood(logits, shifted, ignored).to(written.device)
        items = loss.get("num_items_in_batch")
        return cost * (mean * asked).sum() / (asked.sum() if items is None else items)

    @torch.no_grad()  # not inference_mode, whose tensors a later call could not train through
    def memorize(
        self,
        input_ids: Tensor | Iterable[Tensor],
        past_key_values: MemoryCache | None = None,
        attention_mask: Tensor | None = None,
        *,
        piece: int | None = None,
        progress: bool | Told | None = None,
    ) -> MemoryCache:
        """Read a text for what is kept of it: in pieces, in memory that does not grow with the text,
        without logits and without a graph. (Keys of `"full_attention"` layers do grow.)

        Args:
            input_ids: [B, T], on any device: a tensor or a numpy array, which may be a memmap; or an
                iterable of such parts of a text that is not there at once, [B, any number] each.
            past_key_values: the states to go on from; changed in place (where a later part of an
                iterable is refused, those before it have been read).
            attention_mask: [B, T] or [B, past + T], 0 at pads on either side; not with an iterable.
            piece: tokens of each row that are read in one call. Any number gives the same memory;
                default: whole segments and chunks, 2,048 tokens or more (`default_piece`), and first
                what the cache lacks to them.
            progress: True shows a bar on stderr; a function is called after each piece with the tokens
                of each row that were read.

        Returns the cache to go on from: by `generate_from`, another `memorize`, or a call, with
        gradients too. Raises ValueError for ids, a mask or a cache that do not fit.
        """
        size = default_piece(self.config) if piece is None else piece
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"piece must be a whole number of tokens, at least 1, got {piece!r}")
        cache = MemoryCache(self.model.num_states) if past_key_values is None else past_key_values
        length = text_length(input_ids)
        if attention_mask is not None:
            if length is None:
                raise ValueError(
                    "attention_mask goes with input_ids [B, T]: give the whole text as one tensor, or "
                    "each part of it in a call of its own, with its part of the mask"
                )
            batch = len(input_ids)  # type: ignore[arg-type]
            self.model.check_cache(cache, batch)
            attention_mask = torch.as_tensor(attention_mask)
            attention_mask = _new_columns(attention_mask, batch, length, cache.get_seq_length())
        first = size
        if piece is None and isinstance(cache, MemoryCache):
            first -= cache.get_seq_length() % size  # so that all after it are whole
        with show_reading(progress, length) as tell:
            for ids, mask in cut_text(input_ids, attention_mask, first, size, self.device):
                self.model(ids, mask, past_key_values=cache, output_hidden_states=False)
                tell(ids.shape[1])
        return cache.detach()

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """`generate` carries the memory in our cache, unless the user brings one or wants none, and
        reads the prompt in pieces."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} does not hold a "
                "memory: leave it out"
            )
        mask = model_kwargs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(
                "generate goes on from the last column, which is a pad in some rows: pad on the left "
                '(tokenizer.padding_side = "left")'
            )
        if model_kwargs.get("past_key_values") is not None:
            generation_config.use_cache = True  # whatever a configuration says: or all is read again
        elif generation_config.use_cache:
            model_kwargs["past_key_values"] = MemoryCache(self.model.num_states)
        # transformers cuts ids alone, and gives the hidden states of the last piece alone.
        given = {name for name, value in model_kwargs.items() if value is not None}
        whole = "inputs_embeds" in given or generation_config.output_hidden_states
        if "past_key_values" in given and not whole:
            generation_config.prefill_chunk_size = (
                generation_config.prefill_chunk_size or default_piece(self.config)
            )

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `transformers`; with `past_key_values` that have read something, input_ids [B, T] are
        the whole text, whose beginning they have read, or the new tokens alone: these where they are
        fewer than were read, or attention_mask has columns for what was read. The cache is used up.

        Raises ValueError for ids that could be either: `generate_from` takes new tokens, any number.
        """
        cache = kwargs.get("past_key_values")
        if isinstance(cache, MemoryCache):
            if kwargs.get("use_cache") is False:
                raise ValueError(
                    "use_cache=False with past_key_values: the memory that they hold cannot be read "
                    "again from the ids; leave one of them out"
                )
            ids = kwargs.get("input_ids") if inputs is None else inputs
            kwargs["attention_mask"] = mask_behind(cache, ids, kwargs.get("attention_mask"))
        return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]

    def generate_from(
        self,
        past_key_values: MemoryCache,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """`generate` from a cache that has read something: input_ids [B, T] are the new tokens alone.

        attention_mask: [B, T], 0 at pads on the left. The rest, and the result, as `generate`, without
        a token of what the cache has read. The cache itself stays as it is. A cache of one row serves
        any number of rows.
        """
        if not isinstance(past_key_values, MemoryCache) or kwargs.get("use_cache") is False:
            raise ValueError(
                "generate_from goes on from a MemoryCache and keeps what it reads there: give one, and "
                "leave use_cache on"
            )
        if not text_length(input_ids):
            raise ValueError(
                f"generate_from goes on behind new tokens: input_ids must be a tensor [B, T] with at "
                f"least one, got {list(getattr(input_ids, 'shape', ()))}"
            )
        cache = past_key_values.copy()
        batch = input_ids.shape[0]
        if cache.batch_size == 1 and batch > 1:
            cache.batch_repeat_interleave(batch)
        config = kwargs.get("generation_config") or self.generation_config
        copies = [
            kwargs.get(name) or getattr(config, name, None) or 1
            for name in ("num_beams", "num_return_sequences")
        ]
        if cache.batch_size == batch and max(copies) > 1:
            cache.batch_repeat_interleave(max(copies))
        new = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        past = new.new_ones(batch, cache.get_seq_length())
        mask = torch.cat([past, new], 1)
        return self.generate(input_ids, attention_mask=mask, past_key_values=cache, **kwargs)
