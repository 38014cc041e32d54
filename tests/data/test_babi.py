import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from everlong.data import BabiConfig
from everlong.data.babi_files import read_stories

FILE = """1 Mary moved to the bathroom.
2 John went to the hallway.
3 Where is Mary? \tbathroom\t1
4 Daniel went back to the hallway.
5 Sandra moved to the garden.
6 Where is Daniel? \thallway\t4
1 Sandra took the milk there.
2 Sandra went to the kitchen.
3 Where is the milk? \tkitchen\t1 2
"""
REAL = Path(os.environ.get("EVERLONG_BABI", Path(__file__).parents[3] / "shared" / "data" / "babi"))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "qa1_single-supporting-fact_train.txt").write_text(FILE)
    (tmp_path / "qa1_single-supporting-fact_test.txt").write_text(FILE.replace("Mary", "Anna"))
    return tmp_path


@pytest.fixture
def config(folder, text_folder):
    return lambda **fields: BabiConfig(folder=str(folder), source=str(text_folder), **fields)


def text_of(sample):
    return bytes(sample["input_ids"].tolist()).decode()


def test_stories_are_read_with_all_that_came_before(folder):
    first, second = read_stories(folder / "qa1_single-supporting-fact_train.txt")
    assert [story.answer for story in first] == ["bathroom", "hallway"]
    assert first[0].facts == ("Mary moved to the bathroom.", "John went to the hallway.")
    assert (len(first[1].facts), first[1].support, first[1].question) == (4, 2, "Where is Daniel?")
    assert (second[0].support, second[0].answer) == (1, "kitchen")


@pytest.mark.parametrize("length", [200, 500])
def test_a_sample_is_text_with_a_story_in_its_order(config, length):
    train, test = config(length=length).datasets(30)
    seen = set()
    for data, name in ((train, "Mary"), (test, "Anna")):
        for sample in data:
            text = text_of(sample)
            assert len(text) == length
            [story] = [s for s in data.stories if text.endswith(f" {s.question} {s.answer}")]
            places = [text.index(f" {fact}") for fact in story.facts]
            assert places == sorted(places)
            labels = sample["labels"]
            assert bytes(labels[labels >= 0].tolist()).decode() == story.answer
            end = places[story.support] + len(story.facts[story.support]) + 1
            assert sample["distance"] == len(text) - len(story.answer) - end
            seen |= {name} & {word.strip(".?") for word in text.split()}
    assert seen == {"Mary", "Anna"}


def test_the_sentence_that_answers_stands_where_it_is_asked(config):
    data = config(length=600).datasets(9)[1]
    for i in range(9):
        sample = data.sample(i, depth=i / 9)
        assert sample["depth"] == pytest.approx(i / 9, abs=0.1)
    assert torch.equal(data[3]["input_ids"], data[3]["input_ids"])


def test_a_share_of_the_stories_is_held_out_where_no_test_file_is(folder, config):
    (folder / "qa1_single-supporting-fact_test.txt").unlink()
    train, test = config(held_out=0.4).stories()
    assert {story.answer for story in train} == {"bathroom", "hallway"}
    assert {story.answer for story in test} == {"kitchen"}
    assert config(held_out=0.4).longest_answer == len("kitchen")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"folder": "", "tasks": ["qa11"]}, "tasks are some of qa1, .*, got qa11"),
        ({"folder": "", "max_facts": 1}, "at most 1 sentences.*raise max_facts"),
        ({"folder": "", "length": 64}, "none .* fits into 64 tokens"),
        ({"tasks": []}, "tasks is empty"),
        ({"tasks": ["qa7"]}, r"has 0 files qa7_\*_train.txt, not one: it has qa1"),
        ({"folder": "nowhere"}, "it has none of bAbI"),
        ({"max_facts": 0}, "max_facts must be at least 1"),
        ({"max_facts": 1}, "with at most 1 sentences.*raise max_facts"),
        ({"length": 64}, "length 64 is too short"),
    ],
)
def test_stories_that_are_not_there_are_named(folder, text_folder, fields, message):
    with pytest.raises(ValueError, match=message):
        BabiConfig(**{"folder": str(folder), "source": str(text_folder)} | fields).datasets(1)


@pytest.mark.parametrize("task", ["qa2", "qa4", "qa8"])
def test_without_a_folder_each_sample_has_a_story_of_its_own(task, text_folder):
    config = BabiConfig(source=str(text_folder), tasks=[task], max_facts=12, length=700)
    train, test = config.datasets(40)
    seen = []
    for data in (train, test):
        for i in range(len(data)):
            sample = data[i]
            text = text_of(sample)
            assert len(text) == 700
            story = config.story(np.random.default_rng((data.seed, i)), 700)
            assert text.endswith(f" {story.question} {story.answer}")
            assert all(f" {fact}" in text for fact in story.facts)
            assert len(story.facts) <= 12
            assert len(story.answer) <= config.longest_answer
            seen.append(repr(story))
    if task != "qa4":  # of which there are but some hundreds
        assert len({*seen}) == 80
    assert config.fingerprint() != replace(config, tasks=["qa1"]).fingerprint()
    assert config.fingerprint() == replace(config).fingerprint()


def test_stories_longer_than_the_sample_are_drawn_again(text_folder):
    config = BabiConfig(source=str(text_folder), tasks=["qa2"], max_facts=99, length=300)
    assert all(len(sample["input_ids"]) == 300 for sample in config.datasets(20)[0])


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "file.txt").write_text("Mary had a little lamb\n")
    with pytest.raises(ValueError, match="no file of bAbI: it has the line 'Mary had"):
        read_stories(tmp_path / "file.txt")


@pytest.mark.skipif(not REAL.is_dir(), reason="the files of bAbI are not here")
def test_the_published_files():
    for path in REAL.glob("qa*_train.txt"):
        stories = [story for block in read_stories(path) for story in block]
        assert len(stories) == 10_000, path.name
