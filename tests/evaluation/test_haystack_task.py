"""Needles asked for as they were trained, against models whose answers are known."""

from types import SimpleNamespace

import pytest
from oracles import Reader, pass_key, subject
from transformers import AutoModelForCausalLM

from everlong.evaluation import attention_reach
from everlong.evaluation.haystack import HaystackTask
from everlong.evaluation.task import _by_depth
from everlong.models import Retrieval
from everlong.training import load_recipe
from everlong.training.model import build_model_config


@pytest.fixture
def task(text_folder):
    return HaystackTask("needle", source=str(text_folder))


def scores(task, model, length, samples, **options):
    """The task's cell for a model."""
    asked = subject(model, **options)
    records = list(task.run(asked, length, range(samples), samples))
    assert [record["index"] for record in records] == list(range(samples))
    return task.cells(asked, length, records)[0]


@pytest.mark.parametrize("piece", [64, 100, 4096])
@pytest.mark.parametrize("length", [300, 64 * 4 + 3])
def test_a_model_that_knows_finds_everything_in_pieces_too(task, length, piece):
    read, model = [], Reader(pass_key())
    cell = scores(task, model, length, 7, piece=piece, on_tokens=read.append)
    assert (cell.main.hits, cell.samples, cell.metrics["tokens"].value) == (7, 7, 1.0)
    assert sum(read) == 7 * length
    assert model.largest_output == 6
    assert set(cell.more) == {"mean_distance"}


def test_a_model_that_sees_no_farther_than_its_reach_is_split_by_it(task):
    model = Reader(pass_key(150))
    model.config = SimpleNamespace(sliding_window=75, num_hidden_layers=2, layer_types=None)
    cell = scores(task, model, 400, 40)
    near, far = cell.more["within_reach"], cell.more["beyond_reach"]
    assert near["samples"] + far["samples"] == 40
    assert near["samples"] > 5
    assert far["samples"] > 15
    assert near["value"] > 0.9
    assert far["value"] < 0.1
    found = [each.value for each in cell.by_depth]
    assert found[:5] == [0.0] * 5
    assert found[-1] == 1.0
    assert sum(each.samples for each in cell.by_depth) == 40


def test_a_sample_shows_what_it_asks_for(task):
    for length, passages in ((300, 0), (4000, 0), (4000, 2)):
        asked = subject(Reader(pass_key()), passages=passages)
        for record in task.run(asked, length, range(9), 9):
            assert f"(The pass key is {record['wanted']})" in record["evidence"]
            assert len(record["evidence"]) < 140


def test_with_retrieval_a_short_reach_is_enough(task):
    cell = scores(task, Reader(pass_key(420)), 4000, 20, passages=2)
    assert cell.main.hits >= 15
    assert scores(task, Reader(pass_key(400)), 4000, 20).main.hits <= 5


def test_the_text_is_what_the_recipe_holds_out(tmp_path):
    """Each document has a letter of its own: those of training and of questions share none."""
    for letter in "abcdefghij":
        (tmp_path / f"{letter}.txt").write_text(f"{letter * 9} " * 90)
    data = {"task": "needle", "source": str(tmp_path), "held_out": 0.3}
    task, model = HaystackTask("needle"), subject(Reader(), {"data": data})
    letters = [
        {letter for letter in "abcdefghij" if letter.encode() * 9 in bytes(found.haystack.tokens)}
        for found in (task.config(model).datasets(3, 0)[0], task.dataset(model, 3))
    ]
    assert [len(each) for each in letters] == [7, 3]
    assert not letters[0] & letters[1]


def test_depths_fall_into_tenths():
    records = [{"depth": depth, "scores": {"x": 1.0}} for depth in (0.0, 0.09, 0.1, 0.19, 0.96, 1.0)]
    assert [each.samples for each in _by_depth(records, "x")] == [2, 2, *[0] * 7, 2]


def test_what_is_looked_for_holds_no_answer(task, monkeypatch):
    asked = []

    def spy(self, prompt):
        asked.append(bytes(prompt.tolist()))
        return prompt

    monkeypatch.setattr(Retrieval, "shorten", spy)
    model = subject(Reader(pass_key()), passages=2)
    list(task.run(model, 1000, range(5), 5))
    data = task.dataset(model, 5)
    for i, prompt in enumerate(asked):
        whole = bytes(data.sample(i, 1000, depth=(i + 0.5) / 5)["input_ids"].tolist())
        assert prompt == whole[:-5]


def test_teacher_forcing_scores_as_greedy_decoding_does(task):
    """An oracle that is wrong on some keys, in the middle of them."""
    model = Reader(pass_key(wrong_at={(2, ord("7")), (2, ord("3")), (4, ord("1"))}))
    asked = subject(model)
    records = {record["index"]: record for record in task.run(asked, 300, range(40), 40)}
    greedy = 0
    for i in range(40):
        ids = task.dataset(asked, 40).sample(i, 300, depth=(i + 0.5) / 40)["input_ids"]
        [answer] = asked.generate(ids[None, :-5], 5)
        right = answer.encode() == bytes(ids[-5:].tolist())
        assert records[i]["scores"]["exact"] == right
        greedy += right
    assert 0 < greedy < 40


def test_the_score_is_the_same_in_any_batch(task, tiny_recipe):
    model = AutoModelForCausalLM.from_config(build_model_config(load_recipe(tiny_recipe())))
    answers = [
        [r["answer"] for r in task.run(subject(model, tokens_per_forward=n), 128, range(10), 10)]
        for n in (128, 1000, 10**6)
    ]
    assert answers[0] == answers[1] == answers[2]


def test_reach_is_that_of_windows_alone():
    windows = SimpleNamespace(
        layer_types=["sliding_attention"] * 2, num_hidden_layers=2, sliding_window=64
    )
    assert attention_reach(windows) == 128
    windows.layer_types = ["sliding_attention", "lmm"]
    assert attention_reach(windows) is None
    assert attention_reach(SimpleNamespace()) is None


def test_lengths_that_cannot_be_asked_are_refused(task):
    with pytest.raises(ValueError, match="takes 500 tokens at most, asked are 1,000: leave longer"):
        task.check(subject(Reader(), longest=500), 1000)
    task.check(subject(Reader(), longest=500, passages=2), 1000)
    with pytest.raises(ValueError, match="length 60 is too short"):
        task.check(subject(Reader()), 60)
    with pytest.raises(ValueError, match="needle stands in a text: ask for lengths above 0"):
        task.check(subject(Reader()), 0)


def test_a_tokenizer_of_words_is_refused(task):
    from everlong.data import train_tokenizer

    words = train_tokenizer(["some words, caf\u00e9 caf\u00e9"] * 9, 300)
    with pytest.raises(ValueError, match="whose ids are not bytes: needle is scored on bytes"):
        task.check(subject(Reader(), tokenizer=words), 300)
