"""What is wrong with the world ends a cycle with one clear line, and leaves registry and work directory sound."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from redraft.errors import ModelError, RedraftError, TokenizerMismatch, UnsafeCheckpoint, UnsupportedModel
from redraft.registry import storage
from redraft.registry.errors import CorruptDraft, RegistryFull, WrongTarget
from redraft_training import cycle
from redraft_training.cycle import Outcome
from redraft_training.dataset.errors import DatasetUnreadable, ForeignLog
from redraft_training.distill import checkpoint
from redraft_training.distill.errors import CheckpointError, TrainingDiverged
from redraft_training.distill.step import Stepper
from redraft_training.evaluate import charts
from redraft_training.settings import load_settings
from redraft_training.student.student_model import HFStudent
from tests.fakes import save_tiny
from tests.unit.training.cycle_runs import Site


@pytest.fixture(autouse=True)
def _no_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("overview", "single"):
        monkeypatch.setattr(charts, name, lambda *_: b"png")


@pytest.fixture(name="site")
def _site(tmp_path: Path) -> Site:
    return Site.make(tmp_path)


def assert_untouched(site: Site) -> None:
    """Nothing is published; once the cause is gone the next run is fine."""
    assert site.registry.list() == []
    assert site.run().outcome is Outcome.PUBLISHED


def test_torn_and_foreign_shards_are_skipped(site: Site) -> None:
    (shard,) = (site.root / "traffic").rglob("*.parquet")
    torn = shard.with_name(shard.name.replace("-7", "-7", 1).replace(shard.name[:8], "01a20000"))
    torn.write_bytes(shard.read_bytes()[:-2000])
    (site.root / "traffic" / "notes.txt").write_text("not a shard")
    site.log(5, seed=9, target_fingerprint="sha256:of another target")
    assert site.run().outcome is Outcome.PUBLISHED
    (entry,) = site.registry.list()
    watermark = entry.manifest.training["data_watermark"]
    assert isinstance(watermark, dict)
    assert watermark["num_examples"] == 60


def test_log_of_another_target(tmp_path: Path) -> None:
    site = Site(tmp_path)
    save_tiny(site.target, layers=2)
    site.log(5, target_fingerprint="sha256:of another target")
    with pytest.raises(ForeignLog, match="all 5 records of the traffic log are of another target"):
        site.run()
    assert site.registry.list() == []


@pytest.mark.parametrize("teacher", ["captured", "rerun"])
def test_log_without_labels(tmp_path: Path, teacher: str) -> None:
    site = Site(tmp_path)
    save_tiny(site.target, layers=2)
    site.log(60, captured=False)
    result = site.run(f"teacher={teacher}")
    if teacher == "captured":
        assert result.outcome is Outcome.NOT_ENOUGH_DATA
        assert "set teacher=rerun if it is logged without captured logits" in result.reason
    else:
        assert result.outcome is Outcome.PUBLISHED


def test_too_little_traffic(tmp_path: Path) -> None:
    site = Site(tmp_path)
    save_tiny(site.target, layers=2)
    assert site.run().outcome is Outcome.NOT_ENOUGH_DATA  # no log at all
    site.log(30)
    assert "data.min_new_tokens asks for 100000" in site.run("data.min_new_tokens=100000").reason
    assert "gate.min_positions asks for 5000: wait for more traffic" in site.run("gate.min_positions=5000").reason
    assert not (site.root / "work" / "cycle").exists()
    assert not (site.root / "registry").exists()


def test_training_that_diverges(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def diverge(self: Stepper, *args: Any) -> float:
        raise TrainingDiverged("the loss or its gradient is not finite at step 3: lower the learning rate")

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "_update", diverge)
        with pytest.raises(TrainingDiverged, match="lower the learning rate"):
            site.run()
    assert (site.root / "work" / "failed" / "cycle.json").exists()
    assert not (site.root / "work" / "cycle").exists()  # going on from a checkpoint would only diverge again
    assert_untouched(site)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_draft_that_is_not_finite_is_refused(site: Site, monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    save = HFStudent.save

    def broken(self: HFStudent, directory: Path) -> None:
        save(self, directory)
        path = directory / "model.safetensors"
        weights = load_file(path)
        weights["model.norm.weight"][0] = value
        save_file(weights, path, metadata={"format": "pt"})

    monkeypatch.setattr(HFStudent, "save", broken)
    result = site.run("gate.min_first_acceptance=0")
    assert result.outcome is Outcome.REFUSED
    assert "held-out positions have a probability that is not finite" in result.reason
    assert site.registry.current() is None


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk_while_training(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(CheckpointError, match="the disk is full: free some space and run it again"):
            site.run()
    assert_untouched(site)


@pytest.mark.parametrize("place", ["save_dataset", "write_report", "write_file"])
def test_full_disk_between_the_stages(site: Site, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cycle, place, full)
        with pytest.raises(OSError, match="No space left"):
            site.run()
    assert_untouched(site)


def test_full_registry(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_link", full)
        with pytest.raises(RegistryFull):
            site.run()
    assert_untouched(site)


def test_current_draft_whose_files_are_not_those_of_its_manifest(site: Site) -> None:
    first = site.run()
    site.log(40, seed=3)
    weights = site.root / "registry" / "drafts" / (first.version or "") / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CorruptDraft, match=r"model\.safetensors of draft .* is not the file that its manifest names"):
        site.run()
    assert len(site.registry.list()) == 1
    data[-1] ^= 1
    weights.write_bytes(data)
    assert site.run().version != first.version


def test_registry_of_another_target(site: Site, tmp_path: Path) -> None:
    site.run()
    other = Site(tmp_path / "other")
    save_tiny(other.target, layers=2, seed=1)
    other.log(60)
    (site.root / "registry").rename(other.root / "registry")
    with pytest.raises(WrongTarget, match="or give this target a --registry of its own"):
        other.run()
    assert len(other.registry.list()) == 1


def other_tokenizer(draft: Path) -> None:
    save_tiny(draft, layers=1, vocab_size=62)


def wrong_shapes(draft: Path) -> None:
    save_tiny(draft, layers=1)
    config = json.loads((draft / "config.json").read_text())
    (draft / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))


def pickled(draft: Path) -> None:
    save_tiny(draft, layers=1)
    (draft / "model.safetensors").unlink()
    torch.save({}, draft / "pytorch_model.bin")


def cut(draft: Path) -> None:
    save_tiny(draft, layers=1)
    data = (draft / "model.safetensors").read_bytes()
    (draft / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("spoil", "error"),
    [
        (other_tokenizer, TokenizerMismatch),
        (wrong_shapes, UnsupportedModel),
        (pickled, UnsafeCheckpoint),
        (cut, ModelError),
    ],
)
def test_draft_to_begin_from_that_is_of_no_use(site: Site, spoil: Any, error: type[RedraftError]) -> None:
    draft = site.root / "draft"
    spoil(draft)
    with pytest.raises(error) as caught:
        site.run(f"draft={draft}")
    assert "\n" not in str(caught.value)
    assert_untouched(site)


def test_damaged_data_of_the_cycle_under_way(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cycle, "train", full)
        with pytest.raises(OSError, match="No space left"):
            site.run()
    (site.root / "work/cycle/dataset/training.parquet").write_bytes(b"torn")
    assert_untouched(site)


def test_damaged_replay_memory(site: Site) -> None:
    site.run()
    memory = site.root / "work" / "replay" / "training.parquet"
    memory.write_bytes(memory.read_bytes()[:100])
    with pytest.raises(DatasetUnreadable, match="delete it to start afresh"):
        site.run()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("gate.min_position=1", "gate.min_position"),
        ("distill.epochs=0", "distill.epochs"),
        ("distil.epochs=2", "distil"),
        ("gate.confidence=2", "confidence must be at least 0.5"),
        ("distill.objective.how=best", "distill.objective.how"),
        ("target.name=x", "target has no settings of its own"),
        ("epochs", "expected name=value"),
    ],
)
def test_wrong_settings(override: str, message: str) -> None:
    with pytest.raises(RedraftError, match=message) as caught:
        load_settings(None, ["target=demo", override])
    assert "\n" not in str(caught.value)
