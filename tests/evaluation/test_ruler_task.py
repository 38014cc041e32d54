"""RULER's needles asked of models whose answers are known; and beside RULER's own samples."""

import importlib.util
import re
from collections import Counter

import numpy as np
import pytest
from oracles import Reader, subject

from everlong.data import load_text, split, train_tokenizer
from everlong.data.ruler import KINDS, string_match_all
from everlong.evaluation.ruler import RulerTask, ruler_tasks
from everlong.evaluation.ruler_official import OfficialRulerTask, check_installed

ASKED = re.compile(rb"As the text has it, the secret \w+ of (.+?) (?:is|are)(?= |$)(.*)$", re.S)


def finder(limit=4):
    """Says the first `limit` values of the keys asked for, then ends."""

    def answer(text):
        asked = ASKED.search(text[max(text.rfind(b"As the text has it"), 0) :])
        if asked is None:
            return 258
        keys, given = asked.groups()
        values = [
            value
            for key in re.split(rb", | and ", keys)
            for value in re.findall(rb"One secret \w+ of " + key + rb" is (\S+)\.\s", text)
        ]
        said = b" " + b", ".join(values[:limit]) if limit else b" nothing"
        return said[len(given)] if len(given) < len(said) else 258

    return answer


def records(task, model, length, count=6):
    found = list(task.run(model, length, range(count), count))
    assert sorted(record["index"] for record in found) == list(range(count))
    return found


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_that_finds_the_needle_and_one_that_does_not(kind, text_folder):
    [task] = ruler_tasks([kind], source=str(text_folder))
    for limit, share in ((4, 1.0), (1, 1 / KINDS[kind].num_answers), (0, 0.0)):
        model = subject(Reader(finder(limit)))
        task.check(model, 1500)
        found = records(task, model, 1500)
        assert {record["scores"]["match"] for record in found} == {share}
        assert {record["tokens"] for record in found} == {1500}
        assert all(record["prompt"].endswith((" is", " are")) for record in found)
        assert all(len(record["prompt"]) == 300 for record in found)
        for record in found:
            assert all(value in record["evidence"] for value in record["wanted"].split(", "))
            assert record["evidence"].count("One secret") >= KINDS[kind].num_answers
        cell = task.cells(model, 1500, found)[0]
        assert (cell.main.value, cell.samples) == (share, 6)
    assert record_values(found[0]) == KINDS[kind].num_answers


def record_values(record):
    return len(record["wanted"].split(", "))


def test_the_needles_of_single_tasks_are_spread_evenly(text_folder):
    [task] = ruler_tasks(["niah_single_1"], source=str(text_folder))
    model = subject(Reader(finder()))
    depths = [sample.depth for _, sample in task.samples(model, 3000, range(50), 50)]
    assert set(np.histogram(depths, 10, (0, 1))[0]) <= {3, 4, 5, 6, 7}


def test_a_sample_depends_on_seed_length_and_index_alone(text_folder):
    model = subject(Reader(finder()))
    source = str(text_folder)

    def prompt(seed=0, length=1000, index=3, count=5):
        task = RulerTask("niah_multikey_2", seed, source)
        [(_, sample)] = task.samples(model, length, [index], count)
        return sample.prompt[-300:].tolist()

    assert prompt() == prompt(count=9)
    others = [prompt(seed=1), prompt(length=1001), prompt(index=4)]
    assert all(each != prompt() for each in others)


def test_prompts_are_read_side_by_side(text_folder):
    rows = []

    class Spy(Reader):
        def forward(self, input_ids, **options):
            rows.append(len(input_ids))
            return super().forward(input_ids, **options)

    [task] = ruler_tasks(["niah_single_2"], source=str(text_folder))
    read = []
    model = subject(Spy(finder()), tokens_per_forward=3000, on_tokens=read.append)
    records(task, model, 1000, 7)
    assert set(rows) == {3, 1}
    assert sum(read) > 7 * (1000 - 128)


def test_with_passages_they_and_the_whole_question_are_read(text_folder, monkeypatch):
    [task] = ruler_tasks(["niah_single_1"], source=str(text_folder))
    model, asked = subject(Reader(finder()), passages=2), []
    monkeypatch.setattr(model, "generate", lambda ids, new_tokens: asked.append(ids) or [""])
    samples = [sample for _, sample in task.samples(model, 20_000, range(3), 3)]
    records(task, model, 20_000, 3)
    for ids, sample in zip(asked, samples, strict=True):
        assert ids.shape == (1, 2 * 128 + sample.question_tokens)
        text, whole = model.decode(ids[0]), model.decode(sample.prompt)
        question = whole[whole.rindex("What is the secret number of ") :]
        assert len(question) == sample.question_tokens
        assert text.endswith(question)
        assert text.index(question.split()[6].rstrip(",")) < 256


def test_lengths_and_tokenizers_that_will_not_do_are_refused(text_folder):
    [task] = ruler_tasks(["niah_multiquery"], source=str(text_folder))
    model = subject(Reader(finder()), longest=4096)
    with pytest.raises(
        ValueError, match=r"400 tokens are too few for niah_multiquery.*shortest is \d+"
    ):
        task.check(model, 400)
    with pytest.raises(ValueError, match=r"takes 4,096 tokens at most, asked are 5,000"):
        task.check(model, 5000)
    task.check(model, 4096)
    with pytest.raises(ValueError, match="has no chat template"):
        ruler_tasks(["niah"], source=str(text_folder), chat_template=True)[0].check(model, 4096)


