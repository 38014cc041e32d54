"""BABILong asked of models whose answers are known, and its two scorers."""

import re

import datasets
import pytest
from oracles import Reader, subject
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from everlong.data import train_tokenizer
from everlong.data.babi_solver import answer
from everlong.evaluation import babilong
from everlong.evaluation.babilong import BabilongTask, few_shot, official_score

FACT = re.compile(r"(Mary|John|Daniel|Sandra|Fred|Jeff|Bill|The \w+ is \w+ of) ")
TRAINED = {"data": {"task": "babilong", "tokenizer": "bytes"}}
ASKED = ("Where ", "What ", "Who ", "Is ", "How ")


def reader_of(task, wrong=""):
    """Reads the facts of a text and answers its question; `wrong` is what it says instead."""

    def say(text):
        text = text.decode(errors="replace")
        body, mark, said = text.rpartition("?")
        if not mark:
            return ord("?")
        question = body[max(body.rfind(each) for each in ASKED) :] + "?"
        facts = [each for each in re.split(r"(?<=[.!?]) ", body.strip()) if FACT.match(each)]
        wanted = f" {wrong or answer(task, facts, question)}."
        return ord(wanted[len(said)]) if wanted.startswith(said) and len(said) < len(wanted) else 258

    return say


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa4", "qa5", "qa6", "qa9"])
def test_a_model_that_understands_is_right_and_another_is_not(task, text_folder):
    asked = BabilongTask(task, source=str(text_folder))
    for wrong, score in (("", 1.0), ("XYZ", 0.0)):
        model = subject(Reader(reader_of(task, wrong)), TRAINED, tokens_per_forward=4096)
        for length in (0, 2048):
            asked.check(model, length)
            records = list(asked.run(model, length, range(6), 6))
            assert sorted(record["index"] for record in records) == list(range(6))
            for record in records:
                assert record["scores"] == {"official": score, "substring": score}, record
                assert record["tokens"] == length or not length
                if task in ("qa1", "qa2"):
                    assert record["wanted"] in record["evidence"]


def test_each_prompt_has_the_length_asked_for_in_any_tokenizer(text_folder):
    words = train_tokenizer(["Mary moved to the bathroom. Where is John? "] * 9, 300)
    asked = BabilongTask("qa1", source=str(text_folder), setting="few-shot")
    model = subject(Reader(), tokenizer=words)
    prompts = [asked.ask(model, 3000, i).prompt for i in range(5)]
    assert {len(prompt) for prompt in prompts} == {3000 - 16}
    assert len({prompt.tobytes() for prompt in prompts}) == 5


