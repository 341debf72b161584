"""What was erased from the log leaves training's own copies too, and nothing else does."""

from __future__ import annotations

import json
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from redraft.models.loader import weights_fingerprint
from redraft.models.tokenizer import Tokenizer
from redraft.traffic.erasure import Erasure, Erasures, keep_erasure
from redraft.traffic.layout import open_root
from redraft_training import cycle
from redraft_training.commands.common import Exit
from redraft_training.cycle import Outcome, run_cycle
from redraft_training.cycle_state import RESULT, Erased, Workspace
from redraft_training.dataset.errors import DatasetUnreadable
from redraft_training.dataset.read import Dataset, split
from redraft_training.dataset.replay import Replay, ReplaySettings, erase_remembered
from redraft_training.dataset.select import Selection, TargetIdentity
from redraft_training.dataset.store import erase_dataset, load_dataset, save_dataset
from redraft_training.loop import follow
from tests.fakes import tiny_tokenizer
from tests.unit.training.cycle_runs import VOCAB, Site
from tests.unit.training.dataset_examples import IDENTITY, example
from tests.unit.training.test_commands import call, small

GONE = Erasures([Erasure(1e12, frozenset({"r1", "r4"}), frozenset({"acme"}))])
KEPT = {f"r{i}" for i in range(30)} - {"r1", "r4", "r7"}


def dataset() -> Dataset:
    """Both parts hold some; r7 is the tenant's."""
    return split([example(f"r{i}", 3, seed=i, tenant="acme" if i == 7 else "other") for i in range(30)], 0.4)


def names(*parts: Any) -> set[str]:
    return {e.request_id for part in parts for e in part}


def test_a_data_set_forgets(tmp_path: Path) -> None:
    made = dataset()
    assert {"r1", "r4", "r7"} & names(made.training)
    assert {"r1", "r4", "r7"} & names(made.held_out)
    save_dataset(tmp_path / "d", made, IDENTITY)
    assert erase_dataset(tmp_path / "d", GONE) == 3
    left = load_dataset(tmp_path / "d", IDENTITY)
    assert names(left.training, left.held_out) == KEPT
    assert list(left.training) == [e for e in made.training if e.request_id in KEPT]
    again = split([*left.training, *left.held_out], 0.4)
    assert (left.report.training, left.report.held_out) == (again.report.training, again.report.held_out)
    assert left.report.watermark.sha256 == again.report.watermark.sha256
    assert erase_dataset(tmp_path / "d", GONE) == 0
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "d").iterdir()}
    assert (modes, stat.S_IMODE((tmp_path / "d").stat().st_mode)) == ({0o600}, 0o700)


def remember(directory: Path, identity: TargetIdentity = IDENTITY) -> None:
    selection = Selection(held_out_share=0.4)
    replay = Replay(directory, identity, ReplaySettings(seed=5))
    replay.save(replay.mix(dataset(), selection))


def test_the_replay_memory_forgets(tmp_path: Path) -> None:
    remember(tmp_path)
    assert erase_remembered(tmp_path, GONE) == 3
    replay = Replay(tmp_path, IDENTITY, ReplaySettings(seed=5))  # it checks what it reads
    mixture = replay.mix(split([example("new")], 0.4, newest_unix_s=1.0), Selection(held_out_share=0.4))
    assert names(mixture.dataset.training, mixture.dataset.held_out) == KEPT | {"new"}
    assert erase_remembered(tmp_path, GONE) == 0
    assert erase_remembered(tmp_path / "none", GONE) == 0


def test_a_write_that_was_killed_is_not_in_the_way_and_goes(tmp_path: Path) -> None:
    remember(tmp_path)
    left = tmp_path / "training.parquet.tmp"
    left.write_bytes(b"half of a memory")
    assert erase_remembered(tmp_path, GONE) == 3
    assert not left.exists()


def test_what_cannot_be_searched_is_named(tmp_path: Path) -> None:
    remember(tmp_path)
    (tmp_path / "held_out.parquet").write_bytes(b"torn")
    with pytest.raises(DatasetUnreadable, match=r"held_out\.parquet cannot be searched"):
        erase_remembered(tmp_path, GONE)


def begun(root: Path) -> Workspace:
    workspace = Workspace(root)
    workspace.begin({"settings": {}})
    save_dataset(workspace.memory, dataset(), IDENTITY)
    save_dataset(workspace.dataset, dataset(), IDENTITY)
    return workspace


def test_a_cycle_that_learns_from_it_begins_anew(tmp_path: Path) -> None:
    workspace = begun(tmp_path)
    assert (
        workspace.erase(Erasures()) == workspace.erase(Erasures([Erasure(1e12, frozenset({"x"}))])) == Erased(0, 0, 0)
    )
    assert workspace.is_under_way
    assert workspace.erase(GONE) == Erased(replay=0, cycle=6, by_hand=0)
    assert not workspace.directory.exists()


