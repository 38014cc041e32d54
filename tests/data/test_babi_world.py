"""The simulated stories against the rules of bAbI and, where they are here, against its files."""

import math
import os
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from everlong.data.babi_files import read_stories
from everlong.data.babi_world import QUESTIONS, TASKS, narrate, simulate

REAL = Path(os.environ.get("EVERLONG_BABI", Path(__file__).parents[3] / "shared" / "data" / "babi"))
FILED = [task for task in TASKS if task != "qa3"]
NAMES = {
    "P": "Mary|John|Daniel|Sandra|Bill|Fred|Jeff|Julie",
    "L": "bathroom|bedroom|kitchen|garden|hallway|office|park|cinema|school",
    "O": "apple|football|milk",
    "D": "north|south|east|west",
}


@cache
def shape(sentence):
    """A sentence with its names left out."""
    for letter, names in NAMES.items():
        sentence = re.sub(rf"\b({names})\b", letter, sentence)
    return sentence


def features(block):
    """What tells one rule from another: of each question its form, answer and what it rests on."""
    for number, story in enumerate(block):
        facts = len(story.facts)
        ages = [facts - 1 - i for i in story.supports]
        words = re.findall(r"\w+", story.question)
        yield "answer", story.answer
        yield "question", shape(story.question), shape(story.answer)
        yield "facts", number, min(facts, 60) // 4
        yield "age", min(ages[0], 12)
        yield "supports", len(ages), min(max(ages), 12)
        yield "who", tuple(word for word in words if re.fullmatch(NAMES["P"], word))
        yield "sentence", shape(story.facts[ages[0]])
        yield "actor again", len({fact.split()[0] for fact in story.facts[-5:]})
    facts = block[-1].facts
    for before, fact in zip(("", *facts), facts, strict=False):
        yield "fact", shape(fact)
        yield "kinds", shape(before).split()[-2:] == shape(fact).split()[-2:], shape(fact)[-6:]
        if re.search("dropped|left|discarded|put down", fact):
            yield "dropped there", fact.endswith(" there.")
        yield "pair", before.split()[:1] == fact.split()[:1], shape(fact)[-4:]


def shares(blocks):
    """For each thing that is counted, the share of each value, and of how many."""
    counts = {}
    for block in blocks:
        for name, *value in features(block):
            counts.setdefault(name, Counter())[tuple(value)] += 1
    return {
        name: ({value: n / counter.total() for value, n in counter.items()}, counter.total())
        for name, counter in counts.items()
    }


def distance(one, other):
    """Total variation, 0 to 1."""
    return sum(abs(one.get(value, 0) - other.get(value, 0)) for value in {*one, *other}) / 2


def chance(one, other, size):
    """The distance to expect of two samples of so many independent draws from the same shares."""
    means = [(one.get(value, 0) + other.get(value, 0)) / 2 for value in {*one, *other}]
    return sum((p * (1 - p) / (math.pi * size)) ** 0.5 for p in means)


def blocks_of(task, seeds):
    return [simulate(task, np.random.default_rng(seed)) for seed in seeds]


def real_blocks(task):
    files = list(REAL.glob(f"{task}_*_train.txt"))
    if not files:
        pytest.skip("the files of bAbI are not here")
    return read_stories(files[0])


@pytest.mark.parametrize("task", TASKS)
def test_a_block_is_questions_about_all_that_came_before(task):
    for block in blocks_of(task, range(30)):
        assert len(block) == (1 if task == "qa4" else QUESTIONS)
        assert all(len(story.facts) % 2 == 0 for story in block)
        for before, after in pairwise(block):
            assert after.facts[: len(before.facts)] == before.facts
            assert len(after.facts) > len(before.facts)
        for story in block:
            assert all(0 <= i < len(story.facts) for i in story.supports)
            assert story.support == max(story.supports)


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_one_story_and_seeds_differ(task):
    once, again = blocks_of(task, range(40)), blocks_of(task, range(40))
    other = blocks_of(task, range(1_000_000_000, 1_000_000_040))
    assert once == again
    if task != "qa4":  # of which there are but some hundreds
        assert not {repr(block) for block in once} & {repr(block) for block in other}


def test_what_is_not_asked_for_is_not_told():
    rng, whole = np.random.default_rng(3), np.random.default_rng(3)
    assert next(narrate("qa2", rng)) == simulate("qa2", whole)[0]
    assert rng.random() != whole.random()


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="no simulation of 'qa11', only of qa1, qa2"):
        simulate("qa11", np.random.default_rng(0))


def test_where_a_thing_was_before_is_told_in_three_sentences():
    """qa3's file is not here: what is published of it is that three sentences are needed."""
    for block in blocks_of("qa3", range(30)):
        for story in block:
            put_down, there, before = (story.facts[i] for i in story.supports)
            place = story.question.removesuffix("?").split()[-1]
            assert re.search("dropped|left|discarded|put down", put_down)
            assert there.endswith(f" {place}.")
            assert before.endswith(f" {story.answer}.")
            assert len({fact.split()[0] for fact in (put_down, there, before)}) == 1
            assert story.answer != place


@pytest.mark.parametrize("task", FILED)
def test_sentences_and_questions_have_the_forms_of_the_files(task):
    def forms(blocks):
        stories = [story for block in blocks for story in block]
        return {shape(text) for s in stories for text in (*s.facts, f"{s.question} {s.answer}")}

    assert forms(blocks_of(task, range(2000))) == forms(real_blocks(task))


@pytest.mark.slow
@pytest.mark.parametrize("task", FILED)
def test_shares_are_those_of_the_files(task):
    """Each differs by little more than by chance; questions of one block are not independent."""
    real = real_blocks(task)
    simulated = shares(blocks_of(task, range(len(real))))
    questions = sum(map(len, real))
    for name, (known, number) in shares(real).items():
        told, _ = simulated[name]
        bound = 1.8 * chance(known, told, min(number, questions)) + 0.004
        assert distance(known, told) < bound, name
