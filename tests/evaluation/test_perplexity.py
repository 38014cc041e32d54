"""Bits a byte by position and by context, against a model whose losses are known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import Reader, subject
from transformers import AutoModelForCausalLM

from everlong.data import TextConfig, byte_tokenizer, train_tokenizer
from everlong.data.language import _Reader
from everlong.evaluation.perplexity import TARGET, ContextTask, Documents, PerplexityTask, _stretches
from everlong.evaluation.subject import Subject
from everlong.models import model_config


def knows(seen):
    """Expects what came `seen` bytes ago, once it has read so many: a text of that period costs little
    from there on."""

    def answer(text):
        return text[-seen] if len(text) >= seen else 0

    return answer


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "long"
    folder.mkdir()
    for letter in "abc":
        period = "".join(chr(ord(letter) + i % 20) for i in range(300))[:299] + " "
        (folder / f"{letter}.txt").write_text(period * 10)
    return str(folder)


def cell(task, model, length, count):
    records = list(task.run(model, length, range(count), count))
    assert sorted(record["index"] for record in records) == list(range(count))
    return task.cells(model, length, records)[0]


def test_stretches_double_up_to_the_length():
    assert _stretches(300) == [(1, 64), (64, 128), (128, 256), (256, 300)]
    assert _stretches(64) == [(1, 64)]
    assert _stretches(32) == [(1, 32)]


def test_a_model_that_learns_a_period_pays_less_behind_it(source):
    task = PerplexityTask(source, [1024])
    model = subject(Reader(knows(300)))
    task.check(model, None)
    assert task.count(model, None, 100) == 3
    found = cell(task, model, None, 3)
    right = -math.log2(math.exp(9) / (math.exp(9) + 258))
    wrong = right + 9 / math.log(2)
    by_start = {point.start: point.estimate.value for point in found.curve}
    assert by_start[1] == pytest.approx(wrong, abs=1e-4)
    assert by_start[512] == pytest.approx(right, abs=1e-4)
    assert right < by_start[256] < wrong
    assert found.main.value == pytest.approx((299 * wrong + 724 * right) / 1023, abs=1e-3)


def test_each_stretch_holds_the_losses_and_bytes_of_its_own_positions(source, monkeypatch):
    """Position p costs p bits, and its token has p bytes: a shift by one would show."""
    task, model = PerplexityTask(source, [200]), subject(Reader())
    known = task.documents(model)
    task.known = {"model": Documents([np.arange(200)], np.arange(200))}
    losses = torch.arange(1, 200)[None] * math.log(2)
    monkeypatch.setattr(Subject, "losses", lambda self, ids: (losses, None))
    [record] = task.run(model, None, [0], 1)
    assert len(known.tokens) == 3
    assert record["bytes"] == sum(range(1, 200))
    for start, end, bits, size in record["stretches"]:
        assert bits == pytest.approx(sum(range(start, end)), rel=1e-6)
        assert size == sum(range(start, end))


def test_context_scores_the_same_tokens_at_each_length(source, monkeypatch):
    task, model = ContextTask(source, [300, 1000]), subject(Reader())
    read, plain = [], Subject.read

    def spy(self, ids, keep):
        read.append(ids[0].tolist())
        return plain(self, ids, keep)

    monkeypatch.setattr(Subject, "read", spy)
    document = task.require(model, 1000)[0].tolist()
    for length in (300, 1000):
        list(task.run(model, length, [0], 1))
    assert read == [document[700:1000], document[:1000]]


def test_the_same_tokens_cost_less_with_more_before_them(source):
    task = ContextTask(source, [400, 2000])
    model = subject(Reader(knows(300)))
    short, long = (cell(task, model, length, 3).main.value for length in (400, 2000))
    assert short > 4
    assert long < 1


def test_a_text_begins_with_what_its_tokenizer_puts_before_it(source, monkeypatch):
    """And what is scored stays the same."""
    seen = []

    def answer(text):
        seen.append(text[0])
        return knows(300)(text[1:])

    model, plain = subject(Reader(answer)), subject(Reader(knows(300)))
    monkeypatch.setattr(model, "opening", lambda: [257])
    for task, length in ((PerplexityTask(source, [512]), None), (ContextTask(source, [512]), 512)):
        found, wanted = cell(task, model, length, 3), cell(task, plain, length, 3)
        assert found.main == wanted.main
        assert found.curve == wanted.curve
    assert set(seen) == {255}  # what the reader takes 257 for


def test_bytes_are_those_of_the_tokens(source):
    """A model without knowledge pays log2(V) bits a token, however many bytes that stands for."""
    tokenizer = train_tokenizer([Path(source, "a.txt").read_text()], 300)
    fields = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AutoModelForCausalLM.from_config(model_config("llama", intermediate_size=16, **fields))
    torch.nn.init.zeros_(model.lm_head.weight)
    asked = subject(model.eval(), tokenizer=tokenizer)
    task = PerplexityTask(source, [64])
    texts = [each[1:64] for each in task.require(asked, 64)]
    size = sum(len(asked.decode(text.tolist()).encode()) for text in texts)
    tokens = sum(map(len, texts))
    found = cell(task, asked, None, len(texts))
    assert size > 2 * tokens
    assert found.main.value == pytest.approx(tokens * math.log2(300) / size, rel=1e-5)


def test_what_a_recipe_holds_out_is_read(source, tmp_path):
    model = subject(Reader(), {"data": {"task": "needle", "source": source, "held_out": 0.34}})
    assert len(PerplexityTask(None, [64]).documents(model).tokens) == 1
    text = {"task": "text", "source": source, "held_out": 0.34, "cache_folder": str(tmp_path / "cache")}
    model = subject(Reader(), {"data": text})
    assert len(PerplexityTask(None, [64]).documents(model).tokens) == 1


def test_of_a_streamed_text_just_what_training_left_out_is_read(tmp_path):
    """Streaming holds out each so many-th document, keeping a text others: no document of either split
    may be read as held out that the model was trained on."""
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text(f"{i:02} " * 40)
    data = {"source": str(tmp_path), "streaming": True, "held_out": 0.2, "length": 100}
    trained = _Reader(TextConfig(**data), byte_tokenizer())(0)
    known = {bytes(document[:2].tolist()) for document in trained}
    model = subject(Reader(), {"data": {"task": "text", **data}})
    read = PerplexityTask(None, [100]).documents(model).tokens
    assert len(known) == 16
    assert len(read) == 4
    assert not known & {bytes(document[:2].tolist()) for document in read}
    assert {len(document) for document in read} == {120}


def test_what_cannot_be_read_is_refused(source):
    with pytest.raises(
        ValueError, match="needs a document of 9,000 tokens, but the longest one has 3,000"
    ):
        PerplexityTask(source, [9000]).check(subject(Reader()), None)
    with pytest.raises(ValueError, match="takes 500 tokens at most, asked are 1,000"):
        PerplexityTask(source, [1000]).check(subject(Reader(), longest=500), None)
    with pytest.raises(ValueError, match=f"context scores {TARGET} tokens: ask for lengths beyond"):
        ContextTask(source, [256, 512]).check(subject(Reader()), 256)
    for length in (0, 1):
        with pytest.raises(ValueError, match=f"got {length}: ask for 2 tokens or more"):
            PerplexityTask(source, [length]).check(subject(Reader()), None)


@pytest.mark.parametrize("task", [PerplexityTask, ContextTask])
def test_passages_are_refused_where_the_whole_text_would_be_read(task, source):
    """Its numbers would be told as those of a model with retrieval, of lengths that nobody checked."""
    with pytest.raises(ValueError, match="reads whole texts, not the 2 passages that fit best"):
        task(source, [512]).check(subject(Reader(), passages=2), 512)
