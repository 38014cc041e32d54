"""Logs for TensorBoard, which a full disk may lose without stopping the run."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from transformers.integrations import TensorBoardCallback

SCHEME = "everlong-lossy"


class LossyFile:
    """A file of which is lost what cannot be written. tensorboardX writes in a thread, whose end by an
    error would leave the run waiting for it."""

    def __init__(self, path: str) -> None:
        self.file: IO[bytes] | None = None
        with suppress(OSError):
            self.file = open(path.partition(":")[2], "wb", buffering=0)  # noqa: SIM115

    def write(self, data: bytes) -> None:
        """Write what there is room for."""
        if self.file is not None:
            with suppress(OSError):
                self.file.write(data)

    def flush(self) -> None:
        """Nothing is kept back."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stay open: held-out text may be evaluated yet, for which the parent would open logs anew,
        in a folder of its own."""

    def close(self) -> None:
        """Close it."""
        if self.file is not None:
            with suppress(OSError):
                self.file.close()


class LossyFiles:
    """Makes them, as `tensorboardX.record_writer` asks for it."""

    open = LossyFile

    def directory_check(self, path: str) -> None:
        """Make the folder."""
        with suppress(OSError):
            os.makedirs(path.partition(":")[2], exist_ok=True)


class Logs(TensorBoardCallback):
    """Logs in `folder`; what an earlier run logged at `first_step` and behind it is dropped."""

    tb_writer: Any

    def __init__(self, folder: Path, first_step: int) -> None:
        from tensorboardX import SummaryWriter
        from tensorboardX.record_writer import register_writer_factory

        register_writer_factory(SCHEME, LossyFiles())
        super().__init__(SummaryWriter(f"{SCHEME}:{folder}", purge_step=first_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stay open: held-out text may be evaluated yet, for which the parent would open logs anew,
        in a folder of its own."""

    def close(self) -> None:
        """End the logs, whatever has ended the run."""
        if self.tb_writer is not None:
            self.tb_writer.close()
            self.tb_writer = None