def test_tasks_by_name():
    assert [task.info.name for task in ruler_tasks(["niah"])] == list(KINDS)
    names = ["niah_single", "niah_single_2", "ruler_niah_multivalue"]
    tasks = ruler_tasks(names)
    assert [task.info.name for task in tasks] == [*list(KINDS)[:3], names[2]]
    assert len({id(task.made) for task in tasks[:3]}) == 1
    for name in ("vt", "ruler_niah_triple"):
        with pytest.raises(ValueError, match=f"unknown task '{name}': known are niah, niah_single"):
            ruler_tasks([name])


def has_official(kind):
    try:
        check_installed(kind)
    except ValueError:
        return False
    return True


def needs_official(kind):
    return pytest.mark.skipif(not has_official(kind), reason="RULER's package is not installed")


@pytest.mark.skipif(has_official("niah_single_1"), reason="RULER's package is installed")
def test_without_the_package_one_is_told_what_to_install():
    with pytest.raises(ValueError, match=r"not installed \(.*\): `pip install everlong\[ruler\]`"):
        OfficialRulerTask("niah_single_1").check(subject(Reader()), 4096)


def facts(text, wanted, pattern):
    """What the structure of a prompt is, whatever its words are."""
    pairs = re.findall(pattern, text)
    asked = {key for key, _ in pairs if key in text[-900:].split("What ")[-1]}

    def form(value):
        return re.sub(r"[a-z]+", "a", re.sub(r"\d", "0", value)) if len(value) < 20 else "uuid"

    def uuid(value):
        return bool(
            re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}", value)
        )

    lines = Counter(text.split("\n"))
    return {
        "needles": min(len(pairs), 10),
        "keys": min(len({key for key, _ in pairs}), 10),
        "keys of words": {bool(re.fullmatch(r"[a-z]+(-[a-z.']+)+", key)) for key, _ in pairs},
        "forms of values": {form(value) for _, value in pairs},
        "uuids": {(uuid(key), uuid(value)) for key, value in pairs},
        "asked": len(asked),
        "answers": len(wanted),
        "answers are those of the keys": {value for key, value in pairs if key in asked} == set(wanted),
        "same line": max(lines.values()) > 5,
        "many lines": len(lines) > 10,
        "one": text.endswith(" is"),
    }


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=needs_official(kind)) for kind in KINDS])
def test_our_samples_are_built_as_rulers_are(kind, text_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = subject(Reader(finder()))
    [theirs] = ruler_tasks([f"ruler_{kind}"])
    [ours] = ruler_tasks([kind], source=str(text_folder))
    found = {}
    for task, pattern in (
        (theirs, r"for (\S+) is: (\S+)\.(?=\s|$)"),
        (ours, r"One secret \w+ of (\S+) is (\S+)\.(?=\s)"),
    ):
        samples = [sample for _, sample in task.samples(model, 6000, range(3), 3)]
        texts = [model.decode(sample.prompt) for sample in samples]
        found[task] = [
            facts(text, sample.wanted, pattern) for text, sample in zip(texts, samples, strict=True)
        ]
        assert {sample.new_tokens for sample in samples} == {128}
        assert all(2000 < len(sample.prompt) + 128 <= 6000 for sample in samples)
        for text, sample in zip(texts, samples, strict=True):
            if len(sample.wanted) == 1:
                place = text.index(sample.wanted[0]) / len(text)
                assert sample.depth == pytest.approx(place, abs=0.1)
            else:
                assert sample.depth is None
    assert found[ours] == found[theirs]


@needs_official("niah_multikey_2")
def test_rulers_samples_are_made_once_and_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tokenizer = train_tokenizer(["one text"], 300)
    tokenizer.chat_template = "<bos>{{ messages[0]['content'] }}<eos><bos>"
    model = subject(Reader(lambda text: 258), tokenizer=tokenizer)
    model.generate = lambda ids, new_tokens: [f"{new_tokens}"] * len(ids)
    task = OfficialRulerTask("niah_multikey_2", chat_template=True)
    with pytest.raises(ValueError, match=r"RULER makes no text of 2\d\d tokens or less"):
        task.check(model, 300)
    found = records(task, model, 3000, 2)
    assert all(record["answer"] == "128" for record in found)
    assert all(record["tokens"] <= 3000 for record in found)
    assert all("<<<" not in record["prompt"] for record in found)
    [(_, sample)] = task.samples(model, 3000, [0], 2)
    assert sample.prompt.tolist().count(1) == 2
    assert len(list((tmp_path / "everlong" / "ruler").glob("*.jsonl"))) == 1


@pytest.mark.skipif(importlib.util.find_spec("long_context_eval") is None, reason="no package of RULER")
def test_our_score_is_rulers():
    from long_context_eval.eval.synthetic.constants import string_match_all_per_sample

    rng = np.random.default_rng(0)
    texts = [f"{number:x}AbC"[: rng.integers(1, 6)] for number in rng.integers(10**6, size=300)]
    outputs = ["".join(rng.choice(texts, 20)).swapcase() for _ in range(100)]
    wanted = [rng.choice(texts, int(rng.integers(1, 5))).tolist() for _ in range(100)]
    theirs = string_match_all_per_sample(outputs, wanted)
    ours = [100 * string_match_all(*each) for each in zip(outputs, wanted, strict=True)]
    assert ours == pytest.approx(theirs)
    assert len(set(ours)) > 3


def test_the_prose_is_held_out(text_folder):
    task, documents = RulerTask("niah_single_2", source=str(text_folder)), load_text(text_folder)
    assert task.needles(subject(Reader())).documents == split(documents)[1]
    data = {"task": "ruler", "source": str(text_folder), "held_out": 0.3}
    model = subject(Reader(), {"data": data})
    assert task.needles(model).documents == split(documents, fraction=0.3)[1]
    model = subject(Reader(), {"data": {**data, "source": "another"}})
    assert task.needles(model).documents == split(documents)[1]
