"""Training by `transformers.Trainer`.

A run folder holds recipe.yaml (resolved), provenance.json (versions, machine, fingerprint of the data),
metrics.jsonl (a line for each log), tensorboard logs, checkpoint-STEP folders, loss.png, and when
training is done the model, the tokenizer and result.json. Of several processes (`torchrun`) the main
one writes it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch.utils.data import Subset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from everlong.allocator import keep_freed_memory
from everlong.data import gives_back
from everlong.provenance import PROVENANCE_FILE, RECIPE_FILE, RESULT_FILE, provenance

from .arguments import build_training_arguments
from .carry import MemoryTrainer
from .changes import check_changes, identity
from .checkpoint import check_whole, describe_last, last_checkpoint, step_of
from .guards import Watch
from .model import build_model
from .processes import any_process, is_main, lost_processes, together
from .progress import TrainingProgress
from .recipe import Recipe, load_recipe
from .runs import PICTURE_FILE, Run, plot_losses
from .sharding import check_kind, save_whole_model

ASIDE = "unfinished"  # in a run folder: a checkpoint that is being written


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C; the message says where the last checkpoint is."""


def train(recipe: Recipe, *, overwrite: bool = False) -> dict[str, Any]:
    """Train the recipe's model from the start, in `recipe.run_folder`.

    overwrite: delete an earlier run in that folder; without it such a folder is refused.
    Returns what result.json holds: parameters, steps, tokens, seconds, tokens_per_second, loss.
    Raises NonFiniteError at a loss or gradient that is not finite. Ctrl-C finishes the step, saves
    a checkpoint and raises TrainingInterrupted; a second one stops at once.
    """
    folder = recipe.run_folder
    with together():
        _check_folder(folder, overwrite)
    return _run(replace(recipe, output_dir=str(folder)), checkpoint=None, emptied=True)


