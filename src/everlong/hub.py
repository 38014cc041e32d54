"""Files of the Hugging Face hub: what is on this machine first, then one short try.

Without it, a machine that is offline waits half a minute and more for each name, in retries.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from .words import one_line

PATIENCE = 5.0  # seconds in which the hub must answer
T = TypeVar("T")


def from_hub(name: str | Path, load: Callable[[], T], kind: str = "model") -> T:
    """What `load` gives for a folder or hub id: without the network if it can, else from the hub.

    kind: "model" or "dataset". Raises ValueError if neither this machine has it nor the hub answers;
    what `load` raises, where it does.
    """
    from huggingface_hub import constants

    if Path(name).exists():
        return load()
    try:
        with _offline():
            return load()
    except Exception as error:  # each library has its own kinds for what is not there
        off = constants.is_offline_mode()
        if off or not _answers(constants.ENDPOINT):
            why = "is switched off by HF_HUB_OFFLINE" if off else "is out of reach"
            option = " --repo-type dataset" if kind == "dataset" else ""
            raise ValueError(
                f"there is no folder {name} here, {constants.HF_HUB_CACHE} does not hold all of it "
                f"({one_line(error)[:200]}), and the hub ({constants.ENDPOINT}) {why}: download it "
                f"elsewhere (`hf download {name}{option} --local-dir FOLDER`), copy the folder here "
                "and name it"
            ) from error
    return load()


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Whoever asks the hub inside gets an error at once."""
    from huggingface_hub import constants

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _answers(endpoint: str) -> bool:
    """Whether the hub says anything in time. In a thread: the look-up of its address has no limit."""
    from huggingface_hub.utils import get_session

    answers = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # of several libraries, all of them: no
            answers.append(get_session().head(endpoint, timeout=PATIENCE))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(PATIENCE)
    return bool(answers)
