"""The state of a neural memory between calls."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import register_dataclass

from everlong.ops.decay import Gates, chunk_coefficients

FORMAT = "everlong.neural_memory.1"


@dataclass(frozen=True)
class NeuralMemoryState:
    """Everything a neural memory needs to go on reading where it stopped.

    Weights and momentum stand as they were at the start of the open chunk; the open chunk's tokens
    are kept as factors of their gradients and their gates, in slots 0 ... position - 1 of C. A
    full chunk is closed at once, so 0 <= position < C. All tensors have the batch first.

    Shapes: `weights`, `momentum` per layer [B, H, in, out]; `inputs` per layer [B, H, C, in];
    `errors` per layer [B, H, C, out]; gates [B, H, L, C]; `conv_tail` [B, J-1, N] or None;
    `position` [B], integers on the CPU, so that no step waits for a device to learn its phase.
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
    position: Tensor

    @classmethod
    def initial(
        cls,
        weights: Sequence[Tensor],
        chunk_size: int,
        *,
        momentum: bool | Sequence[Tensor] = True,
        decay: bool = True,
    ) -> "NeuralMemoryState":
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
            position=torch.zeros(batch, dtype=torch.long),
        )

    @property
    def batch_size(self) -> int:
        """Number of rows, B."""
        return self.weights[0].shape[0]

    def check_batch(self, batch: int) -> None:
        """Raise ValueError when the state is not for so many rows."""
        if self.batch_size != batch:
            raise ValueError(
                f"state was built for batch {self.batch_size} but the input has batch {batch}: take "
                "rows with state.select(rows), or pass state=None to start from an empty memory"
            )

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

    def current(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...] | None]:
        """M_t and S_t after the last token read, the open chunk's tokens included."""
        last = (self.position.to(self.device) - 1).clamp(min=0)
        empty = (self.position == 0).to(self.device).view(-1, 1, 1, 1)
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

    def map(self, function: Callable[[Tensor], Tensor]) -> "NeuralMemoryState":
        """The state with `function` applied to every tensor, `position` included."""

        def apply(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(function(item) for item in value)
            return None if value is None else function(value)

        return replace(self, **{f.name: apply(getattr(self, f.name)) for f in fields(self)})

    def select(self, rows: Tensor | Sequence[int]) -> "NeuralMemoryState":
        """The rows with these indices, in this order (repeats allowed)."""
        index = torch.as_tensor(rows, dtype=torch.long)
        if index.numel() and not -self.batch_size <= index.min() <= index.max() < self.batch_size:
            raise ValueError(
                f"rows must lie in 0 ... {self.batch_size - 1} for a state of batch "
                f"{self.batch_size}, got {index.tolist()}"
            )
        index = index % self.batch_size
        return self.map(lambda tensor: tensor.index_select(0, index.to(tensor.device)))

    def repeat(self, n: int) -> "NeuralMemoryState":
        """Each row n times in a row (as beams want them): a b -> a a b b."""
        return self.map(lambda tensor: tensor.repeat_interleave(n, 0))

    def detach(self) -> "NeuralMemoryState":
        """The same values without their history: gradients stop here."""
        return self.map(Tensor.detach)

    def to(self, device: torch.device | str) -> "NeuralMemoryState":
        """The state on another device (`position` stays on the CPU)."""
        return replace(self.map(lambda tensor: tensor.to(device)), position=self.position)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name: `weights.0`, ..., `position`."""
        named: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                named |= {f"{field.name}.{i}": item for i, item in enumerate(value)}
            elif value is not None:
                named[field.name] = value
        return named

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file."""
        tensors = {n: t.detach().cpu().contiguous().clone() for n, t in self.tensors().items()}
        save_file(tensors, path, metadata={"format": FORMAT, "layers": json.dumps(len(self.weights))})

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "NeuralMemoryState":
        """Read a state written by `save`.

        Raises FileNotFoundError, or ValueError when the file is damaged or holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no memory state at {path}")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{path} is not a readable safetensors file ({error}): it is damaged, cut short or "
                "something else; save the state again with state.save(path)"
            ) from error
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{path} holds no neural memory state of format {FORMAT!r} (its metadata: {metadata})"
            )
        return cls.from_tensors(named, json.loads(metadata["layers"])).to(device)

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor], layers: int) -> "NeuralMemoryState":
        values: dict[str, Any] = {}
        for field in fields(cls):
            if f"{field.name}.0" in named:
                values[field.name] = tuple(named[f"{field.name}.{i}"] for i in range(layers))
            else:
                values[field.name] = named.get(field.name)
        return cls(**values)


register_dataclass(NeuralMemoryState)
