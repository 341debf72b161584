"""What a draft directory holds: checked by name, then hashed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from redraft.files import sha256_file
from redraft.registry.errors import CorruptDraft, UnsafeDraft
from redraft.registry.manifest import MAX_FILES, FileRecord
from redraft.registry.names import SUFFIXES, is_safe_file_name

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".msgpack", ".h5", ".npy", ".npz")


def describe_directory(directory: Path) -> dict[str, FileRecord]:
    """Size and SHA-256 of each file of a draft directory, by name; hidden files do not count.

    Raises `UnsafeDraft` for a file that a registry does not hold (a pickle, code, a directory), `CorruptDraft`
    if this is no checkpoint directory: a draft has a config.json and its weights as safetensors.
    """
    names = _checked_names(directory)
    return {name: FileRecord(sha256=sha256_file(path), bytes=path.stat().st_size) for name, path in names.items()}


def check_directory(directory: Path, expected: Mapping[str, FileRecord]) -> None:
    """Raise `CorruptDraft` unless the directory holds exactly these files with exactly these contents."""
    found = describe_directory(directory)
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    changed = sorted(name for name in expected.keys() & found.keys() if expected[name] != found[name])
    for what, names in (("misses", missing), ("also holds", unknown), ("holds another version of", changed)):
        if names:
            raise CorruptDraft(f"the directory of the draft {what} {names[0]}, by its manifest: describe it anew")


def _checked_names(directory: Path) -> dict[str, Path]:
    if not directory.is_dir():
        raise CorruptDraft(f"there is no draft directory {directory}")
    paths = [path for path in sorted(directory.iterdir()) if not path.name.startswith(".")]
    if len(paths) > MAX_FILES:
        raise CorruptDraft(f"{directory} holds more than {MAX_FILES} files")
    for path in paths:
        reason = _objection(path)
        if reason:
            raise UnsafeDraft(f"a draft cannot hold {path.name!r}: {reason}")
    names = {path.name: path for path in paths}
    if "config.json" not in names:
        raise CorruptDraft(f"{directory} is not a model directory: it has no config.json")
    if not any(name.endswith(".safetensors") for name in names):
        raise CorruptDraft(f"{directory} holds no weights: expected *.safetensors")
    return names


def _objection(path: Path) -> str | None:
    suffix = PurePosixPath(path.name).suffix.lower()
    if suffix in _PICKLES:
        return "it may be a pickle, which can run code when read; save the weights as safetensors"
    if not path.is_file():
        return "it is not a plain file"
    if not is_safe_file_name(path.name):
        return f"a registry takes plain names ending in {', '.join(SUFFIXES)}, except manifest.json and status.json"
    return None
