"""What may become of CURRENT: pure functions of the current move."""

from __future__ import annotations

from types import EllipsisType

from redraft.registry.errors import CurrentChanged, Pinned
from redraft.registry.pointer import Current, Wanted


def on_publish(current: Current | None, version: str, expected: str | EllipsisType | None) -> Wanted | None:
    """The move that publishing `version` wants; None if it was made before, and perhaps superseded since."""
    if current is not None and (current.version == version or version in current.history):
        return None
    check_expected(current, expected)
    check_not_pinned(current)
    proven = None if current is None else current.proven or current.version
    return Wanted(version, history_after(current, version), pinned=False, reason="published", proven=proven)


def history_after(current: Current | None, version: str) -> tuple[str, ...]:
    """The earlier drafts once `version` becomes current; each at most once, so no roll-back goes in circles."""
    if current is None:
        return ()
    return tuple(earlier for earlier in (*current.history, current.version) if earlier != version)


def check_expected(current: Current | None, expected: str | EllipsisType | None) -> None:
    """Raise `CurrentChanged` unless `expected` is current: a version, None for none, `...` for anything."""
    found = current.version if current is not None else None
    if expected is not ... and found != expected:
        raise CurrentChanged(f"the current draft is {found or 'none'}, not {expected or 'none'}: look again")


def check_not_pinned(current: Current | None) -> None:
    """Raise `Pinned` if CURRENT is pinned."""
    if current is not None and current.pinned:
        raise Pinned(f"the registry is pinned to draft {current.version}: unpin it first")
