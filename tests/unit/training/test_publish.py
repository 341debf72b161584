"""From the gate's decision to the registry, interrupted anywhere."""

from __future__ import annotations

import math
import secrets
from dataclasses import replace
from pathlib import Path

import pytest

from redraft.registry.errors import CorruptDraft, CurrentChanged, RegistryUnavailable, UnsafeDraft
from redraft.registry.manifest import DraftState
from redraft.registry.store import DraftRegistry
from redraft_training.gate import GateDecision
from redraft_training.publish import DraftFacts, Outcome, Publication, build_manifest, publish_draft
from tests.unit.registry.fakes import EVALUATION, TARGET, TOKENIZER, Killed, intercept, make_draft

YES = GateDecision(True, ("better",))
NO = GateDecision(False, ("domain sql loses 0.03", "only 10 held-out positions"))
FACTS = DraftFacts(
    created_unix_s=1_795_541_100.0,
    target_name="demo",
    target_fingerprint=TARGET,
    tokenizer_fingerprint=TOKENIZER,
    num_parameters=1000,
    training={"tokens": 12, "git": "abc"},
)


@pytest.fixture
def url() -> str:
    return f"memory://registry-{secrets.token_hex(8)}"


@pytest.fixture
def registry(url: str) -> DraftRegistry:
    return DraftRegistry(url)


@pytest.fixture
def draft(tmp_path: Path) -> Path:
    return make_draft(tmp_path / "draft")


def better_than(version: str, **changes: object) -> DraftFacts:
    evaluation = EVALUATION.model_copy(update={"baseline_version": version})
    return replace(FACTS, created_unix_s=1_795_544_700.0, parent_version=version, evaluation=evaluation, **changes)


def test_the_manifest_says_what_the_run_knows(draft: Path) -> None:
    facts = better_than("v0", draft_vocab_size=8)
    manifest = build_manifest(draft, facts)
    assert manifest == build_manifest(draft, facts)
    assert manifest.version.startswith("20261124T182500Z-")
    assert (manifest.parent_version, manifest.draft_vocab_size, manifest.evaluation) == ("v0", 8, facts.evaluation)
    assert manifest.training == {"tokens": 12, "git": "abc"}
    (draft / "model.safetensors").write_bytes(b"other")
    assert build_manifest(draft, facts).version != manifest.version


def test_the_first_draft_then_a_better_one(registry: DraftRegistry, draft: Path, tmp_path: Path) -> None:
    first = publish_draft(draft, registry, FACTS, YES)
    assert (first.outcome, first.reason, first.not_current_because) == (Outcome.PUBLISHED, "better", None)
    second = publish_draft(make_draft(tmp_path / "b", "b"), registry, better_than(first.manifest.version), YES)
    current = registry.current()
    assert current is not None
    assert (current.version, current.previous) == (second.manifest.version, first.manifest.version)
    assert registry.verify(current.version) == second.manifest


def test_refused_is_kept_with_every_reason_and_does_not_serve(registry: DraftRegistry, draft: Path) -> None:
    (draft / "report.html").write_text("<p>worse</p>", encoding="utf-8")
    results = [publish_draft(draft, registry, FACTS, NO) for _ in range(2)]
    assert results[0] == results[1]
    assert results[0].outcome is Outcome.REFUSED
    entry = registry.get(results[0].manifest.version)
    assert (entry.state, entry.reason) == (DraftState.REFUSED, "domain sql loses 0.03; only 10 held-out positions")
    assert "report.html" in entry.manifest.files
    assert registry.current() is None


def test_refused_without_weights(registry: DraftRegistry, draft: Path) -> None:
    publication = publish_draft(draft, registry, FACTS, NO, keep_refused_weights=False)
    assert "model.safetensors" not in publication.manifest.files
    assert registry.verify(publication.manifest.version) == publication.manifest


