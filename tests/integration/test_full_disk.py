"""A disk that is really full, with everything that redraft writes on it: said clearly, nothing half done, serving on.

The disk is a small tmpfs, which takes the right to mount one.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from prometheus_client import CollectorRegistry

from redraft.registry.errors import RegistryFull
from redraft.registry.store import DraftRegistry
from redraft.sampling.params import SamplingParams
from redraft.traffic.reader import TrafficReader
from redraft.traffic.writer import TrafficWriter
from redraft_training.distill.checkpoint import CheckpointStore, Identity, TrainingState
from redraft_training.distill.errors import CheckpointError
from tests.engine_harness import EngineSpec, check_identities, generate, request, running_engine
from tests.unit.registry.fakes import Drafts
from tests.unit.traffic.fakes import Observer

DISK_BYTES = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a megabyte."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(path)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"A FULL DISK IS NOT TESTED, no tmpfs can be mounted: {mounted.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """Not a byte is left inside."""
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(2 * DISK_BYTES))
    try:
        yield
    finally:
        filler.unlink()


def test_serving_goes_on_and_what_is_lost_is_counted(disk: Path) -> None:
    observer = Observer()
    writer = TrafficWriter(str(disk / "traffic"), observer)
    with running_engine(EngineSpec(teacher_top_n=4), sink=writer, registry=CollectorRegistry()) as engine:

        def serve(seed: int) -> str:
            (done,) = generate(engine, [request([5, 6, 7], SamplingParams(seed=seed), 8)])
            check_identities(done)
            assert writer.flush(60)
            return done.text()

        serve(1)
        with full(disk):
            serve(2)
            assert observer.results == {"written": 1, "dropped": 1}
            assert observer.reasons == {"write_error": 1}
        serve(3)
    assert writer.close(60)
    scan = TrafficReader(str(disk / "traffic")).scan()
    assert (scan.records, scan.problems) == (2, ())


def test_a_draft_is_published_whole_or_not_at_all(disk: Path, tmp_path: Path) -> None:
    url = disk / "registry"
    drafts = Drafts(DraftRegistry(str(url)), tmp_path / "made")
    drafts.publish("v1")
    made = drafts.make("v2")
    before = sorted(url.rglob("*"))
    with full(disk):
        with pytest.raises(RegistryFull, match="no space left"):
            drafts.registry.publish(*made)
        assert drafts.registry.versions() == ("v1",)
    current = drafts.registry.current()
    assert current is not None
    assert current.version == "v1"
    left = [path for path in sorted(url.rglob("*")) if path not in before and path.is_file()]
    assert left == []
    drafts.registry.publish(*made)
    assert drafts.registry.verify("v2") == made[1]


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(disk: Path) -> None:
    store = CheckpointStore(disk / "checkpoints", Identity({}, "data", "parent"))

    def save(step: int) -> None:
        store.save(TrainingState(step=step), {"weight": torch.full((64, 64), float(step))}, {})

    save(1)
    with full(disk), pytest.raises(CheckpointError, match=r"step 1 is intact.*the disk is full"):
        save(2)
    assert store.steps() == [1]
    loaded = store.load()
    assert loaded is not None
    assert loaded.model["weight"][0, 0] == 1.0
    save(2)
    assert store.steps() == [1, 2]
