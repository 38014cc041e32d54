"""YAML that strangers may write: values alone, no alias (a few lines of them stand for gigabytes), no
tag, no merge, no class to import, no name twice, no deep nesting. What is written here is read back as
it was.

Besides YAML's own, 1e-4 is a number, and so are 4k and 1m: 4,096 and 1,048,576.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from .words import SIZE, one_line, size_of

MAX_BYTES = 1 << 20
MAX_DEPTH = 20
TAG = "tag:yaml.org,2002:"
SUFFIXED = re.compile(rf"{SIZE.rstrip('?')}$")
EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")


def load_file(path: Path) -> Any:
    """The values of a YAML file in UTF-8 (with or without a byte-order mark), of a megabyte at most.

    Raises ValueError that names the file and the place in it.
    """
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES:,} bytes: it is no recipe")
    try:
        return load(data.decode("utf-8-sig"))
    except (yaml.YAMLError, ValueError) as error:  # numbers of 5,000 digits are a ValueError
        raise ValueError(f"{path} is not YAML as a recipe may be: {one_line(error)}") from error


def load(text: str) -> Any:
    """The values of a text. Raises yaml.YAMLError; ValueError for a number of thousands of digits."""
    depth = 0
    for event in yaml.parse(text, Loader=_loader()):
        if isinstance(event, yaml.AliasEvent):
            raise _refused("an alias (*): write the value out", event.start_mark)
        if getattr(event, "tag", None) is not None:
            raise _refused("a tag (!): values have the types that they look like", event.start_mark)
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise _refused(f"more than {MAX_DEPTH} levels", event.start_mark)
    return yaml.load(text, _loader())


def dump(values: Any) -> str:
    """Values as YAML, which `load` reads back as they were."""
    return yaml.dump(values, Dumper=_dumper(), sort_keys=False, allow_unicode=True)


def _refused(what: str, mark: Any) -> yaml.YAMLError:
    return yaml.MarkedYAMLError(problem=f"it has {what}", problem_mark=mark)


@functools.cache
def _loader() -> Any:
    class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
            names = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    continue  # which no dict can have as a name
                if key.value in names:
                    raise _refused(f"the name {key.value!r} twice", key.start_mark)
                names.add(key.value)
                if key.tag == f"{TAG}merge":  # what it brings in would not be looked at
                    raise _refused("a merge (<<): write the fields out", key.start_mark)
                if key.value == "class_path":  # which jsonargparse would import
                    raise _refused("a class_path: no field of a recipe is a class", key.start_mark)
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {
        letter: [each for each in resolvers if each[0] != f"{TAG}timestamp"]
        for letter, resolvers in Loader.yaml_implicit_resolvers.items()
    }
    Loader.add_implicit_resolver(f"{TAG}float", EXPONENT, list("-+0123456789"))
    Loader.add_implicit_resolver(f"{TAG}int", SUFFIXED, list("0123456789"))
    Loader.add_constructor(f"{TAG}int", _construct_int)
    return Loader


def _construct_int(loader: Any, node: Any) -> int:
    return size_of(node.value) if SUFFIXED.fullmatch(node.value) else loader.construct_yaml_int(node)


@functools.cache
def _dumper() -> Any:
    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    # A text that would be read as a number is put in quotes.
    Dumper.add_implicit_resolver(f"{TAG}float", EXPONENT, list("-+0123456789"))
    Dumper.add_implicit_resolver(f"{TAG}int", SUFFIXED, list("0123456789"))
    return Dumper
