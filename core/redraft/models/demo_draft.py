"""The draft for the demo target that comes with this package: its layers as package data, the rest is the target's."""

from __future__ import annotations

from pathlib import Path

from redraft.errors import ModelNotFound
from redraft.files import sha256_file
from redraft.models.cache import Progress, cache_directory, exclusive_lock, stderr_progress
from redraft.models.delta import unpack_delta
from redraft.models.demo import demo_directory

DEMO_DRAFT_NAME = "demo-draft"
DEMO_DRAFT_FILE = Path(__file__).with_name("data") / "demo-draft.safetensors"
# Part of the cache key: raise it whenever unpacking's result changes.
_UNPACK_VERSION = 1


def demo_draft_directory(
    *, cache_dir: Path | None = None, progress: Progress = stderr_progress
) -> tuple[Path, str, str]:
    """The packaged draft as a checkpoint directory, with its name and revision (the packed weights' SHA-256).

    The first call puts it together from the demo target, in the cache; later calls find it there. Safe from several
    processes at once. Raises `ModelNotFound` if the draft is not part of this build, `ChecksumMismatch` if it does not
    belong to this target, and whatever `demo_directory` raises.
    """
    if not DEMO_DRAFT_FILE.is_file():
        raise ModelNotFound(
            "demo-draft is not part of this build; make one with "
            "redraft-train init --target demo --num-layers 4 --output drafts/first"
        )
    root = cache_dir or cache_directory()
    digest = sha256_file(DEMO_DRAFT_FILE)
    directory = root / "demo" / f"{DEMO_DRAFT_NAME}-{digest[:12]}-v{_UNPACK_VERSION}"
    if directory.is_dir():
        return directory, DEMO_DRAFT_NAME, digest
    target, _, _ = demo_directory(cache_dir=root, progress=progress)
    with exclusive_lock(directory.with_name(f".{directory.name}.lock")):
        if not directory.is_dir():
            progress("Unpacking the draft of the demo model (once)")
            unpack_delta(DEMO_DRAFT_FILE, target, directory)
    return directory, DEMO_DRAFT_NAME, digest
