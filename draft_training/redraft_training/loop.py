"""Following the traffic log: a cycle when there is enough news or the traffic drifts, fewer when nothing improves."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable

from redraft.errors import ConfigError
from redraft.registry.store import DraftRegistry
from redraft.traffic.erasure import erasures_of
from redraft.traffic.reader import TrafficReader
from redraft.traffic.record import TrafficRecord
from redraft_training.cycle import CycleResult, Outcome, Say, run_cycle
from redraft_training.cycle_data import Attempts, forget_erased
from redraft_training.cycle_state import Workspace
from redraft_training.distill.errors import TrainingDiverged
from redraft_training.drift import DriftDetector
from redraft_training.settings import CycleSettings

_MAX_PATIENCE = 16
_MAX_WAIT_S = 3600.0
_OVERLAP_S = 900.0  # a server writes a record this long after it was made at the latest (5 minutes by default)
_KNOWN_VERSIONS = 16
_DRAFT_MODEL = "draft_model"


class Follower:
    """What the log says since the last cycle, read bit by bit.

    Args:
        reader: of the log.
        min_new_tokens: output tokens that make a cycle worth while.
        detector: of drift; a drift needs only a quarter of these tokens.
        attempts: the cycles before, as the registry knows them.
    """

    def __init__(self, reader: TrafficReader, min_new_tokens: int, detector: DriftDetector, attempts: Attempts) -> None:
        self._reader, self._min_new_tokens, self._detector = reader, min_new_tokens, detector
        self._since = self._newest = attempts.newest_unix_s
        self._patience = min(2**attempts.refusals, _MAX_PATIENCE)  # in units of min_new_tokens
        self._not_before = 0
        self._seen: dict[tuple[str, int], float] = {}
        self._versions: deque[str] = deque(maxlen=_KNOWN_VERSIONS)
        self.new_tokens = 0

    def read(self) -> None:
        """Take in what was logged since the last call, once each. Raises OSError if the log cannot be listed.

        Servers write late and out of order, so the last quarter of an hour is looked through again.
        """
        first = max(self._newest - _OVERLAP_S, self._since)
        for record in self._reader.iter_records(None if first == -math.inf else first):
            key = record.request_id, record.sample_index
            if record.created_unix_s > self._since and key not in self._seen:
                self._seen[key] = record.created_unix_s
                self._newest = max(self._newest, record.created_unix_s)
                self._take(record)
        # what is older is not read again
        self._seen = {key: made for key, made in self._seen.items() if made >= self._newest - _OVERLAP_S}

    def _take(self, record: TrafficRecord) -> None:
        self.new_tokens += len(record.output_token_ids)
        steps = [step for step in record.steps if step.proposer == _DRAFT_MODEL]
        if not steps:
            return
        version = steps[-1].draft_version
        if version not in self._versions:  # another draft: its acceptance says nothing of the traffic
            self._versions.append(version)
            self._detector.reset()
        self._detector.observe(
            sum(step.num_accepted for step in steps), sum(len(step.drafted_token_ids) for step in steps)
        )

    @property
    def trigger(self) -> str | None:
        """Why a cycle is due, in words; None if it is not."""
        if self.new_tokens < self._not_before:
            return None
        if self.new_tokens >= self._patience * self._min_new_tokens:
            return f"{self.new_tokens:,} new output tokens"
        if self._detector.drifted and self.new_tokens >= self._min_new_tokens / 4:
            return f"acceptance fell from {self._detector.long:.2f} to {self._detector.short:.2f}"
        return None

    def note(self, outcome: Outcome) -> None:
        """Learn from a cycle's end: after a refusal the next one waits for twice as much news."""
        if outcome is Outcome.NOT_ENOUGH_DATA:
            # fewer tokens are of use than were counted here
            self._not_before = self.new_tokens + max(1, self._min_new_tokens // 4)
            return
        self.new_tokens = self._not_before = 0
        self._detector.reset()
        self._patience = 1 if outcome is Outcome.PUBLISHED else min(2 * self._patience, _MAX_PATIENCE)


def follow(
    settings: CycleSettings,
    *,
    poll_s: float,
    stop: threading.Event,
    say: Say,
    on_result: Callable[[CycleResult], None] = lambda _: None,
    detector: DriftDetector | None = None,
    max_cycles: int | None = None,
) -> None:
    """Run cycles until `stop` is set, the one that was interrupted first.

    Whatever goes wrong but the settings is reported and tried again, after twice the time with each failure in a row,
    an hour at most. A drift may trigger a cycle with less news than `data.min_new_tokens`, so the cycle's own threshold
    is a quarter of it. Raises ConfigError.
    """
    wanted = settings.data.min_new_tokens
    data = settings.data.model_copy(update={"min_new_tokens": max(1, wanted // 4)})
    settings = settings.model_copy(update={"data": data})
    try:
        reader = TrafficReader(settings.require_traffic())
    except (ValueError, ImportError) as error:
        raise ConfigError(f"cannot use --traffic as a traffic log: {error}") from error
    registry = DraftRegistry(settings.require_registry())
    workspace = Workspace(settings.work_dir)
    follower: Follower | None = None
    cycles = failures = 0
    forgotten: frozenset[str] = frozenset()  # erasures that the work directory knows of
    while not stop.is_set() and (max_cycles is None or cycles < max_cycles):
        try:
            if follower is None:
                attempts = Attempts.of(registry.list())
                follower = Follower(reader, wanted, detector or DriftDetector(), attempts)
            follower.read()
            erasures = erasures_of(settings.require_traffic()).names
            if erasures != forgotten:
                with workspace.locked():
                    forget_erased(settings, workspace, say)
                forgotten = erasures
            reason = "the last one was interrupted" if workspace.is_under_way else follower.trigger
            if reason is not None:
                say(f"starting a cycle: {reason}")
                result = run_cycle(settings, say=say)
                follower.note(result.outcome)
                on_result(result)
                cycles += 1
            failures = 0
        except ConfigError:
            raise
        except Exception as error:  # of any store: the loop is to outlive them all
            failures += 1
            if isinstance(error, TrainingDiverged) and follower is not None:
                follower.note(Outcome.REFUSED)
            say(f"failed, and will be tried again: {str(error) or type(error).__name__}")
        stop.wait(min(poll_s * 2**failures, _MAX_WAIT_S))
