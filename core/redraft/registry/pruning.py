"""Deletes old drafts without ever taking one from under CURRENT, however many processes move it meanwhile."""

from __future__ import annotations

from collections.abc import Iterable

from redraft.registry.drafts import DraftFiles, published
from redraft.registry.manifest import DraftEntry, DraftState, DraftStatus
from redraft.registry.names import DRAFTS, MANIFEST, REFUSED, TEMPORARY_SUFFIX
from redraft.registry.pointer import Current, Pointer, Wanted
from redraft.registry.storage import Storage

LEFTOVER_AGE_S = 24 * 3600.0
"""Anything unfinished that is younger may belong to a process that is still at it."""


def prune(storage: Storage, drafts: DraftFiles, pointer: Pointer, keep: int, now_unix_s: float) -> tuple[str, ...]:
    """Delete all but the newest `keep` drafts of each area; return the deleted versions, oldest first."""
    deleted = [*_prune_published(drafts, pointer, keep, now_unix_s)]
    for entry in _old(drafts.read_all(REFUSED), keep):
        drafts.delete(REFUSED, entry.version)
        deleted.append(entry.version)
    _sweep(storage, drafts, now_unix_s)
    pointer.trim()
    return tuple(deleted)


def _prune_published(drafts: DraftFiles, pointer: Pointer, keep: int, now_unix_s: float) -> list[str]:
    """Retire, fence, delete.

    Whoever activates a draft reads its state between reading CURRENT and moving it. So once the drafts are
    retired and CURRENT has moved by one (to where it was: the fence), an activation that missed the retirement
    has either won before the fence, and its draft is spared, or has lost its race and looks again.
    """
    protected = _protected(pointer.read())
    doomed = [entry for entry in _old(drafts.read_all(DRAFTS), keep) if entry.version not in protected]
    if not doomed:
        return []
    for entry in doomed:
        if entry.state is not DraftState.RETIRED:
            drafts.write_status(DRAFTS, entry.version, _retired(entry, now_unix_s))
    protected = _protected(pointer.move(_fence))
    deleted = []
    for entry in doomed:
        if entry.version in protected:
            drafts.write_status(DRAFTS, entry.version, published(now_unix_s))
        else:
            drafts.delete(DRAFTS, entry.version)
            deleted.append(entry.version)
    return deleted


def _fence(current: Current | None) -> Wanted | None:
    if current is None:
        return None
    return Wanted(current.version, current.history, current.pinned, "pruned", current.proven)


def _protected(current: Current | None) -> set[str]:
    return set() if current is None else {current.version, *current.history[-1:], current.proven or current.version}


def _retired(entry: DraftEntry, now_unix_s: float) -> DraftStatus:
    return DraftStatus(state=DraftState.RETIRED, reason=entry.reason, updated_unix_s=now_unix_s)


def _old(entries: Iterable[DraftEntry], keep: int) -> list[DraftEntry]:
    """All but the newest `keep`, oldest first."""
    by_age = sorted(entries, key=lambda entry: (entry.manifest.created_unix_s, entry.version))
    return by_age[: max(len(by_age) - keep, 0)]


def _sweep(storage: Storage, drafts: DraftFiles, now_unix_s: float) -> None:
    """Delete temporary files, and drafts that never got their manifest, if nobody has touched them for a day."""

    def is_old(name: str) -> bool:
        try:
            modified = storage.modified_unix_s(name)
        except FileNotFoundError:
            return False
        return modified is not None and modified < now_unix_s - LEFTOVER_AGE_S

    names = storage.list()
    drafts.delete_files(name for name in names if name.endswith(TEMPORARY_SUFFIX) and is_old(name))
    for area in (DRAFTS, REFUSED):
        by_version: dict[str, list[str]] = {}
        for name in names:
            parts = name.split("/")
            if parts[0] == area and len(parts) == 3:
                by_version.setdefault(parts[1], []).append(name)
        for version, files in by_version.items():
            if f"{area}/{version}/{MANIFEST}" not in files and all(is_old(name) for name in files):
                drafts.delete_files(files)
                storage.delete_empty_directory(f"{area}/{version}")
