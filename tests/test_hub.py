"""Names of the hub: what is here first, then one short try."""

import time

import pytest
from huggingface_hub import constants

from everlong import hub
from everlong.cli import main
from everlong.data import load_tokenizer, read_pieces
from everlong.evaluation.harness_tasks import harness_tasks
from everlong.evaluation.loading import load_outline


@pytest.fixture
def no_hub(monkeypatch):
    """A hub that nobody answers for, and not a file of it here."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_what_is_here_is_taken_without_asking(monkeypatch):
    monkeypatch.setattr(hub, "_answers", lambda endpoint: pytest.fail("asked"))
    assert hub.from_hub("some/model", lambda: 3) == 3


def test_what_is_not_here_comes_from_the_hub_if_it_answers(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_answers", lambda endpoint: True)

    def load():
        if constants.is_offline_mode():
            raise OSError("not in the cache")
        return 3

    assert hub.from_hub("some/model", load) == 3


def test_a_hub_that_hangs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: HangingSession())
    started = time.perf_counter()
    assert not hub._answers("http://127.0.0.1:9")
    assert time.perf_counter() - started < 2


class HangingSession:
    def head(self, *args, **kwargs):
        time.sleep(3)


def test_errors_of_a_folder_are_its_own(tmp_path):
    def load():
        raise KeyError("broken")

    with pytest.raises(KeyError):
        hub.from_hub(tmp_path, load)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (
            lambda: load_tokenizer("nobody/nothing"),
            "reach.*hf download nobody/nothing --local-dir",
        ),
        (
            lambda: load_outline("nobody/nothing"),
            "reach.*hf download nobody/nothing --local-dir",
        ),
        (
            lambda: list(read_pieces("hub:nobody/nothing")),
            "out of reach.*hf download nobody/nothing --repo-type dataset --local-dir",
        ),
        (lambda: harness_tasks(["hellaswag"]), "download the data set Rowan/hellaswag"),
    ],
)
def test_offline_the_error_comes_at_once(ask, message, no_hub):
    started = time.perf_counter()
    with pytest.raises(ValueError, match=message) as error:
        ask()
    assert "\n" not in str(error.value)
    assert time.perf_counter() - started < 10


def test_the_command_line_too(no_hub, tiny_recipe, tmp_path, capsys):
    started = time.perf_counter()
    for arguments in (
        ["eval", "nobody/nothing", "--out", str(tmp_path)],
        ["train", str(tiny_recipe()), "--data.tokenizer=nobody/nothing", "--data.task=text"],
    ):
        assert main(arguments) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert time.perf_counter() - started < 10
