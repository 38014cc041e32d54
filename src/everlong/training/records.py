"""Files of a run folder that hold one record, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_record(file: Path, **fields: type) -> dict[str, Any]:
    """The record in a JSON file. Raises ValueError that names the file if it is none, or if one of
    the fields is missing or of another type."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is cut short") from error
    if not isinstance(record, dict):
        raise ValueError(f"{file} is damaged: it holds no fields")
    for name, kind in fields.items():
        if type(record.get(name)) is not kind:
            raise ValueError(f"{file} is damaged: {name} is {record.get(name)!r}")
    return record
