"""What a draft's directory holds beside its weights: `draft_config.json`, its provenance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from redraft.errors import ModelError

DRAFT_CONFIG = "draft_config.json"
_MAX_BYTES = 16 << 20


def write_provenance(directory: Path, provenance: dict[str, Any]) -> None:
    """Write `draft_config.json`."""
    (directory / DRAFT_CONFIG).write_text(json.dumps(provenance, indent=2) + "\n", encoding="utf-8")


def read_provenance(directory: Path) -> dict[str, Any]:
    """A draft's `draft_config.json`; empty for a checkpoint that has none. Raises `ModelError` for a damaged one."""
    path = directory / DRAFT_CONFIG
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ValueError("too large")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {type(error).__name__}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is damaged: expected an object")
    return content


def parameters(model: nn.Module) -> int:
    """Number of parameters; a tied one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