def with_blank_before(texts):
    """As SentencePiece has it: a blank is put before whatever is given."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, show_progress=False))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("setting", ["trained", "few-shot"])
def test_sentences_are_one_blank_apart_in_any_tokenizer(setting, text_folder):
    letters = "".join(map(chr, [*range(32, 127), 10]))
    tokenizer = with_blank_before(
        [letters, *(each.read_text() for each in text_folder.iterdir()), *few_shot("qa1", "Where?")]
    )
    asked = BabilongTask("qa1", source=str(text_folder), setting=setting)
    model = subject(Reader(), tokenizer=tokenizer)
    asked.check(model, 3000)
    text = model.decode(asked.ask(model, 3000, 0).prompt.tolist())
    assert "  " not in text
    assert " \n" not in text


def test_a_tokenizer_that_loses_words_is_refused(text_folder):
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "Mary": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(ValueError, match="cannot write the task's text: 'Mary moved"):
        BabilongTask("qa1", source=str(text_folder)).check(subject(Reader(), tokenizer=words), 2048)


def test_few_shot_prompts_are_those_of_lm_eval(text_folder):
    """As lm-eval itself builds the prompt of a document."""
    from lm_eval.config.task import TaskConfig  # noqa: F401  (a version without it has another layout)
    from lm_eval.tasks.babilong import common_utils  # noqa: F401

    before, after = few_shot("qa1", "Where is Mary?")
    assert before.startswith("I will give you context")
    assert before.count("\nWhere is ") == 2
    assert before.endswith("\n\n")
    assert after == "\nWhere is Mary?"


@pytest.mark.parametrize(
    ("task", "question", "wanted", "said", "right"),
    [
        ("qa1", "Where is Mary?", "kitchen", "The kitchen. Or the garden.", True),
        ("qa1", "Where is Mary?", "kitchen", "kitchen or garden", False),
        ("qa1", "Where is Mary?", "kitchen", "nowhere. kitchen", False),
        ("qa1", "Where is Mary?", "kitchen", "KITCHEN", True),
        ("qa3", "Where was the milk before the garden?", "kitchen", "before garden: kitchen", True),
        ("qa3", "Where was the milk before the garden?", "kitchen", "garden", False),
        ("qa5", "Who gave the milk to Fred?", "Bill", "Bill gave the milk to Fred", True),
        ("qa8", "What is Mary carrying?", "apple,milk", "milk and apple", True),
        ("qa8", "What is Mary carrying?", "apple,milk", "milk", False),
        ("qa8", "What is Mary carrying?", "milk", "milk and apple", False),
        ("qa1", "Where is Mary?", "kitchen", "kitchen <example> garden", True),
        ("qa1", "Where is Mary?", "kitchen", "kitchen Question: where? garden", False),
        ("qa1", "Where is Mary?", "kitchen", "", False),
    ],
)
def test_the_official_rule(task, question, wanted, said, right):
    assert official_score(task, question, wanted, said) is right


def test_published_samples_come_from_a_local_copy(tmp_path):
    rows = [
        {"input": "Mary went to the garden.", "question": "Where is Mary?", "target": "garden"},
        {"input": "John went to the office.", "question": "Where is John?", "target": "office"},
    ]
    folder = tmp_path / "babilong"
    (folder / "1k").mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / "1k" / "qa1.parquet")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: 1k\n  data_files:\n"
        "  - split: qa1\n    path: 1k/qa1.parquet\n---\n"
    )
    asked = BabilongTask("qa1", setting="trained", published=str(folder))
    model = subject(Reader(reader_of("qa1")))
    assert asked.count(model, 1024, 100) == 2
    assert [r["scores"]["official"] for r in asked.run(model, 1024, [0, 1], 2)] == [1.0, 1.0]
    known = asked.fingerprint(model, 1024, 2)
    babilong._published.cache_clear()
    assert asked.fingerprint(model, 1024, 2) == known
    rows[0]["target"] = "kitchen"
    datasets.Dataset.from_list(rows).to_parquet(folder / "1k" / "qa1.parquet")
    babilong._published.cache_clear()
    assert asked.fingerprint(model, 1024, 2) != known
    with pytest.raises(ValueError, match=r"takes 20 at most: leave 1,024 out"):
        asked.ask(subject(Reader(), longest=20), 1024, 0)
    with pytest.raises(ValueError, match="hf download RMT-team/babilong-1k-samples"):
        asked.check(model, 2048)
    with pytest.raises(ValueError, match="1k, 2k and so on, not 1500"):
        asked.check(model, 1500)


def test_lengths_that_cannot_be_asked_are_refused(text_folder):
    asked = BabilongTask("qa1", source=str(text_folder), setting="few-shot")
    with pytest.raises(ValueError, match="300 tokens are too few for babilong_qa1"):
        asked.check(subject(Reader()), 300)
    with pytest.raises(ValueError, match="takes 500 tokens at most, asked are 1,000"):
        asked.check(subject(Reader(), longest=500), 1000)
    with pytest.raises(ValueError, match="babilong_qa1 reads whole texts, not the 2 passages"):
        asked.check(subject(Reader(), passages=2), 4096)
    with pytest.raises(ValueError, match="setting is auto, trained or few-shot, got 'none'"):
        BabilongTask("qa1", setting="none")
