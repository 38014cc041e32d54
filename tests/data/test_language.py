"""Rows of text: what is in them, in which order, and what bad text gets."""

import gzip
import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from everlong.data import (
    DataConfig,
    PackedDataset,
    TextConfig,
    corpus,
    encode_bytes,
    gives_back,
    load_text,
    load_tokenizer,
    train_tokenizer,
)
from everlong.data.corpus import token_bytes, token_type
from everlong.data.reading import Piece, read_pieces
from everlong.data.rows import Text

BYTE_EOS = 258


@pytest.fixture
def config(text_folder, tmp_path):
    return TextConfig(source=str(text_folder), length=64, cache_folder=str(tmp_path / "cache"))


@pytest.fixture
def documents(text_folder):
    return {file.read_bytes() for file in text_folder.glob("*.txt")}


@pytest.fixture
def bpe(text_folder, tmp_path):
    folder = tmp_path / "bpe"
    texts = [file.read_text() for file in text_folder.glob("*.txt")]
    train_tokenizer([*texts, "héllo ☃"], 300).save_pretrained(folder)
    return str(folder)


def text_of(row):
    """A row's text, with a bar where a document ends."""
    return b"".join(b"|" if each == BYTE_EOS else bytes([each]) for each in row["input_ids"].tolist())


