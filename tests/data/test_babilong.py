"""Stories of bAbI among the sentences of a text, in tokens of any tokenizer."""

import re

import numpy as np
import pytest
import torch

from everlong.data import BabilongConfig, train_tokenizer
from everlong.data.babi_solver import answer
from everlong.data.babilong import _sentences

SENTENCE = re.compile(
    r"(?P<fact>(?:Mary|John|Daniel|Sandra) [^.?]*\.)|(?P<question>Where is [^?]*\?) (?P<answer>\w+)\."
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def config(text_folder):
    return lambda **fields: BabilongConfig(source=str(text_folder), **fields)


def words(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_sentences_are_those_of_the_text():
    text = "One is\n here. Two?  Three! (Four.) five"
    assert _sentences(text) == ["One is here.", "Two?", "Three!", "(Four.) five"]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
@pytest.mark.parametrize("length", [600, 1200])
def test_a_sample_is_a_text_with_a_story_that_answers_its_questions(config, tokenizer, length):
    data = config(tokenizer=tokenizer, vocabulary=600, tasks=["qa1", "qa2"], length=length, together=0)
    coder = data.build_tokenizer()
    for sample in list(data.datasets(20)[0]):
        assert len(sample["input_ids"]) == len(sample["labels"]) == length
        text = words(coder, sample["input_ids"])
        facts, said = [], []
        for found in SENTENCE.finditer(text):
            if found["fact"]:
                facts.append(found["fact"])
            else:
                said.append((answer("qa2", facts, found["question"]), found["answer"]))
        assert said
        assert all(right == given for right, given in said), text
        labels = sample["labels"]
        told = words(coder, labels[labels >= 0]).strip(" .").split(". ")
        assert told == [given for _, given in said]


def test_a_story_that_stands_together_is_at_the_end(config):
    data = config(tokenizer="bytes", tasks=["qa1"], length=600, together=1).datasets(10)[0]
    for sample in data:
        text = bytes(sample["input_ids"].tolist()).decode()
        story = text.index(" Mary") if " Mary" in text else len(text)
        first = min(story, *(text.find(f" {name}") % 10**6 for name in ("John", "Daniel", "Sandra")))
        assert "texts" not in text[first:]


def test_a_context_has_the_length_asked_for_and_no_question(config):
    plain = config(tokenizer="bytes", tasks=["qa1"]).plain()
    data = plain.held_out_data(None, 100)
    for index in range(5):
        text, story, depth = data.context(index, 2000)
        assert len(text) == 2000
        decoded = bytes(text.tolist()).decode()
        places = [decoded.index(fact) for fact in story.facts]
        assert places == sorted(places)
        assert "?" not in decoded
        room = 2000 - sum(len(fact) + 1 for fact in story.facts)
        before = sum(len(fact) + 1 for fact in story.facts[: story.support])
        assert depth == pytest.approx((places[story.support] - 1 - before) / room)
        alone, again, _ = data.context(index, 0)
        assert bytes(alone.tolist()).decode() == "".join(f" {fact}" for fact in again.facts)


def test_a_long_text_goes_round_and_a_sample_depends_on_seed_and_index(config):
    data = config(tokenizer="bytes").plain()
    one, two = data.held_out_data(None, 9), data.held_out_data(None, 9, seed=1)
    assert len(one.context(0, 100_000)[0]) == 100_000
    assert np.array_equal(one.context(3, 900)[0], one.context(3, 900)[0])
    assert not np.array_equal(one.context(3, 900)[0], two.context(3, 900)[0])


def test_training_and_held_out_samples_share_no_story(config):
    train, test = config(tokenizer="bytes", length=512).datasets(30)
    told = [{bytes(s["input_ids"].tolist()[-200:]) for s in data} for data in (train, test)]
    assert not told[0] & told[1]
    assert torch.equal(train[3]["input_ids"], train[3]["input_ids"])


def test_the_tokenizer_is_trained_once_and_knows_the_words(config):
    data = config(vocabulary=400)
    first = data.build_tokenizer()
    assert len(first) == 400
    for word in (" bathroom", " Mary"):
        assert len(first(word)["input_ids"]) == 1, word
    assert data.build_tokenizer().get_vocab() == first.get_vocab()
    assert config(vocabulary=350).build_tokenizer().get_vocab() != first.get_vocab()


def test_any_tokenizer_serves(config, tmp_path):
    train_tokenizer(["some text of " * 50], 300).save_pretrained(tmp_path / "own")
    data = config(tokenizer=str(tmp_path / "own"), length=700).datasets(3)[0]
    assert all(len(sample["input_ids"]) == 700 for sample in data)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tasks": []}, "tasks are some of qa1, .* got "),
        ({"tasks": ["qa11"]}, "tasks are some of"),
        ({"together": 2}, "together is a share"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(config, fields, message):
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_a_length_without_room_is_refused(config):
    data = config(tokenizer="bytes", tasks=["qa1"], length=512).datasets(3)[0]
    with pytest.raises(ValueError, match="length 20 is too short: of 1,000 stories of qa1 none fits"):
        data.sample(0, 20)
