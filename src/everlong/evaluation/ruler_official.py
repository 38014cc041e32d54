"""RULER's own samples, made by NVIDIA's package nvidia-long-context-eval where it is installed.

Its generator is a script; it runs in a process of its own with the model's tokenizer, and what it wrote
is kept. It is slow for long texts: it tokenises each text anew as it adds to it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from everlong.data.config import digest
from everlong.data.corpus import cache_home
from everlong.data.ruler import KINDS, Coder, RulerSample
from everlong.files import write_file

from .haystack import check_length
from .ruler import TITLES, NiahTask, task_info
from .subject import Subject

PREFIX = "ruler_"
FAMILY = "RULER's needles, its own samples"
PACKAGE = "long_context_eval"
INSTALL = "pip install everlong[ruler]"
NEEDED = ("nltk", "wonderwords", "tenacity", "tqdm")
SEED = 42  # RULER's
MARK = "<<<reply>>>"  # where a chat template's turn ends and the given start of the answer begins
TRIED = 8192  # tokens up to which `check` makes a sample to see whether there can be one


class OfficialRulerTask(NiahTask):
    """One of RULER's tasks of needles with RULER's texts, words and prose.

    A text is as long as RULER's generator makes it: up to the length asked, mostly a few hundred tokens
    less. chat_template: ask as the tokenizer's chat template wants it.
    """

    def __init__(self, kind: str, seed: int = 0, chat_template: bool = False) -> None:
        self.kind, self.seed, self.chat_template = kind, seed, chat_template
        self.info = task_info(
            f"{PREFIX}{kind}",
            f"RULER's {kind}: {TITLES[kind]}",
            "Samples of RULER's own generator (nvidia-long-context-eval).",
            FAMILY,
            {"seed": seed, "chat_template": chat_template},
        )

    def check(self, subject: Subject, length: int | None) -> None:
        """Refuse lengths that the model cannot take, or RULER cannot make (if they are short), and say
        what is to be installed."""
        assert length is not None
        check_length(subject, length)
        check_installed(self.kind)
        Coder(subject.tokenizer, self.chat_template)
        if length <= TRIED:
            self.written(subject, length, 1)

    def fingerprint(self, subject: Subject, length: int | None, count: int) -> str:
        """The package's version, and what stands around a prompt."""
        coder = Coder(subject.tokenizer, self.chat_template)
        return f"{package_version()} {coder.opening} {coder.after}"

    def samples(
        self, subject: Subject, length: int, indices: Sequence[int], count: int
    ) -> Iterator[tuple[int, RulerSample]]:
        """The samples, of those made for `count`."""
        coder = Coder(subject.tokenizer, self.chat_template)
        rows = self.written(subject, length, count)
        new_tokens = package_task()["tokens_to_generate"]
        for index in indices:
            text, wanted = rows[index]["input"], tuple(rows[index]["outputs"])
            before, _, reply = text.partition(MARK)
            parts = [coder.opening, subject.encode(before).tolist()]
            if self.chat_template:
                parts += [coder.after, subject.encode(reply.lstrip()).tolist()]
            prompt = np.concatenate([np.array(part, np.int64) for part in parts])
            question = text.rpartition("\n")[2]
            asked = len(subject.encode(question)) + len(coder.after)
            depth = before.find(wanted[0]) / len(before) if len(wanted) == 1 else None
            answer = f" {', '.join(wanted)}"
            yield index, RulerSample(prompt, answer, wanted, depth, asked, new_tokens)

    def written(self, subject: Subject, length: int, count: int) -> list[dict[str, Any]]:
        """What the generator wrote, with `input` and `outputs`; made once for a tokenizer, a length
        and a count."""
        coder = Coder(subject.tokenizer, self.chat_template)
        room = length - len(coder.opening) - len(coder.after)
        vocabulary = subject.tokenizer.backend_tokenizer.to_str()
        key = [vocabulary, self.kind, room, count, self.seed, self.chat_template, package_version()]
        file = cache_home() / "ruler" / f"{self.kind}-{length}-{digest(json.dumps(key).encode())}.jsonl"
        if not file.is_file():
            text = self._generate(subject, room, count)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_file(file, text)
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]

    def _generate(self, subject: Subject, room: int, count: int) -> str:
        task = package_task()
        mark = MARK if self.chat_template else ""
        with tempfile.TemporaryDirectory() as folder:
            subject.tokenizer.save_pretrained(folder)
            options = {
                "save_dir": folder,
                "save_name": "samples",
                "tokenizer_path": folder,
                "tokenizer_type": "hf",
                "max_seq_length": room,
                "tokens_to_generate": task["tokens_to_generate"],
                "num_samples": count,
                "random_seed": SEED + self.seed,
                "template": f"{task['template']}{mark}{task['answer_prefix']}",
                **package_kind(self.kind),
            }
            script = [sys.executable, "-m", f"{PACKAGE}.data.synthetic.niah"]
            run_generator([*script, *(f"--{name}={value}" for name, value in options.items())], room)
            return Path(folder, "samples", "validation.jsonl").read_text(encoding="utf-8")


def run_generator(command: Sequence[str], room: int) -> None:
    """Run RULER's script, and stop it where it would never end: asked for less than its shortest text,
    it tries for ever. Raises ValueError for that, and for more than its prose holds."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    current, said = 0, ""
    with subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said = line.strip() or said
            found = re.search(r"Current length (\d+)", line)
            is_first, current = not current, int(found[1]) if found else current
            if is_first and current > room:
                process.kill()
                raise ValueError(
                    f"RULER makes no text of {room:,} tokens or less in this tokenizer: its shortest "
                    f"takes {current:,}. Leave shorter lengths out"
                )
            if "Num haystack" in line and current < room:
                process.kill()
                raise ValueError(
                    f"RULER's prose ends at {current:,} tokens in this tokenizer, asked are {room:,}: "
                    "leave longer lengths out, or take the tasks without ruler_ before their names"
                )
    if process.returncode:
        raise ValueError(f"RULER's generator failed ({said}): is all of it installed? {INSTALL}")


def check_installed(kind: str) -> None:
    """Say what is missing, and how it is installed."""
    missing = [name for name in (PACKAGE, *NEEDED) if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(
            f"RULER's own samples need packages that are not installed ({', '.join(missing)}): "
            f"`{INSTALL}`, or take the tasks without ruler_ before their names"
        )
    if KINDS[kind].haystack != "essay":
        return
    try:
        import_module("nltk").data.find("tokenizers/punkt_tab/english/")
    except LookupError as error:
        raise ValueError(
            f"RULER cuts its prose for {kind} with data of nltk that is not there: "
            "`python -m nltk.downloader punkt_tab` (where the hub is out of reach: elsewhere, and copy "
            "the folder nltk_data here)"
        ) from error


def package_task() -> dict[str, Any]:
    """RULER's templates and numbers for needles."""
    return import_module(f"{PACKAGE}.data.synthetic.constants").TASKS["niah"]


def package_kind(kind: str) -> dict[str, Any]:
    """RULER's arguments of a task."""
    found = importlib.util.find_spec(PACKAGE)
    assert found is not None
    assert found.origin is not None
    values = yaml.safe_load(Path(found.origin).with_name("synthetic.yaml").read_text(encoding="utf-8"))
    return values[kind]["args"]


def package_version() -> str:
    """The version of RULER's package, as far as it is known."""
    try:
        return metadata.version("nvidia-long-context-eval")
    except metadata.PackageNotFoundError:
        return ""
