"""Renders the table of settings in docs/retraining.md from `CycleSettings`, so that it cannot differ from the schema.

python -m scripts.training_docs            # rewrite the table
"""

from __future__ import annotations

from pathlib import Path

from redraft_training.settings_text import describe

PAGE = Path(__file__).parent.parent / "docs" / "retraining.md"
_HEADING = "\n## Settings\n"
_INTRODUCTION = """
<!-- Made by scripts/training_docs.py from draft_training/redraft_training/settings.py; edit there. -->

`redraft-train settings` prints them as a file for `--config`; `--set name=value` changes one; flags win.

| setting | default | meaning |
| --- | --- | --- |
"""


def render() -> str:
    """The page as it should be: everything before the settings is left as it is."""
    text = PAGE.read_text(encoding="utf-8").partition(_HEADING)[0]
    rows = [_row(setting.name, setting.default, setting.meaning) for setting in describe()]
    return text + _HEADING + _INTRODUCTION + "".join(rows)


def _row(name: str, default: str, meaning: str) -> str:
    cells = (f"`{name}`", f"`{default}`", meaning)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
