"""Models from folders and from the hub, as subjects of an evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from everlong import strict_yaml
from everlong.data.config import DataConfig
from everlong.files import read_record
from everlong.hub import from_hub
from everlong.provenance import RECIPE_FILE, RESULT_FILE, model_name
from everlong.words import check_names, one_line

from .results import ModelInfo
from .subject import Subject

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Config = TypeVar("Config", bound=DataConfig)
PROBE = 64  # tokens in which a model shows whether it goes on from its cache
WHOLE = 64 << 20  # bytes; of a larger file its size, its first and its last bytes are hashed
MODEL_FILES = ("*.safetensors", "*.gguf", "*.bin", "config.json", "generation_config.json")
TOKENIZER_FILES = (  # what begins and ends a text, how a chat is written; of slow ones the words
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.*",
    "merges.txt",
)


def load_model(
    folder: str | Path, dtype: str | torch.dtype = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and the tokenizer in a local folder, or of a hub id, on the accelerator
    if there is one. A folder may hold a single GGUF file instead. dtype: as of `from_pretrained`.

    Raises ValueError if the folder holds no model, or none that was finished, or one that is damaged.
    """
    from transformers import AutoTokenizer

    from everlong.models.pretrained import load_whole

    where = _where(folder)
    try:
        model = from_hub(folder, lambda: load_whole(str(folder), **where, dtype=dtype))
        tokenizer = from_hub(folder, lambda: AutoTokenizer.from_pretrained(str(folder), **where))
    except Exception as error:  # a truncated or foreign file: every loader raises its own kind
        raise ValueError(_unloadable(folder, error)) from error
    _check_ends(folder, model)
    _check_vocabulary(folder, model, tokenizer)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), tokenizer


def _check_vocabulary(
    folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a tokenizer with tokens that the model has no embedding for."""
    size = model.config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise ValueError(
            f"{folder} has a tokenizer of {len(tokenizer):,} tokens, but its model has a vocabulary of "
            f"{size:,}: put the tokenizer there that the model was trained with"
        )


def _check_ends(folder: str | Path, model: PreTrainedModel) -> None:
    """Refuse an end of a text that is no token."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    for end in ends if isinstance(ends, list) else [ends]:
        if end is not None and type(end) is not int:
            raise ValueError(
                f"{folder}: eos_token_id is a token id or a list of such, got {ends!r}: mend it in "
                "generation_config.json or config.json"
            )


def longest_text(model: PreTrainedModel) -> int | None:
    """Tokens that a model takes at most; None where there is no such limit."""
    if getattr(model, "_is_stateful", False):
        return None
    return getattr(model.config, "max_position_embeddings", None)


def load_subject(folder: str | Path, dtype: str | torch.dtype = "auto", **options: Any) -> Subject:
    """The model in a folder, or of a hub id, to be evaluated. options: fields of `Subject`.

    Raises ValueError for one that cannot read a text in pieces, as an evaluation does.
    """
    model, tokenizer = load_model(folder, dtype)
    subject = _subject(folder, model, tokenizer, options)
    check_pieces(subject)
    return subject


@torch.inference_mode()
def check_pieces(subject: Subject) -> None:
    """Refuse a model that gives no cache, or goes on from it as if it had read nothing: Mamba does so
    with several tokens in some versions of `transformers`, and whatever it is asked comes out wrong."""
    model, name = subject.model, subject.cache_name
    size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE, subject.info.longest or PROBE)
    half = length // 2
    ids = torch.randint(size, (1, length), generator=generator).to(model.device)
    whole = model(input_ids=ids, use_cache=True)
    cache = getattr(model(input_ids=ids[:, :half], use_cache=True), name, None)
    wanted, differs = subject.sound(whole.logits)[:, half:].float(), True
    if cache is not None:
        rest = model(input_ids=ids[:, half:], use_cache=True, **{name: cache}).logits.float()
        noise = 1e-3 if whole.logits.dtype in (torch.float32, torch.float64) else 0.1
        differs = bool((rest - wanted).abs().max() > noise * wanted.abs().max())
    if differs:
        raise ValueError(
            f"{subject.info.path} ({subject.info.kind}) cannot be evaluated: in this version of "
            f"transformers it {'gives no cache' if cache is None else 'forgets what it has read'} when "
            "a text is read in pieces. Leave it out"
        )


