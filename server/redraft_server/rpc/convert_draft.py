"""Drafts between protobuf and plain data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from redraft.registry.names import MAX_VERSION_LENGTH, is_version
from redraft.v1 import draft_pb2 as pb
from redraft_server.rpc.status import FieldViolation, invalid_argument

if TYPE_CHECKING:  # the rollout brings torch
    from redraft_server.rollout.view import DraftView

MAX_SHARES = 8
_TOLERANCE = 1e-6


def draft_to_pb(view: DraftView) -> pb.Draft:
    draft = pb.Draft(
        version=view.version,
        parent_version=view.parent_version,
        state=f"DRAFT_STATE_{view.state.value}",
        target_fingerprint=view.target_fingerprint,
        tokenizer_fingerprint=view.tokenizer_fingerprint,
        expected_acceptance=view.expected_acceptance,
        realised_acceptance=view.realised_acceptance,
        draft_tokens=view.draft_tokens,
        share=view.share,
        refusal_reason=view.reason,
    )
    if view.created_unix_s is not None:
        draft.create_time.FromMicroseconds(round(view.created_unix_s * 1e6))
    return draft


def check_version(path: str, version: str) -> None:
    """Raise INVALID_ARGUMENT unless it can be the version of a draft."""
    if not version:
        raise invalid_argument([FieldViolation(path, "is required")])
    if not is_version(version):
        rule = f"must be at most {MAX_VERSION_LENGTH} characters out of A-Z a-z 0-9 . _ -"
        raise invalid_argument([FieldViolation(path, rule)])


def parse_split(shares: Iterable[pb.DraftShare]) -> dict[str, float]:
    """Shares by version; each 0 to 1, together 1. Raises INVALID_ARGUMENT."""
    given = list(shares)
    if not 1 <= len(given) <= MAX_SHARES:
        raise invalid_argument([FieldViolation("shares", f"must be 1 to {MAX_SHARES} shares")])
    found: dict[str, float] = {}
    for index, share in enumerate(given):
        path = f"shares[{index}]"
        check_version(f"{path}.version", share.version)
        if share.version in found:
            raise invalid_argument([FieldViolation(f"{path}.version", "is given twice")])
        if not 0.0 <= share.share <= 1.0:  # NaN is neither
            raise invalid_argument([FieldViolation(f"{path}.share", "must be between 0 and 1")])
        found[share.version] = share.share
    total = math.fsum(found.values())
    if abs(total - 1.0) > _TOLERANCE:
        raise invalid_argument([FieldViolation("shares", f"must add up to 1, not {total:g}")])
    return found
