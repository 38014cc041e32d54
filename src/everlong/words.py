"""Words from users and for them: names and the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Collection


def check_names(given: Collection[str], valid: Collection[str], prefix: str = "") -> None:
    """Raise ValueError for a name that is not valid, naming the nearest one that is."""
    for name in given:
        if name not in valid:
            raise ValueError(f"unknown field {prefix}{name}{nearest(name, valid, prefix)}")


def nearest(name: str, valid: Collection[str], prefix: str = "") -> str:
    """What to say behind a name that is not valid: the nearest one that is, or all if they are few."""
    near = difflib.get_close_matches(name, valid, n=1)
    if near:
        return f": did you mean {prefix}{near[0]}?"
    return f": valid are {', '.join(sorted(valid))}" if len(valid) < 40 else ""


def one_line(error: Exception) -> str:
    """What an error says, without its line breaks."""
    return " ".join(str(error).split())