def resume(folder: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Continue the run in a folder from its last checkpoint; otherwise like `train`.

    A run that was killed before its first one starts anew. overrides: as for `load_recipe`, over the
    run's own recipe.
    """
    for file in (RECIPE_FILE, PROVENANCE_FILE):
        if not Path(folder, file).is_file():
            raise ValueError(f"{folder} is not a run folder: it has no {file}")
    if any(option.partition("=")[0] == "--output_dir" for option in overrides):
        raise ValueError("a run is resumed in its own folder: leave --output_dir out")
    recipe = load_recipe(Path(folder, RECIPE_FILE), overrides)
    checkpoint = last_checkpoint(folder)
    if checkpoint is not None:
        check_whole(checkpoint, recipe.training.get("max_steps", 0))
    if checkpoint is None and Path(folder, RESULT_FILE).is_file():
        raise ValueError(
            f"{folder} holds no checkpoint to resume from: "
            "train it anew with --overwrite, with training.save_steps below training.max_steps"
        )
    return _run(replace(recipe, output_dir=str(folder)), checkpoint)


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that training may not empty."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file: name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not ((folder / RECIPE_FILE).is_file() and (folder / PROVENANCE_FILE).is_file()):
        raise ValueError(f"output_dir {folder} holds files of no run of everlong: name another")
    if not overwrite:
        raise ValueError(
            f"{folder} holds a run already: continue it with --resume {folder}, "
            "delete it with --overwrite, or name another --output_dir"
        )


@lost_processes()
def _run(recipe: Recipe, checkpoint: str | None, *, emptied: bool = False) -> dict[str, Any]:
    """Train from a checkpoint, or from the start; emptied: of all that is in the folder."""
    arguments = build_training_arguments(recipe)
    folder = recipe.run_folder
    with together():
        train_data, test_data = _datasets(recipe, arguments)
        about = identity(recipe, _samples_per_step(arguments), arguments.world_size)
        changes = check_changes(folder, about) if checkpoint else []
        set_seed(recipe.seed)
        model = build_model(recipe)
    with together():
        if is_main():
            _prepare_folder(recipe, about, emptied=emptied)
    with together():
        if not (folder / RECIPE_FILE).is_file():
            raise ValueError(
                f"{folder} is not where the main process has made it: give an output_dir on a file "
                "system that all machines share"
            )

    held_out = Subset(test_data, range(min(recipe.evaluation.held_out_samples, len(test_data))))
    tokenizer = recipe.data.build_tokenizer()
    size = _bytes_per_label(held_out) if gives_back(tokenizer) else None
    progress = TrainingProgress(folder, recipe.data.length_at, size, shown=is_main())
    interrupt = _Interrupt()
    watch = Watch(recipe.guards, progress)
    trainer = EverlongTrainer(
        watch=watch,
        model=model,
        args=arguments,
        train_dataset=train_data,
        eval_dataset=held_out,
        data_collator=_collate,
        processing_class=tokenizer,
        callbacks=[progress, interrupt, watch],
    )
    if is_main():
        trainer.add_callback(_tensorboard(folder, checkpoint))
    for shown_twice in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown_twice)
    if getattr(recipe.data, "layout", None) == "streams":
        trainer.carry_memory()
    with interrupt.caught(), progress:
        for change in changes:
            progress.bar.console.print(f"changed: {change}")
        try:
            keep_freed_memory()
            output = trainer.train(resume_from_checkpoint=checkpoint)
            at_end = progress.held_out.get("step") == trainer.state.global_step
            if progress.bytes_per_label is not None and not (at_end or interrupt.requested):
                trainer.evaluate()
        except KeyboardInterrupt:
            raise TrainingInterrupted(_interrupted(folder)) from None
        finally:
            if is_main():
                plot_losses(folder / PICTURE_FILE, [Run(folder)])
    if interrupt.requested:
        raise TrainingInterrupted(_interrupted(folder))
    save_whole_model(trainer)
    result = _write_result(recipe, trainer, output.training_loss, progress)
    trainer.accelerator.wait_for_everyone()  # now the folder is whole for all of them
    return result


def _prepare_folder(recipe: Recipe, about: dict[str, Any], *, emptied: bool) -> None:
    folder = recipe.run_folder
    if emptied and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / PROVENANCE_FILE, {"seed": recipe.seed, **provenance(), **about})
    recipe.save(folder)


def _write_result(
    recipe: Recipe, trainer: Trainer, mean_loss: float, progress: TrainingProgress
) -> dict[str, Any]:
    tokens = trainer.state.num_input_tokens_seen
    result = {
        "name": recipe.name,
        "seed": recipe.seed,
        "parameters": sum(each.numel() for each in trainer.model.parameters()),
        "steps": trainer.state.global_step,
        "loss": mean_loss if progress.last_loss is None else progress.last_loss,
        "tokens": tokens,
        "seconds": progress.seconds,
        "tokens_per_second": tokens / max(progress.seconds, 1e-9),
    }
    result |= {name: value for name, value in progress.held_out.items() if name != "step"}
    if is_main():
        _write_json(recipe.run_folder / RESULT_FILE, result)
    return result


def _tensorboard(folder: Path, checkpoint: str | None) -> TrainerCallback:
    """Logs for TensorBoard; what a checkpoint's run logged behind it is dropped."""
    from tensorboardX import SummaryWriter

    step = step_of(checkpoint) + 1 if checkpoint else 0
    return TensorBoardCallback(SummaryWriter(str(folder / "tensorboard"), purge_step=step))


def _bytes_per_label(held_out: Subset) -> float | None:
    """Bytes of held-out text behind each label; None if it is no text."""
    label_bytes = getattr(held_out.dataset, "label_bytes", None)
    if label_bytes is None:
        return None
    rows = [held_out[index]["labels"][1:] for index in range(len(held_out))]
    labels = sum(int((row >= 0).sum()) for row in rows)
    return sum(label_bytes(index) for index in held_out.indices) / labels


def _samples_per_step(arguments: TrainingArguments) -> int:
    return arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def _datasets(recipe: Recipe, arguments: TrainingArguments) -> tuple[Any, Any]:
    samples_per_step = _samples_per_step(arguments)
    num_samples = arguments.max_steps * samples_per_step
    # Batches go to the processes in turn.
    at_once = arguments.train_batch_size * arguments.world_size
    with arguments.main_process_first():  # the others find its text tokenised
        return recipe.data.datasets(num_samples, recipe.seed, samples_per_step, at_once)


def _collate(samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    names = [name for name in ("input_ids", "labels", "position_ids") if name in samples[0]]
    return {name: torch.stack([sample[name] for sample in samples]) for name in names}


class EverlongTrainer(MemoryTrainer):
    """The Trainer, but it stops where `watch` says so, resumes with all weights or not, decays matrices
    alone, and a checkpoint that is there is whole."""

    saving_in: Path | None = None

    def __init__(self, *, watch: Watch, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.watch = watch

    def get_decay_parameter_names(self, model: PreTrainedModel) -> list[str]:
        """Names of the parameters that weight decay pulls at: matrices alone. The scales of the norms
        inside a memory are one for each head, which makes a matrix of them in shape only."""
        every = model.named_parameters(remove_duplicate=False)
        sizes = {name: each.ndim for name, each in every}
        names = Trainer.get_decay_parameter_names(self, model)
        return [name for name in names if sizes[name] >= 2 and "_scale." not in name]

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The Trainer has switched the cache off, which whoever uses the model wants.
        self.model.config.use_cache = True
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model.config.use_cache = self.args.use_cache

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self.saving_in is None else str(self.saving_in)

    def _save_checkpoint(self, model: PreTrainedModel, trial: Any) -> None:
        folder, step = Path(self.args.output_dir), self.state.global_step
        name = f"{PREFIX_CHECKPOINT_DIR}-{step}"
        if self.state.best_global_step == step:
            self.state.best_model_checkpoint = str(folder / name)
        aside = folder / ASIDE
        if self.args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.saving_in = aside
        try:
            super()._save_checkpoint(model, trial)
        except OSError as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise OSError(
                f"checkpoint-{step} could not be written ({error}); {describe_last(folder)}"
            ) from error
        finally:
            self.saving_in = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(folder / name, ignore_errors=True)
            (aside / name).rename(folder / name)
            aside.rmdir()
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: PreTrainedModel | None = None
    ) -> None:
        check_kind(resume_from_checkpoint, sharded=self.is_fsdp_enabled)
        # The Trainer's own loads whatever weights happen to fit.
        file = Path(resume_from_checkpoint, SAFE_WEIGHTS_NAME)
        if self.is_fsdp_enabled or not file.is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        try:
            load_model(model or self.model, file)
        except SafetensorError as error:
            raise ValueError(
                f"{file} is damaged or cut short ({error}): delete {resume_from_checkpoint} and resume "
                "again, from the checkpoint before it"
            ) from error
        except RuntimeError as error:
            raise ValueError(
                f"{resume_from_checkpoint} does not fit the recipe's model: "
                f"{' '.join(str(error).split())}"
            ) from error

    def training_step(
        self, model: PreTrainedModel, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.watch.check_loss(loss, model, inputs, self)
        if self.accelerator.sync_gradients:  # the step's gradients are whole
            self.watch.check_gradient(self.model, self.args, self.state)
        if torch.isfinite(loss):
            return loss
        # The step will be left out, and what it remembers is of no use.
        if self.memory is not None:
            self.carry_memory()
        return torch.zeros_like(loss)


def _interrupted(folder: Path) -> str:
    return f"stopped; {describe_last(folder)}. Continue with: everlong train --resume {folder}"


class _Interrupt(TrainerCallback):
    """Turns the first Ctrl-C into: finish the step, save a checkpoint, stop."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Handle Ctrl-C here; only the main thread may, elsewhere it stays as it is."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if not is_main():
            return
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nfinishing this step; press Ctrl-C again to stop at once\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The signal reaches processes at different steps; a checkpoint is written by all at one.
        # One that comes while they ask each other must not be overwritten by their answer.
        if any_process(self.requested):
            self.requested = True
            control.should_save = True
            control.should_training_stop = True


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
