"""Prompts for tests on the demo model: real ones where the shared data sets are at hand, else these."""

from __future__ import annotations

import json
from pathlib import Path

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
_DOMAINS = ("chat", "code", "math", "qa", "summarize", "sql")

HAND_WRITTEN = (
    "What is the capital of Norway, and why do people visit it?",
    "Write a Python function that tells whether a word is a palindrome.",
    "Tom has 3 boxes of 12 pencils. He gives away 7 pencils. How many are left? Think step by step.",
    "Who wrote the first computer program?",
    "Summarize in one sentence: The city closed the old bridge in March. Inspectors had found rust in two of its "
    "cables. A ferry carries people across the river until the repair ends in autumn.",
    "Write an SQL query that counts the orders of each customer in the table orders(id, customer_id, total).",
)


def demo_prompts(count: int = 6) -> tuple[str, ...]:
    """`count` user messages, one from each domain in turn."""
    files = [SHARED_DATA / f"{domain}.jsonl" for domain in _DOMAINS]
    if not all(file.is_file() for file in files):
        return tuple(HAND_WRITTEN[index % len(HAND_WRITTEN)] for index in range(count))
    lines = [file.read_text(encoding="utf-8").splitlines() for file in files]
    return tuple(json.loads(lines[i % len(lines)][i // len(lines)])["prompt"] for i in range(count))
