import re

import pytest
import torch

from everlong.data.haystack import Haystack
from everlong.data.needle import BEFORE, NeedleConfig, NeedleDataset
from everlong.data.text import Document

WORDS = ("alpha beta gamma delta epsilon zeta eta theta " * 40).encode()
DOCUMENTS = [Document("a", WORDS), Document("b", WORDS[::-1])]


def dataset(num_samples=50, seed=0, batch=1, **fields):
    return NeedleDataset(Haystack.of_bytes(DOCUMENTS), NeedleConfig(**fields), num_samples, seed, batch)


def text_of(sample):
    return bytes(sample["input_ids"].tolist()).decode()


def answers_of(sample):
    """The labelled stretches of a sample, as text."""
    marks = [chr(label) if label >= 0 else " " for label in sample["labels"].tolist()]
    return "".join(marks).split()


@pytest.mark.parametrize("length", [100, 333, 5000])
def test_a_sample_is_text_with_a_needle_and_its_question_at_the_end(length):
    for sample in dataset(length=length):
        text = text_of(sample)
        assert len(text) == length
        found = re.fullmatch(
            r"(.*) \(The pass key is (\d{5})\)(?:\s.*)?"
            r" What is the pass key\? \(The pass key is (\d{5})",
            text,
            re.DOTALL,
        )
        assert found
        assert found[2] == found[3]
        assert answers_of(sample) == [found[2]]
        assert text.endswith(found[2])


def test_the_rest_of_a_sample_is_one_window_of_the_documents():
    haystack = "\n\n".join(document.text.decode() for document in DOCUMENTS)
    for sample in dataset(length=400):
        rest = re.sub(r" \(The pass key is \d{5}\)", "", text_of(sample))
        rest = re.sub(r" What is the pass key\? \(The pass key is \d{5}$", "", rest)
        assert rest in haystack * 2


def test_distance_and_depth_are_those_of_the_text():
    for sample in dataset(length=300):
        text = text_of(sample)
        answer = len(text) - 5
        assert sample["distance"] == answer - text.index(text[answer:])
        before = text.index(" (The pass key is")
        assert sample["depth"] == pytest.approx(before / (300 - 24 - 45))


def test_depth_can_be_asked_for():
    samples = dataset(length=2000)
    assert samples.sample(0, depth=0)["depth"] < 0.01
    assert samples.sample(0, depth=0.5)["depth"] == pytest.approx(0.5, abs=0.01)
    assert samples.sample(0, depth=1)["depth"] == 1
    with pytest.raises(ValueError, match=r"depth must lie in \[0, 1\], got 2"):
        samples.sample(0, depth=2)


def test_depths_and_keys_spread_evenly():
    samples = [dataset(400)[i] for i in range(400)]
    assert torch.tensor([sample["depth"] for sample in samples]).mean() == pytest.approx(0.5, abs=0.06)
    first_digits = [answers_of(sample)[0][0] for sample in samples]
    assert all(20 <= first_digits.count(digit) <= 60 for digit in "0123456789")


def test_samples_depend_on_seed_and_index_alone():
    one, two = dataset(seed=1)[7], dataset(num_samples=8, seed=1)[7]
    assert torch.equal(one["input_ids"], two["input_ids"])
    assert not torch.equal(one["input_ids"], dataset(seed=2)[7]["input_ids"])
    assert not torch.equal(one["input_ids"], dataset(seed=1)[8]["input_ids"])


def test_text_longer_than_the_documents_goes_round():
    assert len(dataset(length=20_000)[0]["input_ids"]) == 20_000


@pytest.mark.parametrize("spread", [False, True])
def test_several_needles_have_names_and_every_answer_a_label(spread):
    samples = dataset(length=900, num_needles=4, num_questions=3, spread_questions=spread)
    for sample in samples:
        text = text_of(sample)
        keys = dict(re.findall(r" \(The pass key of (\w+) is (\d{5})\)", text))
        asked = re.findall(
            r" What is the pass key of (\w+)\? \(The pass key of \1 is (\d{5})(?:\)|$)", text
        )
        assert len(keys) == 4
        assert len(asked) == 3
        assert [answer for _, answer in asked] == answers_of(sample)
        for name, answer in asked:
            assert keys[name] == answer
            assert text.index(f"The pass key of {name} is") < text.index(f"pass key of {name}?")
        if not spread:
            assert re.search(r"(?: What is the pass key of \w+\? \([\w ]+\)?){3}$", text)


def test_text_loss_labels_a_share_of_the_text():
    everything = dataset(text_loss=1.0)[0]
    assert torch.equal(everything["labels"], everything["input_ids"])
    labels = dataset(length=5000, text_loss=0.1)[0]["labels"]
    assert (labels >= 0).float().mean() == pytest.approx(0.1, abs=0.03)
    assert (labels[-5:] >= 0).all()


