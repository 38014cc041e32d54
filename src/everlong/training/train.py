"""Training by `transformers.Trainer`.

A run folder holds recipe.yaml (resolved), provenance.json (versions, machine, fingerprint of the data),
metrics.jsonl (a line for each log), tensorboard logs, checkpoint-STEP folders, loss.png, and when
training is done the model, the tokenizer and result.json. Of several processes (`torchrun`) the main
one writes it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_model
from torch.optim.lr_scheduler import LambdaLR
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
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from everlong.allocator import keep_freed_memory
from everlong.data import gives_back
from everlong.files import (
    NotWritten,
    aside_of,
    check_output,
    hold,
    read_record,
    sync,
    whole_files,
    write_file,
    writing,
)
from everlong.provenance import PROVENANCE_FILE, RECIPE_FILE, RESULT_FILE, is_run, provenance
from everlong.words import one_line

from .arguments import build_training_arguments
from .carry import MemoryTrainer
from .changes import check_changes, identity
from .checkpoint import check_whole, describe_last, last_checkpoint, reading, seal, step_of
from .folder import check_deletable, delete_run
from .guards import Watch
from .model import build_model
from .processes import any_process, is_main, lost_processes, num_processes, together
from .progress import METRICS_FILE, TrainingProgress
from .recipe import Recipe, load_recipe
from .runs import PICTURE_FILE, Run, plot_losses
from .sharding import check_kind, save_whole_model
from .tensorboard import Logs

# Of a group of parameters: what the recipe says, and not the checkpoint of a run that it has continued.
SET_BY_RECIPE = ("initial_lr", "weight_decay", "betas", "eps")

# Of a result: what is told of a run that has ended. Without it the end is written anew.
TOLD = {"parameters": int, "tokens": int, "seconds": float, "tokens_per_second": float}


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C; the message says where the last checkpoint is."""


