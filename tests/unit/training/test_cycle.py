"""A whole cycle on tiny models: what it publishes, what it resumes, what it refuses to begin."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from redraft.errors import RedraftError
from redraft.models.draft import load_draft
from redraft.models.loader import load_model
from redraft.models.ref import ModelKind, ModelRef
from redraft.registry.errors import RegistryUnavailable
from redraft.registry.manifest import DraftState
from redraft.registry.store import DraftRegistry
from redraft_training import cycle
from redraft_training.cycle import Outcome, run_cycle
from redraft_training.cycle_state import WorkDirBusy, Workspace
from redraft_training.evaluate import charts
from redraft_training.evaluate.comparison import Comparison
from tests.unit.registry.fakes import Drafts
from tests.unit.training.cycle_runs import Site


@pytest.fixture(autouse=True)
def _no_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("overview", "single"):
        monkeypatch.setattr(charts, name, lambda *_: b"png")


@pytest.fixture(name="site")
def _site(tmp_path: Path) -> Site:
    return Site.make(tmp_path)


class Killed(BaseException):
    """Ends a cycle as a kill would: nothing catches it."""


def interrupt(monkeypatch: pytest.MonkeyPatch, site: Site, place: Any, name: str, *overrides: str) -> None:
    def die(*args: Any, **kwargs: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(place, name, die)
        with pytest.raises(Killed):
            site.run(*overrides)


def test_cycles_follow_the_traffic(site: Site) -> None:
    first = site.run()
    assert first.outcome is Outcome.PUBLISHED
    registry = site.registry
    current = registry.current()
    assert current is not None
    assert current.version == first.version
    manifest = registry.verify(current.version)
    assert first.comparison is not None
    assert manifest.evaluation == first.comparison.to_summary(4)
    assert manifest.evaluation is not None
    assert manifest.evaluation.expected_acceptance > 0.2
    assert {"report.html", "report.png", "draft_vocab.json"} <= manifest.files.keys()
    assert (manifest.parent_version, manifest.draft_vocab_size, manifest.target_name) == (
        None,
        60,
        str(site.target.name),
    )
    settings = manifest.training["settings"]
    assert isinstance(settings, dict)
    assert "work_dir" not in settings

    idle = site.run()
    assert idle.outcome is Outcome.NOT_ENOUGH_DATA
    assert "0 output tokens of use were logged since the last attempt" in idle.reason

    site.log(40, seed=3, domain="chat")
    second = site.run("gate.max_domain_loss=1", "distill.epochs=4")
    assert second.comparison is not None
    assert second.comparison.serving_version == first.version
    assert set(second.comparison.domains) == {"sql", "chat"}  # the first domain is remembered
    entry = registry.get(second.version or "")
    assert entry.manifest.parent_version == first.version
    assert (entry.state is DraftState.PUBLISHED) == (second.outcome is Outcome.PUBLISHED)
    assert len(registry.list()) == 2


def test_published_draft_loads_for_its_target(site: Site) -> None:
    result = site.run("student.quantise=int8")
    fetched = site.registry.fetch(result.version or "", site.root / "fetched")
    target = load_model(ModelRef(ModelKind.DIRECTORY, str(site.target)))
    draft = load_draft(ModelRef(ModelKind.DIRECTORY, str(fetched)), target)
    assert draft.quant is not None
    assert draft.output_ids is not None
    assert len(draft.output_ids) == 60


def test_refused_draft_is_kept_and_the_same_traffic_not_tried_again(site: Site) -> None:
    result = site.run("gate.min_first_acceptance=0.99")
    assert result.outcome is Outcome.REFUSED
    assert "least for a first draft" in result.reason
    (entry,) = site.registry.list()
    assert (entry.version, entry.state, entry.reason) == (result.version, DraftState.REFUSED, result.reason)
    assert site.registry.current() is None
    site.registry.verify(entry.version)
    assert site.run().outcome is Outcome.NOT_ENOUGH_DATA


def test_resumed_cycle_keeps_its_data_whatever_becomes_of_the_log(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, site, cycle, "compared")
    begun = json.loads((site.root / "work/cycle/cycle.json").read_text())
    shutil.rmtree(site.root / "traffic")
    monkeypatch.setattr(cycle, "train", None)  # what is trained is not trained again
    result = site.run()
    assert result.outcome is Outcome.PUBLISHED
    assert site.registry.get(result.version or "").manifest.created_unix_s == begun["created_unix_s"]


def test_killed_after_publishing_publishes_nothing_more(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, site, Workspace, "finish")
    published = site.registry.versions()
    result = site.run()
    assert (result.outcome, result.version) == (Outcome.PUBLISHED, published[0])
    assert result.comparison is not None
    assert site.registry.versions() == published
    assert (site.root / "work/replay/training.parquet").exists()
    # the traffic itself stays nowhere but in the log and the replay memory
    assert not [*(site.root / "work/last").rglob("*.parquet"), *(site.root / "work/last").rglob(".*")]


def test_other_settings_begin_afresh(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, site, cycle, "compared")
    said: list[str] = []
    run_cycle(site.settings("distill.epochs=1", "data.min_new_tokens=90"), say=said.append)
    assert "the cycle under way was begun with other settings: starting afresh" in said
    interrupted = said.index("the cycle under way was begun with other settings: starting afresh")
    assert said[interrupted + 1] == "reading the traffic log"


def test_when_to_run_is_no_other_setting(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, site, cycle, "compared", "distill.max_minutes=10")
    said: list[str] = []
    run_cycle(site.settings("data.min_new_tokens=90", "distill.max_minutes=20"), say=said.append)
    assert said[0] == "going on with the cycle under way"


def test_two_cycles_in_one_work_dir(site: Site) -> None:
    with Workspace(site.root / "work").locked(), pytest.raises(WorkDirBusy, match="another cycle is at work"):
        site.run()
    assert site.run().outcome is Outcome.PUBLISHED


def test_two_work_dirs_on_one_registry(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one publishes while this one is about to: it compares again, with what is current by then."""
    interrupt(monkeypatch, site, cycle, "publish_draft")
    decided = json.loads((site.root / "work/cycle/decision.json").read_text())
    assert decided["publish"]
    other = site.run("distill.seed=1", work_dir="other")
    result = site.run()
    assert result.comparison is not None
    assert result.comparison.serving_version == other.version
    assert len(site.registry.list()) == 2
    expected = result.version if result.outcome is Outcome.PUBLISHED else other.version
    current = site.registry.current()
    assert current is not None
    assert current.version == expected


