import sys

import pytest

from everlong.data.text import Document, load_text, split


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_text("öne")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("three")
    (tmp_path / "sub" / "empty.txt").write_text(" \n")
    (tmp_path / "other.csv").write_text("no")
    return tmp_path


def test_folder_file_and_glob(folder):
    assert load_text(folder) == [
        Document("a.txt", "öne".encode()),
        Document("b.txt", b"two"),
        Document("sub/c.txt", b"three"),
    ]
    assert load_text(folder / "b.txt") == [Document("b.txt", b"two")]
    assert [each.text for each in load_text(f"{folder}/*.txt")] == ["öne".encode(), b"two"]


def test_package_is_read_but_not_imported(folder, monkeypatch):
    package = folder / "some_texts"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError")
    (package / "data" / "play.md").write_text("play")
    monkeypatch.syspath_prepend(folder)
    assert load_text("package:some_texts") == [Document("data/play.md", b"play")]
    assert "some_texts" not in sys.modules


@pytest.mark.parametrize("source", ["/no/such/file.txt", "/no/such/*.txt", "package:no_such"])
def test_missing_source_is_named(source):
    with pytest.raises(FileNotFoundError, match=source.removeprefix("package:").replace("*", ".")):
        load_text(source)


def test_missing_package_says_what_to_install():
    with pytest.raises(FileNotFoundError, match=r"pip install everlong\[demo\]"):
        load_text("package:no_such")


def test_text_that_is_not_utf8_is_named_with_its_position(tmp_path):
    (tmp_path / "latin.txt").write_bytes("grüß".encode("latin1"))
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8: byte 0xfc at position 2"):
        load_text(tmp_path)


def test_a_byte_order_mark_is_dropped(tmp_path):
    (tmp_path / "a.txt").write_text("öne", encoding="utf-8-sig")
    assert load_text(tmp_path) == [Document("a.txt", "öne".encode())]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"text": "x"}]', r"a\.json holds records"),
        ("a.jsonl", b'{"text": "x"}', r"a\.jsonl holds records"),
        ("a.parquet", b"", r"a\.parquet holds records"),
        ("A.JSONL", b'{"text": "x"}', r"A\.JSONL holds records"),
        ("a.ndjson", b'{"text": "x"}', r"a\.ndjson holds records"),
        ("a.txt", "text".encode("utf-16"), r"a\.txt is not UTF-8 but UTF-16"),
        ("a.txt", b"a\0b", r"a\.txt is no text: byte 0x00 at position 1"),
        ("a.txt", b"\xef\xbb\xbfa\xff", r"byte 0xff at position 4"),
    ],
)
def test_what_is_no_plain_text_is_refused(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_text(tmp_path / name)


def test_source_without_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no text"):
        load_text(tmp_path)


def test_split_shares_no_document_and_is_deterministic():
    documents = [Document(str(i), b"x") for i in range(30)]
    train, test = split(documents, seed=3, fraction=0.2)
    assert len(test) == 6
    assert sorted([*train, *test], key=lambda d: int(d.name)) == documents
    assert split(documents, seed=3, fraction=0.2) == (train, test)
    assert split(documents, seed=4, fraction=0.2)[1] != test


def test_split_always_leaves_both_sides():
    documents = [Document("a", b"x"), Document("b", b"x")]
    for fraction in (0.01, 0.99):
        assert [len(side) for side in split(documents, fraction=fraction)] == [1, 1]
    with pytest.raises(ValueError, match="at least 2"):
        split(documents[:1])
    with pytest.raises(ValueError, match=r"\(0, 1\), got 1"):
        split(documents, fraction=1)
