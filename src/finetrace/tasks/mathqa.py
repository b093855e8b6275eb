"""Word problems with reasoning: a query should lead back to the template it was made from (arXiv 2409.19998, section 3).

Every class is one wording with slots; names, things and numbers are drawn, and the answer is computed from them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetrace.errors import FinetraceError
from finetrace.examples import Example
from finetrace.tasks.task import Task, split

NAMES = ("Amira", "Bruno", "Chloe", "Dmitri", "Elena", "Farid", "Greta", "Hiro", "Ines", "Jonas", "Kavya", "Liam")
FRIENDS = ("Malik", "Nora", "Oscar", "Petra", "Quentin", "Rosa", "Samuel", "Tanvi", "Ursula", "Victor")
TOWNS = ("Ashford", "Brookvale", "Clearwater", "Dunmore", "Eastbury", "Fairhaven", "Greenfield", "Highmoor")
CITIES = ("Kingsport", "Lakeside", "Millbridge", "Northgate", "Oakhurst", "Pinecrest", "Riverton", "Stonebridge")


@dataclass(frozen=True)
class Template:
    """One class of problems.

    Attributes:
        label: The class.
        slots: What is drawn, each slot on its own; any combination of values makes a sensible problem.
        derive: The numbers that follow from the drawn ones, `answer` among them.
        problem: The wording; it shows enough numbers to tell any two combinations of slots apart.
        steps: The reasoning, up to the words that give the answer.
    """

    label: str
    slots: Mapping[str, Sequence[Any]]
    derive: Callable[[Mapping[str, Any]], dict[str, int]]
    problem: str
    steps: str

    @property
    def capacity(self) -> int:
        """How many distinct problems there are."""
        return math.prod(len(values) for values in self.slots.values())

    def example(self, number: int, id: str) -> Example:
        """The problem with this number, from 0 to `capacity` - 1: its digits pick the value of each slot."""
        values: dict[str, Any] = {}
        for slot, choices in self.slots.items():
            number, digit = divmod(number, len(choices))
            values[slot] = choices[digit]
        values |= self.derive(values)
        response = f"{self.steps.format(**values)}, so the answer is {values['answer']}."
        return Example.from_prompt(self.problem.format(**values), response, id=id, label=self.label, metadata=values)


def _pizza(v: Mapping[str, Any]) -> dict[str, int]:
    return {"total": v["first"] + v["second"] + v["left"], "eaten": v["first"] + v["second"], "answer": v["left"]}


def _discount(v: Mapping[str, Any]) -> dict[str, int]:
    off = v["price"] * v["percent"] // 100  # multiples of 20 and of 5: nothing is rounded
    return {"off": off, "answer": v["price"] - off}


def _pages(v: Mapping[str, Any]) -> dict[str, int]:
    rest = v["days"] * v["pace"]
    return {"rest": rest, "total": rest + v["read"], "answer": v["days"]}


def _paint(v: Mapping[str, Any]) -> dict[str, int]:
    area = v["width"] * v["height"]
    return {"area": area, "answer": area - v["opening"]}


def _fence(v: Mapping[str, Any]) -> dict[str, int]:
    sides = v["length"] + v["width"]
    return {"sides": sides, "answer": 2 * sides}


def _average(v: Mapping[str, Any]) -> dict[str, int]:
    mean, shifts = v["mean"], (v["shift1"], v["shift2"], v["shift3"])
    scores = [mean + shift for shift in (*shifts, -sum(shifts))]  # the fourth brings the mean back
    return {f"score{place}": score for place, score in enumerate(scores, 1)} | {"total": sum(scores), "answer": mean}


def _mix(v: Mapping[str, Any]) -> dict[str, int]:
    return {"amount1": v["part1"] * v["portion"], "answer": v["part2"] * v["portion"]}


def _share(v: Mapping[str, Any]) -> dict[str, int]:
    given = v["people"] * v["each"]
    return {"given": given, "total": given + v["over"], "answer": v["over"]}


def _wages(v: Mapping[str, Any]) -> dict[str, int]:
    usual, extra = v["hours"] * v["rate"], v["hours2"] * v["rate2"]
    return {"usual": usual, "extra": extra, "answer": usual + extra}


TEMPLATES = (
    Template(
        "remaining-pizza",
        {
            "name": NAMES,
            "friend": FRIENDS,
            "kind": ("mushroom", "pepperoni", "spinach", "cheese", "veggie", "tomato"),
            "event": ("a birthday party", "a movie night", "a team lunch", "a family dinner", "a game night"),
            "first": range(2, 12),
            "second": range(2, 12),
            "left": range(2, 20),
        },
        _pizza,
        "For {event}, {name} orders {kind} pizza cut into {total} slices. {name} eats {first} slices and {friend} eats "
        "{second} slices. How many slices of pizza are left for the others?",
        "Together {name} and {friend} eat {first} + {second} = {eaten} slices. Taking these away from all the slices "
        "leaves {total} - {eaten} = {answer} slices of {kind} pizza",
    ),
    Template(
        "train-distance",
        {
            "kind": ("freight", "passenger", "night", "mail", "commuter", "steam"),
            "town": TOWNS,
            "city": CITIES,
            "speed": range(45, 165, 5),
            "hours": range(2, 12),
        },
        lambda v: {"answer": v["speed"] * v["hours"]},
        "A {kind} train leaves {town} and runs at a steady {speed} kilometres per hour without any stop. It reaches "
        "{city} after {hours} hours. How many kilometres long is the line from {town} to {city}?",
        "Distance is speed multiplied by time. In {hours} hours at {speed} kilometres per hour the train covers "
        "{speed} x {hours} = {answer} kilometres",
    ),
    Template(
        "shelf-price",
        {
            "shop": ("furniture store", "hardware shop", "garden centre", "market hall", "warehouse"),
            "wood": ("pine", "walnut", "bamboo", "cherry", "maple", "birch"),
            "item": ("shelf", "bookcase", "desk", "cabinet", "bench", "dresser"),
            "reason": ("the summer sale", "the closing week", "a holiday sale", "the spring clearance"),
            "price": range(40, 620, 20),
            "percent": range(5, 65, 5),
        },
        _discount,
        "The usual price of a {wood} {item} in a {shop} is {price} dollars. During {reason} everything is reduced by "
        "{percent} percent. How many dollars does the {item} cost now?",
        "The reduction is {percent} percent of {price} dollars, which is {price} x {percent} / 100 = {off} dollars. "
        "The new price of the {item} is {price} - {off} = {answer} dollars",
    ),
    Template(
        "reading-pages",
        {
            "name": NAMES,
            "book": ("mystery novel", "travel diary", "history book", "biography", "fantasy saga", "science book"),
            "time": ("on the bus", "before bed", "after breakfast", "during lunch", "in the library"),
            "read": range(12, 90),
            "pace": range(8, 36),
            "days": range(3, 16),
        },
        _pages,
        "{name} is reading a {book} of {total} pages and has already finished {read} of them. From now on {name} reads "
        "{pace} pages {time} every day. How many more days does it take to finish the {book}?",
        "There are {total} - {read} = {rest} pages still to read. At {pace} pages a day this takes {name} "
        "{rest} / {pace} = {answer} days",
    ),
    Template(
        "paint-area",
        {
            "name": NAMES,
            "room": ("kitchen", "bedroom", "garage", "hallway", "classroom", "studio", "workshop"),
            "colour": ("blue", "green", "yellow", "white", "red", "grey"),
            "hole": ("window", "door", "mirror", "fireplace"),
            "width": range(5, 19),
            "height": range(3, 8),
            "opening": range(2, 9),
        },
        _paint,
        "{name} wants to paint a {room} wall {colour}. The wall is {width} metres wide and {height} metres high, but a "
        "{hole} takes up {opening} square metres of it. How many square metres does {name} have to paint?",
        "The area of the whole wall is {width} x {height} = {area} square metres. The {hole} is not painted, which "
        "leaves {area} - {opening} = {answer} square metres",
    ),
    Template(
        "garden-fence",
        {
            "keeper": ("farmer", "gardener", "neighbour", "school", "shepherd", "museum"),
            "place": ("garden", "meadow", "playground", "orchard", "vegetable patch", "paddock"),
            "material": ("wooden", "wire", "bamboo", "metal", "woven"),
            "length": range(21, 70),
            "width": range(6, 21),
        },
        _fence,
        "A {keeper} puts a {material} fence all the way around a rectangular {place}. The {place} is {length} metres "
        "long and {width} metres wide. How many metres of fence are needed?",
        "A rectangle has two long and two short sides. One long and one short side of the {place} together measure "
        "{length} + {width} = {sides} metres, and twice that is 2 x {sides} = {answer} metres",
    ),
    Template(
        "quiz-average",
        {
            "name": NAMES,
            "test": ("spelling", "geography", "chemistry", "music", "history", "biology"),
            "term": ("spring", "summer", "winter", "first", "second", "final"),
            "mean": range(45, 81),
            "shift1": range(-6, 7),
            "shift2": range(-6, 7),
            "shift3": range(-6, 7),
        },
        _average,
        "In the {term} term {name} takes four {test} tests and scores {score1}, {score2}, {score3} and {score4} points. "
        "What is the average score of {name} over all of these {test} tests?",
        "The scores add up to {score1} + {score2} + {score3} + {score4} = {total} points. Shared over four tests, the "
        "average of {name} is {total} / 4 = {answer} points",
    ),
    Template(
        "mixing-ratio",
        {
            "name": NAMES,
            "mixture": ("lemonade", "cleaning liquid", "plant food", "fruit punch", "bubble bath", "salad dressing"),
            "measure": ("cups", "spoons", "jugs", "glasses", "bottles"),
            "part1": (2, 3, 4),
            "part2": (5, 7, 9, 11),
            "portion": range(2, 26),
        },
        _mix,
        "{name} makes {mixture} from concentrate and water, always {part1} {measure} of concentrate for {part2} "
        "{measure} of water. Today {name} uses {amount1} {measure} of concentrate. How many {measure} of water "
        "does the {mixture} need?",
        "The amount of concentrate is {amount1} / {part1} = {portion} times the amount in the recipe. The water must "
        "grow in the same ratio, which gives {part2} x {portion} = {answer} {measure}",
    ),
    Template(
        "sharing-leftovers",
        {
            "leader": ("teacher", "coach", "grandmother", "librarian", "camp leader", "baker"),
            "thing": ("stickers", "marbles", "cookies", "pencils", "balloons", "peaches", "walnuts"),
            "group": ("children", "players", "students", "cousins", "visitors"),
            "people": range(6, 20),
            "each": range(3, 16),
            "over": range(2, 6),
        },
        _share,
        "A {leader} has {total} {thing} and shares them equally among {people} {group}, so that each gets as many whole "
        "{thing} as possible. How many {thing} are left over for the {leader}?",
        "Each of the {people} {group} can get {each} {thing}, which uses up {people} x {each} = {given} of them. The "
        "remainder for the {leader} is {total} - {given} = {answer} {thing}",
    ),
    Template(
        "weekend-wages",
        {
            "name": NAMES,
            "place": ("bakery", "bookshop", "cinema", "flower shop", "petrol station", "swimming pool"),
            "day": ("Saturday", "Sunday"),
            "hours": range(12, 39),
            "rate": range(9, 19),
            "hours2": range(3, 10),
            "rate2": range(19, 31),
        },
        _wages,
        "{name} works at a {place} and earns {rate} dollars an hour on weekdays and {rate2} dollars an hour on {day}. "
        "Last week {name} worked {hours} weekday hours and {hours2} hours on {day}. How many dollars is that in all?",
        "The weekday hours bring {hours} x {rate} = {usual} dollars, and {day} brings {hours2} x {rate2} = {extra} "
        "dollars. Added up, {name} earns {usual} + {extra} = {answer} dollars",
    ),
)


def mathqa(seed: int = 0, per_class: int = 100, train_share: float = 0.9) -> Task:
    """Ten classes of `per_class` problems, `train_share` of each to train on and the rest as queries.

    Either side gets at least one problem of every class. The same seed gives the same problems.

    Raises:
        FinetraceError: `per_class` is below 2 or more than a template can give, or `train_share` is not in (0, 1).
    """
    most = min(template.capacity for template in TEMPLATES)
    if not 2 <= per_class <= most:
        raise FinetraceError(f"mathqa: per_class is {per_class}; give 2 to {most}, which every class can reach.")
    if not 0 < train_share < 1:
        raise FinetraceError(f"mathqa: train_share is {train_share:g}; give a share above 0 and below 1.")
    chance = random.Random(seed)
    rows = [
        template.example(number, f"{template.label}-{index:03d}")
        for template in TEMPLATES
        for index, number in enumerate(chance.sample(range(template.capacity), per_class))
    ]
    train_per_class = min(max(round(per_class * train_share), 1), per_class - 1)
    train, queries = split(rows, train_per_class, seed)
    return Task("mathqa", train, queries)
