"""Words from users and for them: names and the nearest valid one, sizes such as 4k, text made safe to
show."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.text import Text

SIZE = r"[0-9]{1,12}(?:_[0-9]{3}){0,3}[kKmM]?"  # as `parse_size` reads it
# Control characters but tab and line feed, those that turn the direction of writing, halves of letters.
HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def check_names(given: Iterable[Any], valid: Collection[str], prefix: str = "") -> None:
    """Raise ValueError for a name that is not valid, naming the nearest one that is."""
    for name in given:
        if name not in valid:
            shown_name = one_line(plain(name)) or repr(name)
            raise ValueError(f"unknown field {prefix}{shown_name}{nearest(name, valid, prefix)}")


def nearest(name: Any, valid: Collection[str], prefix: str = "") -> str:
    """What to say behind a name that is not valid: the nearest one that is, or all if they are few."""
    listed = f": valid are {', '.join(sorted(valid))}" if len(valid) < 40 else ""
    return did_you_mean(name, valid, prefix) or listed


def did_you_mean(name: Any, valid: Iterable[str], prefix: str = "") -> str:
    """The nearest valid name as a question; "" if none is near."""
    near = difflib.get_close_matches(str(name), list(valid), n=1)
    return f": did you mean {prefix}{near[0]}?" if near else ""


def one_line(error: object) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split())


def parse_size(text: str, what: str = "wanted is a whole number such as 512, 1k or 1m") -> int:
    """512, 1k = 1,024, 2m = 2 x 1,024 x 1,024. Raises ValueError for another form."""
    if not re.fullmatch(SIZE, text.strip()):
        raise ValueError(f"{what}, got {text!r}")
    return size_of(text.strip())


def size_of(text: str) -> int:
    """The number that a text of the form `SIZE` stands for."""
    unit = {"k": 1 << 10, "m": 1 << 20}.get(text[-1].lower())
    return int(text) if unit is None else int(text[:-1]) * unit


def is_number(value: Any) -> bool:
    """Whether a value that was read can be reckoned with: no NaN, and none that a float cannot hold."""
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8: a name of a file that is none holds halves of letters."""
    return not re.search("[\ud800-\udfff]", text)


def plain(text: object) -> str:
    r"""A text with all that does not show, and that a terminal, a page or a file might act on or choke
    on, written out: "\x1b" for the escape character."""
    return HIDDEN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def plain_all(value: Any) -> Any:
    """Dicts, lists and tuples with each text in them `plain`."""
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {plain_all(name): plain_all(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain_all, value))
    return value


def shown(text: object, style: str = "") -> Text:
    """A text for rich as it stands: brackets are no markup, colons no emoji."""
    from rich.text import Text

    return Text(plain(text), style)


def file_name(name: str) -> str:
    """A name as one file or folder may be called, in the folder that it is joined to."""
    return re.sub(r"[^\w.-]+", "_", name).lstrip(".")