def train(
    recipe: Recipe,
    *,
    overwrite: bool = False,
    then: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Train the recipe's model from the start, in `recipe.run_folder`.

    overwrite: delete an earlier run in that folder; without it such a folder is refused, and so is one
        that holds anything but that run, or what the recipe reads.
    then: done with the result as long as no other process may write to the folder.
    Returns what result.json holds: parameters, steps, tokens, seconds, tokens_per_second, loss.
    Raises NonFiniteError at a loss or gradient that is not finite. Ctrl-C finishes the step, saves
    a checkpoint and raises TrainingInterrupted; a second one stops at once.
    """
    folder = recipe.run_folder
    with _alone(folder):
        with together():
            check_output(
                folder,
                "run",
                is_run,
                overwrite=overwrite,
                otherwise=f"continue it with --resume {folder}, ",
            )
            check_deletable(recipe, folder)
        result = _run(replace(recipe, output_dir=str(folder)), checkpoint=None, emptied=True)
        then(result)
        return result


def resume(
    folder: str | Path,
    overrides: Sequence[str] = (),
    *,
    then: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Continue the run in a folder from its last checkpoint; otherwise like `train`.

    A run that was killed before its first one starts anew, one that has ended is left as it is.
    overrides: as for `load_recipe`, over the run's own recipe. What they change of the learning rate
    holds from the next step on.
    """
    folder = Path(folder).expanduser()
    for file in (RECIPE_FILE, PROVENANCE_FILE):
        if not Path(folder, file).is_file():
            raise ValueError(f"{folder} is not a run folder: it has no {file}")
    if any(option.partition("=")[0] == "--output_dir" for option in overrides):
        raise ValueError("a run is resumed in its own folder: leave --output_dir out")
    recipe = load_recipe(folder / RECIPE_FILE, overrides)
    with _alone(folder):
        result = _go_on(recipe, folder, changed=bool(overrides))
        then(result)
        return result


def _go_on(recipe: Recipe, folder: Path, *, changed: bool) -> dict[str, Any]:
    """Train on from a folder's last checkpoint, unless the run there has ended."""
    checkpoint, steps = last_checkpoint(folder), recipe.training["max_steps"]
    result = _ended(folder, checkpoint, steps)
    if result is not None:
        if changed:
            _check_unchanged(recipe, folder)
        if is_main():
            text = f"{folder} is finished after {steps} steps; --training.max_steps gives it more"
            Console(stderr=True, soft_wrap=True).print(text, markup=False, highlight=False)
        return result
    if checkpoint is not None:
        check_whole(checkpoint, steps)
    elif (folder / RESULT_FILE).is_file():
        raise ValueError(
            f"{folder} holds no checkpoint to resume from: "
            "train it anew with --overwrite, with training.save_steps below training.max_steps"
        )
    return _run(replace(recipe, output_dir=str(folder)), checkpoint)


def _check_unchanged(recipe: Recipe, folder: Path) -> None:
    """Refuse changes to a run that has ended, which would change nothing."""
    samples = _samples_per_step(build_training_arguments(recipe))
    about = identity(replace(recipe, output_dir=str(folder)), samples, num_processes())
    # The folder may have been moved.
    found = [each for each in check_changes(folder, about) if not each.startswith("output_dir ")]
    if found:
        raise ValueError(
            f"{folder} is finished, nothing can be changed: {'; '.join(found)}. Give more of "
            "--training.max_steps too, or leave that out; everlong eval scores what is trained"
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep all but the processes of this run out of its folder; the main one holds it for them."""
    with ExitStack() as held:
        with together():
            if is_main():
                held.enter_context(hold(folder))
        yield


def _ended(folder: Path, checkpoint: str | None, steps: int) -> dict[str, Any] | None:
    """The result of a run that has ended after so many steps, with its model; None of any other."""
    if not any(folder.glob("model*.safetensors")):
        return None
    try:
        result = read_record(folder / RESULT_FILE, **TOLD)
    except (OSError, ValueError):
        return None
    reached = steps if checkpoint is None else step_of(checkpoint)
    return result if result.get("steps") == reached == steps else None


@lost_processes()
def _run(recipe: Recipe, checkpoint: str | None, *, emptied: bool = False) -> dict[str, Any]:
    """Train from a checkpoint, or from the start; emptied: of all that is in the folder."""
    folder = recipe.run_folder
    try:
        trainer, changes = _set_up(recipe, checkpoint, emptied=emptied)
        progress, interrupt = trainer.watch.progress, _Interrupt()
        trainer.add_callback(interrupt)
        with interrupt.caught(), progress:
            for change in changes:
                progress.bar.console.print(f"changed: {change}")
            loss = _fit(trainer, checkpoint, interrupt)
        if interrupt.requested:
            raise TrainingInterrupted(_interrupted(folder))
        trainer.save_trained()
        result = _write_result(recipe, trainer, loss, progress)
    except NotWritten as error:
        begun = (folder / RECIPE_FILE).is_file()
        again = f"continue with: everlong train --resume {folder}" if begun else "start it again"
        raise NotWritten(f"{error}; {describe_last(folder)}. Make room, and {again}") from error
    trainer.accelerator.wait_for_everyone()  # now the folder is whole for all of them
    return result


def _set_up(
    recipe: Recipe, checkpoint: str | None, *, emptied: bool
) -> tuple[EverlongTrainer, list[str]]:
    """The trainer of a recipe, with its folder made, and what has changed since the checkpoint."""
    arguments = build_training_arguments(recipe)
    folder = recipe.run_folder
    with together():
        train_data, test_data = _datasets(recipe, arguments)
        about = identity(recipe, _samples_per_step(arguments), arguments.world_size)
        changes = check_changes(folder, about) if checkpoint else []
        trainer = _trainer(recipe, arguments, train_data, test_data)
    with together():
        if is_main() and emptied:
            _prepare_folder(recipe, about)
    with together():
        if not (folder / RECIPE_FILE).is_file():
            raise ValueError(
                f"{folder} is not where the main process has made it: give an output_dir on a file "
                "system that all machines share"
            )
    if is_main():
        first = step_of(checkpoint) + 1 if checkpoint else 0
        trainer.logs = Logs(folder / "tensorboard", first)
        trainer.add_callback(trainer.logs)
    if not emptied:  # what a recipe was changed to holds once the run goes on with it
        trainer.add_callback(_Rewrite(recipe, about))
    return trainer, changes


def _trainer(
    recipe: Recipe, arguments: TrainingArguments, train_data: Any, test_data: Any
) -> EverlongTrainer:
    """The trainer of a recipe, with its model, optimizer and schedule; nothing is written."""
    folder = recipe.run_folder
    set_seed(recipe.seed)
    model = build_model(recipe)
    held_out = Subset(test_data, range(min(recipe.evaluation.held_out_samples, len(test_data))))
    tokenizer = recipe.data.build_tokenizer()
    size = _bytes_per_label(held_out) if gives_back(tokenizer) else None
    progress = TrainingProgress(folder, recipe.data.length_at, size, shown=is_main())
    watch = Watch(recipe.guards, progress)
    try:
        trainer = EverlongTrainer(
            watch=watch,
            model=model,
            args=arguments,
            train_dataset=train_data,
            eval_dataset=held_out,
            data_collator=_collate,
            processing_class=tokenizer,
            callbacks=[progress, watch],
        )
        trainer.create_optimizer()
        # On a parameter of no use: a schedule leaves its first learning rate in an optimizer.
        trial = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
        trainer.create_scheduler(arguments.max_steps, trial)
    except Exception as error:  # libraries raise a dozen kinds, all of them about the fields
        raise ValueError(f"the recipe's training part cannot be used: {one_line(error)}") from error
    trainer.lr_scheduler = None
    if trainer.is_fsdp_enabled:  # it makes one of the parameters that it has sharded
        trainer.optimizer = None
    for shown_twice in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(shown_twice)
    if getattr(recipe.data, "layout", None) == "streams":
        trainer.carry_memory()
    return trainer


def _fit(trainer: EverlongTrainer, checkpoint: str | None, interrupt: _Interrupt) -> float:
    """Train, and return the mean loss. Whatever stops it, what was logged is drawn."""
    progress, folder = trainer.watch.progress, Path(trainer.args.output_dir)
    try:
        keep_freed_memory()
        output = trainer.train(resume_from_checkpoint=checkpoint)
        at_end = progress.held_out.get("step") == trainer.state.global_step
        if progress.bytes_per_label is not None and not (at_end or interrupt.requested):
            trainer.evaluate()
        return float(output.training_loss)
    except KeyboardInterrupt:
        raise TrainingInterrupted(_interrupted(folder)) from None
    finally:
        if is_main():
            _draw(folder, progress)
            trainer.logs.close()


def _draw(folder: Path, progress: TrainingProgress) -> None:
    """Draw the losses; that they cannot be drawn stops nothing, and hides nothing that did."""
    try:
        plot_losses(folder / PICTURE_FILE, [Run(folder)])
    except Exception as error:  # whatever a drawing library raises
        progress.bar.console.print(f"no picture of the losses: {error}", markup=False)


def _prepare_folder(recipe: Recipe, about: dict[str, Any]) -> None:
    """A run folder without an earlier run, and with what the new one is."""
    folder = recipe.run_folder
    folder.mkdir(parents=True, exist_ok=True)
    delete_run(folder)
    _write_recipe(recipe, about)


def _write_recipe(recipe: Recipe, about: dict[str, Any]) -> None:
    folder = recipe.run_folder
    with whole_files(folder, str(folder)) as aside:
        values = {"seed": recipe.seed, **provenance(), **about}
        (aside / PROVENANCE_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        (aside / RECIPE_FILE).write_text(recipe.to_yaml(), encoding="utf-8")


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
        write_file(recipe.run_folder / RESULT_FILE, json.dumps(result, indent=2) + "\n")
    return result


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
    logs: Logs

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
        self.watch.check_weights(self.model, self.args, self.state)
        folder = Path(self.args.output_dir)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with self._written_aside(name) as aside:
            self.saving_in = aside
            try:
                with together():
                    super()._save_checkpoint(model, trial)
            finally:
                self.saving_in = None
            if self.args.should_save:
                seal(aside / name)
            if is_main():
                sync(folder / METRICS_FILE)  # what it says up to here will not be logged again
        if self.args.should_save:
            rotate_checkpoints(output_dir=str(folder), save_total_limit=self.args.save_total_limit)

    def save_trained(self) -> None:
        """Write the model and the tokenizer to the run folder."""
        self.watch.check_weights(self.model, self.args, self.state)
        card = "README.md"
        with self._written_aside("the model") as aside:
            save_whole_model(self, aside)
            if Path(self.args.output_dir, card).exists():  # it may be somebody's own by now
                (aside / card).unlink(missing_ok=True)

    @contextmanager
    def _written_aside(self, what: str) -> Iterator[Path]:
        """`whole_files` in the run folder, for all processes."""
        folder = Path(self.args.output_dir)
        with together(), ExitStack() as stack:
            with together():
                if self.args.should_save:
                    stack.enter_context(whole_files(folder, what))
            with together(), writing(what, aside_of(folder)):
                yield aside_of(folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: PreTrainedModel | None = None
    ) -> None:
        check_kind(resume_from_checkpoint, sharded=self.is_fsdp_enabled)
        # The Trainer's own loads whatever weights happen to fit.
        file = Path(resume_from_checkpoint, SAFE_WEIGHTS_NAME)
        if self.is_fsdp_enabled or not file.is_file():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        with reading(resume_from_checkpoint):
            try:
                load_model(model or self.model, file)
            except RuntimeError as error:
                raise ValueError(
                    f"{resume_from_checkpoint} does not fit the recipe's model: "
                    f"{' '.join(str(error).split())}"
                ) from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        groups = self.optimizer.param_groups
        said = [{name: group[name] for name in SET_BY_RECIPE if name in group} for group in groups]
        with reading(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
        for group, own in zip(self.optimizer.param_groups, said, strict=True):
            group.update(own)
        if isinstance(self.lr_scheduler, LambdaLR):
            self._follow_schedule(self.lr_scheduler)

    def _follow_schedule(self, schedule: LambdaLR) -> None:
        """Take the learning rates of the next step from the recipe's schedule. Those of the checkpoint
        are of the schedule that it was made with: 0 where that had come to its end."""
        groups, step = self.optimizer.param_groups, schedule.last_epoch
        base = [group["initial_lr"] for group in groups]
        rates = [rate * factor(step) for rate, factor in zip(base, schedule.lr_lambdas, strict=True)]
        schedule.load_state_dict({**schedule.state_dict(), "base_lrs": base, "_last_lr": rates})
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with reading(str(checkpoint)):
            super()._load_rng_state(checkpoint)

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


class _Rewrite(TrainerCallback):
    """Writes the recipe of a resumed run when its state is loaded, and not if it cannot be."""

    def __init__(self, recipe: Recipe, about: dict[str, Any]) -> None:
        self.recipe, self.about = recipe, about

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with together():
            if is_main():
                _write_recipe(self.recipe, self.about)


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
