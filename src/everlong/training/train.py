"""Training by `transformers.Trainer`.

A run folder holds recipe.yaml (resolved), provenance.json, metrics.jsonl (a line for each log),
checkpoint-STEP folders, and when training is done the model, the tokenizer and result.json. Of several
processes (`torchrun`) the main one writes it.
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
    AutoModelForCausalLM,
    PreTrainedModel,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints, sort_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from everlong.data import HaystackDataset, byte_tokenizer
from everlong.provenance import RECIPE_FILE, RESULT_FILE, provenance

from .processes import any_process, is_main, lost_processes, together
from .progress import TrainingProgress
from .recipe import (
    Recipe,
    build_model_config,
    build_training_arguments,
    load_recipe,
)
from .sharding import check_kind, save_whole_model, whole

PROVENANCE_FILE = "provenance.json"
EVAL_SAMPLES = 64
ASIDE = "unfinished"  # in a run folder: a checkpoint that is being written


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C; the message says where the last checkpoint is."""


class NonFiniteError(FloatingPointError):
    """A loss or a gradient is not finite; the message says where and what is left."""


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
    return _run(replace(recipe, output_dir=str(folder)), checkpoint=None)


def resume(folder: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Continue the run in a folder from its last checkpoint; otherwise like `train`.

    A run that was killed before its first one starts anew. overrides: as for `load_recipe`, over the
    run's own recipe.
    """
    if not Path(folder, RECIPE_FILE).is_file():
        raise ValueError(f"{folder} is not a run folder: it has no {RECIPE_FILE}")
    recipe = load_recipe(Path(folder, RECIPE_FILE), overrides)
    checkpoint = last_checkpoint(folder)
    if checkpoint is None and Path(folder, RESULT_FILE).is_file():
        raise ValueError(
            f"{folder} holds no checkpoint to resume from: "
            "train it anew with --overwrite, with training.save_steps below training.max_steps"
        )
    return _run(replace(recipe, output_dir=str(folder)), checkpoint)


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest whole checkpoint in a run folder; what is written last decides that it is whole."""
    found = sort_checkpoints(str(folder))
    whole = [path for path in found if Path(path, TRAINER_STATE_NAME).is_file()]
    return whole[-1] if whole else None


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that training may not empty."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output_dir {folder} is a file: name a folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / RECIPE_FILE).is_file():
        raise ValueError(f"output_dir {folder} holds files of no run of everlong: name another")
    if not overwrite:
        raise ValueError(
            f"{folder} holds a run already: continue it with --resume {folder}, "
            "delete it with --overwrite, or name another --output_dir"
        )


@lost_processes()
def _run(recipe: Recipe, checkpoint: str | None) -> dict[str, Any]:
    """Train from a checkpoint, or from the start in an emptied folder."""
    arguments = build_training_arguments(recipe)
    folder = recipe.run_folder
    with together():
        train_data, test_data = _datasets(recipe, arguments)
        set_seed(recipe.seed)
        model = AutoModelForCausalLM.from_config(build_model_config(recipe))
        if checkpoint is not None:
            _check_geometry(folder, arguments)
    with together():
        if is_main():
            _prepare_folder(recipe, arguments, emptied=checkpoint is None)
    with together():
        if not (folder / RECIPE_FILE).is_file():
            raise ValueError(
                f"{folder} is not where the main process has made it: give an output_dir on a file "
                "system that all machines share"
            )

    progress = TrainingProgress(folder, recipe.data.length_at, shown=is_main())
    interrupt = _Interrupt()
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=train_data,
        eval_dataset=Subset(test_data, range(min(EVAL_SAMPLES, len(test_data)))),
        data_collator=_collate,
        processing_class=byte_tokenizer(),
        callbacks=[progress, interrupt, _FiniteGradients()],
    )
    for shown_twice in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown_twice)
    with interrupt.caught(), progress:
        try:
            output = trainer.train(resume_from_checkpoint=checkpoint)
        except KeyboardInterrupt:
            raise TrainingInterrupted(_interrupted(folder)) from None
    if interrupt.requested:
        raise TrainingInterrupted(_interrupted(folder))
    save_whole_model(trainer)
    result = _write_result(recipe, trainer, output.training_loss, progress)
    trainer.accelerator.wait_for_everyone()  # now the folder is whole for all of them
    return result


