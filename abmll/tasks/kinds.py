"""Kinds of short text that a reader tells apart at a glance: the material of the built-in tasks."""

from __future__ import annotations

from collections.abc import Callable
from random import Random


def _list(text: str) -> list[str]:
    """Words as one line of text: easier to read and to edit than a column of literals."""
    return text.split()


_ANIMALS = _list(
    "otter lion zebra horse rabbit wolf camel tiger sheep donkey mouse goat panda koala lemur bison moose "
    "hare whale seal badger beaver ferret gibbon"
)
_FRENCH = _list(
    "la maison est grande et belle mais le jardin reste petit nous avons deux chats qui dorment toujours sous "
    "une vieille table avec les enfants"
)
_GERMAN = _list(
    "das haus ist sehr klein und der garten auch wir haben zwei hunde die immer unter einem alten tisch "
    "schlafen mit den kindern"
)
_NAMES = _list("Anna Peter Maria John Laura David Emma Paul Julia Mark Sofia Daniel Clara Robert Nina Oscar")
_SURNAMES = _list("Miller Rossi Novak Smith Garcia Weber Johansson Brown Silva Dubois Kowalski Jensen Moreau Fischer")
_MONTHS = _list("January February March April May June July August September October November December")
_FOODS = _list("bread rice soup salad cheese butter pasta apples beans onions carrots pepper olives yoghurt honey eggs")
_ELEMENTS = _list("H C N O Na Mg Al Si S Cl K Ca Fe Cu Zn")
_VARIABLES = _list("x y total count name items index result value size")
_FUNCTIONS = _list("len sum open sorted print range load parse")
_PIECES = "NBRQK"
_FILES = _list("report photo notes budget song draft backup invoice")
_ENDINGS = _list("txt jpg pdf csv mp3 zip png")


def _words(words: list[str], count: int, separator: str = ", ") -> Callable[[Random], str]:
    return lambda rng: separator.join(rng.sample(words, count))


def _square(rng: Random) -> str:
    return rng.choice("abcdefgh") + str(rng.randint(1, 8))


def _code(rng: Random) -> str:
    return f"{rng.choice(_VARIABLES)} = {rng.choice(_FUNCTIONS)}({rng.choice(_VARIABLES)}, {rng.randint(0, 99)})"


# name of the kind -> a draw of it; each has more than a thousand different texts
KINDS: dict[str, Callable[[Random], str]] = {
    "numbers": lambda rng: " ".join(str(rng.randint(10, 999)) for _ in range(4)),
    "animals": _words(_ANIMALS, 4),
    "French": _words(_FRENCH, 6, " "),
    "German": _words(_GERMAN, 6, " "),
    "capitals": lambda rng: " ".join(rng.sample(_FOODS + _ANIMALS, 4)).upper(),
    "dates": lambda rng: f"{rng.randint(1, 28)} {rng.choice(_MONTHS)} {rng.randint(1700, 2030)}",
    "times": lambda rng: " ".join(f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}" for _ in range(3)),
    "emails": lambda rng: f"{rng.choice(_NAMES).lower()}{rng.randint(1, 99)}@{rng.choice(_SURNAMES).lower()}.com",
    "links": lambda rng: f"https://www.{rng.choice(_SURNAMES).lower()}.org/{rng.choice(_FILES)}/{rng.randint(1, 99)}",
    "prices": lambda rng: ", ".join(f"${rng.randint(1, 99)}.{rng.randint(0, 99):02d}" for _ in range(3)),
    "sums": lambda rng: (lambda a, b: f"{a} + {b} = {a + b}")(rng.randint(2, 400), rng.randint(2, 400)),
    "people": lambda rng: (
        f"{rng.choice(_NAMES)} {rng.choice(_SURNAMES)} and {rng.choice(_NAMES)} {rng.choice(_SURNAMES)}"
    ),
    "code": _code,
    "files": lambda rng: " ".join(f"{rng.choice(_FILES)}{rng.randint(1, 99)}.{rng.choice(_ENDINGS)}" for _ in range(2)),
    "chess": lambda rng: " ".join(f"{i}. {rng.choice(_PIECES)}{_square(rng)} {_square(rng)}" for i in range(1, 4)),
    "formulas": lambda rng: " + ".join(
        "".join(element + rng.choice(("", "2", "3")) for element in rng.sample(_ELEMENTS, 2)) for _ in range(3)
    ),
    "food": _words(_FOODS, 4),
    "codes": lambda rng: "-".join("".join(rng.choices("BDFGHKLMPRTVXZ0123456789", k=4)) for _ in range(3)),
}

# Labels that mean nothing: only a task's examples tell what they answer.
NONSENSE = _list(
    "dax wug blick toma plon sled drot fep gorp zub kiv mell nard quill runt teb vash yorn lunt sprok crint "
    "harl jeff ombo"
)
