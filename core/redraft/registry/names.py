"""Names in a registry: versions, the files that a draft may hold, and where each thing lies.

registry.json                          what this is, and the schema version
CURRENT                                a copy of the last move, for people
moves/0000000042.json                  each move of CURRENT; the highest number is the truth
drafts/20261124T172500Z-1a2b3c4d/      config.json, model.safetensors, tokenizer.json, ...
    status.json                        published, rolled back, retired
    manifest.json                      written last: without it there is no draft
refused/20261124T181200Z-9f8e7d6c/     the same, of a draft that did not pass the gate
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import PurePosixPath

MARKER = "registry.json"
CURRENT = "CURRENT"
MOVES = "moves"
DRAFTS = "drafts"
REFUSED = "refused"
MANIFEST = "manifest.json"
STATUS = "status.json"
TEMPORARY_SUFFIX = ".tmp"

MAX_VERSION_LENGTH = 80
SUFFIXES = (
    *(".safetensors", ".json", ".jsonl", ".jinja", ".txt", ".model", ".tiktoken"),  # a checkpoint
    *(".md", ".html", ".png", ".csv", ".yaml"),  # a model card and the report of the evaluation
)
"""Of the files that a draft may hold. Neither pickles nor code are among them."""

_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_MOVE = re.compile(r"(\d{10})\.json")


def new_version(digests: Mapping[str, str], unix_s: float) -> str:
    """A version for files with these SHA-256 digests: the time in UTC, then 8 hex digits of the contents.

    Sorts by time; the same contents at the same second give the same version.

    >>> new_version({"model.safetensors": "00"}, 1_795_541_100.0)
    '20261124T172500Z-c2b829cf'
    """
    content = "".join(f"{name}\0{digest}\n" for name, digest in sorted(digests.items()))
    now = datetime.fromtimestamp(int(unix_s), UTC)
    return f"{now:%Y%m%dT%H%M%SZ}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"


def is_version(name: str) -> bool:
    """Whether a version may be called so: it is also the name of a directory."""
    return len(name) <= MAX_VERSION_LENGTH and _VERSION.fullmatch(name) is not None


def is_safe_file_name(name: str) -> bool:
    """Whether a draft may hold a file of this name: no directory, nothing hidden, a suffix from `SUFFIXES`."""
    if name in (MANIFEST, STATUS) or _FILE_NAME.fullmatch(name) is None:
        return False
    return PurePosixPath(name).suffix in SUFFIXES


def move_name(generation: int) -> str:
    """Where the record of a move of CURRENT lies."""
    return f"{MOVES}/{generation:010d}.json"


def move_generation(name: str) -> int | None:
    """The number of a move from its path under the root; None for any other file."""
    match = _MOVE.fullmatch(name.removeprefix(f"{MOVES}/"))
    return int(match[1]) if match else None
