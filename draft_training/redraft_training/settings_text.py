"""Every setting with its default and its meaning, in words: for the terminal and the documentation."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from redraft_training.settings import CycleSettings


@dataclass(frozen=True, slots=True)
class Setting:
    """`default` as YAML (which JSON is)."""

    name: str
    default: str
    meaning: str


def describe() -> list[Setting]:
    """Every setting, by its dotted name, in order."""
    return [
        Setting(".".join(path), json.dumps(value), meaning)
        for path, value, meaning in _walk(CycleSettings(), ())
        if not is_group(value)
    ]


def as_yaml() -> str:
    """The defaults as a commented file for --config."""
    lines: list[str] = []
    for path, value, meaning in _walk(CycleSettings(), ()):
        margin = "  " * (len(path) - 1)
        lines += [""] if is_group(value) and len(path) == 1 else []
        lines += textwrap.wrap(meaning, 116, initial_indent=f"{margin}# ", subsequent_indent=f"{margin}# ")
        lines.append(f"{margin}{path[-1]}:" + ("" if is_group(value) else f" {json.dumps(value)}"))
    return "\n".join(lines) + "\n"


def is_group(value: Any) -> bool:
    """Whether it is settings, and not one."""
    return isinstance(value, BaseModel) or is_dataclass(value)


def _walk(settings: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any, str]]:
    """(path, default, meaning) of every setting and every group, a group before what is in it."""
    for name, meaning in _meanings(settings).items():
        value = getattr(settings, name)
        yield (*path, name), (str(value) if isinstance(value, Path) else value), " ".join(meaning.split())
        if is_group(value):
            yield from _walk(value, (*path, name))


def _meanings(settings: Any) -> dict[str, str]:
    if isinstance(settings, BaseModel):
        return {name: field.description or "" for name, field in type(settings).model_fields.items()}
    return {field.name: _docstrings(type(settings)).get(field.name, "") for field in fields(settings)}


def _docstrings(cls: type) -> dict[str, str]:
    """The string below each attribute of a class."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        statement.target.id: text.value.value
        for statement, text in zip(body.body, body.body[1:], strict=False)
        if isinstance(statement, ast.AnnAssign)
        and isinstance(statement.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }
