"""Short plain sentences, put together from word lists: lower case, letters and spaces only."""

from __future__ import annotations

import random
import re

SHORTEST, LONGEST = 4, 10  # words of a sentence

_SLOT = re.compile(r"\{(\w+)(?:\.(\w+))?\}")  # {name}, or {name.form} for a word of the list in another form


def _words(listed: str) -> tuple[str, ...]:
    return tuple(listed.split(", "))


_CARE = "clean, wash, repair, inspect, polish, paint, lift, hide, test"
_TRADE = "borrow, buy, sell, return, steal, fetch, carry, order, rent"

# Every slot's choices. A list is kept to words that fit wherever a pattern uses it, and every word has a vowel and
# takes "an" only where it starts with one.
SLOTS: dict[str, tuple[str, ...]] = {
    "person": _words(
        "actor, archer, baker, builder, butcher, captain, carpenter, chemist, clown, dancer, doctor, driver, engineer, "
        "farmer, gardener, guard, hunter, judge, lawyer, librarian, mechanic, merchant, musician, nurse, painter, "
        "pilot, plumber, sailor, shepherd, singer, soldier, student, tailor, teacher, tourist, waiter, writer"
    ),
    "relative": _words("aunt, brother, cousin, friend, neighbour, nephew, niece, sister, uncle"),
    "elder": _words("father, grandfather, grandmother, mother"),
    "nature": _words(
        "brave, careful, cheerful, clever, curious, famous, friendly, gentle, kind, lonely, nervous, old, patient, "
        "polite, proud, quiet, serious, tired, young"
    ),
    "mood": _words(
        "calm, confused, grateful, happy, hungry, lonely, nervous, proud, relieved, sad, sleepy, tired, weary"
    ),
    "whose": _words("her, his, our, their, your"),
    "number": _words("two, three, four, five, six, seven, several"),
    "who": (
        "the {person}",
        "the {nature} {person}",
        "the {nature} {person}",
        "a {nature} {person}",
        "a {person}",
        "{whose} {relative}",
        "{whose} {elder}",
    ),
    "they": ("the {person.s}", "{number} {person.s}", "{number} {nature} {person.s}", "{whose} {relative.s}"),
    "animal": _words(
        "badger, bear, cat, deer, dog, donkey, duck, fox, goat, goose, hare, hedgehog, hen, horse, lamb, lizard, "
        "mouse, otter, pony, rabbit, raccoon, squirrel, tiger, turtle, wolf"
    ),
    "look": _words(
        "black, brown, fat, gentle, hungry, lazy, old, shaggy, sleepy, small, spotted, thirsty, timid, wild"
    ),
    "beast": ("the {animal}", "the {look} {animal}", "a {look} {animal}", "{whose} {look} {animal}"),
    "beasts": ("the {look} {animal.s}", "{number} {animal.s}", "{number} {look} {animal.s}"),
    "move": _words("creep, hurry, jog, limp, march, race, run, rush, stroll, trot, walk, wander"),
    "rest": _words("doze, hide, play, rest, sit, sleep, stand, wait"),
    "area": _words("field, forest, garden, jungle, market, meadow, orchard, park, square, town, valley, village, yard"),
    "building": _words(
        "bakery, barn, castle, church, cottage, hospital, hotel, library, lighthouse, mill, museum, palace, school, "
        "station, temple, theatre, tower"
    ),
    "air": _words("ancient, beautiful, distant, empty, lonely, old, peaceful, quiet, silent, sunny"),
    "through": ("across the {area}", "through the {air} {area}", "toward the {building}", "past the {air} {building}"),
    "where": ("near the {building}", "behind the {building}", "in the {area}", "in the {air} {area}"),
    "spot": _words("bench, door, fence, fireplace, fountain, gate, oak tree, pond, stove, wall, window"),
    "beside": _words("behind, beside, close to, near, next to"),
    "tool": _words(
        "axe, broom, brush, bucket, chisel, crowbar, drill, hammer, kettle, ladder, lantern, rake, saw, shovel, spade, "
        "toolbox, wheelbarrow, wrench"
    ),
    "wear": _words("broken, cheap, dirty, dusty, expensive, heavy, muddy, new, old, rusty, shiny, small, sturdy"),
    "implement": ("the {tool}", "the {wear} {tool}", "a {wear} {tool}", "{number} {wear} {tool.s}"),
    "care": _words(_CARE),
    "handle": _words(f"{_CARE}, {_TRADE}"),
    "put": _words("drop, hide, keep, leave, put, store"),
    "dish": _words("bread, cake, curry, goulash, pasta, pizza, porridge, pudding, rice, salad, soup, stew"),
    "taste": _words("cold, creamy, delicious, fresh, homemade, plain, spicy, sweet, tasty, warm"),
    "dine": _words("eat, enjoy, finish, order, prepare, share, taste"),
    "crop": _words("apple, carrot, cherry, lemon, melon, mushroom, olive, onion, peach, pear, plum, potato, tomato"),
    "ripe": _words("fresh, green, juicy, large, ripe, small, tiny, wild"),
    "gather": _words("buy, collect, count, sell, slice, steal, wash, weigh"),
    "thing": _words(
        "barrel, bicycle, carpet, chair, clock, drum, lamp, mirror, piano, statue, suitcase, table, vase, wagon"
    ),
    "colour": _words("black, blue, golden, green, orange, purple, red, silver, white, yellow"),
    "gift": _words("bell, blanket, book, candle, coat, hat, letter, map, postcard, ring, scarf, ticket, umbrella"),
    "give": _words("bring, give, hand, lend, offer, sell, send, show"),
    "measure": _words("bigger, cheaper, cleaner, heavier, lighter, newer, older, prettier, smaller"),
    "vehicle": _words("boat, bus, carriage, ferry, taxi, tractor, train, tram, truck"),
    "subject": _words("astronomy, biology, chess, geometry, history, law, literature, medicine, music, poetry"),
    "learn": _words("discuss, enjoy, explain, learn, practise, study, teach"),
    "event": _words("concert, exam, game, journey, lesson, meeting, parade, party, race, storm, trip, wedding"),
    "visit": _words("draw, explore, leave, paint, photograph, visit"),
    "hope": _words("decide, hope, plan, promise, refuse, want"),
    "manner": _words(
        "calmly, carefully, cheerfully, eagerly, finally, gladly, happily, nervously, patiently, proudly, quickly, "
        "quietly, secretly, silently, slowly"
    ),
    "past": _words(
        "after lunch, at dawn, at noon, before dinner, during the storm, last night, last summer, last week, "
        "this morning, two days ago, yesterday"
    ),
    "habit": _words(
        "after school, at night, before breakfast, each winter, every evening, every morning, every summer, in autumn, "
        "most weekends, on rainy days"
    ),
    "future": _words("after lunch, at noon, before sunset, in the evening, next summer, next week, tomorrow, tonight"),
    "downpour": _words("cold rain, heavy rain, icy sleet, light rain, loud hail, soft snow, wet snow"),
    "haze": _words("black smoke, deep snow, fine dust, grey mist, pale frost, thick fog"),
    "veil": _words("cover, surround, touch"),
    "gust": _words("chilly wind, cold breeze, fierce gale, sudden storm, violent thunderstorm, warm wind"),
    "blow": _words("blow, race, rush, sweep"),
    "shower": _words("drizzle, pour, rain, snow"),
}

PATTERNS = (
    "{who} {manner} {handle.past} {implement}",
    "{who} {handle.past} {implement} {past}",
    "{who} is {care.ing} {implement} {beside} the {spot}",
    "{they} will {handle} {implement} {future}",
    "{beast} {move.past} {through}",
    "{beast} {manner} {move.s} {through}",
    "{they} {move.past} {through} {past}",
    "{beasts} {rest} {where}",
    "{habit} {beasts} {rest} {beside} the {spot}",
    "{who} saw {beasts} {where}",
    "{habit} {who} {gather.s} {ripe} {crop.s}",
    "{they} {gather.past} {ripe} {crop.s} {where}",
    "{who} {manner} {dine.past} {taste} {dish}",
    "{they} are {dine.ing} {taste} {dish} {where}",
    "the {dish} tasted better than the {taste} {dish}",
    "there was a {colour} {thing} {beside} the {spot}",
    "please {put} the {wear} {tool} {beside} the {spot}",
    "the {colour} {thing} is {measure} than {whose} {tool}",
    "{who} {give.past} {whose} {relative} a {colour} {gift}",
    "{who} {give.s} the {person} a {gift} {habit}",
    "{downpour} {fall.past} on the {air} {building} {past}",
    "{haze} {veil.s} the {building} and the {area}",
    "a {gust} {blow.past} across the {air} {area}",
    "it was {shower.ing} when {who} {reach.past} the {building}",
    "the {colour} {vehicle} stopped {where} {past}",
    "the {vehicle} to the {building} leaves {future}",
    "{who} {hope.s} to {visit} the {building} {future}",
    "{they} {hope.past} to {visit} the {air} {building}",
    "{whose} {relative.s} {learn} {subject} {where}",
    "{habit} {who} {learn.s} {subject}",
    "{who} felt {mood} after the {event} {where}",
    "nobody remembers where {who} {lose.past} the {gift}",
    "{who} sings while {they} {dine} {dish}",
    "{beast} and {beast} {rest} {where}",
    "{beasts} {move} {manner}",
    "{beast} {move.past} {manner}",
    "{they} {learn} {subject}",
    "{who} {dine.past} {taste} {dish}",
    "please {care} the {wear} {tool}",
)

