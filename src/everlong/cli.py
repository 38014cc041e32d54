"""The `everlong` command: train, runs, eval, generate, tokenizer, data, demo.

A mistake of the user is one line on stderr and exit code 2; Ctrl-C is 130.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import itertools
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from os.path import expanduser
from pathlib import Path
from typing import Any, NoReturn

from everlong import __version__, strict_yaml
from everlong.files import place
from everlong.words import did_you_mean, nearest, one_line, parse_size, plain

TRAIN_OPTIONS = ("--help", "--resume", "--overwrite", "--print_config")
PREFILL_PIECE = 2048
MAX_SEED = (1 << 32) - 1  # of numpy
MAX_VOCABULARY = 1 << 24  # memory for all of them is taken before the first
COLDEST = 1e-6  # temperature
GRACE = 5.0  # seconds in which torchrun ends the processes of which one has ended


def number(
    kind: type[int] | type[float] = int, low: float = 0, high: float = math.inf
) -> Callable[[str], Any]:
    """What reads an option's number, in low ... high; a whole one may be 4k or 1m."""

    def read(text: str) -> Any:
        try:
            value = parse_size(text) if kind is int and not text.startswith("-") else kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        if not (low <= value <= high and math.isfinite(value)):
            limit = f"at least {_bound(low)}"
            limit += f" and at most {_bound(high)}" if math.isfinite(high) else ""
            raise argparse.ArgumentTypeError(f"must be {limit}, got {text}")
        return value

    return read


