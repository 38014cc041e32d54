"""The needle: a pass key hidden in real text, and a question for it at the end.

A sample is a window of text with a sentence such as " (The pass key is 48213)" at a word boundary,
then " What is the pass key? (The pass key is " and the answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from .haystack import TEST_SEED, Haystack, HaystackConfig, HaystackDataset, Sentence
from .text import load_text, refuse_answers, split

_NAMES = (
    "Accra Algiers Amman Ankara Athens Baghdad Baku Bamako Beirut Belfast Berlin Bern Bogota "
    "Boston Bremen Cairo Calais Canton Capua Chester Cordoba Corinth Cyprus Dakar Delhi Delos "
    "Dover Dublin Durban Ephesus Exeter Florence Geneva Genoa Ghent Granada Hamburg Hanoi "
    "Harare Havana Helsinki Jaffa Kabul Kiev Kyoto Lagos Leeds Leipzig Lima Lisbon London "
    "Madrid Malaga Milan Minsk Moscow Naples Nice Oslo Oxford Palermo Paris Prague Quebec Rome "
    "Salerno Seville Sofia Tripoli Tunis Turin Utrecht Venice Verona Vienna Warsaw York Zurich"
)
NAMES = tuple(_NAMES.split())
ASCII = tuple(map(chr, range(33, 127)))
SIGNS = tuple("ÄÖÜßàáâãäåæçèéêëìíîïñòóôõöøùúûüýœ°§©£€¥«»‘’“”–—…•×½¼")
# Numbers stand behind these.
BEFORE = ("is", "was", "in", "of", "to", "by", "than", "about", "from", "over", "at", "and")
WORD = 6  # bytes of an English word and the space before it, about


@dataclass(frozen=True)
class NeedleConfig(HaystackConfig):
    """A pass-key task; the other fields are those of `HaystackConfig`.

    key_digits: digits of a key, each uniform.
    num_needles: sentences with a key of its own each; from 2 on each carries a name.
    num_questions: how many of the needles are asked for.
    spread_questions: all questions but the last stand in the text, each somewhere behind its
        needle, instead of at the end.
    distractors: share of the text's words that something strange stands before, in [0, 1]: half of them
        numbers as people write them, half words of any signs; in lessons alone. A memory that has met
        no number but keys takes any for one, and one that never met a sign may write it.
    needle, question: the sentences. {key} is the key, {of} is "" or " of NAME"; the answer follows
        the question.
    """

    task: Literal["needle"] = "needle"
    key_digits: int = 5
    num_needles: int = 1
    num_questions: int = 1
    spread_questions: bool = False
    distractors: float = 0.0
    needle: str = " (The pass key{of} is {key})"
    question: str = " What is the pass key{of}? (The pass key{of} is "

    def __post_init__(self) -> None:
        if not 1 <= self.num_needles <= len(NAMES):
            raise ValueError(f"num_needles must lie in 1 ... {len(NAMES)}, got {self.num_needles}")
        if not 1 <= self.num_questions <= self.num_needles:
            raise ValueError(
                f"num_questions must lie in 1 ... num_needles = {self.num_needles}, "
                f"got {self.num_questions}"
            )
        if not 0 <= self.distractors <= 1:
            raise ValueError(f"distractors must lie in [0, 1], got {self.distractors}")
        if self.key_digits < 1:
            raise ValueError(f"key_digits must be at least 1, got {self.key_digits}")
        if self.needle.count("{key}") != 1 or "{key}" in self.question:
            raise ValueError(
                "needle must hold {key} once and question must not (the answer follows it), "
                f"got needle {self.needle!r} and question {self.question!r}"
            )
        if self.num_needles > 1 and ("{of}" not in self.needle or "{of}" not in self.question):
            raise ValueError(
                "with more than one needle both sentences must hold {of}, the needle's name, "
                f"got needle {self.needle!r} and question {self.question!r}"
            )
        super().__post_init__()
        self.check_room(self.longest_sentences)

    @property
    def closing(self) -> str:
        """What follows a key, in a needle and behind an answer within the text."""
        return self.needle.partition("{key}")[2]

    @property
    def answer_pattern(self) -> str:
        """A regular expression of what a needle says, of any name and with any number."""
        before = self.needle.partition("{key}")[0].strip()
        return re.escape(before).replace(re.escape("{of}"), "(?: of [A-Za-z]+)?") + r"\s*\d"

    @property
    def longest_sentences(self) -> int:
        """Tokens that needles and questions take together, at most."""
        of = f" of {max(NAMES, key=len)}" if self.num_needles > 1 else ""
        key = "0" * self.key_digits
        needle = self.needle.replace("{of}", of).replace("{key}", key)
        question = self.question.replace("{of}", of) + key + self.closing
        needles = self.num_needles * len(needle.encode())
        return needles + self.num_questions * len(question.encode()) - len(self.closing.encode())

    @property
    def longest_answer(self) -> int:
        """Tokens of a key."""
        return self.key_digits

    def plain(self) -> NeedleConfig:
        """The task to judge by: the same sentences with one needle and one question, in the text as it
        is."""
        return replace(super().plain(), num_needles=1, num_questions=1, distractors=0.0)

    def datasets(
        self, num_samples: int, seed: int = 0, batch: int = 1, streams: int | None = None
    ) -> tuple[NeedleDataset, NeedleDataset]:
        """The training and the held-out data set; they share no document.

        The held-out one has keys of its own too, and its full length from the first sample on. The
        split is the same for every seed, so that models of several seeds meet the same test text.
        """
        documents = load_text(self.source)
        refuse_answers(documents, self.answer_pattern)
        train, test = split(documents, fraction=self.held_out)
        full_length = replace(self, start_length=None, distractors=0.0)
        return (
            NeedleDataset(Haystack.of_bytes(train), self, num_samples, seed, batch),
            NeedleDataset(Haystack.of_bytes(test), full_length, num_samples, TEST_SEED + seed, batch),
        )


class NeedleDataset(HaystackDataset):
    """Pass-key samples."""

    config: NeedleConfig

    def draft(
        self, rng: np.random.Generator, depth: float | None, length: int
    ) -> tuple[list[Sentence], int]:
        """Needles, then questions. The last needle is the last question's, which stands at the end
        of the sample with nothing behind its answer."""
        config = self.config
        depths = rng.random(config.num_needles)
        if depth is not None:
            depths[-1] = depth
        names = rng.choice(NAMES, config.num_needles, replace=False)
        digits = rng.integers(10, size=(config.num_needles, config.key_digits))

        def sentence(needle: int, at: float, template: str, is_question: bool) -> Sentence:
            of = "" if config.num_needles == 1 else f" of {names[needle]}"
            before, after = template.replace("{of}", of).split("{key}")
            key = "".join(map(str, digits[needle]))
            return Sentence(at, before.encode(), key.encode(), after.encode(), is_question)

        last = config.num_needles - 1
        needles = [sentence(i, depths[i], config.needle, False) for i in range(config.num_needles)]
        questions = []
        for i in range(config.num_needles - config.num_questions, last):
            at = rng.uniform(depths[i], 1) if config.spread_questions else 1.0
            questions.append(sentence(i, at, config.question + "{key}" + config.closing, True))
        questions.append(sentence(last, 1.0, config.question + "{key}", True))
        told = sum(len(each.text) for each in needles + questions)
        return needles + self.distractors(rng, (length - told) // 2) + questions, last

    def distractors(self, rng: np.random.Generator, room: int) -> list[Sentence]:
        """What nobody asks for; room: the bytes it may take, half of the text."""
        found: list[Sentence] = []
        for _ in range(round(self.config.distractors * 2 * room / WORD)):
            word = f" {(_number if rng.random() < 0.5 else _word)(rng)}".encode()
            room -= len(word)
            if room < 0:
                break
            found.append(Sentence(rng.random(), word, b"", b"", False))
        return found


def _number(rng: np.random.Generator) -> str:
    """A number as people write them: of one to seven digits, a year, a sum, a part; every second
    behind a word that often stands before one."""
    number, part = rng.integers(10 ** rng.integers(1, 8)), rng.integers(100)
    year = rng.integers(1000, 2100)
    forms = (f"{number}", f"{number}", f"{year}", f"{number:,}", f"${number:,}", f"{number}.{part}")
    form = forms[rng.integers(len(forms))]
    return f"{rng.choice(BEFORE)} {form}" if rng.random() < 0.5 else form


def _word(rng: np.random.Generator) -> str:
    """One to eight signs: of ASCII, or of what else stands in European texts."""
    signs = ASCII if rng.random() < 0.7 else SIGNS
    return "".join(rng.choice(signs, rng.integers(1, 9)))