def test_a_cycle_at_its_end_keeps_the_rest_of_its_memory(tmp_path: Path) -> None:
    workspace = begun(tmp_path)
    workspace.write(RESULT, {"outcome": "published"})
    assert workspace.erase(GONE).cycle == 6
    assert not workspace.dataset.exists()
    memory = load_dataset(workspace.memory, IDENTITY)
    assert names(memory.training, memory.held_out) == KEPT
    assert workspace.read(RESULT) is not None


@pytest.fixture(name="site")
def _site(tmp_path: Path) -> Site:
    return Site.make(tmp_path)


def identity_of(site: Site) -> TargetIdentity:
    return TargetIdentity(weights_fingerprint(site.target), Tokenizer(tiny_tokenizer(VOCAB)).fingerprint, VOCAB)


def remembered(site: Site) -> set[str]:
    parts = ("training", "held_out")
    tables = [pq_ids(site.root / "work" / "replay" / f"{part}.parquet") for part in parts]
    return set().union(*tables)


def pq_ids(path: Path) -> set[str]:
    import pyarrow.parquet as pq

    return set(pq.read_table(path, columns=["request_id"])["request_id"].to_pylist())


def ask(site: Site, *request_ids: str) -> None:
    """As `redraft-train traffic delete` would on another machine."""
    keep_erasure(*open_root(str(site.root / "traffic")), Erasure(1e12, frozenset(request_ids)))


class Killed(BaseException):
    pass


def test_the_next_run_forgets_whatever_it_finds(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(site.root / "work" / "replay", identity_of(site))
    monkeypatch.setattr(cycle, "train", lambda *_, **__: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        site.run()
    data = site.root / "work" / "cycle" / "dataset" / "training.parquet"
    before = pq_ids(data)
    ask(site, min(before), "r1")
    said: list[str] = []
    with pytest.raises(Killed):
        run_cycle(site.settings(), say=said.append)
    assert said[:2] == [
        "1 examples were erased from the log: they left the replay memory",
        "4 examples of the cycle under way were erased from the log",  # each is in its data and in its memory
    ]
    assert pq_ids(data) == before - {min(before), "r1"}
    assert "r1" not in remembered(site)


def test_a_run_without_news_forgets_too(site: Site) -> None:
    remember(site.root / "work" / "replay", identity_of(site))
    ask(site, "r1")
    assert site.run("data.min_new_tokens=1000000").outcome is Outcome.NOT_ENOUGH_DATA
    assert len(remembered(site)) == 29


def test_the_loop_forgets_while_it_waits(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(site.root / "work" / "replay")
    stop = threading.Event()
    keep_erasure(*open_root(str(site.root / "traffic")), Erasure(1e12, frozenset({"r1"})))
    monkeypatch.setattr(stop, "wait", lambda timeout: stop.set())
    follow(site.settings("data.min_new_tokens=1000000"), poll_s=1.0, stop=stop, say=lambda _: None)
    assert "r1" not in remembered(site)
    assert len(remembered(site)) == 29


def test_distil_by_hand_does_not_go_on_with_it(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["distill", f"--target={site.target}", f"--traffic={site.root / 'traffic'}"]
    arguments += [f"--output={site.root / 'hand'}", *small()]
    with monkeypatch.context() as patch:
        patch.setattr("redraft_training.training_run.train", lambda *_, **__: (_ for _ in ()).throw(OSError("full")))
        assert call(*arguments)[0] == Exit.ERROR
    kept = site.root / "hand" / "dataset" / "training.parquet"
    first = min(pq_ids(kept))
    ask(site, first)
    status, _, stderr = call(*arguments)
    assert (status, "1 of the examples" in stderr) == (Exit.USAGE, True)
    assert first not in pq_ids(kept)


def test_delete_reaches_the_work_directories_that_are_named(site: Site) -> None:
    remember(site.root / "work" / "replay")
    arguments = ["traffic", "delete", f"--traffic={site.root / 'traffic'}", "--request-id=r1"]
    arguments += [f"--work-dir={site.root / 'work'}"]
    with Workspace(site.root / "work").locked():
        status, _, stderr = call(*arguments)
    assert (status, "a cycle is at work in it" in stderr) == (Exit.ERROR, True)
    assert call(*arguments, "--dry-run")[0] == 0
    assert "r1" in remembered(site)
    status, stdout, _ = call(*arguments)
    assert (status, "1 examples left the replay memory" in stdout) == (0, True)
    assert "r1" not in remembered(site)
    status, _, stderr = call(*arguments[:-1], f"--work-dir={site.root / 'wrok'}")
    assert (status, "is no directory" in stderr) == (Exit.USAGE, True)
    assert json.loads(min((site.root / "traffic/erasures").iterdir()).read_text())["request_ids"] == ["r1"]