def test_lengths_grow_by_step_and_are_one_within_a_batch():
    samples = dataset(
        num_samples=48, batch=4, length=1024, start_length=96, growth_steps=10, key_digits=3
    )
    lengths = [len(sample["input_ids"]) for sample in samples]
    steps = [lengths[i : i + 4] for i in range(0, 48, 4)]
    assert all(len(set(step)) == 1 for step in steps)
    assert lengths == sorted(lengths)
    assert lengths[0] == 96
    assert lengths[-1] == 1024
    assert steps[5][0] == round(96 * (1024 / 96) ** 0.5 / 32) * 32


def test_training_and_held_out_samples_share_no_text_and_no_keys(tmp_path):
    for letter in "abcdefghij":
        (tmp_path / f"{letter}.txt").write_text(f"{letter * 9} " * 20)
    config = NeedleConfig(source=str(tmp_path), held_out=0.3, start_length=96, growth_steps=9)
    train, test = config.datasets(20)
    assert not {*train.haystack.tokens.tolist()} & {*test.haystack.tokens.tolist()} - {*b" \n"}
    assert not {answers_of(s)[0] for s in train} & {answers_of(s)[0] for s in test}
    assert len(train[0]["input_ids"]) == 96
    assert len(test[0]["input_ids"]) == 512


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_needles": 0}, "num_needles must lie in"),
        ({"num_questions": 2}, "num_questions must lie in 1 ... num_needles = 1, got 2"),
        ({"key_digits": 0}, "key_digits must be at least 1"),
        ({"text_loss": 2.0}, "text_loss"),
        ({"needle": "no key"}, "needle must hold {key} once"),
        ({"needle": "{key}", "num_needles": 2}, "both sentences must hold {of}"),
        ({"length": 69}, "length 69 is too short: .* can take 69 tokens"),
        ({"start_length": 60}, "length 60 is too short"),
        ({"num_needles": 19}, "length 512 is too short"),
        ({"start_length": 1000}, "start_length must lie in 1 ... length = 512, got 1000"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        NeedleConfig(**fields)


def test_a_length_too_short_for_the_sentences_is_refused():
    with pytest.raises(ValueError, match=r"length 60 is too short: .* take 69 tokens"):
        dataset().sample(0, length=60)


def test_lengths_wait_before_they_grow():
    config = NeedleConfig(length=512, start_length=96, hold_steps=20, growth_steps=10)
    assert [config.length_at(step) for step in (0, 20, 30, 99)] == [96, 96, 512, 512]
    assert 96 < config.length_at(25) < 512
    with pytest.raises(ValueError, match="hold_steps and growth_steps must be at least 0, got -1"):
        NeedleConfig(hold_steps=-1)


def test_what_nobody_asks_for_stands_in_lessons_alone(tmp_path):
    (tmp_path / "text").mkdir()
    for i in range(10):
        (tmp_path / "text" / f"{i}.txt").write_bytes(WORDS)
    config = NeedleConfig(source=str(tmp_path / "text"), length=600, distractors=0.1)
    lessons, judged = config.datasets(200)
    numbers = 0
    for sample in lessons:
        text = text_of(sample)
        assert len(sample["input_ids"]) == 600
        assert len(answers_of(sample)) == 1
        numbers += len(re.findall(r"(?<!key is) \$?\d[\d,.]*(?= )", text))
    assert 800 < numbers < 1200  # half of ten a sample
    everything = "".join(map(text_of, lessons))
    assert {"$", "@", "~", "é", "—"} <= {*everything}
    assert all(re.search(f" {word} \\$?\\d", everything) for word in BEFORE)
    assert not any(re.search(r"(?<!is )\b\d", text_of(sample)) for sample in judged)
    assert config.plain().distractors == 0
    with pytest.raises(ValueError, match=r"distractors must lie in \[0, 1\], got 2"):
        NeedleConfig(distractors=2)


@pytest.mark.parametrize(
    "found",
    ["(The pass key is 7)", "as was said: (The pass key of Rome is 48213)", "(The pass key is\n1"],
)
def test_a_text_that_answers_the_question_by_itself_is_refused(tmp_path, found):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(WORDS + (found.encode() if name == "b" else b""))
    with pytest.raises(ValueError, match=r"b\.txt holds .*asked for"):
        NeedleConfig(source=str(tmp_path), length=200).datasets(4)


def test_a_text_that_asks_or_has_numbers_alone_is_not_refused(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(
            WORDS + b"What is the pass key? 48213 (The pass key is lost"
        )
    NeedleConfig(source=str(tmp_path), length=200).datasets(4)


def test_a_short_lesson_has_room_for_some_text(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_bytes(WORDS)
    config = NeedleConfig(source=str(tmp_path), length=96, distractors=1.0)
    assert all(len(sample["input_ids"]) == 96 for sample in config.datasets(200)[0])
