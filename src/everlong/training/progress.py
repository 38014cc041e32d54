"""What a training run shows and logs: a bar, a line for each log, metrics.jsonl."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback

from everlong.files import append_line, read_lines, write_file
from everlong.words import is_number

METRICS_FILE = "metrics.jsonl"
LOSSES, NUMBERS = ("loss", "eval_loss"), ("seconds", "tokens", "tokens_per_second")  # are read back


class TrainingProgress(TrainerCallback):
    """A progress bar on stderr, and a log line there and in `folder`/metrics.jsonl.

    length_at: the sample length (tokens) of a training step, counted from 0.
    `seconds` is the training time and `last_loss` the last loss logged; a resumed run counts on
    from its checkpoint. tokens_per_second is a mean since the last log, pads not counted.
    bytes_per_label: of held-out text, how many bytes each of its labels stands for: then held-out
        losses (nats a token, the mean over batches) are also given in bits a byte, whatever the tokens
        are. `held_out` has the last of them, with their step.
    shown: False keeps all of it to itself, as of several processes all but one should.
    """

    def __init__(
        self,
        folder: Path,
        length_at: Callable[[int], int],
        bytes_per_label: float | None = None,
        *,
        shown: bool = True,
    ) -> None:
        self.shown = shown
        self.bytes_per_label = bytes_per_label
        self.held_out: dict[str, float] = {}
        self.path = folder / METRICS_FILE
        self.length_at = length_at
        self.last_loss: float | None = None
        self.bar = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True, quiet=not shown, markup=False),
            disable=not shown,
        )
        self._seconds_before = 0.0
        self._started: float | None = None
        self._last = (0.0, 0)
        self._logged_at = 0
        self._not_finite: set[int] = set()  # steps since then

    @property
    def seconds(self) -> float:
        """Seconds of training, those before a resumed checkpoint included."""
        running = time.perf_counter() - self._started if self._started is not None else 0.0
        return self._seconds_before + running

    def __enter__(self) -> TrainingProgress:
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Drop what an interrupted run logged behind its checkpoint, and start the clock."""
        logged = read_metrics(self.path.parent) if self.shown else []
        kept = [line for line in logged if line["step"] <= state.global_step]
        if self.shown:
            write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._seconds_before = kept[-1].get("seconds", 0.0) if kept else 0.0
        self.last_loss = next((line["loss"] for line in reversed(kept) if "loss" in line), None)
        self._started = time.perf_counter()
        self._last = (self.seconds, state.num_input_tokens_seen)
        self._logged_at = state.global_step
        held_out = [line for line in kept if "eval_loss" in line]
        self.held_out = dict(held_out[-1]) if held_out else {}
        self.held_out.pop("seconds", None)
        self.task = self.bar.add_task(
            "train", total=state.max_steps, completed=state.global_step, status=""
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(self.task, completed=state.global_step)
        if state.global_step >= state.max_steps:  # the last loss too, wherever logging_steps end
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **kwargs: Any) -> None:
        if "eval_loss" in logs:
            loss = logs["eval_loss"]
            self.held_out = {"step": state.global_step, "eval_loss": loss}
            text = f"step {state.global_step:6d}  held-out loss {loss:.4f}"
            if self.bytes_per_label is not None:
                bits = self.held_out["bits_per_byte"] = loss / math.log(2) / self.bytes_per_label
                text += f"  {bits:.4f} bits a byte"
            self._write(self.held_out)
            self.bar.console.print(text)
        if "loss" not in logs:
            return
        # The Trainer has taken losses that are not finite as 0.
        left_out, self._not_finite = len(self._not_finite), set()
        steps, self._logged_at = state.global_step - self._logged_at, state.global_step
        if left_out == steps:
            logs.pop("loss")
            return
        logs["loss"] *= steps / (steps - left_out)
        seconds, tokens = self.seconds, state.num_input_tokens_seen
        speed = (tokens - self._last[1]) / max(seconds - self._last[0], 1e-9)
        self._last = (seconds, tokens)
        self.last_loss = logs["loss"]
        length = self.length_at(state.global_step - 1)
        self._write(
            {
                "step": state.global_step,
                "loss": logs["loss"],
                "grad_norm": logs.get("grad_norm"),
                "learning_rate": logs["learning_rate"],
                "length": length,
                "tokens": tokens,
                "tokens_per_second": speed,
            }
        )
        status = f"loss {logs['loss']:.4f}  {speed:,.0f} tokens/s  length {length:,}"
        self.bar.update(self.task, status=status)
        self.bar.console.print(f"step {state.global_step:6d}  {status}")

    def not_finite(self, step: int) -> None:
        """Leave the loss of a step out of what is logged."""
        self._not_finite.add(step)

    def skipped(self, step: int, reason: str) -> None:
        """Note a step that was left out."""
        self._write({"step": step, "skipped": reason})
        self.bar.console.print(f"step {step:6d}  left out: {reason}")

    def _write(self, line: dict[str, Any]) -> None:
        if self.shown:
            append_line(self.path, {**line, "seconds": self.seconds})


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The lines of a run folder's metrics.jsonl; none if it is not there. A killed run may have left
    half a line, which is left out, as is any line that is no record of a step."""
    return [line for line in read_lines(Path(folder, METRICS_FILE)) if _is_record(line)]


def _is_record(line: Any) -> bool:
    if not isinstance(line, dict) or type(line.get("step")) is not int or not is_number(line["step"]):
        return False
    sound = all(is_number(line[name]) for name in NUMBERS if name in line)
    return sound and all(is_loss(line[name]) for name in LOSSES if name in line)


def is_loss(value: Any) -> bool:
    """Whether a value that was read may be a loss, which is NaN or infinite where a model is spoilt."""
    return isinstance(value, float) or is_number(value)
