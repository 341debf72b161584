"""The finished draft's directory."""

from __future__ import annotations

import shutil
from pathlib import Path

from safetensors import SafetensorError

from redraft.files import sync_directory
from redraft_training.distill.errors import CheckpointError
from redraft_training.student.student import Student


def write_draft(student: Student, directory: Path) -> None:
    """Write a complete draft checkpoint in place of whatever is at `directory`.

    A process killed in between leaves the old one, the new one, or none, but never half of one. Raises
    `CheckpointError` if it cannot be written.
    """
    temporary = directory.with_name(f".{directory.name}.new")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        student.save(temporary)
        if directory.exists():
            shutil.rmtree(directory)
        temporary.rename(directory)
        sync_directory(directory.parent)
    except (OSError, SafetensorError) as error:  # the latter is also what a full disk makes of saving weights
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot write the draft to {directory}: {reason}; the checkpoints are intact, "
            "so running it again only repeats this last step"
        ) from error
