"""Texts for the programs: drawn from word lists, the same every time, nothing downloaded."""

from __future__ import annotations

import random
from dataclasses import dataclass

__all__ = ["Material", "Person"]

_NAMES = [
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gita",
    "Hugo",
    "Iris",
    "Jon",
    "Kira",
    "Leo",
    "Mona",
    "Nils",
    "Olga",
    "Paul",
]
_TOWNS = [
    "Aarhus",
    "Bergen",
    "Cadiz",
    "Delft",
    "Essen",
    "Florence",
    "Ghent",
    "Haifa",
    "Izmir",
    "Jena",
    "Kyoto",
    "Lyon",
]
_TRADES = [
    "baker",
    "carpenter",
    "doctor",
    "farmer",
    "jeweller",
    "librarian",
    "nurse",
    "painter",
    "pilot",
    "tailor",
]
_THINGS = [
    "apples",
    "boxes",
    "candles",
    "drums",
    "eggs",
    "flutes",
    "globes",
    "hats",
    "keys",
    "lamps",
    "maps",
    "nets",
]
_VERBS = [
    "bought",
    "sold",
    "found",
    "lost",
    "made",
    "mended",
    "lent",
    "borrowed",
    "counted",
    "packed",
]
_TOPICS = (
    "a small garden", "a quiet library", "a night train", "a market hall", "a stone bridge",
    "a fishing boat", "a village school", "a mountain hut",
)  # fmt: skip
_CLAIMS = (
    "it costs less than people think", "it needs care every week", "it changes with the seasons",
    "it brings neighbours together", "it teaches patience", "it is easy to begin with little",
    "its history is longer than it seems", "it suffers when nobody is responsible",
    "it rewards those who plan ahead", "it works best when it stays simple",
)  # fmt: skip


@dataclass(frozen=True)
class Person:
    """Somebody to ask about."""

    name: str
    trade: str
    town: str
    age: int

    @property
    def sentence(self) -> str:
        return f"{self.name} is a {self.trade} of {self.age} years who lives in {self.town}."


class Material:
    """Draws texts.

    Args:
        seed: the same seed gives the same texts.
    """

    def __init__(self, seed: str) -> None:
        self._chance = random.Random(seed)

    def number(self, least: int = 2, most: int = 99) -> int:
        return self._chance.randint(least, most)

    def topic(self) -> str:
        return self._chance.choice(_TOPICS)

    def person(self) -> Person:
        draw = self._chance.choice
        return Person(draw(_NAMES), draw(_TRADES), draw(_TOWNS), self.number(20, 80))

    def paragraph(self, sentences: int) -> str:
        """About twelve tokens a sentence."""
        return " ".join(self._sentence() for _ in range(sentences))

    def _sentence(self) -> str:
        draw = self._chance.choice
        if self._chance.random() < 0.5:
            return (
                f"{draw(_NAMES)} {draw(_VERBS)} {self.number()} {draw(_THINGS)} in {draw(_TOWNS)}."
            )
        return f"About {draw(_TOPICS)} they say that {draw(_CLAIMS)}."

    def sum_question(self) -> tuple[str, str]:
        """A question, and its worked answer."""
        name, thing = self._chance.choice(_NAMES), self._chance.choice(_THINGS)
        have, more = self.number(), self.number()
        question = f"{name} has {have} {thing} and gets {more} more. How many {thing} are there?"
        return question, f"{have} and {more} make {have + more}. The answer is {have + more}."
