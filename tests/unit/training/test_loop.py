"""The loop around the cycle: what starts one, what makes it wait, what it survives. Cycles themselves are faked."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from redraft.errors import ConfigError
from redraft.registry.errors import RegistryUnavailable
from redraft.registry.manifest import DraftState
from redraft.traffic.reader import TrafficReader
from redraft.traffic.record import StepRecord, TrafficRecord
from redraft.traffic.writer import TrafficWriter
from redraft_training import loop
from redraft_training.cycle import CycleResult, Outcome
from redraft_training.cycle_data import Attempts
from redraft_training.distill.errors import TrainingDiverged
from redraft_training.drift import DriftDetector
from redraft_training.loop import Follower, follow
from redraft_training.settings import CycleSettings, load_settings
from tests.unit.traffic.fakes import Observer, record

NOTHING_YET = Attempts(float("-inf"), 0)


def rates(count: int, mean: float, rng: random.Random) -> list[tuple[int, int]]:
    """(accepted, drafted) of sequences as unlike as real ones: their own rates spread over all of [0, 1]."""
    made = []
    for _ in range(count):
        rate, drafted = rng.betavariate(3 * mean, 3 * (1 - mean)), rng.randint(8, 80)
        made.append((sum(rng.random() < rate for _ in range(drafted)), drafted))
    return made


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_no_drift(seed: int) -> None:
    detector = DriftDetector()
    alarms = 0
    for counts in rates(5000, 0.5, random.Random(seed)):  # 220,000 drafted tokens
        detector.observe(*counts)
        alarms += detector.drifted
    assert alarms == 0


@pytest.mark.parametrize("seed", range(4))
def test_fall_of_the_acceptance_is_noticed_soon(seed: int) -> None:
    rng = random.Random(seed)
    detector = DriftDetector()
    for counts in rates(1000, 0.5, rng):
        detector.observe(*counts)
    drafted = 0
    for counts in rates(1000, 0.25, rng):
        detector.observe(*counts)
        drafted += counts[1]
        if detector.drifted:
            break
    assert detector.drifted
    assert drafted < 5000


def test_rise_slow_start_and_reset_are_no_drift() -> None:
    rng = random.Random(1)
    detector = DriftDetector()
    for counts in rates(30, 0.9, rng):
        detector.observe(*counts)
    detector.observe(0, 100)
    assert not detector.drifted  # too little to tell
    for counts in rates(500, 0.3, rng) + rates(500, 0.8, rng):
        detector.observe(*counts)
    assert not detector.drifted
    detector.observe(0, 0)
    detector.reset()
    assert detector.drafted == 0.0


def entry(state: DraftState, newest_unix_s: object = None) -> Any:
    training = {} if newest_unix_s is None else {"data_watermark": {"newest_unix_s": newest_unix_s}}
    return SimpleNamespace(state=state, manifest=SimpleNamespace(training=training))


def test_attempts_come_from_the_registry() -> None:
    published, refused = DraftState.PUBLISHED, DraftState.REFUSED
    assert Attempts.of([]) == NOTHING_YET
    assert Attempts.of([entry(refused, 30.0), entry(refused, 20.0), entry(published, 10.0)]) == Attempts(30.0, 2)
    assert Attempts.of([entry(published), entry(refused, 5)]) == Attempts(5.0, 0)
    assert Attempts.of([entry(refused, "tomorrow")]).refusals == 1


def write(root: Path, records: Sequence[TrafficRecord]) -> None:
    writer = TrafficWriter(str(root), Observer())
    assert all(writer.offer(made) for made in records)
    assert writer.close(30.0)


def served(name: str, created: float, *, accepted: int = 2, version: str = "d-1") -> TrafficRecord:
    """10 output tokens, 4 drafted."""
    step = StepRecord(0, (1, 2, 3, 4), accepted, "draft_model", version)
    return replace(record(name, created_unix_s=created, teacher=()), output_token_ids=tuple(range(10)), steps=(step,))


def test_follower_counts_every_record_once_and_late_ones_too(tmp_path: Path) -> None:
    follower = Follower(TrafficReader(str(tmp_path)), 50, DriftDetector(), Attempts(1000.0, 0))
    write(tmp_path, [served("old", 1000.0), served("a", 1001.0), served("b", 2000.0)])
    follower.read()
    follower.read()
    assert follower.new_tokens == 20
    assert follower.trigger is None
    write(tmp_path, [served("late", 1990.0), served("c", 2001.0), served("d", 2002.0)])  # another server's
    follower.read()
    assert follower.trigger == "50 new output tokens"
    follower.note(Outcome.PUBLISHED)
    follower.read()
    assert follower.new_tokens == 0


def test_refusals_double_the_news_that_is_wanted(tmp_path: Path) -> None:
    follower = Follower(TrafficReader(str(tmp_path)), 100, DriftDetector(), Attempts(0.0, 1))
    for tokens, trigger in ((199, None), (200, "200 new output tokens")):
        follower.new_tokens = tokens
        assert follower.trigger == trigger
    for _ in range(10):
        follower.note(Outcome.REFUSED)
    follower.new_tokens = 1600
    assert follower.trigger == "1,600 new output tokens"
    follower.note(Outcome.PUBLISHED)
    follower.new_tokens = 100
    assert follower.trigger == "100 new output tokens"
    follower.note(Outcome.NOT_ENOUGH_DATA)
    assert follower.trigger is None
    follower.new_tokens = 125
    assert follower.trigger == "125 new output tokens"


def test_drift_triggers_on_less_news_but_another_draft_is_no_drift(tmp_path: Path) -> None:
    detector = DriftDetector(short_tokens=40.0, long_tokens=400.0)
    follower = Follower(TrafficReader(str(tmp_path)), 4000, detector, NOTHING_YET)
    good = [served(f"g{i}", 1000.0 + i, accepted=3) for i in range(110)]
    write(tmp_path, good)
    follower.read()
    assert follower.new_tokens == 1100
    assert follower.trigger is None
    other = [served(f"o{i}", 2000.0 + i, accepted=1, version="d-2") for i in range(30)]
    write(tmp_path, other)
    follower.read()
    assert follower.trigger is None
    write(tmp_path, [served(f"b{i}", 3000.0 + i, accepted=0, version="d-2") for i in range(40)])
    follower.read()
    assert follower.trigger is not None
    assert follower.trigger.startswith("acceptance fell from 0.")


class Clock(threading.Event):
    """An event that nobody waits for: it notes for how long, and says stop after so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.waits: list[float] = []
        self._times = times

    def wait(self, timeout: float | None = None) -> bool:
        self.waits.append(timeout or 0.0)
        if len(self.waits) >= self._times:
            self.set()
        return self.is_set()


