"""The solver: what it reads, and that it answers what is simulated and what is published."""

import os
from pathlib import Path

import numpy as np
import pytest

from everlong.data.babi_files import check_babi, read_stories, write_babi
from everlong.data.babi_solver import answer, answers
from everlong.data.babi_world import TASKS, simulate

REAL = Path(os.environ.get("EVERLONG_BABI", Path(__file__).parents[3] / "shared" / "data" / "babi"))

EXAMPLES = [
    ("qa1", "Mary went to the garden. Mary moved to the office.", "Where is Mary?", "office"),
    ("qa2", "Mary got the milk there. Mary went to the office.", "Where is the milk?", "office"),
    (
        "qa2",
        "Mary went to the garden. Mary took the milk there. Mary left the milk. "
        "Mary went to the office.",
        "Where is the milk?",
        "garden",
    ),
    (
        "qa3",
        "Mary took the milk. Mary moved to the office. Mary moved to the garden. "
        "Mary moved to the office. Mary moved to the kitchen. Mary dropped the milk there.",
        "Where was the milk before the office?",
        "garden",
    ),
    (
        "qa4",
        "The office is north of the kitchen. The garden is south of the kitchen.",
        "What is the kitchen north of?",
        "garden",
    ),
    ("qa5", "Bill gave the milk to Fred.", "Who did Bill give the milk to?", "Fred"),
    (
        "qa5",
        "Bill gave the milk to Fred. Fred passed the milk to Jeff.",
        "Who gave the milk?",
        "Fred",
    ),
    ("qa6", "Mary went to the garden. Mary took the milk there.", "Is Mary in the garden?", "yes"),
    (
        "qa7",
        "Mary took the milk there. John handed the apple to Mary. Mary left the milk there.",
        "How many objects is Mary carrying?",
        "one",
    ),
    (
        "qa8",
        "Mary took the milk there. Mary took the apple there. Mary left the milk. "
        "Mary got the milk there.",
        "What is Mary carrying?",
        "milk,apple",  # in the order in which she first took them
    ),
    ("qa9", "Mary is in the park. Mary is no longer in the park.", "Is Mary in the park?", "no"),
    ("qa10", "Bill is either in the park or the office.", "Is Bill in the office?", "maybe"),
    ("qa10", "Bill is either in the park or the office.", "Is Bill in the school?", "no"),
    # So it is in the files.
    ("qa10", "Bill is either in the park or the park.", "Is Bill in the park?", "maybe"),
]


@pytest.mark.parametrize(("task", "text", "question", "right"), EXAMPLES)
def test_questions_are_answered(task, text, question, right):
    facts = [f"{fact}." for fact in text.rstrip(".").split(". ")]
    assert answers(task, facts, question) == [right]


@pytest.mark.parametrize("task", TASKS)
def test_all_that_is_simulated_is_answered(task):
    for seed in range(300):
        for story in simulate(task, np.random.default_rng(seed)):
            assert answer(task, story.facts, story.question) == story.answer, story


def test_two_answers_can_be_right():
    facts = ["Bill gave the milk to Fred.", "Fred left the milk.", "Bill gave the apple to Fred."]
    question = "What did Bill give to Fred?"
    assert answers("qa5", facts, question) == ["apple", "milk"]
    later = [*facts, *["Jeff went to the garden."] * 3]
    assert answers("qa5", later, question) == ["apple"]


@pytest.mark.parametrize(
    ("task", "fact", "question", "message"),
    [
        ("qa11", "Mary went to the park.", "Where is Mary?", "not 'qa11'"),
        ("qa1", "Mary slept.", "Where is Mary?", "no sentence of bAbI's qa1 to qa10: 'Mary slept.'"),
        ("qa1", "Mary went to the park.", "Why is Mary there?", "no sentence .* 'Why is Mary"),
        ("qa1", "Mary went to the park.", "Where is John?", "the 1 sentences do not tell .* John"),
    ],
)
def test_what_cannot_be_answered_is_refused(task, fact, question, message):
    with pytest.raises(ValueError, match=message):
        answer(task, [fact], question)


def test_simulated_files_are_read_back_and_all_answered(tmp_path):
    written = write_babi(tmp_path / "stories", TASKS, 20, seed=3)
    assert len(written) == 2 * len(TASKS)
    assert (tmp_path / "stories" / "qa10_indefinite-knowledge_test.txt") in written
    for task in TASKS:
        train, test = (read_stories(path) for path in written if path.name.startswith(f"{task}_"))
        assert (sum(map(len, train)), sum(map(len, test))) == (20, 2 if task == "qa4" else 5)
        rng = np.random.default_rng((3, TASKS.index(task)))
        assert train[0] == simulate(task, rng)
        assert not {repr(block) for block in train} & {repr(block) for block in test}
    counts = check_babi(tmp_path / "stories")
    assert counts == {task: (22, 22) if task == "qa4" else (25, 25) for task in TASKS}
    again = write_babi(tmp_path / "again", ["qa7"], 20, seed=3)
    assert [path.read_text() for path in again] == [
        path.read_text() for path in written if path.name.startswith("qa7_")
    ]


@pytest.mark.parametrize(
    ("tasks", "questions", "message"),
    [
        (["qa1", "qa11"], 5, "tasks are some of qa1, .* got 'qa1, qa11'"),
        (["qa1"], 0, "at least 1, got 0"),
        (["qa2"], 5, "is there already: name another folder, or delete it"),
    ],
)
def test_files_that_cannot_be_written_are_refused(tasks, questions, message, tmp_path):
    (tmp_path / "qa2_two-supporting-facts_test.txt").touch()
    with pytest.raises(ValueError, match=message):
        write_babi(tmp_path, tasks, questions)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_without_stories_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no files of bAbI, such as qa1_single"):
        check_babi(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the files of bAbI are not here")
def test_all_that_is_published_is_answered():
    for task, (right, asked) in check_babi(REAL).items():
        assert right == asked == 10_000, task


@pytest.mark.skipif(not REAL.is_dir(), reason="the files of bAbI are not here")
def test_what_a_published_question_has_two_answers_to_is_rare():
    [path] = REAL.glob("qa5_*_train.txt")
    stories = [story for block in read_stories(path) for story in block]
    found = [answers("qa5", story.facts, story.question) for story in stories]
    assert sum(len(each) > 1 for each in found) == 36
    first = [each[0] == story.answer for each, story in zip(found, stories, strict=True)]
    assert sum(first) == 10_000 - 18
