"""Stories of bAbI's tasks (Weston et al., 2015), told by a small simulated world.

People walk between places, take things, drop them and hand them on; after every two sentences one
question is asked if one can be. The rules and shares here were measured on the published files
(the training parts of 10,000 questions); tests/data/test_babi_world.py compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .babi_story import Story

QUESTIONS = 5  # in a block
WINDOW = 5  # a question is about one of so many last sentences
BARE_DROP = 0.8  # share of drops that are told without "there"

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
# The order matters: a giver hands on the first of what they hold to the first person there.
THINGS = ("apple", "football", "milk")
FOUR = ("John", "Mary", "Sandra", "Daniel")
GIVERS = ("Mary", "Fred", "Bill", "Jeff")

MOVES = ("went to", "went back to", "moved to", "journeyed to", "travelled to")
GETS = ("got", "took", "grabbed", "picked up")
DROPS = ("dropped", "left", "discarded", "put down")
GIVES = ("gave", "handed", "passed")


class Event(NamedTuple):
    """What a sentence tells: a kind ("move", "get", "drop", "give"), who, what or where, to whom."""

    kind: str
    person: str
    thing: str
    to: str = ""


class Question(NamedTuple):
    """A question, its answer, and the sentences (indices) that the answer rests on."""

    text: str
    answer: str
    supports: tuple[int, ...]


@dataclass
class World:
    """Where everyone and everything really is, whether it has been told or not."""

    people: tuple[str, ...]
    at: dict[str, str]
    holder: dict[str, str] = field(default_factory=dict)

    @classmethod
    def start(cls, people: tuple[str, ...], rng: np.random.Generator) -> World:
        """People and things at places drawn at random."""
        return cls(people, {name: _pick(rng, PLACES) for name in (*people, *THINGS)})

    def held(self, person: str) -> list[str]:
        """What a person holds, in the order of THINGS."""
        return [thing for thing in THINGS if self.holder.get(thing) == person]

    def near(self, person: str) -> list[str]:
        """What a person could take."""
        place = self.at[person]
        return [t for t in THINGS if t not in self.holder and self.at[t] == place]

    def receiver(self, person: str) -> str | None:
        """To whom a person would give: the first one who is at the same place."""
        there = (p for p in self.people if p != person and self.at[p] == self.at[person])
        return next(there, None)

    def draw(self, kinds: Sequence[str], rng: np.random.Generator) -> Event:
        """An event that is possible now.

        A kind and a person are drawn until they go together. Moving to the place where one is does
        not, and giving does as soon as anyone could: so all could give 4 / 4, and 5/6 of all move.
        """
        while True:
            kind, person = _pick(rng, kinds), _pick(rng, self.people)
            if kind == "move":
                place = _pick(rng, PLACES)
                if place != self.at[person]:
                    return Event(kind, person, place)
            elif kind == "get" and self.near(person):
                return Event(kind, person, _pick(rng, self.near(person)))
            elif kind == "drop" and self.held(person):
                return Event(kind, person, _pick(rng, self.held(person)))
            elif kind == "give":
                able = [p for p in self.people if self.held(p) and self.receiver(p)]
                if able:
                    giver = _pick(rng, able)
                    to = self.receiver(giver)
                    assert to is not None
                    return Event(kind, giver, self.held(giver)[0], to)

    def apply(self, event: Event) -> None:
        """Let an event happen."""
        if event.kind == "move":
            self.at[event.person] = event.thing
        elif event.kind == "get":
            self.holder[event.thing] = event.person
        elif event.kind == "give":
            self.holder[event.thing] = event.to
        elif event.kind == "drop":
            del self.holder[event.thing]
            self.at[event.thing] = self.at[event.person]


@dataclass
class Told:
    """The events told so far, and the dice for what is told or asked next."""

    rng: np.random.Generator
    events: list[Event] = field(default_factory=list)

    def recent(self) -> list[int]:
        """The indices of the last sentences, shuffled: the first that can be asked about is."""
        last = range(max(0, len(self.events) - WINDOW), len(self.events))
        return [int(i) for i in self.rng.permutation(last)]

    def last(self, kind: str, person: str, before: int | None = None) -> int | None:
        """The last event of a kind that a person did, before an index."""
        for i in reversed(range(len(self.events) if before is None else before)):
            if self.events[i].kind == kind and self.events[i].person == person:
                return i
        return None

    def last_of(self, thing: str) -> int:
        """The last event of a thing."""
        return max(i for i, e in enumerate(self.events) if e.kind != "move" and e.thing == thing)


def simulate(task: str, rng: np.random.Generator) -> list[Story]:
    """One block of stories as a bAbI file has them: questions with all sentences that came before.

    task: qa1 to qa5. For qa3, only its published description was at hand, not its file: objects
    are asked about when they lie where they were dropped after at least two moves.
    Raises ValueError for another task.
    """
    if task not in TASKS:
        raise ValueError(f"there is no simulation of {task!r}, only of {', '.join(TASKS)}")
    return TASKS[task](rng)


def _world_block(people: tuple[str, ...], kinds: tuple[str, ...], ask: Ask, there: bool) -> Block:
    """Blocks of a world in which events of these kinds happen; `there` is said of all gets."""

    def block(rng: np.random.Generator) -> list[Story]:
        world, told, facts, stories = World.start(people, rng), Told(rng), [], []
        while len(stories) < QUESTIONS:
            for _ in range(2):
                event = world.draw(kinds, rng)
                world.apply(event)
                told.events.append(event)
                facts.append(_sentence(event, rng, there))
            question = ask(told)
            if question is not None:
                stories.append(Story(tuple(facts), *question))
        return stories

    return block


def _sentence(event: Event, rng: np.random.Generator, there: bool) -> str:
    """An event in words."""
    kind, person, thing, to = event
    if kind == "move":
        return f"{person} {_pick(rng, MOVES)} the {thing}."
    if kind == "give":
        return f"{person} {_pick(rng, GIVES)} the {thing} to {to}."
    verb = _pick(rng, GETS if kind == "get" else DROPS)
    bare = not (there and kind == "get") and rng.random() < BARE_DROP
    return f"{person} {verb} the {thing}{'' if bare else ' there'}."


def _ask_person(told: Told) -> Question | None:
    """qa1: where someone of the last sentences is."""
    person = told.events[told.recent()[0]].person
    i = told.last("move", person)
    assert i is not None
    return Question(f"Where is {person}?", told.events[i].thing, (i,))


def _ask_thing(told: Told) -> Question | None:
    """qa2: where a thing is that was taken and moved, or dropped by someone who had moved."""
    for at in told.recent():
        event = told.events[at]
        if event.kind == "move":
            continue
        i = told.last_of(event.thing)
        kind, person = told.events[i].kind, told.events[i].person
        move = told.last("move", person, before=None if kind == "get" else i)
        if move is not None and (kind == "drop" or move > i):
            return Question(f"Where is the {event.thing}?", told.events[move].thing, (i, move))
    return None


def _ask_before(told: Told) -> Question | None:
    """qa3: where a dropped thing was before one of the places to which it was carried."""
    for at in told.recent():
        event = told.events[at]
        if event.kind == "move":
            continue
        i = told.last_of(event.thing)
        if told.events[i].kind == "drop":
            stops = _stops(told, i)
            if len(stops) > 1:
                place = told.events[stops[int(told.rng.integers(1, len(stops)))]].thing
                arrived = max(k for k, j in enumerate(stops) if told.events[j].thing == place)
                before, now = stops[arrived - 1], stops[arrived]
                text = f"Where was the {event.thing} before the {place}?"
                return Question(text, told.events[before].thing, (i, now, before))
    return None


def _stops(told: Told, drop: int) -> list[int]:
    """The moves that a dropped thing made since it was taken."""
    _, person, thing, _ = told.events[drop]
    taken = max(i for i in range(drop) if told.events[i] == Event("get", person, thing))
    return [i for i in range(taken, drop) if told.events[i][:2] == ("move", person)]


def _ask_given(told: Told) -> Question | None:
    """qa5: who gave what to whom, of the last time that a thing was given."""
    given = [at for at in told.recent() if told.events[at].kind == "give"]
    if not given:
        return None
    thing = told.events[given[0]].thing
    i = max(i for i, e in enumerate(told.events) if e.kind == "give" and e.thing == thing)
    _, person, thing, to = told.events[i]
    forms = (
        (f"What did {person} give to {to}?", thing),
        (f"What did {person} give to {to}?", thing),
        (f"Who gave the {thing}?", person),
        (f"Who gave the {thing} to {to}?", person),
        (f"Who received the {thing}?", to),
        (f"Who did {person} give the {thing} to?", to),
    )
    return Question(*forms[int(told.rng.integers(len(forms)))], (i,))


def _map_block(rng: np.random.Generator) -> list[Story]:
    """qa4: three places in a line, and what lies beside one of them."""
    first, middle, last = (PLACES[i] for i in rng.permutation(len(PLACES))[:3])
    axis = (("north", "south"), ("east", "west"))[int(rng.integers(2))]
    one, other = axis if rng.random() < 0.5 else axis[::-1]
    facts = []
    for place, side, back in ((first, one, other), (last, other, one)):
        # Two of three sentences say where the outer place is, the others where the middle one is.
        told = (place, side, back, middle) if rng.random() < 2 / 3 else (middle, back, side, place)
        facts.append(told)
    asked = int(rng.integers(2))
    answer, side, back, place = facts[asked]
    question = f"is {side} of the {place}" if rng.random() < 0.5 else f"is the {place} {back} of"
    sentences = tuple(f"The {a} is {side} of the {b}." for a, side, _, b in facts)
    return [Story(sentences, f"What {question}?", answer, (asked,))]


def _pick(rng: np.random.Generator, among: Sequence[str]) -> str:
    """One of them, at random."""
    return among[int(rng.integers(len(among)))]


Ask = Callable[[Told], Question | None]
Block = Callable[[np.random.Generator], list[Story]]
_CARRY = ("move", "get", "drop")
TASKS: dict[str, Block] = {
    "qa1": _world_block(FOUR, ("move",), _ask_person, True),
    "qa2": _world_block(FOUR, _CARRY, _ask_thing, True),
    "qa3": _world_block(FOUR, _CARRY, _ask_before, False),
    "qa4": _map_block,
    "qa5": _world_block(GIVERS, (*_CARRY, "give"), _ask_given, True),
}
