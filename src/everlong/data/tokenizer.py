"""Bytes as tokens: 256 byte ids and three special ones; no vocabulary to train, no text it cannot
hold. Corpora are mapped by numpy (a view, no copy); the tokenizer itself is for prompts and for
`from_pretrained`. And other tokenizers: loaded, or trained on a text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from everlong.files import whole_files
from everlong.hub import from_hub
from everlong.words import one_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
BYTES = "bytes"  # what the byte tokenizer is called where a tokenizer is named
PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
LONGEST_WORD = 256  # bytes, in training
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

    vocab = {letter: byte for byte, letter in enumerate(_byte_letters())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([PAD, BOS, EOS])
    return _with_special_tokens(backend)


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """The byte tokenizer for "bytes", else that of a folder or hub id, as `AutoTokenizer` loads it.

    Raises ValueError for one that is not there, and for one that `tokenizers` does not run.
    """
    if name == BYTES:
        return byte_tokenizer()
    from transformers import AutoTokenizer

    try:
        tokenizer = from_hub(name, lambda: AutoTokenizer.from_pretrained(name))
    except Exception as error:  # a dozen kinds, from no network to a file that is no JSON
        raise ValueError(
            f"no tokenizer can be loaded from {name!r} ({one_line(error)}): give {BYTES!r}, "
            "a folder that `everlong tokenizer` or save_pretrained wrote, or a hub id"
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"the tokenizer {name} is slow: everlong takes those with a tokenizer.json")
    backend.no_truncation()  # some are saved with the length of their model
    backend.no_padding()
    backend.encode_special_tokens = True  # in a text their names are text
    return tokenizer


def gives_back(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether tokens stand for all of a text, so that its bytes can be counted by them."""
    text = "The 3rd DOG, naïve:\n\n\tit runs  away (42)."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() == text


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of these texts, with <pad>, <bos> and <eos> as ids 0, 1 and 2.

    It has no unknown token: every byte has one of its own. Longer words than 256 bytes are learnt from
    in parts: merging within a word takes time with the square of its length. vocab_size: at most,
    special tokens and bytes included; a short text gives fewer. Raises ValueError if it is below 259,
    or without a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < VOCAB_SIZE:
        raise ValueError(
            f"vocab_size must be at least {VOCAB_SIZE}, for the bytes and three special tokens, "
            f"got {vocab_size}"
        )
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    cut = pre_tokenizers.FixedLength(LONGEST_WORD)  # of bytes, each a letter by now
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, cut])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    seen = False

    def noted() -> Iterator[str]:
        nonlocal seen
        for text in texts:
            seen = True
            yield text

    backend.train_from_iterator(noted(), trainer)
    backend.pre_tokenizer = words
    if not seen:
        raise ValueError("the source holds no text: a tokenizer is trained on some")
    return _with_special_tokens(backend)


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a tokenizer to a folder, for `AutoTokenizer`: all its files or none. Raises NotWritten."""
    with whole_files(folder, f"the tokenizer in {folder}") as aside:
        tokenizer.save_pretrained(aside)


def _with_special_tokens(backend: Tokenizer) -> PreTrainedTokenizerFast:
    """As `transformers` knows it; the names of special tokens inside a text are plain bytes."""
    from transformers import PreTrainedTokenizerFast

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