def jsonl(path, rows, opened=open):
    with opened(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return str(path)


class TestPacked:
    def test_rows_hold_documents_that_restart(self, config, documents):
        data, _ = replace(config, length=1000, held_out=0.2).datasets(20)
        joined = b"|".join(documents)
        for row in data:
            ids, positions = row["input_ids"], row["position_ids"]
            assert ids.shape == row["labels"].shape == positions.shape == (1000,)
            starts = (positions == 0).nonzero().flatten().tolist()
            assert starts[0] == 0
            for start, end in zip(starts, [*starts[1:], 1000], strict=True):
                assert positions[start:end].tolist() == list(range(end - start))
                piece = text_of({"input_ids": ids[start:end]})
                assert piece.removesuffix(b"|") in joined
                assert end == 1000 or piece.endswith(b"|")
                assert start == 0 or any(each.startswith(piece[:100]) for each in documents)

    def test_only_the_first_token_of_a_document_and_of_a_row_has_no_label(self, config):
        for row in config.datasets(50)[0]:
            unlabelled = row["labels"] == -100
            assert torch.equal(unlabelled, row["position_ids"] == 0)
            assert torch.equal(row["labels"][~unlabelled], row["input_ids"][~unlabelled])

    def test_a_pass_reads_each_token_once_and_the_next_in_another_order(self):
        ends = np.array([3, 40, 41, 200, 1000])
        spans = np.stack([np.concatenate([[0], ends[:-1]]), ends], 1)
        text = Text(np.arange(1000, dtype=np.uint16), spans, eos=None)
        data = PackedDataset(text, DataConfig(length=32), 93, np.zeros(1000))
        passes = [[data[n * 31 + i]["input_ids"] for i in range(31)] for n in range(3)]
        for each in passes:
            assert len(torch.cat(each).unique()) == 31 * 32
        flat = [torch.cat(each).tolist() for each in passes]
        assert flat[0] != flat[1] != flat[2]
        assert flat[0] != sorted(flat[0])

    def test_an_item_depends_on_seed_and_index_alone(self, config):
        rows = [text_of(each) for each in config.datasets(300, seed=1)[0]]
        again = config.datasets(300, seed=1)[0]
        for index in (299, 3, 170, 0):
            assert text_of(again[index]) == rows[index]
        assert text_of(config.datasets(300, seed=2)[0][5]) != rows[5]

    def test_lengths_follow_the_curriculum(self, config):
        config = replace(config, length=128, start_length=32, hold_steps=2, growth_steps=4)
        data, test = config.datasets(2 * 8, batch=2)
        assert [len(each["labels"]) for each in data] == [
            config.length_at(step) for step in range(8) for _ in range(2)
        ]
        assert len(data[0]["labels"]) == 32
        assert {len(each["labels"]) for each in test} == {128}

    def test_joined_documents_have_an_end_token_between_and_no_positions(self, config):
        data, test = replace(config, documents="join", length=1500, held_out=0.2).datasets(3)
        restart = replace(config, length=1500, held_out=0.2).datasets(3)[0]
        for each, same in zip(data, restart, strict=True):
            assert set(each) == {"input_ids", "labels"}
            assert (each["input_ids"] == BYTE_EOS).any()
            assert torch.equal(each["labels"], same["labels"])
        assert "position_ids" not in test[0]


class TestStreams:
    def test_each_row_goes_on_where_the_one_before_it_ended(self, config):
        config = replace(config, layout="streams", length=48, start_length=32, growth_steps=3)
        data, _ = config.datasets(6 * 20, batch=6, streams=3)
        pieces_a_step = 2
        text = data.text
        for stream in range(3):
            rows = [data[i] for i in range(stream, len(data), 3)]
            got = torch.cat([row["input_ids"] for row in rows])
            places = torch.cat([row["position_ids"] for row in rows])
            want, positions = text.read(stream * len(text) // 3, len(got))
            assert got.tolist() == want.tolist()
            assert places.tolist() == positions.tolist()
            lengths = [len(row["labels"]) for row in rows]
            assert lengths == [config.length_at(i // pieces_a_step) for i in range(len(rows))]
            assert len(set(lengths)) > 1
            # A document starts at 0 and nowhere else.
            ends = (got == BYTE_EOS).nonzero().flatten() + 1
            starts = (places == 0).nonzero().flatten().tolist()
            assert len(starts) > 1
            assert set(starts) - {0} == set(ends.tolist()) - {len(got)}

    def test_it_goes_round(self):
        text = Text(encode_bytes(b"abcdef"), np.array([[0, 2], [2, 6]]), eos=None)
        ids, positions = text.read(4, 9)
        assert bytes(ids.astype(np.uint8)) == b"efabcdefa"
        assert positions.tolist() == [2, 3, 0, 1, 0, 1, 2, 3, 0]


class TestHeldOut:
    def test_no_document_is_on_both_sides(self, config, documents):
        train, test = replace(config, held_out=0.3).datasets(400)
        seen = [
            {text for text in documents for row in side if text_of(row) in text}
            for side in (train, test)
        ]
        assert len(seen[1]) == 3
        assert len(seen[0]) == 7
        assert not seen[0] & seen[1]

    def test_it_is_the_same_for_every_seed(self, config):
        a, b = (config.datasets(10, seed=seed)[1] for seed in (0, 1))
        assert [text_of(each) for each in a] == [text_of(each) for each in b]

    def test_a_single_text_is_cut_at_a_paragraph(self, tmp_path, config):
        paragraphs = [f"Paragraph {i} says\nsomething.\n\n" for i in range(100)]
        (tmp_path / "one.txt").write_text("".join(paragraphs))
        config = replace(config, source=str(tmp_path / "one.txt"), held_out=0.2)
        train, test = config.datasets(4)
        [[_, cut]] = train.text.spans
        assert test.text.spans.tolist() == [[cut, len("".join(paragraphs))]]
        assert bytes(test.text.tokens[cut : cut + 10]) == b"Paragraph "
        assert abs(cut - 0.8 * len("".join(paragraphs))) < 30

    def test_a_source_of_its_own(self, config, tmp_path):
        (tmp_path / "other.txt").write_text("another text altogether. " * 20)
        train, test = replace(config, validation_source=str(tmp_path / "other.txt")).datasets(4)
        assert len(train.text.spans) == 10
        assert b"altogether" in text_of(test[0])

    def test_bytes_behind_labels(self, config, bpe):
        for tokenizer in ("bytes", bpe):
            _, test = replace(config, tokenizer=tokenizer, length=100).datasets(1)
            decoder = (
                config.build_tokenizer()
                if tokenizer == "bytes"
                else replace(config, tokenizer=bpe).build_tokenizer()
            )
            for index in range(len(test)):
                labels = [each for each in test[index]["labels"].tolist() if each != -100]
                text = decoder.decode(labels, skip_special_tokens=True)
                assert test.label_bytes(index) == len(text.encode())


class TestCache:
    def test_the_second_time_nothing_is_tokenised(self, config, monkeypatch, text_folder):
        before = [text_of(each) for each in config.datasets(10)[0]]
        calls = []
        write = corpus.write_corpus
        monkeypatch.setattr(
            corpus, "write_corpus", lambda *args, **kwargs: calls.append(1) or write(*args, **kwargs)
        )
        assert [text_of(each) for each in config.datasets(10)[0]] == before
        assert not calls
        fingerprint = config.fingerprint()
        (text_folder / "3.txt").write_text("This one has another text now. " * 30)
        assert config.fingerprint() != fingerprint
        assert len(calls) == 1
        replace(config, max_bytes=5000).datasets(1)
        assert len(calls) == 2

    def test_a_corpus_cut_short_is_made_anew(self, config, tmp_path):
        before = [text_of(each) for each in config.datasets(10)[0]]
        [file] = (tmp_path / "cache").glob("*/tokens.bin")
        file.write_bytes(file.read_bytes()[:100])
        assert [text_of(each) for each in config.datasets(10)[0]] == before

    def test_nothing_is_left_of_a_corpus_that_failed(self, config, text_folder, tmp_path):
        (text_folder / "zz.txt").write_bytes(b"\xff")
        with pytest.raises(ValueError, match="not UTF-8"):
            config.datasets(1)
        assert not list((tmp_path / "cache").iterdir())

    def test_its_folder(self, config, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        replace(config, cache_folder=None).datasets(1)
        assert len(list((tmp_path / "xdg" / "everlong" / "corpora").iterdir())) == 1

    def test_tokens_take_no_more_room_than_they_need(self, bpe, config):
        tokenizer = replace(config, tokenizer=bpe).build_tokenizer()
        assert token_type(None) == np.uint8
        assert token_type(tokenizer) == np.uint16


class TestSources:
    def test_all_kinds_hold_the_same(self, tmp_path):
        texts = ["Erster Text: grün.", "second\n\ntext", "", "third"]
        rows = [{"text": text, "other": 1} for text in texts]
        jsonl(tmp_path / "a.jsonl", rows)
        jsonl(tmp_path / "a.jsonl.gz", rows, gzip.open)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
        want = [Piece(text.encode(), True) for text in texts if text]
        for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "*.jsonl"):
            assert list(read_pieces(str(tmp_path / name))) == want, name
        assert list(read_pieces(str(tmp_path))) == want * 3
        assert list(read_pieces([str(tmp_path / "a.jsonl"), str(tmp_path / "a.parquet")])) == want * 2

    def test_hub_data_sets_are_streamed(self, tmp_path):
        folder = tmp_path / "set"
        folder.mkdir()
        jsonl(folder / "train.jsonl", [{"words": "one two"}, {"words": "three"}])
        pieces = list(read_pieces(f"hub:{folder}", column="words"))
        assert pieces == [Piece(b"one two", True), Piece(b"three", True)]

    def test_a_long_text_comes_in_pieces_cut_at_paragraphs(self, tmp_path):
        text = "".join(f"Paragraph {i} is über short.\n\n" for i in range(100_000)).encode()
        (tmp_path / "long.txt").write_bytes(text)
        jsonl(tmp_path / "long.jsonl", [{"text": text.decode()}])
        for name in ("long.txt", "long.jsonl"):
            pieces = list(read_pieces(str(tmp_path / name)))
            assert len(pieces) > 2
            assert b"".join(piece.text for piece in pieces) == text
            assert [piece.starts for piece in pieces] == [True] + [False] * (len(pieces) - 1)
            assert all(piece.text.startswith(b"Paragraph") for piece in pieces)

    def test_letters_are_never_cut(self, tmp_path):
        text = ("☃" * 1_000_000).encode()
        (tmp_path / "snow.txt").write_bytes(text)
        pieces = [piece.text for piece in read_pieces(str(tmp_path / "snow.txt"))]
        assert b"".join(pieces) == text
        assert all(piece.decode() for piece in pieces)
        [capped] = read_pieces(str(tmp_path / "snow.txt"), max_bytes=10)
        assert capped.text.decode() == "☃☃☃"

    def test_a_cap_on_bytes_cuts_the_last_document(self, text_folder):
        pieces = list(read_pieces(str(text_folder), max_bytes=2000))
        assert sum(len(piece.text) for piece in pieces) == 2000
        assert len(pieces) == 3


class TestStreaming:
    def test_rows_are_made_on_the_way_and_nothing_is_written(self, config, tmp_path, bpe):
        for tokenizer in ("bytes", bpe):
            streaming = replace(config, streaming=True, tokenizer=tokenizer)
            data, test = streaming.datasets(500, seed=1)
            rows = [row["input_ids"].tolist() for row in data]
            assert not (tmp_path / "cache").exists()
            again, _ = streaming.datasets(500, seed=1)
            for index in (7, 300, 301, 12):
                assert again[index]["input_ids"].tolist() == rows[index]
            assert all((row["labels"] == -100).eq(row["position_ids"] == 0).all() for row in test)

    def test_what_is_held_out_is_not_trained_on(self, config, documents):
        data, test = replace(config, streaming=True).datasets(1000)
        [held_out] = {text for text in documents for row in test if text_of(row) in text}
        assert not any(text_of(row) in held_out for row in data)

    def test_it_refuses_streams_of_memory_and_too_few_documents(self, config):
        with pytest.raises(ValueError, match="use layout: packed, or streaming: false"):
            replace(config, streaming=True, layout="streams")
        with pytest.raises(ValueError, match="no document could be held out"):
            replace(config, streaming=True, held_out=0.01).datasets(1)

    def test_a_short_text_is_refused(self, config):
        config = replace(config, streaming=True, max_bytes=2000, length=3000)
        data, _ = replace(config, validation_source=config.source, length=1000).datasets(1)
        assert data[0]
        with pytest.raises(ValueError, match=r"training text has 2,003 tokens.*length 3,000"):
            replace(config, validation_source=config.source).datasets(1)[0][0]


class TestTokenizer:
    def test_a_trained_one_is_used(self, config, bpe):
        config = replace(config, tokenizer=bpe)
        tokenizer = config.build_tokenizer()
        assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
        data, _ = config.datasets(1)
        assert "of ten short texts, told often." in tokenizer.decode(data[0]["input_ids"])
        text = "Ünknown ☃ letters\n"
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert token_bytes(tokenizer)[ids].sum() == len(text.encode())

    def test_one_that_is_not_there_is_named(self, config):
        with pytest.raises(
            ValueError, match=r"no tokenizer can be loaded from '/no/such'.*everlong tok"
        ):
            replace(config, tokenizer="/no/such").datasets(1)

    def test_a_vocabulary_below_bytes_is_refused(self):
        with pytest.raises(ValueError, match="at least 259"):
            train_tokenizer(["text"], 100)


class TestBadText:
    def test_fields(self, config):
        for fields, message in [
            ({"held_out": 0}, r"held_out is a share .* got 0"),
            ({"max_bytes": 0}, "max_bytes must be at least 1"),
            ({"source": []}, "source is empty"),
            ({"length": 1}, "at least 2 tokens"),
            ({"start_length": 100}, "start_length must lie in 1 ... length = 64"),
        ]:
            with pytest.raises(ValueError, match=message):
                replace(config, **fields)

    def test_a_text_shorter_than_a_row(self, config):
        with pytest.raises(
            ValueError, match=r"training text has .* tokens.*length 100,000: take a sho"
        ):
            replace(config, length=100_000).datasets(1)
        with pytest.raises(ValueError, match=r"held-out text has 8.. tokens.*length 2,000"):
            replace(config, length=2000).datasets(1)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", b"", "holds no text"),
            ("a.txt", b" \n\n ", "holds no text"),
            ("a.txt", b"PK\x03\x04\x00\x00", r"a\.txt is no text: byte 0x00 at position 4"),
            ("a.txt", b"gr\xfc\xdf", r"a\.txt is not UTF-8: byte 0xfc at position 2"),
            ("a.txt", b"a" * 3_000_000 + b"\xff", "byte 0xff at position 3000000"),
            ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2 is not JSON"),
            ("a.jsonl", b'{"words": "x", "id": 3}\n', "line 1 has no column 'text': it has words, id;"),
            ("a.jsonl", b"[1]\n", "line 1 has no column 'text'"),
            ("a.jsonl", b'{"text": 3}\n', "line 1: text holds '3', which is no text"),
            ("a.jsonl", b'{"text": "\xff"}\n', r"a\.jsonl is not UTF-8"),
            ("a.jsonl.gz", b"no gzip", "damaged or no gzip"),
            (
                "a.jsonl.gz",
                gzip.compress(b'{"text": "x"}', mtime=0)[:-9] + b"x" * 9,
                "damaged or no gzip",
            ),
            (
                "a.jsonl",
                b'{"text": "' + b"x" * 9000 + b'"}\n\n{"text": "gr\xfc"}\n',
                r"a\.jsonl is not UTF-8: byte 0xfc at position 9026 \(line 3\)",
            ),
            ("a.jsonl", '{"text": "x"}\n'.encode("utf-16"), r"a\.jsonl is not UTF-8 but UTF-16"),
            ("a.txt", "some text".encode("utf-16"), r"a\.txt is not UTF-8 but UTF-16"),
            ("a.txt", b"\xef\xbb\xbfgr\xfc", "byte 0xfc at position 5"),
            ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1 is not JSON"),
            ("a.jsonl", b"\n", "holds no text"),
            ("a.json", b"[]", "holds no text"),
            ("a.json", b'[{"text": "x"}, {"text": ', "a.json begins like a JSON array and is none"),
            ("a.json", b'[{"text": "x"}, 3]', "a.json, item 2 has no column 'text'"),
            ("a.json", b'{\n"text": "x"\n}', "a.json, line 1 is not JSON"),
            ("a.parquet", b"", "damaged or no Parquet"),
            ("a.parquet", b"no parquet", "damaged or no Parquet"),
        ],
    )
    def test_files(self, config, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            replace(config, source=str(tmp_path / name)).datasets(1)

    def test_parquet_without_the_column(self, config, tmp_path):
        pq.write_table(pa.Table.from_pylist([{"words": "x"}]), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match="has no column 'text': it has words; name the one"):
            replace(config, source=str(tmp_path / "a.parquet")).datasets(1)

    def test_nothing_there(self, config, tmp_path):
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=r"holds no file \*\.txt, \*\.jsonl"):
            replace(config, source=str(tmp_path / "empty")).datasets(1)
        for source in ("/no/such", "/no/*.such", "package:no_such"):
            with pytest.raises(FileNotFoundError, match=r"exist|matches|installed"):
                replace(config, source=source).datasets(1)
        with pytest.raises(ValueError, match="hub:/no/such cannot be read"):
            replace(config, source="hub:/no/such").datasets(1)


PEAK = """
import sys
from everlong.data import TextConfig
config = TextConfig(source=sys.argv[1], cache_folder=sys.argv[2], length=512)
def peak():
    [line] = [line for line in open("/proc/self/status") if line.startswith("VmHWM:")]
    return int(line.split()[1])
TextConfig(source=sys.argv[3], cache_folder=sys.argv[2], length=512).datasets(1)
before = peak()
data, _ = config.datasets(10000)
for index in range(0, 10000, 2):
    data[index]
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    line = json.dumps({"text": "a text of some sixty bytes, as many as there are here. " * 40}) + "\n"
    (tmp_path / "big.jsonl").write_text(line * 20_000)  # 45 MB
    (tmp_path / "small.jsonl").write_text(line * 1000)
    arguments = [str(tmp_path / name) for name in ("big.jsonl", "cache", "small.jsonl")]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *arguments], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 20_000, "KiB; the text is 44,000"


def test_a_text_that_ends_in_a_word_is_one_piece(tmp_path):
    """It is tokenised as the same text in any other file."""
    (tmp_path / "a.txt").write_text("hello world and a text hello")
    assert [piece.text for piece in read_pieces(str(tmp_path / "a.txt"))] == [
        b"hello world and a text hello"
    ]


def test_names_of_special_tokens_in_a_text_are_text(tmp_path):
    train_tokenizer(["a few words, told often"] * 9, 270).save_pretrained(tmp_path)
    settings = tmp_path / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"split_special_tokens": true', '"x": 1'))
    tokenizer = load_tokenizer(str(tmp_path))
    ids = tokenizer.backend_tokenizer.encode("a<eos>b").ids
    assert tokenizer.eos_token_id not in ids
    assert gives_back(tokenizer)


def test_a_tokenizer_that_loses_text_is_known():
    backend = Tokenizer(models.WordPiece({"[UNK]": 0, "the": 1, "##s": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    assert not gives_back(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.JSON", "a.ndjson", "a.JSONL.GZ"])
def test_an_array_of_objects_is_read_as_rows(name, tmp_path):
    opened = gzip.open if name.lower().endswith(".gz") else open
    with opened(tmp_path / name, "wt", encoding="utf-8") as file:
        json.dump([{"text": "one"}, {"id": 3, "text": "two"}, {"text": None}], file, indent=1)
    assert [piece.text for piece in read_pieces(str(tmp_path / name))] == [b"one", b"two"]


def test_suffixes_may_be_written_in_capitals(tmp_path):
    rows = [{"text": "one"}, {"text": "two"}]
    jsonl(tmp_path / "A.JSONL", rows)
    jsonl(tmp_path / "b.NDJSON", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.Parquet")
    (tmp_path / "d.TXT").write_text("three")
    found = [piece.text for piece in read_pieces(str(tmp_path))]
    assert found == [b"one", b"two"] * 3 + [b"three"]
    assert [each.name for each in load_text(tmp_path)] == ["d.TXT"]


@pytest.mark.parametrize("name", ["a.csv", "a.TSV", "a.csv.gz", "a.arrow", "a.feather", "a.orc"])
def test_records_that_are_not_read_are_no_text(name, tmp_path):
    (tmp_path / name).write_text("text\none\n")
    for source in (str(tmp_path / name), str(tmp_path / "a*")):
        with pytest.raises(ValueError, match=f"{name} holds records of a kind that is not read"):
            list(read_pieces(source))
    with pytest.raises(ValueError, match="holds records"):
        load_text(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "one\n"), ("a.jsonl", '{"text": "one\\n"}\n'), ("a.json", '[{"text": "one\\n"}]')],
)
def test_a_byte_order_mark_is_no_text(name, content, tmp_path):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert [piece.text for piece in read_pieces(str(tmp_path / name))] == [b"one\n"]


def test_parquet_that_is_not_utf8_is_named(tmp_path):
    words = pa.array([b"fine", b"gr\xfc"], pa.binary()).view(pa.utf8())
    pq.write_table(pa.table({"text": words}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet is damaged.*0xfc"):
        list(read_pieces(str(tmp_path / "a.parquet")))


def test_a_lone_surrogate_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud800 letter"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl.*text holds half a letter"):
        list(read_pieces(str(tmp_path / "a.jsonl")))