def test_compared_with_a_draft_that_serves_no_longer(registry: DraftRegistry, draft: Path, tmp_path: Path) -> None:
    first = publish_draft(draft, registry, FACTS, YES).manifest.version
    facts = better_than(first)
    publish_draft(make_draft(tmp_path / "b", "b"), registry, facts, YES)
    late = make_draft(tmp_path / "c", "c")
    for _ in range(2):
        with pytest.raises(CurrentChanged, match="look again"):
            publish_draft(late, registry, facts, YES)
    assert registry.get(build_manifest(late, facts).version).state is DraftState.PUBLISHED


def test_pinned_is_published_but_not_current(registry: DraftRegistry, draft: Path, tmp_path: Path) -> None:
    first = publish_draft(draft, registry, FACTS, YES).manifest.version
    registry.pin()
    publication = publish_draft(make_draft(tmp_path / "b", "b"), registry, better_than(first), YES)
    assert publication.outcome is Outcome.PUBLISHED
    assert publication.not_current_because is not None
    assert "unpin" in publication.not_current_because
    current = registry.current()
    assert current is not None
    assert current.version == first


def test_rolled_back_before_the_run_was_resumed(registry: DraftRegistry, draft: Path, tmp_path: Path) -> None:
    first = publish_draft(draft, registry, FACTS, YES).manifest.version
    arguments = (make_draft(tmp_path / "b", "b"), registry, better_than(first), YES)
    publish_draft(*arguments)
    registry.rollback(reason="degraded")
    resumed = publish_draft(*arguments)
    assert resumed.outcome is Outcome.PUBLISHED
    assert resumed.not_current_because is not None
    assert "rolled back" in resumed.not_current_because
    current = registry.current()
    assert current is not None
    assert current.version == first


@pytest.mark.parametrize("decision", [YES, NO], ids=["published", "refused"])
def test_interrupted_at_each_request_it_ends_the_same(draft: Path, tmp_path: Path, decision: GateDecision) -> None:
    candidate = make_draft(tmp_path / "b", "b")
    expected: Publication | None = None
    for point in range(1, 100):
        url = f"memory://registry-{secrets.token_hex(8)}"
        first = publish_draft(draft, DraftRegistry(url), FACTS, YES).manifest.version
        count = 0

        def die_at_point(_: str, point: int = point) -> None:
            nonlocal count
            count += 1
            if count >= point:
                raise Killed

        registry = DraftRegistry(url)
        intercept(registry, die_at_point)
        try:
            expected = publish_draft(candidate, registry, better_than(first), decision)
        except Killed:
            other = DraftRegistry(url)
            for entry in other.list():
                other.verify(entry.version)
            resumed = publish_draft(candidate, other, better_than(first), decision)
            assert resumed.not_current_because is None
            assert {entry.version for entry in other.list()} == {first, resumed.manifest.version}
            current = other.current()
            assert current is not None
            assert current.version == (resumed.manifest.version if decision.publish else first)
        else:
            assert point > 10
            assert expected.manifest.version == build_manifest(candidate, better_than(first)).version
            return
    pytest.fail("publish_draft never came to its end")


def test_what_a_manifest_cannot_hold_is_named(draft: Path) -> None:
    with pytest.raises(CorruptDraft, match="cannot describe the draft"):
        build_manifest(draft, replace(FACTS, training={"loss": math.nan}))
    with pytest.raises(CorruptDraft, match="num_parameters"):
        build_manifest(draft, replace(FACTS, num_parameters=0))
    (draft / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(UnsafeDraft, match="pickle"):
        build_manifest(draft, FACTS)


def test_no_registry_nothing_changes(registry: DraftRegistry, draft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redraft.object_store.FIRST_WAIT_S", 0.0)

    def away(_: str) -> None:
        raise ConnectionError

    before = sorted(path.name for path in draft.iterdir())
    intercept(registry, away)
    for decision in (YES, NO):
        with pytest.raises(RegistryUnavailable, match="cannot"):
            publish_draft(draft, registry, FACTS, decision)
    assert sorted(path.name for path in draft.iterdir()) == before