def _bound(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _place(text: str) -> str:
    """A file or folder."""
    try:
        return place(text, "the name")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _temperature(text: str) -> float:
    """By a colder one logits would not be finite."""
    value = number(float)(text)
    if 0 < value < COLDEST:
        raise argparse.ArgumentTypeError(f"must be 0 or at least {COLDEST:g}, got {text}")
    return value


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (sys.argv if not given) and return the exit code."""
    given = list(sys.argv[1:] if arguments is None else map(str, arguments))
    if hasattr(sys.stdout, "reconfigure"):  # names of files need not be text
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = _run(given)
        print(end="", flush=True)
        return code
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes the rest as it ends
        return 128 + 13  # as of a process that SIGPIPE ends
    except KeyboardInterrupt as error:
        if _is_main():
            print(f"\n{error}" if str(error) else "\nstopped", file=sys.stderr)
        return 130
    except FloatingPointError as error:
        return _stopped(error, f"everlong: training stopped: {error}", 1)
    except (ValueError, OSError) as error:
        if isinstance(error, FileExistsError) and error.filename is not None:
            error = OSError(f"{error.filename} is a file: name a folder")
        return _stopped(error, f"everlong: error: {error}", 2)


def _run(arguments: list[str]) -> int:
    known, overrides = split_overrides(arguments)
    parser = build_parser()
    options = parser.parse_args(known)
    if options.command is None:
        parser.print_help()
        return 0
    options.overrides, options.command_line = overrides, arguments
    _quiet()
    return options.run(options)


def _is_main() -> bool:
    """Whether this process has the terminal; `torchrun` starts several."""
    return os.environ.get("RANK", "0") == "0"


def _stopped(error: Exception, message: str, code: int) -> int:
    """Say why the work has stopped, once for all processes, and return the exit code.

    torchrun ends all processes as soon as one has ended: who has no news of its own, as most errors are
    found by all, waits for that.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    lost = isinstance(error, ConnectionError)  # of another process, which tells itself
    if not alone and (lost or not _is_main()):
        time.sleep(2 * GRACE if lost else GRACE)
    print(plain(one_line(message)), file=sys.stderr, flush=True)
    return code


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors, and name the nearest option or command."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but an unknown option is named before one that lacks."""
        options = self._option_string_actions
        for arg in args:
            if not arg.startswith("-"):
                if self._subparsers is not None:
                    break  # what follows is the command's
                continue
            name = arg.partition("=")[0]
            if re.fullmatch(r"--\w[\w-]*", name) and not any(each.startswith(name) for each in options):
                self.error(f"unknown option {name}{nearest(name, [*options])}")
        return super().parse_known_args(args, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = str(action.metavar or action.dest).lower()
            raise argparse.ArgumentError(
                action, f"unknown {what} {value!r}{nearest(value, [*action.choices])}"
            )

    def error(self, message: str) -> NoReturn:
        message = re.sub(r"^argument (\S+): must", r"\1 must", message)
        raise ValueError(f"{message} (see {self.prog} --help)")


def build_parser() -> argparse.ArgumentParser:
    """The commands and their options; `run` is the function of the chosen one."""
    parser = _Parser(prog="everlong", description="Language models that have a memory.")
    parser.add_argument("--version", action="version", version=f"everlong {__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    _add_train(commands)
    _add_runs(commands)
    _add_eval(commands)
    _add_generate(commands)
    _add_tokenizer(commands)
    _add_data(commands)
    _add_demo(commands)
    return parser


def _add_train(commands: Any) -> None:
    train = commands.add_parser(
        "train",
        help="train a model from a recipe",
        usage="everlong train RECIPE [--FIELD VALUE ...] | everlong train --resume RUN_FOLDER",
        description="Train a model from a recipe. Any field of the recipe may be given as an "
        "option: --training.max_steps 100 --data.length 256 --model.hidden_size 64 --seed 1 "
        "--output_dir runs/mine.",
        allow_abbrev=False,
    )
    train.add_argument(
        "recipe", nargs="?", metavar="RECIPE", type=expanduser, help="a YAML file or a known name"
    )
    train.add_argument(
        "--resume", metavar="RUN_FOLDER", type=expanduser, help="continue from its last checkpoint"
    )
    train.add_argument(
        "--overwrite", action="store_true", help="delete an earlier run in the same folder"
    )
    train.add_argument(
        "--print_config", action="store_true", help="print the recipe as it would be run, and stop"
    )
    train.set_defaults(run=_train)


def _add_runs(commands: Any) -> None:
    runs = commands.add_parser(
        "runs",
        help="list and compare runs",
        description="List runs, say what tells them apart, draw their losses.",
    )
    runs.add_argument(
        "folders",
        nargs="*",
        default=["runs"],
        metavar="FOLDER",
        type=_place,
        help="a run, or what holds some (runs)",
    )
    runs.add_argument("--compare", action="store_true", help="also the fields that differ")
    runs.add_argument(
        "--picture", metavar="FILE", type=_place, help="draw their losses into one picture"
    )
    runs.set_defaults(run=_runs)


def _add_eval(commands: Any) -> None:
    evaluate = commands.add_parser("eval", help="evaluate models", description="Evaluate models.")
    evaluate.add_argument(
        "models",
        nargs="+",
        metavar="MODEL",
        type=expanduser,
        help="a folder with a model, or a hub id",
    )
    evaluate.add_argument(
        "--tasks",
        default="needle",
        help="by commas: needle, babi, niah, babilong, perplexity, context, or any of lm-eval's "
        "(docs/evaluation.md)",
    )
    evaluate.add_argument("--lengths", default="512,1k,2k,4k", help="tokens, by commas; 1k = 1024")
    evaluate.add_argument(
        "--samples", default="100", help="for each length (100), or 16k:100,128k:20: so many up to each"
    )
    evaluate.add_argument(
        "--passages",
        type=number(),
        default=0,
        help="read so many passages that fit the question best, not the text (0: the text)",
    )
    evaluate.add_argument(
        "--stories",
        metavar="FOLDER",
        type=expanduser,
        help="the files of bAbI, for babi (simulated)",
    )
    evaluate.add_argument(
        "--setting",
        default="auto",
        choices=("auto", "trained", "few-shot"),
        help="of babilong: as its recipes train it, or with lm-eval's instruction and examples "
        "(auto: the first for models trained on it)",
    )
    evaluate.add_argument(
        "--babilong",
        metavar="FOLDER",
        type=expanduser,
        help="its published samples, instead of simulated ones",
    )
    evaluate.add_argument(
        "--chat_template", action="store_true", help="put niah's prompts as a user's message"
    )
    evaluate.add_argument(
        "--data_dir", metavar="DIR", type=expanduser, help="local data sets of lm-eval's tasks"
    )
    evaluate.add_argument(
        "--num_fewshot", type=number(), help="examples in lm-eval's tasks (lm-eval's own)"
    )
    evaluate.add_argument(
        "--tokens_per_forward",
        type=number(low=1),
        default=32768,
        help="read at a time, all texts together (32,768); fewer take less memory",
    )
    evaluate.add_argument(
        "--source", type=expanduser, help="text: a file, a folder, a pattern or package:NAME"
    )
    evaluate.add_argument("--seed", type=number(high=MAX_SEED), default=0, help="of the samples (0)")
    evaluate.add_argument(
        "--out", required=True, metavar="DIR", type=_place, help="for results and pictures"
    )
    evaluate.add_argument(
        "--overwrite", action="store_true", help="begin anew where --out holds an evaluation"
    )
    evaluate.set_defaults(run=_evaluate)


def _add_generate(commands: Any) -> None:
    generate = commands.add_parser(
        "generate", help="continue a text", description="Continue a text with a model."
    )
    generate.add_argument(
        "model", metavar="MODEL", type=expanduser, help="a folder that training wrote"
    )
    prompt = generate.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to continue; - reads it from stdin")
    prompt.add_argument("--prompt_file", metavar="FILE", type=_place, help="read the text from a file")
    generate.add_argument("--max_new_tokens", type=number(low=1), default=200, help="at most (200)")
    generate.add_argument(
        "--temperature", type=_temperature, default=0.0, help="0 takes the likeliest token (0)"
    )
    generate.add_argument("--top_k", type=number(), help="sample from so many; 0: from all (0)")
    generate.add_argument("--top_p", type=number(float, 1e-9, 1), help="sample from this share (1)")
    generate.add_argument("--seed", type=number(high=MAX_SEED), help="of the sampling (0)")
    generate.set_defaults(run=_generate)


def _add_tokenizer(commands: Any) -> None:
    tokenizer = commands.add_parser(
        "tokenizer",
        help="train a tokenizer on a text",
        description="Train a byte-level BPE with <pad>, <bos> and <eos>. A recipe names its folder as "
        "data.tokenizer; AutoTokenizer loads it.",
    )
    tokenizer.add_argument(
        "--source",
        required=True,
        action="append",
        type=expanduser,
        help="text: a file (text, JSONL, Parquet), a folder, a pattern, package:NAME or "
        "hub:OWNER/NAME; may be given several times",
    )
    tokenizer.add_argument(
        "--vocab_size", type=number(high=MAX_VOCABULARY), default=8192, help="at most (8192)"
    )
    tokenizer.add_argument(
        "--out", required=True, metavar="FOLDER", type=_place, help="for the tokenizer"
    )
    tokenizer.add_argument(
        "--overwrite", action="store_true", help="replace an earlier tokenizer in the same folder"
    )
    tokenizer.add_argument("--text_column", help="of JSONL, Parquet, the hub (text)")
    tokenizer.add_argument("--subset", help="of a data set on the hub")
    tokenizer.add_argument("--split", help="of a data set on the hub (train)")
    tokenizer.add_argument(
        "--max_bytes", type=number(), default=200_000_000, help="read no more text (200,000,000)"
    )
    tokenizer.set_defaults(run=_tokenizer)


def _add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train a memory and a Transformer, and compare them",
        description="Train both models on a needle in real text, evaluate them far beyond the "
        "training length, and draw the picture. With --full, what is done is not done again.",
    )
    demo.add_argument(
        "--full", action="store_true", help="every block and rival, three seeds, to 2M tokens and more"
    )
    demo.add_argument("--out", metavar="DIR", type=_place, help="instead of runs/demo")
    demo.add_argument(
        "--overwrite", action="store_true", help="replace other runs in its folders, of another recipe"
    )
    demo.set_defaults(run=_demo)


def _add_data(commands: Any) -> None:
    """The command `data`: files of stories."""
    data = commands.add_parser("data", help="write and check stories", description="Stories of bAbI.")
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = actions.add_parser(
        "babi-check",
        help="answer all questions of bAbI's files",
        description="Answer the questions of bAbI's files by reading their sentences, and print for "
        "each task how many come out as the file has it. Exit code 1 if some do not.",
    )
    write = actions.add_parser(
        "babi-write",
        help="write simulated stories",
        description="Write simulated stories as bAbI's files, for training and for tests.",
    )
    check.add_argument("folder", metavar="FOLDER", type=_place, help="with qa1_..._train.txt and so on")
    write.add_argument("folder", metavar="FOLDER", type=_place, help="for the files")
    write.add_argument("--tasks", default="qa1,qa2,qa3,qa4,qa5", help="of qa1 to qa10, by commas")
    write.add_argument(
        "--stories",
        type=number(),
        default=10_000,
        help="questions to train on; a tenth for tests (10,000)",
    )
    write.add_argument("--seed", type=number(high=MAX_SEED), default=0, help="of the stories (0)")
    data.set_defaults(run=_data)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of the command itself, and for `train` the recipe's fields among them.

    A field is --NAME=VALUE or --NAME VALUE with any name that is no option of `train`; argparse
    would take such a VALUE for the recipe. Raises ValueError for a field without a value.
    """
    if list(arguments[:1]) != ["train"]:
        return list(arguments), []
    known, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if not name.startswith("--") or name in TRAIN_OPTIONS:
            known.append(argument)
        elif equals:
            overrides.append(argument)
        else:
            value = list(itertools.islice(rest, 1))
            if value and value[0].startswith("--"):
                raise ValueError(f"{argument} has no value: give {argument}=VALUE")
            overrides += [argument, *value]
    return known, overrides


def _quiet() -> None:
    """Leave the terminal to everlong's own progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _train(options: argparse.Namespace) -> int:
    from everlong.training import load_recipe, resume, train
    from everlong.training.processes import leave

    _check_fields(options.overrides)
    if (options.recipe is None) == (options.resume is None):
        raise ValueError("give either a recipe or --resume RUN_FOLDER (see everlong train --help)")
    if options.resume == "":
        raise ValueError("--resume has no run folder: give --resume RUN_FOLDER")
    if options.resume and options.overwrite:
        raise ValueError("--resume goes on with a run, --overwrite deletes one: give one of them")
    if options.print_config:
        recipe = options.recipe or Path(options.resume, "recipe.yaml")
        if not options.recipe and not recipe.is_file():
            raise ValueError(f"{options.resume} is not a run folder: it has no recipe.yaml")
        print(load_recipe(recipe, options.overrides).to_yaml(), end="")
        return 0
    if options.resume:
        folder = Path(options.resume)
        resume(folder, options.overrides, then=lambda result: _finish(folder, result))
    else:
        recipe = load_recipe(options.recipe, options.overrides)
        folder = recipe.run_folder
        train(recipe, overwrite=options.overwrite, then=lambda result: _finish(folder, result))
    leave()
    return 0


def _check_fields(overrides: Sequence[str]) -> None:
    """Refuse an option that is neither one of `train` nor a field of a recipe."""
    from everlong.training.recipe import Recipe

    fields = [f"--{each.name}" for each in dataclasses.fields(Recipe)]
    for option in overrides:
        name = re.split(r"[.=]", option)[0]
        if option.startswith("--") and name not in fields:
            raise ValueError(
                f"unknown option {plain(name)}{did_you_mean(name, [*fields, *TRAIN_OPTIONS])} "
                "(see everlong train --help)"
            )


def _finish(folder: Path, result: dict[str, Any]) -> None:
    """Say what training came to, and score the model."""
    if _is_main():
        print(
            f"{result['parameters']:,} parameters, {result['tokens']:,} tokens in "
            f"{result['seconds'] / 60:.1f} minutes ({result['tokens_per_second']:,.0f} tokens/s). "
            f"The model is in {folder}"
        )
    _score(folder)


def _score(folder: Path) -> None:
    """Score a trained model on what its recipe asks for."""
    # Not by load_recipe: the other processes have left, and it would wait for them.
    recipe = strict_yaml.load_file(folder / "recipe.yaml")
    asked = recipe["evaluation"]
    if not asked["tasks"]:
        return
    arguments = [
        "eval",
        str(folder),
        f"--tasks={','.join(asked['tasks'])}",
        f"--lengths={','.join(map(str, asked['lengths']))}",
        f"--samples={asked['samples']}",
        f"--seed={recipe['seed']}",
        f"--out={folder / 'evaluation'}",
    ]
    options = build_parser().parse_args(arguments)
    options.command_line = arguments
    _evaluate(options)


def _runs(options: argparse.Namespace) -> int:
    from everlong.training.runs import find_runs, plot_losses, print_differences, print_runs

    runs = find_runs(options.folders)
    print_runs(runs)
    if options.compare:
        print_differences(runs)
    if options.picture:
        if not plot_losses(Path(options.picture), runs):
            raise ValueError("none of these runs has logged a loss yet: there is nothing to draw")
        print(f"written: {options.picture}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from everlong.evaluation import SampleCounts, TaskOptions, build_tasks, evaluate, parse_length
    from everlong.evaluation.report import print_tables, write_report
    from everlong.evaluation.run import evaluation_folder, processes

    lengths = [parse_length(each) for each in options.lengths.split(",")]
    counts = SampleCounts.parse(str(options.samples))
    names = [each.strip() for each in options.tasks.split(",") if each.strip()]
    chosen = TaskOptions(
        seed=options.seed,
        source=options.source,
        stories=options.stories,
        setting=options.setting,
        babilong=options.babilong,
        chat_template=options.chat_template,
        data_dir=options.data_dir,
        num_fewshot=options.num_fewshot,
    )
    tasks = build_tasks(names, lengths, chosen)
    out, state = Path(options.out), processes()
    settings = {
        "command": shlex.join(["everlong", *options.command_line]),
        "lengths": lengths,
        "samples": str(options.samples),
        "seed": options.seed,
    }
    with ExitStack() as held:
        if state.is_main_process:
            held.enter_context(evaluation_folder(out, overwrite=options.overwrite))
        state.wait_for_everyone()  # others see samples of an earlier one no more
        results, samples = evaluate(
            list(dict.fromkeys(options.models)),
            tasks,
            lengths,
            counts,
            out,
            settings=settings,
            passages=options.passages,
            tokens_per_forward=options.tokens_per_forward,
            on_results=lambda results: results.write(out / "results.json"),
        )
        if state.is_main_process:
            written = write_report(results, out, samples)
            print_tables(results)
            print(f"written: {', '.join(map(str, written))}")
    state.destroy_process_group()
    return 0


def _generate(options: argparse.Namespace) -> int:
    from transformers import GenerationConfig, LogitsProcessorList, TextStreamer, set_seed

    from everlong.evaluation import load_model, longest_text
    from everlong.evaluation.subject import sound

    sampling = _sampling(options)
    prompt = _prompt(options)
    model, tokenizer = load_model(options.model)
    ids = tokenizer(prompt, return_tensors="pt").to(model.device)
    length = ids["input_ids"].shape[1] + options.max_new_tokens
    limit = longest_text(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"prompt and new tokens are {length:,} tokens, but this model takes {limit:,} at most: "
            "shorten the prompt, or take a model with a memory"
        )
    memory = {}
    if hasattr(model, "memorize"):  # all but the last token, from which generate goes on
        text = ids["input_ids"][:, :-1]
        memory["past_key_values"] = model.memorize(text, progress=text.shape[1] > PREFILL_PIECE)
    # Its cache has another name, which generate's reading in pieces does not know.
    is_mamba = "cache_params" in inspect.signature(model.forward).parameters
    if sampling:
        set_seed(options.seed or 0)
    # Of the model's own way to generate the ends alone: the options say the rest.
    model.generation_config = GenerationConfig(eos_token_id=model.generation_config.eos_token_id)
    model.generate(
        **ids,
        max_new_tokens=options.max_new_tokens,
        do_sample=bool(sampling),
        logits_processor=LogitsProcessorList([lambda ids, logits: sound(logits, options.model)]),
        **sampling,
        **memory,
        prefill_chunk_size=None if is_mamba else PREFILL_PIECE,
        pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
    )
    return 0


def _sampling(options: argparse.Namespace) -> dict[str, Any]:
    """How a token is drawn; empty where the likeliest is taken."""
    if options.temperature > 0:
        top_p = 1.0 if options.top_p is None else options.top_p
        return {"temperature": options.temperature, "top_k": options.top_k or 0, "top_p": top_p}
    _check_used(options, ("seed", "top_k", "top_p"), "give --temperature too")
    return {}


def _check_used(options: argparse.Namespace, names: Sequence[str], otherwise: str) -> None:
    """Refuse options that are given and change nothing."""
    for name in names:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name} changes nothing here: {otherwise}, or leave it out")


def _prompt(options: argparse.Namespace) -> str:
    from everlong.data.text import read_text

    if options.prompt_file:
        path = Path(options.prompt_file)
        if not path.is_file():
            raise ValueError(f"{path} does not exist, or is no file")
        prompt = read_text(path).decode()
    else:
        prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    if not prompt:
        raise ValueError("the prompt is empty: give at least one character to continue")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is no text: letter {error.start} is half of one") from None
    return prompt


def _tokenizer(options: argparse.Namespace) -> int:
    from everlong.data import read_pieces, save_tokenizer, train_tokenizer
    from everlong.data.reading import HUB, has_columns
    from everlong.data.tokenizer import TOKENIZER_FILES
    from everlong.files import check_output, hold

    out = Path(options.out)
    if not any(source.startswith(HUB) for source in options.source):
        _check_used(options, ("subset", "split"), "name a source on the hub (hub:OWNER/NAME)")
    if not any(map(has_columns, options.source)):
        _check_used(options, ("text_column",), "name a source of JSONL, Parquet or the hub")
    if options.max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {options.max_bytes}")
    with hold(out):  # a place that cannot be written is known before the work
        known = set(TOKENIZER_FILES).issuperset
        check_output(out, "tokenizer", known, overwrite=options.overwrite)
        pieces = read_pieces(
            options.source,
            "text" if options.text_column is None else options.text_column,
            options.subset,
            "train" if options.split is None else options.split,
            options.max_bytes,
        )
        tokenizer = train_tokenizer((piece.text.decode() for piece in pieces), options.vocab_size)
        save_tokenizer(tokenizer, out)
    print(f"{len(tokenizer):,} tokens. The tokenizer is in {out}: train with --data.tokenizer {out}")
    return 0


def _demo(options: argparse.Namespace) -> int:
    from everlong.demo import run_demo

    out = Path(options.out) if options.out else None
    run_demo(full=options.full, out=out, overwrite=options.overwrite)
    return 0


def _data(options: argparse.Namespace) -> int:
    from everlong.data.babi_files import check_babi, write_babi

    folder = Path(options.folder)
    if options.action == "babi-write":
        tasks = [task.strip() for task in options.tasks.split(",")]
        for path in write_babi(folder, tasks, options.stories, options.seed):
            print(f"written: {path}")
        return 0
    counts = check_babi(folder)
    for task, (right, asked) in counts.items():
        print(f"{task}: {right} / {asked}")
    return int(any(right < asked for right, asked in counts.values()))
