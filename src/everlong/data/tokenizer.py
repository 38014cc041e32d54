"""Bytes as tokens: 256 byte ids and three special ones; no vocabulary to train, no text it cannot
hold. Corpora are mapped by numpy (a view, no copy); the tokenizer itself is for prompts and for
`from_pretrained`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
VOCAB_SIZE = 256 + 3


def encode_bytes(text: str | bytes) -> np.ndarray:
    """The token ids of a text: its UTF-8 bytes, as uint8; the same ids as `byte_tokenizer()` gives.

    bytes need not be valid UTF-8. The result is a read-only view; convert it before changing it.
    """
    return np.frombuffer(text.encode() if isinstance(text, str) else text, dtype=np.uint8)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids 0 ... 255 are the bytes of the text in UTF-8.

    <pad>, <bos> and <eos> are ids 256, 257 and 258; none is added by encoding, and their names
    inside a text are plain bytes. It saves, and loads by `AutoTokenizer.from_pretrained`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {letter: byte for byte, letter in enumerate(_byte_letters())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([PAD, BOS, EOS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def _byte_letters() -> list[str]:
    """The letter that `tokenizers`' ByteLevel writes for each byte (GPT-2's table).

    Bytes that print in Latin-1 stand for themselves, the others take the letters from 256 on.
    """
    printing = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]
