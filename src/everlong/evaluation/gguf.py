"""Models in llama.cpp's format, which `transformers` reads."""

from __future__ import annotations

from pathlib import Path


def gguf_file(folder: str | Path) -> str | None:
    """The name of the one *.gguf file in a folder that holds no model of `transformers`, for
    `from_pretrained(folder, gguf_file=name)`; None if there is no such file.

    Raises ValueError if there are several, for which of them is the model nobody knows.
    """
    if Path(folder, "config.json").is_file():
        return None
    names = sorted(path.name for path in Path(folder).glob("*.gguf"))
    if len(names) > 1:
        raise ValueError(
            f"{folder} holds {len(names)} GGUF files ({', '.join(names)}): put the one that is meant "
            "into a folder of its own"
        )
    return names[0] if names else None