def _prepare_folder(recipe: Recipe, arguments: TrainingArguments, *, emptied: bool) -> None:
    folder = recipe.run_folder
    if emptied and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    recipe.save(folder)
    about = {"seed": recipe.seed, **_geometry(arguments), **provenance()}
    _write_json(folder / PROVENANCE_FILE, about)


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
    if is_main():
        _write_json(recipe.run_folder / RESULT_FILE, result)
    return result


def _geometry(arguments: TrainingArguments) -> dict[str, int]:
    """How the samples of a step are divided."""
    each = arguments.train_batch_size * arguments.gradient_accumulation_steps
    return {"processes": arguments.world_size, "samples_per_step": each * arguments.world_size}


def _check_geometry(folder: Path, arguments: TrainingArguments) -> None:
    """Refuse to go on with steps of another size: their samples would not follow the ones seen."""
    path = folder / PROVENANCE_FILE
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    now = _geometry(arguments)
    samples = before.get("samples_per_step", now["samples_per_step"])
    if samples != now["samples_per_step"]:
        raise ValueError(
            f"{folder} was trained with {samples} samples a step by {before['processes']} processes, "
            f"now it would be {now['samples_per_step']} by {now['processes']}: start as many, or "
            "give --training.per_device_train_batch_size or --training.gradient_accumulation_steps "
            "that make up for it"
        )


def _datasets(recipe: Recipe, arguments: TrainingArguments) -> tuple[HaystackDataset, HaystackDataset]:
    samples_per_step = _geometry(arguments)["samples_per_step"]
    num_samples = arguments.max_steps * samples_per_step
    return recipe.data.datasets(num_samples, recipe.seed, samples_per_step)


def _collate(samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([sample[name] for sample in samples]) for name in ("input_ids", "labels")}


class _Trainer(Trainer):
    """The Trainer, but it stops at a loss that is not finite, resumes with all weights or not, and a
    checkpoint that is there is whole."""

    saving_in: Path | None = None

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
                f"checkpoint-{step} could not be written ({error}); {_last_checkpoint(folder)}"
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

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        everywhere = self.accelerator.reduce(loss)  # so that all processes stop where one has to
        if not torch.isfinite(everywhere):
            raise NonFiniteError(_not_finite("the loss", everywhere.item(), self.args, self.state))
        return loss


class _FiniteGradients(TrainerCallback):
    """Stops training before a gradient that is not finite reaches the weights."""

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: PreTrainedModel, **kwargs: Any
    ) -> None:
        if args.fp16:
            return  # the gradient scaler skips such steps itself
        named = [(name, each.grad) for name, each in model.named_parameters()]
        grads = [(name, grad) for name, grad in named if grad is not None]
        norm = whole(torch.nn.utils.get_total_norm([grad for _, grad in grads]))
        if not torch.isfinite(norm):
            culprits = [name for name, grad in grads if not torch.isfinite(whole(grad)).all()]
            what = f"the gradient of {culprits[0]}" if culprits else "the gradient's norm"
            raise NonFiniteError(_not_finite(what, norm.item(), args, state))


def _not_finite(what: str, value: float, arguments: Any, state: Any) -> str:
    return (
        f"{what} is {value} at step {state.global_step + 1}; "
        f"{_last_checkpoint(arguments.output_dir)}. A lower training.learning_rate or "
        "training.max_grad_norm, or more training.warmup_steps, may help"
    )


def _interrupted(folder: Path) -> str:
    return f"stopped; {_last_checkpoint(folder)}. Continue with: everlong train --resume {folder}"


def _last_checkpoint(folder: str | Path) -> str:
    checkpoint = last_checkpoint(folder)
    return f"the last checkpoint is {checkpoint}" if checkpoint else "no checkpoint was saved yet"


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
        self.requested = any_process(self.requested)
        if self.requested:
            control.should_save = True
            control.should_training_stop = True


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
