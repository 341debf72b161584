"""Prompts for the benchmarks: the evaluation lines of a folder of JSONL files, or a few of our own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from redraft.models.tokenizer import Tokenizer

_REPOSITORY = Path(__file__).resolve().parent.parent
DEFAULT_DATA = Path("..", "shared", "data")  # relative to the repository
_EXCLUDED = frozenset({"spec_bench"})  # long prompts, two turns: a benchmark of its own

DataOption = Annotated[
    Path | None,
    typer.Option("--data", help=f"Folder of <domain>.jsonl files. Default: {DEFAULT_DATA} if there, else built in."),
]


@dataclass(frozen=True, slots=True)
class BenchmarkPrompt:
    """A user message, with the application's own system message where it has one.

    `category`: of a benchmark's prompt, what kind it is there.
    """

    id: str
    text: str
    system: str | None = None
    category: str = ""

    def token_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Rendered with the model's chat template, the assistant's turn opened."""
        messages = [{"role": "user", "content": self.text}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        return tuple(tokenizer.apply_chat_template(messages))


@dataclass(frozen=True, slots=True)
class PromptSet:
    prompts: tuple[BenchmarkPrompt, ...]
    source: str  # a phrase for the report


BUILT_IN = tuple(
    BenchmarkPrompt(f"built-in-{number}", text)
    for number, text in enumerate(
        (
            "What is the capital of France, and what is it known for?",
            "Explain in simple words why the sky is blue.",
            "A shop sells pens at 3 dollars each and books at 12 dollars each. Tom buys 4 pens and 2 books and pays "
            "with a 50 dollar note. How much change does he get? Think step by step.",
            "Write a Python function that returns the n-th Fibonacci number, with a docstring.",
            "Turn this list into one JSON array of objects with the keys name and city: "
            "Anna Berg, Oslo; Paul Klein, Vienna; Maria Rossi, Milan; Jean Dupont, Lyon.",
            "Correct the spelling and repeat the text: 'The comitee has recieved your aplication and will anounce its "
            "desicion next wendesday.'",
            "Summarize in one sentence: Bees visit flowers to collect nectar. While they do so, pollen sticks to their "
            "bodies and is carried to the next flower, which is how many plants reproduce.",
            "Translate to German: Good morning, I would like a cup of coffee and a sandwich, please.",
        ),
        start=1,
    )
)


def load_prompts(data: Path | None, count: int) -> PromptSet:
    """`count` prompts, spread evenly over the domains; the same ones on every call.

    Raises:
        typer.BadParameter: `data` was given and holds no prompts, or there are fewer than `count`.
    """
    folder = _REPOSITORY / DEFAULT_DATA if data is None else data
    files = sorted(file for file in folder.glob("*.jsonl") if file.stem not in _EXCLUDED)
    if not files:
        if data is not None:
            raise typer.BadParameter(f"{data} holds no .jsonl files", param_hint="--data")
        return PromptSet(_spread(BUILT_IN, count), "built-in prompts")
    per_domain = -(-count // len(files))
    domains = [list(itertools.islice(_evaluation_lines(file), per_domain)) for file in files]
    chosen = _spread([prompt for row in zip(*domains, strict=False) for prompt in row], count)
    used = len({prompt.id.rsplit("-", 1)[0] for prompt in chosen})
    return PromptSet(chosen, f"evaluation prompts of {used} domains")


def load_domain(data: Path | None, domain: str, count: int) -> tuple[BenchmarkPrompt, ...]:
    """At most `count` evaluation prompts of one domain, the same ones on every call; of a benchmark, whose lines are
    in order of category, spread over all of it. Without a folder of domains: the built-in ones.

    Raises:
        typer.BadParameter: the folder does not have this domain.
    """
    if data is None and not has_data(data):
        return _spread(BUILT_IN, min(count, len(BUILT_IN)))
    file = (_REPOSITORY / DEFAULT_DATA if data is None else data) / f"{domain}.jsonl"
    if not file.is_file():
        raise typer.BadParameter(f"there is no {file.name} in {file.parent}", param_hint="--domains")
    lines = list(_evaluation_lines(file))
    return _spread(lines, min(count, len(lines))) if domain in _EXCLUDED else tuple(lines[:count])


def load_mixed(data: Path | None, count: int) -> tuple[BenchmarkPrompt, ...]:
    """`count` prompts of all domains; the built-in ones come again if there are no others."""
    distinct = count if has_data(data) else min(count, len(BUILT_IN))
    return tuple(itertools.islice(itertools.cycle(load_prompts(data, distinct).prompts), count))


def has_data(data: Path | None) -> bool:
    """Whether there is a folder of domains."""
    return any((_REPOSITORY / DEFAULT_DATA if data is None else data).glob("*.jsonl"))


def _spread(prompts: tuple[BenchmarkPrompt, ...] | list[BenchmarkPrompt], count: int) -> tuple[BenchmarkPrompt, ...]:
    if count > len(prompts):
        raise typer.BadParameter(f"there are only {len(prompts)} prompts", param_hint="--prompts")
    return tuple(prompts[index * len(prompts) // count] for index in range(count))


def _evaluation_lines(file: Path) -> Iterator[BenchmarkPrompt]:
    """Prompts whose id is `<domain>-e...`, or all of a benchmark's: what no draft may be trained on."""
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            entry = json.loads(line)
            if file.stem in _EXCLUDED or entry["id"].startswith(f"{file.stem}-e"):
                yield BenchmarkPrompt(entry["id"], entry["prompt"], entry.get("system"), entry.get("category", ""))
