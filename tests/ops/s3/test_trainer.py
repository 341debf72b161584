"""`redraft-train run` with traffic and drafts both in S3: the same loop as on disk, and it may be repeated."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from redraft.models.loader import weights_fingerprint
from redraft.registry.store import DraftRegistry
from redraft.traffic.spool import Spool
from redraft.traffic.writer import TrafficWriter
from redraft_training import cycle
from redraft_training.__main__ import app
from redraft_training.commands.common import Exit
from redraft_training.cycle_state import Workspace
from redraft_training.evaluate import charts
from tests.ops.s3.conftest import Bucket
from tests.unit.traffic.fakes import Observer
from tests.unit.training.cycle_runs import SMALL, Site, records


class Killed(BaseException):
    """Ends a cycle as a kill would: nothing catches it."""


class Trainer:
    """`redraft-train run` on a small target."""

    def __init__(self, bucket: Bucket, root: Path) -> None:
        self.traffic, self.drafts = bucket.url("traffic"), bucket.url("drafts")
        self.root = root
        self._site = Site.make(root, requests=0)

    def log(self, count: int) -> None:
        """As a server does: through a spool."""
        observer = Observer()
        spool = Spool(self.root / "spool", self.traffic, observer, max_bytes=2**30)
        writer = TrafficWriter(spool, observer)
        for made in records(count, weights_fingerprint(self._site.target), seed=0, domain="sql"):
            assert writer.offer(made)
        assert writer.close(30)
        assert spool.flush(30)
        assert spool.close(30) == 0

    def run(self, work: str = "work") -> Result:
        places = {"target": self._site.target, "traffic": self.traffic, "registry": self.drafts}
        options = [text for name, value in places.items() for text in (f"--{name}", str(value))]
        settings = [text for setting in SMALL for text in ("--set", setting)]
        return CliRunner().invoke(app, ["run", *options, "--work-dir", str(self.root / work), *settings])

    @property
    def registry(self) -> DraftRegistry:
        return DraftRegistry(self.drafts)


@pytest.fixture
def trainer(bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainer:
    for name in ("overview", "single"):
        monkeypatch.setattr(charts, name, lambda *_: b"png")
    made = Trainer(bucket, tmp_path)
    made.log(60)
    return made


def test_a_cycle_publishes_once_however_often_it_runs(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "finish", die)  # killed after publishing, before it is remembered here
        with pytest.raises(Killed):
            trainer.run()
    current = trainer.registry.current()
    assert current is not None
    trainer.registry.verify(current.version)
    monkeypatch.setattr(cycle, "train", None)  # what is trained is not trained again
    resumed = trainer.run()
    assert resumed.exit_code == Exit.PUBLISHED, resumed.output
    assert current.version in resumed.output
    for work in ("work", "another machine"):
        assert trainer.run(work).exit_code == Exit.NOT_ENOUGH_DATA
    assert trainer.registry.current() == current
    assert [entry.version for entry in trainer.registry.list()] == [current.version]


def test_an_outage_is_one_line_and_worth_a_retry(trainer: Trainer, bucket: Bucket) -> None:
    bucket.proxy.down()
    away = trainer.run()
    assert away.exit_code == Exit.ERROR
    assert "the store cannot be reached" in away.stderr
    assert len([line for line in away.stderr.splitlines() if line.startswith("error: ")]) == 1
    bucket.proxy.up()
    trainer.traffic = "s3://no-such-bucket/traffic"
    missing = trainer.run()
    assert missing.exit_code == Exit.ERROR  # a log that is not there is not an empty one
    assert "the bucket does not exist" in missing.stderr
    assert trainer.registry.list() == []
