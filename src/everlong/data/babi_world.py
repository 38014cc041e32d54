"""Stories of bAbI's tasks qa1 to qa10 (Weston et al., 2015), simulated.

`World` makes things happen and tells them; here is what is asked about it. A sentence is drawn from
the last five and asked about as the task does; if it cannot be, another of them is tried, and if
none can be, the story goes on by two sentences. Which sentences can be asked about, the forms of
the questions and their shares were measured on the published files, as `World`'s rules were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import NamedTuple

import numpy as np

from .babi_events import CARRYING, KINDS, ROOMS, World
from .babi_story import Story

QUESTIONS = 5  # in a block, but for qa4, which has one
COUNTS = ("none", "one", "two", "three")
HANDLED = ("get", "drop", "give")


class Question(NamedTuple):
    """A question, its answer, and the sentences (indices) that the answer rests on."""

    text: str
    answer: str
    supports: tuple[int, ...]


def simulate(task: str, rng: np.random.Generator) -> list[Story]:
    """One block of stories as a bAbI file has them: questions with all sentences that came before.

    task: qa1 to qa10. Their distributions are those of the published files, with two reservations.
    qa3 could not be compared with its file: it is qa2's world and asks where a thing was before a
    place to which it was carried, once it has been put down. And qa5 here never asks what someone
    gave to another person when two answers are right, as its file does in 36 of 10,000 questions.
    Raises ValueError for another task.
    """
    return list(narrate(task, rng))


def narrate(task: str, rng: np.random.Generator) -> Iterator[Story]:
    """The stories of `simulate` one by one; what comes after the last one taken is not told."""
    if task not in TASKS:
        raise ValueError(f"there is no simulation of {task!r}, only of {', '.join(TASKS)}")
    if task == "qa4":
        yield _map_story(rng)
        return
    world, kinds = World.of(task, rng), KINDS.get(task, CARRYING)
    facts: list[str] = []
    asked = 0
    while asked < QUESTIONS:
        facts += [world.say(world.happen(kinds), task) for _ in range(2)]
        question = ASK[task](world)
        if question is not None:
            asked += 1
            yield Story(tuple(facts), *question)


def _map_story(rng: np.random.Generator) -> Story:
    """qa4: three places in a line, and what lies beside one of them."""
    first, middle, last = (ROOMS[int(i)] for i in rng.permutation(len(ROOMS))[:3])
    one, other = (("north", "south"), ("east", "west"))[int(rng.integers(2))]
    if rng.random() < 0.5:
        one, other = other, one
    told = []
    for place, side, back in ((first, one, other), (last, other, one)):
        # Two of three sentences say where the outer place is, the others where the middle one is.
        outer = rng.random() < 2 / 3
        told.append((place, side, back, middle) if outer else (middle, back, side, place))
    asked = int(rng.integers(2))
    answer, side, back, place = told[asked]
    question = f"is {side} of the {place}" if rng.random() < 0.5 else f"is the {place} {back} of"
    facts = tuple(f"The {a} is {side} of the {b}." for a, side, _, b in told)
    return Story(facts, f"What {question}?", answer, (asked,))


def _ask_person(world: World) -> Question:
    """qa1: where someone is."""
    person = world.recent()[0].person
    i = _known(world.last("move", person=person))
    return Question(f"Where is {person}?", world.events[i].what, (i,))


def _ask_thing(world: World) -> Question | None:
    """qa2: where a thing is, if it was carried there or put down by someone who had walked."""
    for event in world.recent(*HANDLED):
        i = _known(world.last(*HANDLED, what=event.what))
        kind, person, thing, _ = world.events[i]
        move = world.last("move", person=person, before=i if kind == "drop" else None)
        if move is not None and (kind == "drop" or move > i):
            return Question(f"Where is the {thing}?", world.events[move].what, (i, move))
    return None


def _ask_before(world: World) -> Question | None:
    """qa3: where a thing was before a place; it was put down, and carried to two places before."""
    for event in world.recent(*HANDLED):
        i = _known(world.last(*HANDLED, what=event.what))
        kind, person, thing, _ = world.events[i]
        taken = _known(world.last("get", person=person, what=thing))
        stops = [j for j in range(taken, i) if world.events[j][:2] == ("move", person)]
        if kind == "drop" and len(stops) > 1:
            place = world.events[stops[int(world.rng.integers(1, len(stops)))]].what
            came = max(k for k, j in enumerate(stops) if world.events[j].what == place)
            before, now = stops[came - 1], stops[came]
            text = f"Where was the {thing} before the {place}?"
            return Question(text, world.events[before].what, (i, now, before))
    return None


def _ask_given(world: World) -> Question | None:
    """qa5: who gave what to whom, when a thing was last given."""
    for event in world.recent("give"):
        i = _known(world.last("give", what=event.what))
        _, giver, thing, to = world.events[i]
        # A third of the questions is each about the thing, the giver and the receiver.
        form = world.rng.random()
        if form < 1 / 3 and i == world.last("give", person=giver, to=to):
            return Question(f"What did {giver} give to {to}?", thing, (i,))
        by = (f"Who gave the {thing}?", f"Who gave the {thing} to {to}?")
        who = (f"Who received the {thing}?", f"Who did {giver} give the {thing} to?")
        forms, answer = (by, giver) if form < 2 / 3 else (who, to)
        return Question(world.pick(forms), answer, (i,))
    return None


def _ask_yes_no(world: World) -> Question | None:
    """qa6, qa9, qa10: whether someone is at a place."""
    for event in world.recent("move", "be", "deny", "either"):
        i = _known(world.last("move", "be", "deny", "either", person=event.person))
        kind, person, what, other = world.events[i]
        right = world.at[person]
        place = right if world.rng.random() < 0.5 else world.other_place(right)
        if kind == "deny":
            place, answer = what, "no"
        elif kind == "either":
            answer = "maybe" if place in (what, other) else "no"
        else:
            answer = "yes" if place == right else "no"
        return Question(f"Is {person} in the {place}?", answer, (i,))
    return None


def _ask_count(world: World) -> Question | None:
    """qa7: how many things someone carries."""
    for event in world.recent(*HANDLED):
        person = event.person
        supports = [
            i
            for i, (kind, who, _, to) in enumerate(world.events)
            if kind in HANDLED and person in (who, to)
        ]
        answer = COUNTS[len(world.held(person))]
        return Question(f"How many objects is {person} carrying?", answer, tuple(supports))
    return None


def _ask_list(world: World) -> Question | None:
    """qa8: what someone carries, in the order in which they first took each thing."""
    for event in world.recent(*HANDLED):
        person = event.person
        told: dict[str, list[int]] = {}
        for i, (kind, who, thing, _) in enumerate(world.events):
            if kind in HANDLED and who == person:
                told.setdefault(thing, []).append(i)
        held = world.held(person)
        answer = ",".join(thing for thing in told if thing in held) or "nothing"
        return Question(f"What is {person} carrying?", answer, tuple(chain(*told.values())))
    return None


def _known(index: int | None) -> int:
    """An index that there must be."""
    assert index is not None
    return index


ASK: dict[str, Callable[[World], Question | None]] = {
    "qa1": _ask_person,
    "qa2": _ask_thing,
    "qa3": _ask_before,
    "qa5": _ask_given,
    "qa6": _ask_yes_no,
    "qa7": _ask_count,
    "qa8": _ask_list,
    "qa9": _ask_yes_no,
    "qa10": _ask_yes_no,
}
TASKS = tuple(f"qa{number}" for number in range(1, 11))
