"""Prompts of two applications for the demo: questions to SQL, and a bank's help desk.

Built from templates, so the demo needs no data of anyone's; every prompt is different, and the two domains have little
in common. `prompts(domain, part, count)` gives the same ones on every call.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Literal

Domain = Literal["sql", "support"]
Part = Literal["traffic", "evaluation"]

_EVALUATION_SHARE = 0.15  # of all combinations; never sent as traffic

_SYSTEM: dict[Domain, str] = {
    "sql": "Translate the question into one SQL query for the table. Answer with the query only.",
    "support": "You are the help desk of a bank. Answer the customer in two short sentences.",
}

# table: its columns, the first of which is a text to ask for
_TABLES = {
    "employees": ("name", "city", "salary", "department"),
    "products": ("title", "category", "price", "stock"),
    "flights": ("airline", "origin", "destination", "delay"),
    "books": ("title", "author", "year", "pages"),
    "patients": ("name", "ward", "age", "doctor"),
    "orders": ("customer", "country", "total", "status"),
    "films": ("title", "director", "year", "rating"),
    "players": ("name", "team", "goals", "position"),
    "hotels": ("name", "town", "stars", "rooms"),
    "courses": ("title", "teacher", "credits", "semester"),
}
_QUESTIONS = (
    "List the {0} of all {table}.",
    "Which {table} have the highest {2}?",
    "How many {table} are there for each {1}?",
    "What is the average {2} by {1}?",
    "Show {0} and {2} of the {table} whose {2} is more than {number}.",
    "Show {0} and {3}, ordered by {2} from high to low.",
    "How many different values of {1} do the {table} have?",
    "List the {0} where {1} is '{value}'.",
    "What is the total {2} of {table} with {1} '{value}'?",
    "Find the three {table} with the lowest {2}.",
)
_NUMBERS = ("10", "25", "50", "100")
_VALUES = ("Oslo", "Berlin", "Miller", "North", "Blue", "Green")

_WISHES = (
    "I lost my {thing}. What should I do?",
    "How do I activate my new {thing}?",
    "Why was my {thing} declined {place}?",
    "Can I change the PIN of my {thing} {place}?",
    "How long does it take until my {thing} arrives?",
    "I see a payment {place} on my {thing} that I did not make.",
    "What does it cost to use my {thing} {place}?",
    "Please tell me how to block my {thing}.",
    "How can I raise the limit of my {thing}?",
    "My {thing} does not work {place}. Can you help me?",
    "How do I link my {thing} to the app?",
    "Where can I see the statements of my {thing}?",
)
_THINGS = ("card", "credit card", "debit card", "virtual card", "savings account", "joint account", "travel card")
_PLACES = ("abroad", "in the app", "at an ATM", "in a shop", "online", "at the airport", "in a restaurant")


@dataclass(frozen=True, slots=True)
class DemoPrompt:
    """`id` is unique over both domains and parts."""

    id: str
    domain: Domain
    system: str
    text: str


def prompts(domain: Domain, part: Part, count: int) -> list[DemoPrompt]:
    """The first `count` prompts of one part, in a fixed random order; the parts share no prompt.

    Raises ValueError if there are fewer.
    """
    texts = sorted(set(_sql() if domain == "sql" else _support()))
    random.Random(f"redraft-demo-{domain}").shuffle(texts)
    cut = round(_EVALUATION_SHARE * len(texts))
    chosen = texts[:cut] if part == "evaluation" else texts[cut:]
    if count > len(chosen):
        raise ValueError(f"there are {len(chosen)} {part} prompts of {domain}, not {count}")
    return [
        DemoPrompt(f"{domain}-{part}-{index:04d}", domain, _SYSTEM[domain], text)
        for index, text in enumerate(chosen[:count])
    ]


def _sql() -> list[str]:
    return [
        f"Table {table}({', '.join(columns)}). {question.format(*columns, table=table, number=number, value=value)}"
        for (table, columns), question, number, value in itertools.product(
            _TABLES.items(), _QUESTIONS, _NUMBERS, _VALUES
        )
    ]


def _support() -> list[str]:
    return [
        wish.format(thing=thing, place=place) for wish, thing, place in itertools.product(_WISHES, _THINGS, _PLACES)
    ]