def load_outline(folder: str | Path, **options: Any) -> Subject:
    """As `load_subject`, without weights: enough to say what the model can be asked.

    Raises ValueError as `load_model`, but for damaged weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = _where(folder)
    try:
        config = from_hub(folder, lambda: AutoConfig.from_pretrained(str(folder), **where))
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        tokenizer = from_hub(folder, lambda: AutoTokenizer.from_pretrained(str(folder), **where))
    except Exception as error:
        raise ValueError(_unloadable(folder, error)) from error
    return _subject(folder, model, tokenizer, options)


def name_apart(infos: Sequence[ModelInfo]) -> list[ModelInfo]:
    """The models with names unlike each other. Those with a common label are seeds of one recipe.

    Where their kind of model does not tell them apart, the path does."""
    named = []
    for info in infos:
        same = [other for other in infos if other.label == info.label]
        recipes = [recipe_of(Path(other.path)) for other in same]
        seeds = {recipe.pop("seed", None) for recipe in recipes}
        for recipe in recipes:
            recipe.pop("output_dir", None)
        if len(same) == 1:
            named.append(info)
        elif len(seeds) == len(same) and all(recipe == recipes[0] for recipe in recipes):
            named.append(replace(info, name=f"{info.label}, seed {info.seed}"))
        else:
            label = f"{info.label} {info.path}"
            named.append(replace(info, name=label, label=label))
    return named


def recipe_of(folder: Path) -> dict[str, Any]:
    """The recipe of a run folder, or of the run that a checkpoint folder lies in; empty if none. Raises
    ValueError for a file that is no recipe."""
    for place in (folder, folder.resolve().parent):
        if (place / RECIPE_FILE).is_file():
            return _checked(strict_yaml.load_file(place / RECIPE_FILE), place / RECIPE_FILE)
    return {}


def _checked(recipe: Any, file: Path) -> dict[str, Any]:
    """A recipe whose fields that are asked for here have their types; {} of an empty file."""
    recipe = {} if recipe is None else recipe
    if not isinstance(recipe, dict):
        raise ValueError(f"{file} is no recipe: it holds {str(recipe)[:80]!r}")
    data, training = recipe.get("data") or {}, recipe.get("training") or {}
    of_data = data if isinstance(data, dict) else {}
    held_out = of_data.get("held_out")
    steps = training.get("max_steps") if isinstance(training, dict) else None
    fields: dict[str, tuple[Any, type]] = {
        "name": (recipe.get("name"), str),
        "seed": (recipe.get("seed"), int),
        "data": (data, dict),
        "data.length": (of_data.get("length"), int),
        "data.held_out": (float(held_out) if type(held_out) is int else held_out, float),
        "training": (training, dict),
        "training.max_steps": (steps, int),
    }
    for name, (value, kind) in fields.items():
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{file}: {name} is no {kind.__name__}: {str(value)[:80]!r}")
    return {**recipe, "data": data, "training": training}


def fingerprint(folder: str | Path) -> str:
    """A hash of the weights, the configuration and the tokenizer in a folder; of a hub id, its name."""
    hashed = hashlib.blake2b(digest_size=16)
    patterns = (*MODEL_FILES, *TOKENIZER_FILES)
    paths = sorted(path for pattern in patterns for path in Path(folder).glob(pattern))
    if not paths:
        hashed.update(str(folder).encode())
    for path in paths:
        hashed.update(path.name.encode())
        hashed.update(_head_and_tail(path))
    return hashed.hexdigest()


def _head_and_tail(path: Path) -> bytes:
    size = path.stat().st_size
    if size <= WHOLE:
        return path.read_bytes()
    with path.open("rb") as file:
        head = file.read(WHOLE // 2)
        file.seek(size - WHOLE // 2)
        return str(size).encode() + head + file.read()


def _subject(
    folder: str | Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
) -> Subject:
    _check_vocabulary(folder, model, tokenizer)
    path = Path(folder)
    recipe = recipe_of(path) if path.is_dir() else {}
    label = path.resolve().name if path.is_dir() else str(folder)
    if recipe and not (path / RECIPE_FILE).is_file():  # a checkpoint of a run
        label = f"{model_name(recipe) or path.resolve().parent.name} {label}"
    elif recipe:
        label = model_name(recipe) or label
    if options.get("passages"):
        label = f"{label} +RAG"
    result = path / RESULT_FILE
    about = {"recipe": recipe["name"]} if recipe.get("name") else {}
    if result.is_file():
        about |= read_record(result, steps=int | None)
    info = ModelInfo(
        name=label,
        label=label,
        path=str(folder),
        kind=model.config.model_type,
        parameters=model.num_parameters(),
        seed=recipe.get("seed"),
        training_length=_training_length(path, recipe, about.get("steps") or _steps_of(path)),
        longest=longest_text(model),
        about=about,
        fingerprint=fingerprint(folder),
    )
    return Subject(model, tokenizer, info, recipe, **options)


def _training_length(path: Path, recipe: dict[str, Any], steps: int | None) -> int | None:
    """Tokens of the longest sample that a model has seen in so many steps (None: all that its recipe
    has); None if its recipe does not say."""
    data = recipe.get("data", {})
    if "length" not in data:
        return None
    seen = steps or recipe.get("training", {}).get("max_steps") or sys.maxsize
    names = [each.name for each in dataclasses.fields(DataConfig) if each.name in data]
    config = data_config(DataConfig, {name: data[name] for name in names}, path)
    return config.length_at(seen - 1)


def data_config(kind: type[Config], fields: dict[str, Any], path: str | Path) -> Config:
    """A task as the model at a path was trained on it. Raises ValueError for fields that it lacks, and
    for values that it cannot have."""
    try:
        check_names(fields, [each.name for each in dataclasses.fields(kind)], "data.")
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: data in the {RECIPE_FILE} of its training cannot be read: {one_line(error)}. "
            "Mend that file"
        ) from error


def _steps_of(folder: Path) -> int | None:
    """Steps that a checkpoint stands at, where it is one."""
    state = folder / "trainer_state.json"
    return read_record(state, global_step=int | None).get("global_step") if state.is_file() else None


def gguf_file(folder: Path) -> str | None:
    """The name of the single GGUF file of a folder without a config.json; None if there is no such."""
    found = sorted(folder.glob("*.gguf"))
    return found[0].name if len(found) == 1 and not (folder / "config.json").is_file() else None


def _where(folder: str | Path) -> dict[str, Any]:
    """Arguments of from_pretrained behind its name. Raises ValueError for a folder without a model."""
    if not str(folder):
        raise ValueError("a model has no name: name a folder that training wrote, or a hub id")
    path = Path(folder)
    if not path.is_dir():
        ours = str(folder).startswith((".", "/", "runs/"))  # where `everlong train` writes
        if str(folder).count("/") == 1 and not ours:
            return {}
        raise ValueError(
            f"{folder} does not exist: train it first (`everlong train RECIPE`), or name a folder that "
            "training wrote, or a hub id"
        )
    where: dict[str, Any] = {"local_files_only": True}
    file = gguf_file(path)
    if file is not None:
        return {**where, "gguf_file": file}
    if not (path / "config.json").is_file():
        hint = (
            f"its training has not finished: continue it with `everlong train --resume {folder}`, "
            "or name one of its checkpoint folders"
            if (path / RECIPE_FILE).is_file()
            else "name a folder that training wrote"
        )
        raise ValueError(f"{folder} holds no model (no config.json): {hint}")
    return where


def _unloadable(folder: str | Path, error: Exception) -> str:
    reason = one_line(error)
    if not Path(folder).is_dir():
        return f"{folder} can be loaded neither from a folder nor from the hub: {reason}"
    return (
        f"{folder} cannot be loaded: {reason}. If a file of it is cut short, "
        "train it anew or name an earlier checkpoint"
    )