# What the rules of `_inflect` get wrong.
_IRREGULAR = {
    "blow.past": "blew",
    "bring.past": "brought",
    "buy.past": "bought",
    "creep.past": "crept",
    "deer.s": "deer",
    "draw.past": "drew",
    "eat.past": "ate",
    "fall.past": "fell",
    "give.past": "gave",
    "goose.s": "geese",
    "hide.past": "hid",
    "jog.past": "jogged",
    "lend.past": "lent",
    "lose.past": "lost",
    "mouse.s": "mice",
    "plan.past": "planned",
    "run.past": "ran",
    "sell.past": "sold",
    "send.past": "sent",
    "steal.past": "stole",
    "sweep.past": "swept",
    "teach.past": "taught",
    "trot.past": "trotted",
    "wolf.s": "wolves",
}


def compose(chance: random.Random) -> str:
    """A sentence of 4 to 10 words in a pattern drawn by `chance`; the same state gives the same sentence."""
    while True:
        sentence = fill(chance.choice(PATTERNS), chance)
        words = sentence.split()
        if SHORTEST <= len(words) <= LONGEST and not _stutters(words):
            return sentence


def fill(pattern: str, chance: random.Random) -> str:
    """The pattern with words drawn for its slots, and `an` for `a` before a vowel."""
    return re.sub(r"\ba (?=[aeiou])", "an ", _expand(pattern, chance))


def _expand(pattern: str, chance: random.Random) -> str:
    def choose(slot: re.Match[str]) -> str:
        name, form = slot.groups()
        word = _expand(chance.choice(SLOTS.get(name, (name,))), chance)  # a slot without a list is the word itself
        return _inflect(word, form) if form else word

    return _SLOT.sub(choose, pattern)


def _inflect(word: str, form: str) -> str:
    """A noun or verb with its `s`, or a verb's `past` or `ing` form."""
    if (known := _IRREGULAR.get(f"{word}.{form}")) is not None:
        return known
    after_consonant = word[-2] not in "aeiou"
    if form == "ing":
        return (word[:-1] if word.endswith("e") else word) + "ing"
    if word.endswith("y") and after_consonant:
        return word[:-1] + ("ies" if form == "s" else "ied")
    if form == "s":
        return word + ("es" if word.endswith(("s", "sh", "ch", "x", "to")) else "s")
    return word + ("d" if word.endswith("e") else "ed")


def _stutters(words: list[str]) -> bool:
    """Whether a word that carries meaning comes twice, in the singular or the plural."""
    stems = [word.rstrip("s") for word in words if word not in ("the", "a", "an", "to")]
    return len(set(stems)) < len(stems)
