"""What stops a run before it is spoilt: what is not finite, and memories that explode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from everlong.models.stateful import BlockOutput, StatefulDecoder

from .checkpoint import describe_last
from .processes import ProcessLost, any_process
from .progress import TrainingProgress
from .recipe import Guards
from .sharding import whole


class NonFiniteError(FloatingPointError):
    """A loss, a gradient or a memory is not finite, or a memory too large; the message says where and
    what is left."""


class Watch(TrainerCallback):
    """Stops training at a loss, gradient or memory that is not finite, and at a memory too large,
    before it reaches the weights. Steps whose loss or gradient is not finite are left out where
    `guards` allows for it.

    A memory is what a layer hands on: the largest entry of each layer's state is taken as it goes by.
    progress: told of each loss that is not finite, and of each step that is left out.
    """

    def __init__(self, guards: Guards, progress: TrainingProgress) -> None:
        self.guards = guards
        self.progress = progress
        self.skipped = 0  # in a row
        self._largest: dict[int, Tensor] = {}  # by layer
        self._hooks: list[Any] = []

    @property
    def lenient(self) -> bool:
        """Whether steps may be left out."""
        return self.guards.skipped_steps > 0

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any
    ) -> None:
        self._hooks = [
            layer.register_forward_hook(lambda _, __, output, i=i: self._take(i, output))
            for decoder in model.modules()
            if isinstance(decoder, StatefulDecoder)
            for i, layer in enumerate(getattr(decoder, "layers", []))
        ]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def check_loss(self, loss: Tensor, model: nn.Module, inputs: dict[str, Any], trainer: Any) -> None:
        """Raise NonFiniteError for a loss or memory of this step, naming the layer."""
        what = self._memory()
        bad = what is not None or not (self.lenient or bool(torch.isfinite(loss)))
        if not torch.isfinite(loss):
            self.progress.not_finite(trainer.state.global_step + 1)
        if not any_process(bad):
            return
        if not bad:
            raise ProcessLost
        if what is None:
            # A sharded model needs all processes for a pass.
            plain = trainer.accelerator.unwrap_model(model)
            where = None if trainer.is_fsdp_enabled else first_not_finite(plain, inputs)
            what = f"the loss is {loss.item()}"
            what += f", first of all the output of {where}" if where else ""
        raise NonFiniteError(_stopped(what, trainer.args, trainer.state))

    def check_gradient(self, model: nn.Module, args: Any, state: Any) -> None:
        """Raise NonFiniteError for a gradient of this step, naming its parameter, or leave it out.

        To be asked before the Trainer clips: a norm of infinity makes zeros of finite gradients.
        """
        if args.fp16:
            return  # the gradient scaler leaves such steps out itself
        named = [(name, each.grad) for name, each in model.named_parameters()]
        grads = [(name, grad) for name, grad in named if grad is not None]
        norm = whole(torch.nn.utils.get_total_norm([grad for _, grad in grads]))
        if torch.isfinite(norm):
            self.skipped = 0
            return
        culprits = [name for name, grad in grads if not torch.isfinite(whole(grad)).all()]
        what = f"the gradient of {culprits[0]} is" if culprits else "the gradient's norm is"
        what = f"{what} {norm.item()}"
        self.skipped += 1
        if self.skipped > self.guards.skipped_steps:
            raise NonFiniteError(_stopped(what, args, state))
        for parameter in model.parameters():  # AdamW passes over what has no gradient
            parameter.grad = None
        self.progress.skipped(state.global_step + 1, what)

    def check_weights(self, model: nn.Module, args: Any, state: Any) -> None:
        """Raise NonFiniteError for a model that the last update has spoilt, naming the parameter. To be
        asked before it is written: no loss of it is known yet."""
        names = [name for name, each in model.named_parameters() if not _is_finite(whole(each))]
        if not any_process(bool(names)):
            return
        if not names:
            raise ProcessLost
        raise NonFiniteError(_stopped(f"{names[0]} is not finite", args, state, state.global_step))

    def _take(self, layer: int, output: Any) -> None:
        # Layers of LM2's positions also hand out what the next layer's bank wants to know.
        out = output if isinstance(output, BlockOutput) else output[0]
        floats = [
            leaf
            for leaf in tree_leaves(out.state)
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel()
        ]
        if floats:
            entries = [leaf.detach().abs().amax().float() for leaf in floats]
            before = self._largest.get(layer, entries[0])  # of other pieces of the text
            self._largest[layer] = torch.stack([before, *entries]).max()

    def _memory(self) -> str | None:
        """What is wrong with the memories that went by since the last call."""
        largest, self._largest = self._largest, {}
        if not largest:
            return None
        values = torch.stack(list(largest.values())).cpu()
        bad = values > self.guards.max_memory
        if not self.lenient:  # otherwise its loss is not finite either, and the step is left out
            bad |= ~torch.isfinite(values)
        if not bad.any():
            return None
        first = int(bad.nonzero()[0])
        return (
            f"the memory of layer {list(largest)[first]} has an entry of {values[first].item():.3g}, "
            f"more than guards.max_memory ({self.guards.max_memory:g})"
        )


def first_not_finite(model: nn.Module, inputs: dict[str, Any]) -> str | None:
    """The name of the module whose output is the first that is not finite, where no part of it has
    one; None if a second pass over the inputs finds none."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        # A module ends after its parts, so the first to be seen has no part with such an output.
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        floats = [each for each in tensors if each.is_floating_point()]
        if not found and any(not torch.isfinite(each).all() for each in floats):
            found.append(name or "the model")

    with torch.no_grad(), _hooked(model, look):
        model(**inputs)
    return found[0] if found else None


@contextmanager
def _hooked(model: nn.Module, look: Any) -> Iterator[None]:
    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: look(name, output))
        for name, module in model.named_modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_finite(tensor: Tensor) -> bool:
    """Whether all of it is. Its ends are: a mask of a large one would take as much memory again."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.detach())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _stopped(what: str, arguments: Any, state: Any, step: int | None = None) -> str:
    """step: of which it was found; the one behind those that are done if not given."""
    step = state.global_step + 1 if step is None else step
    return (
        f"{what} at step {step}; {describe_last(arguments.output_dir)}. A lower "
        "training.learning_rate or training.max_grad_norm, or more training.warmup_steps, may help"
    )
