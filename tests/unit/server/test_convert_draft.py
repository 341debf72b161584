"""Drafts and splits between protobuf and plain data."""

from __future__ import annotations

import pytest

from redraft.v1 import draft_pb2 as pb
from redraft_server.rollout.view import DraftView, LiveState
from redraft_server.rpc.convert_draft import check_version, draft_to_pb, parse_split
from redraft_server.rpc.status import StatusError


def shares(*pairs: tuple[str, float]) -> list[pb.DraftShare]:
    return [pb.DraftShare(version=version, share=share) for version, share in pairs]


def test_every_state_has_its_name_in_the_api() -> None:
    for state in LiveState:
        assert draft_to_pb(DraftView("v", state, "t", "k")).state == getattr(pb, f"DRAFT_STATE_{state.value}")


def test_what_was_not_measured_is_not_set() -> None:
    bare = draft_to_pb(DraftView("v", LiveState.ACTIVE, "t", "k"))
    assert not bare.HasField("expected_acceptance")
    assert not bare.HasField("realised_acceptance")
    assert not bare.HasField("create_time")
    full = draft_to_pb(DraftView("v", LiveState.ACTIVE, "t", "k", "p", 1.5, 0.0, 0.25, 8, 0.5, "why"))
    assert full.HasField("expected_acceptance")
    assert (full.realised_acceptance, full.draft_tokens, full.share) == (0.25, 8, 0.5)
    assert (full.parent_version, full.refusal_reason) == ("p", "why")
    assert full.create_time.ToMilliseconds() == 1500


def test_a_split() -> None:
    assert parse_split(shares(("a", 0.9), ("b", 0.1))) == {"a": 0.9, "b": 0.1}
    assert parse_split(shares(*[(f"v{i}", 1 / 3) for i in range(3)])).keys() == {"v0", "v1", "v2"}


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ([], "shares"),
        (shares(*[(f"v{i}", 1 / 9) for i in range(9)]), "shares"),
        (shares(("a", 0.5), ("b", 0.4)), "shares"),
        (shares(("a", 0.5), ("a", 0.5)), "shares[1].version"),
        (shares(("a", 1.5), ("b", -0.5)), "shares[0].share"),
        (shares(("a", float("nan"))), "shares[0].share"),
        (shares(("", 1.0)), "shares[0].version"),
        (shares(("../x", 1.0)), "shares[0].version"),
    ],
)
def test_a_split_that_makes_no_sense(given: list[pb.DraftShare], field: str) -> None:
    with pytest.raises(StatusError) as caught:
        parse_split(given)
    assert f"{field}: " in caught.value.message


def test_versions() -> None:
    check_version("version", "20261124T172500Z-1a2b3c4d")
    for bad in ("", "a/b", "x" * 200, "..", "\n"):
        with pytest.raises(StatusError):
            check_version("version", bad)