@pytest.fixture(name="settings")
def _settings(tmp_path: Path) -> CycleSettings:
    return load_settings(
        None,
        ["data.min_new_tokens=20"],
        traffic=str(tmp_path / "traffic"),
        registry=str(tmp_path / "registry"),
        work_dir=str(tmp_path / "work"),
    )


def followed(
    settings: CycleSettings, monkeypatch: pytest.MonkeyPatch, outcomes: list[Outcome | Exception], times: int
) -> tuple[list[CycleSettings], list[str], Clock]:
    """Run the loop against cycles that end in this way; what they were given, what was said, and the waits."""
    given: list[CycleSettings] = []
    said: list[str] = []

    def fake(cycle_settings: CycleSettings, *, say: Any) -> CycleResult:
        given.append(cycle_settings)
        outcome = outcomes[len(given) - 1]
        if isinstance(outcome, Exception):
            raise outcome
        return CycleResult(outcome, "")

    monkeypatch.setattr(loop, "run_cycle", fake)
    clock = Clock(times)
    follow(settings, poll_s=10.0, stop=clock, say=said.append)
    return given, said, clock


def test_loop_survives_its_stores_and_backs_off(
    settings: CycleSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(tmp_path / "traffic", [served("a", 1001.0), served("b", 1002.0)])
    failures: list[Outcome | Exception] = [
        RegistryUnavailable("the registry is away"),
        OSError(28, "No space left on device"),
        RuntimeError("of a library"),
    ]
    given, said, clock = followed(settings, monkeypatch, [*failures, Outcome.PUBLISHED], 6)
    assert len(given) == 4
    assert clock.waits == [20.0, 40.0, 80.0, 10.0, 10.0, 10.0]
    assert "failed, and will be tried again: the registry is away" in said
    assert given[0].data.min_new_tokens == 5  # a drift may trigger with less news


def test_loop_waits_for_more_news_after_a_divergence(
    settings: CycleSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write(tmp_path / "traffic", [served("a", 1001.0), served("b", 1002.0)])
    given, _, _ = followed(settings, monkeypatch, [TrainingDiverged("not finite")], 5)
    assert len(given) == 1


def test_loop_goes_on_with_a_cycle_that_was_interrupted(
    settings: CycleSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "work" / "cycle").mkdir(parents=True)
    (tmp_path / "work" / "cycle" / "cycle.json").write_text("{}")
    given, said, _ = followed(settings, monkeypatch, [Outcome.PUBLISHED], 1)
    assert len(given) == 1
    assert said == ["starting a cycle: the last one was interrupted"]


def test_wrong_settings_end_the_loop(settings: CycleSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(tmp_path / "traffic", [served("a", 1001.0), served("b", 1002.0)])
    with pytest.raises(ConfigError, match="out of range"):
        followed(settings, monkeypatch, [ConfigError("a vocabulary of 3 ids is out of range")], 3)
    with pytest.raises(ConfigError, match="cannot use --traffic"):
        follow(settings.model_copy(update={"traffic": "nosuch://x"}), poll_s=1.0, stop=Clock(1), say=print)
