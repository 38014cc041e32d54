import numpy as np
import pytest
from transformers import AutoTokenizer

from everlong.data.tokenizer import VOCAB_SIZE, byte_tokenizer, encode_bytes, train_tokenizer

TEXTS = [
    "",
    "plain",
    "  two blanks,\ttab\r\nand  line ends \n\n",
    "héllo, 世界, \U0001f600",
    "<pad> is text, <eos> too",
    "".join(map(chr, range(300))),
]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_bytes(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert np.array_equal(encode_bytes(text), np.array(ids))
    assert tokenizer.decode(ids) == text


def test_special_tokens_lie_behind_the_bytes():
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == VOCAB_SIZE
    special = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    assert special == (256, 257, 258)
    assert tokenizer.decode([104, 105, 258], skip_special_tokens=True) == "hi"


def test_round_trip_through_auto_tokenizer(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == list(text.encode())
        assert loaded.decode(list(text.encode())) == text
    assert loaded.pad_token_id == 256


def test_bytes_that_are_not_utf8_encode():
    assert encode_bytes(b"\xff\x00").tolist() == [255, 0]


def test_a_huge_word_is_learnt_from_in_parts():
    """In one it takes minutes; of one that repeats itself the tokens tell as well."""
    word = "ab" * 4096
    tokenizer = train_tokenizer([word, "héllo wörld " * 9], 400)
    text = f"{word[:1000]} héllo wörld"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    longest = max(len(each) for each in tokenizer.get_vocab())
    assert longest <= 256
