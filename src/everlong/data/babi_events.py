"""A small world that tells the stories of bAbI's tasks qa1 to qa10 (Weston et al., 2015).

People walk between places, take things, drop them and hand them on; a sentence tells each event, and
after every two sentences a question is asked if one can be. The rules and the shares here were
measured on the training parts of the published files (10,000 questions each), but for qa3, whose
file was not at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

WINDOW = 5  # a question is about one of so many last sentences
BARE = 0.8  # share of the drops that are told without "there"

# The order of things and people matters: a giver hands on the first of what they hold, to the first
# person who is there. That holds of all gifts in the files of qa5 and qa7.
THINGS = ("apple", "football", "milk")
PEOPLE = {
    "qa5": ("Mary", "Fred", "Bill", "Jeff"),
    "qa10": ("Bill", "Fred", "Julie", "Mary"),
}
FOUR = ("John", "Mary", "Sandra", "Daniel")
ROOMS = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
TOWN = ("bedroom", "cinema", "kitchen", "office", "park", "school")

WALKS = ("move",)
CARRYING = ("move", "get", "drop")
GIVING = ("move", "get", "drop", "give")
# Half of the sentences of qa9 and qa10 tell a walk; a quarter, where someone is after one.
KINDS = {
    "qa1": WALKS,
    "qa5": GIVING,
    "qa7": GIVING,
    "qa9": ("move", "move", "be", "deny"),
    "qa10": ("move", "move", "be", "either"),
}

WORDS = {
    "move": ("went to", "went back to", "moved to", "journeyed to", "travelled to"),
    "be": ("is in",),
    "deny": ("is not in", "is no longer in"),
    "get": ("got", "took", "grabbed", "picked up"),
    "drop": ("dropped", "left", "discarded", "put down"),
    "give": ("gave", "handed", "passed"),
}


class Event(NamedTuple):
    """What a sentence tells.

    kind: "move" and "be" name the place where a person is now, "deny" the one that they left, and
        "either" two, of which one is right; "get", "drop" and "give" name a thing.
    to: who is given it; with "either", the other place.
    """

    kind: str
    person: str
    what: str
    to: str = ""


@dataclass
class World:
    """Where everyone and everything really is, what was told of it, and the dice.

    people, places: who is there, and where they can be.
    at: of people and of things that lie about.
    holder: of the things that someone carries.
    """

    rng: np.random.Generator
    people: tuple[str, ...]
    places: tuple[str, ...]
    at: dict[str, str] = field(default_factory=dict)
    holder: dict[str, str] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    @classmethod
    def of(cls, task: str, rng: np.random.Generator) -> World:
        """The world of a task: people and things at random places, of which nothing is told yet."""
        world = cls(rng, PEOPLE.get(task, FOUR), TOWN if task == "qa10" else ROOMS)
        world.at = {name: world.pick(world.places) for name in (*world.people, *THINGS)}
        return world

    def pick(self, among: Sequence[str]) -> str:
        """One of them, at random."""
        return among[int(self.rng.integers(len(among)))]

    def other_place(self, place: str) -> str:
        """Any place but this."""
        return self.pick([p for p in self.places if p != place])

    def held(self, person: str) -> list[str]:
        """What a person carries, in the order of THINGS."""
        return [thing for thing in THINGS if self.holder.get(thing) == person]

    def within_reach(self, person: str) -> list[str]:
        """What a person could take."""
        place = self.at[person]
        return [t for t in THINGS if t not in self.holder and self.at[t] == place]

    def receiver(self, person: str) -> str:
        """To whom a person would give: the first who is at the same place, or nobody ("")."""
        there = (p for p in self.people if p != person and self.at[p] == self.at[person])
        return next(there, "")

    def happen(self, kinds: Sequence[str]) -> Event:
        """Let something happen of one of these kinds, and tell it.

        A kind and a person are drawn until they are possible together. A walk to where the person
        is already is not (so five of six are), and giving is as soon as anyone could give.
        """
        event = None
        while event is None:
            kind, person = self.pick(kinds), self.pick(self.people)
            if kind in ("get", "drop", "give"):
                event = self._handle(kind, person)
            else:
                event = self._walk(kind, person)
        self.events.append(event)
        return event

    def _walk(self, kind: str, person: str) -> Event | None:
        """A person goes elsewhere."""
        left, place = self.at[person], self.pick(self.places)
        if place == left:
            return None
        self.at[person] = place
        if kind == "deny":
            return Event(kind, person, left)
        if kind == "either":
            # The other place may be the same one: "in the park or the park" is in the files.
            two = (place, self.pick(self.places))
            return Event(kind, person, *(two if self.rng.random() < 0.5 else two[::-1]))
        return Event(kind, person, place)

    def _handle(self, kind: str, person: str) -> Event | None:
        """Someone takes, drops or hands on a thing."""
        if kind == "give":
            able = [p for p in self.people if self.held(p) and self.receiver(p)]
            if not able:
                return None
            person = self.pick(able)
            thing, to = self.held(person)[0], self.receiver(person)
            self.holder[thing] = to
            return Event(kind, person, thing, to)
        things = self.held(person) if kind == "drop" else self.within_reach(person)
        if not things:
            return None
        thing = self.pick(things)
        if kind == "drop":
            del self.holder[thing]
            self.at[thing] = self.at[person]
        else:
            self.holder[thing] = person
        return Event(kind, person, thing)

    def say(self, event: Event, task: str) -> str:
        """An event in a sentence."""
        kind, person, what, to = event
        if kind == "either":
            return f"{person} is either in the {what} or the {to}."
        verb = self.pick(WORDS[kind])
        if kind == "give":
            return f"{person} {verb} the {what} to {to}."
        # All takings are told with "there" but for those of qa3.
        there = kind == "drop" or (kind == "get" and task == "qa3")
        there = self.rng.random() >= BARE if there else kind == "get"
        return f"{person} {verb} the {what}{' there' if there else ''}."

    def recent(self, *kinds: str) -> list[Event]:
        """Those of the last sentences that are of such a kind (all, if none is named), shuffled."""
        last = self.events[-WINDOW:]
        shuffled = [last[int(i)] for i in self.rng.permutation(len(last))]
        return [event for event in shuffled if not kinds or event.kind in kinds]

    def last(self, *kinds: str, before: int | None = None, **fields: str) -> int | None:
        """The index of the last event of such a kind (of any, if none is named) with these fields.

        before: an index; only what happened before counts.
        """
        for i in range(len(self.events) if before is None else before)[::-1]:
            event = self.events[i]
            if (not kinds or event.kind in kinds) and all(
                getattr(event, name) == value for name, value in fields.items()
            ):
                return i
        return None