def test_registry_that_vanishes_mid_cycle(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.run()
    site.log(40, seed=3)
    interrupt(monkeypatch, site, cycle, "compared")
    registry, away = site.root / "registry", site.root / "unmounted"
    registry.rename(away)
    with pytest.raises(RegistryUnavailable, match=r"is empty, and had draft .* check that it is mounted"):
        site.run()
    assert not registry.exists()  # above all, nothing was published there
    away.rename(registry)
    assert site.run().outcome in (Outcome.PUBLISHED, Outcome.REFUSED)


def test_comparison_on_disk_is_the_one_decided_on(site: Site) -> None:
    result = site.run()
    assert result.directory == site.root / "work" / "last"
    kept = Comparison.from_json((result.directory / "comparison.json").read_text())
    assert kept == result.comparison


def test_pinned_registry_keeps_its_draft(site: Site) -> None:
    first = site.run()
    site.registry.pin()
    site.log(40, seed=3)
    second = site.run("distill.epochs=8", "gate.max_domain_loss=1")
    assert second.outcome is Outcome.PUBLISHED
    assert second.reason.startswith("not made current (the registry is pinned to")
    current = site.registry.current()
    assert current is not None
    assert current.version == first.version


def test_nothing_is_needed_but_what_is_named(site: Site) -> None:
    settings = site.settings().model_copy(update={"registry": None})
    with pytest.raises(RedraftError, match="registry is not set: give --registry"):
        run_cycle(settings)
    assert not (site.root / "work").exists()


def test_a_cycle_leaves_the_registry_bounded(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drafts = Drafts(site.registry, tmp_path / "made")
    for version in ("r1", "r2", "r3"):
        drafts.refuse(version)
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(DraftRegistry, "prune", lambda *_: (_ for _ in ()).throw(RegistryUnavailable("no such store")))
        result = run_cycle(site.settings("keep_drafts=1"), say=said.append)
    assert result.outcome is Outcome.PUBLISHED  # all the same
    assert said[-1] == "no old drafts were deleted: no such store"
    assert set(site.registry.refused_versions()) == {"r1", "r2", "r3"}

    site.log(40, seed=3)
    said.clear()
    second = run_cycle(site.settings("keep_drafts=1"), say=said.append)  # whatever the gate says of it
    assert said[-1].endswith("old drafts from the registry")
    published, refused = set(site.registry.versions()), set(site.registry.refused_versions())
    assert len(refused) == 1
    assert {result.version, second.version} <= published | refused
    assert result.version in published
