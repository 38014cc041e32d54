"""Answers to the questions of bAbI's tasks qa1 to qa10, read from the sentences alone.

It shares nothing with what makes stories (babi_world), so that each checks the other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

TASKS = tuple(f"qa{number}" for number in range(1, 11))

COUNTS = ("none", "one", "two", "three")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
RECENT = 5


@dataclass
class Notes:
    """What the sentences so far tell.

    at: the places where a person may be; two for "either", even if they are the same.
    path: those where a thing was, one after the other.
    carried: whether a person holds a thing now, of each that they ever held, in that order.
    given: sentence, giver, thing, receiver. beside: place -> direction -> what lies there.
    """

    at: dict[str, tuple[str, ...]] = field(default_factory=dict)
    path: dict[str, list[str]] = field(default_factory=dict)
    carried: dict[str, dict[str, bool]] = field(default_factory=dict)
    given: list[tuple[int, str, str, str]] = field(default_factory=list)
    beside: dict[str, dict[str, str]] = field(default_factory=dict)
    sentences: int = 0

    def arrive(self, person: str, *places: str) -> None:
        """A person is at one of these places, with all that they carry; none: somewhere else."""
        self.at[person] = places
        for thing, held in self.carried.get(person, {}).items():
            if held:
                self.see(thing, person)

    def see(self, thing: str, person: str) -> None:
        """A thing is where a person is, if that is known."""
        places = self.at.get(person, ())
        path = self.path.setdefault(thing, [])
        if len(places) == 1 and path[-1:] != [*places]:
            path += places

    def hold(self, person: str, thing: str, held: bool = True) -> None:
        """A person has a thing from now on, or has it no longer."""
        self.carried.setdefault(person, {})[thing] = held
        if held:
            self.see(thing, person)

    def hand(self, giver: str, thing: str, to: str) -> None:
        """A person gives a thing to another one."""
        self.given.append((self.sentences, giver, thing, to))
        self.hold(giver, thing, False)
        self.hold(to, thing)

    def lie(self, place: str, side: str, other: str) -> None:
        """A place is on this side of another one."""
        self.beside.setdefault(other, {})[side] = place
        self.beside.setdefault(place, {})[OPPOSITE[side]] = other

    def gifts(self) -> list[tuple[int, str, str, str]]:
        """The last time that each thing was given, latest first."""
        last = {thing: (i, giver, thing, to) for i, giver, thing, to in self.given}
        return sorted(last.values(), reverse=True)


Patterns = tuple[tuple[str, Callable[..., Sequence[str] | None]], ...]

SENTENCES: Patterns = (
    (r"(\w+) (?:went|went back|moved|journeyed|travelled) to the (\w+)", Notes.arrive),
    (r"(\w+) is in the (\w+)", Notes.arrive),
    (r"(\w+) is either in the (\w+) or the (\w+)", Notes.arrive),
    (r"(\w+) is (?:not|no longer) in the \w+", Notes.arrive),
    (r"(\w+) (?:got|took|grabbed|picked up) the (\w+)(?: there)?", Notes.hold),
    (
        r"(\w+) (?:dropped|left|discarded|put down) the (\w+)(?: there)?",
        lambda notes, person, thing: notes.hold(person, thing, False),
    ),
    (r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)", Notes.hand),
    (r"The (\w+) is (\w+) of the (\w+)", Notes.lie),
)


def _whether(notes: Notes, person: str, place: str) -> list[str]:
    """Whether a person is at a place; one who left a place and was not seen since is not there."""
    places = notes.at[person]
    return ["no" if place not in places else "yes" if len(places) == 1 else "maybe"]


def _before(notes: Notes, thing: str, place: str) -> list[str]:
    """Where a thing was before it came to a place for the last time."""
    path = notes.path[thing]
    came = max(i for i, each in enumerate(path) if each == place)
    return path[came - 1 : came]


def _held(notes: Notes, person: str) -> list[str]:
    """What a person carries."""
    return [thing for thing, held in notes.carried.get(person, {}).items() if held]


def _gift(notes: Notes, giver: str, to: str) -> list[str]:
    """What a person gave to another one: the latest first, then others of the last sentences."""
    things = [(i, thing) for i, by, thing, who in notes.gifts() if (by, who) == (giver, to)]
    return [thing for i, thing in things if i == things[0][0] or notes.sentences - i <= RECENT]


QUESTIONS: Patterns = (
    (r"Where is the (\w+)", lambda notes, thing: notes.path[thing][-1:]),
    (r"Where is (\w+)", lambda notes, person: notes.at[person]),
    (r"Where was the (\w+) before the (\w+)", _before),
    (r"What is (\w+) of the (\w+)", lambda notes, side, place: [notes.beside[place][side]]),
    (
        r"What is the (\w+) (\w+) of",
        lambda notes, place, side: [notes.beside[place][OPPOSITE[side]]],
    ),
    (r"What did (\w+) give to (\w+)", _gift),
    (
        r"Who gave the (\w+)(?: to \w+)?",
        lambda notes, asked: [giver for _, giver, thing, _ in notes.gifts() if thing == asked],
    ),
    (
        r"Who (?:received|did \w+ give) the (\w+)(?: to)?",
        lambda notes, asked: [to for _, _, thing, to in notes.gifts() if thing == asked],
    ),
    (r"Is (\w+) in the (\w+)", _whether),
    (r"How many objects is (\w+) carrying", lambda n, person: [COUNTS[len(_held(n, person))]]),
    (r"What is (\w+) carrying", lambda notes, person: [",".join(_held(notes, person)) or "nothing"]),
)


def answers(task: str, facts: Sequence[str], question: str) -> list[str]:
    """All right answers to a question, the likeliest first; none if the sentences do not tell.

    There is one but where qa5 asks what someone gave to another person and it was two things, of
    which its files take either.
    Raises ValueError for another task, and for a sentence or question that is not of bAbI.
    """
    if task not in TASKS:
        raise ValueError(f"the tasks that can be answered are {', '.join(TASKS)}, not {task!r}")
    notes = Notes()
    for fact in facts:
        number, words = _match(SENTENCES, fact.strip(), ".")
        SENTENCES[number][1](notes, *words)
        notes.sentences += 1
    number, words = _match(QUESTIONS, question.strip(), "?")
    try:
        return list(QUESTIONS[number][1](notes, *words) or ())
    except (KeyError, ValueError):
        return []


def answer(task: str, facts: Sequence[str], question: str) -> str:
    """The answer to a question; see `answers`. Raises ValueError if the sentences do not tell it."""
    found = answers(task, facts, question)
    if not found:
        raise ValueError(f"the {len(facts)} sentences do not tell the answer to {question!r}")
    return found[0]


@lru_cache(maxsize=10_000)
def _match(patterns: Patterns, text: str, end: str) -> tuple[int, tuple[str, ...]]:
    """Which of the patterns a sentence or question follows, and the words that it is about."""
    for number, (pattern, _) in enumerate(patterns):
        found = re.fullmatch(pattern + re.escape(end), text)
        if found is not None:
            return number, found.groups()
    raise ValueError(f"it is no sentence of bAbI's qa1 to qa10: {text!r}")
