"""Pages in `benchmarks/results`: every one says what it was measured on, when, and by which command."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path("benchmarks", "results")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column is text, the others numbers."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def write_page(path: Path, title: str, machine: str, parts: Sequence[str]) -> None:
    """Write the page; `parts` are Markdown blocks below the standard head."""
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    head = f"# {title}\n\n{today}. {machine}\n\n```\n{command()}\n```"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join([head, *parts]) + "\n", encoding="utf-8")


def command() -> str:
    """The running command as one would type it; absolute paths lose their folders."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    name = "benchmarks" if module is None else module.name.removesuffix(".__main__")
    shown = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return shlex.join(["python", "-m", name, *shown])
