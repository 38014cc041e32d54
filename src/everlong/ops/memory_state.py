"""The state of a neural memory between calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from everlong.ops.decay import Gates, chunk_coefficients
from everlong.ops.state import PerRow, State, check_position, check_tensor, check_tuple, per_row


@dataclass(frozen=True)
class NeuralMemoryState(State):
    """Everything a neural memory needs to go on reading where it stopped.

    Weights and momentum stand as they were at the start of the open chunk; the open chunk's tokens
    are kept as factors of their gradients and their gates, in slots 0 ... position - 1 of C. A
    full chunk is closed at once, so 0 <= position < C. All tensors have the batch first.

    Shapes: `weights`, `momentum` per layer [B, H, in, out]; `inputs` per layer [B, H, C, in];
    `errors` per layer [B, H, C, out]; gates [B, H, L, C]; `conv_tail` [B, J-1, N] or None;
    `position`: an integer, or [B] on the CPU where rows differ.
    `momentum` and `log_eta` are None without momentum, `log_retain` without forgetting.
    """

    weights: tuple[Tensor, ...]
    momentum: tuple[Tensor, ...] | None
    inputs: tuple[Tensor, ...]
    errors: tuple[Tensor, ...]
    theta: Tensor
    log_retain: Tensor | None
    log_eta: Tensor | None
    conv_tail: Tensor | None
    position: PerRow

    @classmethod
    def initial(
        cls,
        weights: Sequence[Tensor],
        chunk_size: int,
        *,
        momentum: bool | Sequence[Tensor] = True,
        decay: bool = True,
    ) -> NeuralMemoryState:
        """An empty open chunk on top of `weights` (per layer [B, H, in, out]).

        `momentum`: True starts S at zero, False is a memory without momentum, tensors start there.
        """
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        first = weights[0]
        batch, heads = first.shape[:2]

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch, heads, *shape, dtype=first.dtype, device=first.device)

        gates = (len(weights), chunk_size)
        if momentum is True:
            momentum = [torch.zeros_like(weight) for weight in weights]
        elif momentum is False:
            momentum = ()
        return cls(
            weights=tuple(weights),
            momentum=tuple(momentum) if momentum else None,
            inputs=tuple(zeros(chunk_size, w.shape[2]) for w in weights),
            errors=tuple(zeros(chunk_size, w.shape[3]) for w in weights),
            theta=zeros(*gates),
            log_retain=zeros(*gates) if decay else None,
            log_eta=zeros(*gates) if momentum else None,
            conv_tail=None,
            position=0,
        )

    def check_fields(self) -> None:
        """Raise ValueError where the fields do not fit each other; weights and C say how."""
        check_tuple("weights", self.weights)
        for i, weight in enumerate(self.weights):
            check_tensor(f"weights.{i}", weight, (None,) * 4)
        check_tensor("theta", self.theta, (None,) * 4)
        (batch, heads, size), chunk = self.weights[0].shape[:3], self.chunk_size
        if self.dtype not in (torch.float32, torch.float64) or not (size and chunk):
            raise ValueError(
                "a state's memory is of float32 or float64, of size 1 or more, and has room for a "
                f"token: got {self.dtype}, size {size} and room for {chunk}"
            )
        check = partial(check_tensor, device=self.device, dtype=self.dtype)
        widths = [size, *(weight.shape[3] for weight in self.weights[:-1]), size]
        shapes: dict[str, list[tuple[int, int]]] = {
            "weights": list(pairwise(widths)),
            "momentum": list(pairwise(widths)),
            "inputs": [(chunk, width) for width in widths[:-1]],
            "errors": [(chunk, width) for width in widths[1:]],
        }
        if self.momentum is None and self.log_eta is None:
            del shapes["momentum"]
        for name, wanted in shapes.items():
            check_tuple(name, getattr(self, name), len(wanted))
            for i, (x, shape) in enumerate(zip(getattr(self, name), wanted, strict=True)):
                check(f"{name}.{i}", x, (batch, heads, *shape))
        for name, gate in zip(Gates._fields, self.gates, strict=True):
            if gate is not None or (name == "log_eta" and self.momentum is not None):
                check(name, gate, (batch, heads, len(self.weights), chunk))
        if self.conv_tail is not None:
            check_tensor("conv_tail", self.conv_tail, (batch, None, None), self.device)
        check_position(self.position, batch, chunk)

    @property
    def gates(self) -> Gates:
        """The open chunk's gates, [B, H, L, C] each."""
        return Gates(self.theta, self.log_retain, self.log_eta)

    @property
    def chunk_size(self) -> int:
        """Capacity of the open chunk, C."""
        return self.theta.shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights, momentum and rows."""
        return self.weights[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are (`position` is always on the CPU)."""
        return self.weights[0].device

    @property
    def positions(self) -> Tensor:
        """`position` row by row, [B] on the CPU."""
        return per_row(self.position, self.batch_size)

    def current(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        """M_t and S_t after the last token read, the open chunk's tokens included."""
        self.check()
        if isinstance(self.position, int) and not self.position:
            return self.weights, self.momentum
        with torch.autocast(self.device.type, enabled=False):
            return self._current()

    def _current(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        positions = self.positions.to(self.device)
        last = (positions - 1).clamp(min=0)
        empty = (positions == 0).view(-1, 1, 1, 1)
        # Unfilled slots hold zeros: theta = 0 writes nothing, but S would be added on and on, so M
        # is read at the row of the last real token instead of the chunk's last row.
        coefficients = chunk_coefficients(self.gates)
        row = last.view(-1, 1, 1).expand(-1, *self.theta.shape[1:3])
        take = row.unsqueeze(-1)
        memory_carry = coefficients.memory_carry.gather(-1, take)
        write = coefficients.write.gather(
            -2, take.unsqueeze(-1).expand(*take.shape, self.chunk_size)
        ).squeeze(-2)
        weights, momentum = [], []
        for layer, weight in enumerate(self.weights):
            z, error = self.inputs[layer], self.errors[layer]
            new = memory_carry[:, :, layer, :, None] * weight
            new = new + (z * write[:, :, layer, :, None]).mT @ error
            if self.momentum is not None and coefficients.momentum_carry is not None:
                carry = coefficients.momentum_carry.gather(-1, take)[:, :, layer, :, None]
                new = new + carry * self.momentum[layer]
            weights.append(torch.where(empty, weight, new))
        if self.momentum is None or self.log_eta is None:
            return tuple(weights), None
        # eta = 1 and theta = 0 in the unfilled slots: S at the chunk's end is S at the last token.
        for layer, start in enumerate(self.momentum):
            final_carry, final_write = coefficients.final_carry, coefficients.final_write
            assert final_carry is not None and final_write is not None
            z, error = self.inputs[layer], self.errors[layer]
            momentum.append(
                final_carry[:, :, layer, None, None] * start
                + (z * final_write[:, :, layer, :, None]).mT @ error
            )
        return tuple(weights), tuple(momentum)

    def insert(
        self,
        inputs: Sequence[Tensor],
        errors: Sequence[Tensor],
        gates: Gates,
        start: int | Tensor,
        count: int | Tensor,
    ) -> NeuralMemoryState:
        """The state with new rows in slots start ... start + count - 1 of the open chunk, which is
        not closed here. `start` and `count` are integers, or [B] where rows differ."""

        def put(buffer: Tensor, new: Tensor, dim: int) -> Tensor:
            length, size = new.shape[dim], buffer.shape[dim]
            shape = [-1 if i == dim else 1 for i in range(buffer.dim())]
            if length == 1 and torch.compiler.is_compiling() and isinstance(start, int):
                # Whose program for one slot is that for all.
                here = torch.arange(size, device=buffer.device) == start
                return torch.where(here.view(shape), new, buffer)
            if isinstance(start, int):
                before, after = buffer.narrow(dim, 0, start), size - start - length
                return torch.cat([before, new, buffer.narrow(dim, size - after, after)], dim)
            source = torch.arange(size, device="cpu") - start[:, None]
            fresh = (source >= 0) & (source < torch.as_tensor(count, device="cpu")[:, None])
            shape[0] = buffer.shape[0]
            source = source.clamp(0, length - 1).to(buffer.device).view(shape).expand_as(buffer)
            return torch.where(fresh.to(buffer.device).view(shape), new.gather(dim, source), buffer)

        def put_gate(buffer: Tensor | None, new: Tensor | None) -> Tensor | None:
            return None if buffer is None or new is None else put(buffer, new, 3)

        return replace(
            self,
            inputs=tuple(put(b, n, 2) for b, n in zip(self.inputs, inputs, strict=True)),
            errors=tuple(put(b, n, 2) for b, n in zip(self.errors, errors, strict=True)),
            theta=put(self.theta, gates.theta, 3),
            log_retain=put_gate(self.log_retain, gates.log_retain),
            log_eta=put_gate(self.log_eta, gates.log_eta),
            position=self.position + count,
        )

    def reopen(self, weights: Sequence[Tensor], momentum: Sequence[Tensor] | None) -> NeuralMemoryState:
        """An empty open chunk on top of new weights and momentum."""
        fresh = NeuralMemoryState.initial(
            weights,
            self.chunk_size,
            momentum=False if momentum is None else momentum,
            decay=self.log_retain is not None,
        )
        return replace(fresh, conv_tail=self.conv_tail)

    def close(self) -> NeuralMemoryState:
        """The open chunk ends here, however full: the next token is the first of a new one."""
        return self.reopen(*self.current())


register_dataclass(NeuralMemoryState)
