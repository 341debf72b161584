"""Seed topics of the cold start, by domain. Short noun phrases: each completes "The user asks about ..."."""

from __future__ import annotations

TOPICS: dict[str, tuple[str, ...]] = {
    "chat": (
        *("planning a weekend", "a gift for a colleague", "learning to cook", "sleeping better", "a difficult talk"),
        *("starting to run", "moving to another city", "a hobby for winter", "caring for house plants", "saving money"),
        *("a job interview", "naming a pet", "writing a speech", "getting along with neighbours", "travelling light"),
    ),
    "code": (
        *(
            "a Python function on lists",
            "a Python function on strings",
            "parsing a file in Python",
            "a recursive function",
        ),
        *("a JavaScript event handler", "a regular expression", "a unit test", "a bug in a loop", "sorting with a key"),
        *("a small class in Python", "reading JSON", "a shell script", "dates and times in code", "a hash map"),
    ),
    "math": (
        *("a word problem with prices", "a word problem with speeds", "percentages", "fractions", "an equation"),
        *("the area of a shape", "probability with dice", "averages", "ratios in a recipe", "a sequence of numbers"),
        *("counting combinations", "interest on savings", "unit conversion", "ages of two people", "sharing fairly"),
    ),
    "qa": (
        *("a country's geography", "a historical event", "an animal", "an invention", "the human body", "a planet"),
        *("a work of literature", "a musical instrument", "a chemical element", "a sport's rules", "a language"),
        *("how a machine works", "the weather", "a famous scientist", "a law of physics"),
    ),
    "summarize": (
        *("summarizing a short news report", "summarizing a product review", "summarizing an email thread"),
        *("summarizing meeting notes", "summarizing a scientific finding", "shortening a paragraph about a city"),
        *("the main point of a speech", "summarizing a story in one sentence", "key points of a policy"),
    ),
    "sql": (
        *("an SQL query on orders and customers", "an SQL query with a join", "an SQL query that counts by group"),
        *(
            "an SQL query on employees",
            "an SQL query for the latest row of each user",
            "an SQL query with a date range",
        ),
        *("an SQL query on products and stock", "an SQL query for duplicates", "an SQL query that ranks by sales"),
    ),
    "writing": (
        *("a short poem", "a polite email", "a product description", "the opening of a story", "a thank-you note"),
        *("rewriting a sentence more clearly", "a headline", "a dialogue between two friends", "a complaint letter"),
    ),
}
