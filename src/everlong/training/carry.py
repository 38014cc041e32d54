"""Training on streams: the memory of one batch goes on in the next.

Row b of a batch goes on where row b of the process's last batch stopped. States are cut from their
history in between, so that gradients reach back within a batch alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from everlong.models import MemoryCache


class MemoryTrainer(Trainer):
    """A Trainer that can carry a model's memory, and keeps it in its checkpoints.

    `memory` is that of this process's rows behind its last training batch; None: nothing is carried.
    Evaluation neither reads nor changes it.
    """

    memory: MemoryCache | None = None

    def carry_memory(self) -> None:
        """Carry a memory from now on, an empty one at first. Raises ValueError for several devices in
        one process, which would divide its rows anew at each batch."""
        if self.args.n_gpu > 1:
            raise ValueError(
                f"layout: streams wants one device a process, got {self.args.n_gpu}: start with "
                "torchrun --nproc_per_node, or show it one device (CUDA_VISIBLE_DEVICES)"
            )
        self.memory = MemoryCache(self.model.model.num_states)

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """As the Trainer's; the model goes on from the memory and changes it."""
        if self.memory is None:
            return super().training_step(model, inputs, *args, **kwargs)
        inputs = {**inputs, "past_key_values": self.memory}
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.memory.detach()
        return loss

    def _save_rng_state(self, output_dir: str) -> None:
        # As this, the memory is one for each process, and what a resumed run must go on from.
        super()._save_rng_state(output_dir)
        if self.memory is not None:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            self.memory.save(self._memory_file(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if self.memory is None or checkpoint is None:
            return
        file = self._memory_file(checkpoint)
        if not file.is_file():
            raise ValueError(
                f"{checkpoint} holds no memory to go on from ({file.name}): resume with as many "
                "processes as saved it, or train anew with --overwrite"
            )
        memory = MemoryCache.load(file, self.args.device)
        if memory.batch_size not in (-1, self.args.train_batch_size):  # -1: of a step that was left out
            raise ValueError(
                f"{file} is the memory of {memory.batch_size} rows, but a batch has "
                f"{self.args.train_batch_size}: resume with the batch size that it was saved with"
            )
        self.memory = memory

    def _memory_file(self, folder: str) -> Path:
        return Path(folder, f"memory_{self.args.process_index}.safetensors")
