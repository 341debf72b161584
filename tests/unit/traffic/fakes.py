"""Records and an observer for the traffic tests."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from typing import Any

from redraft.traffic.record import SamplingRecord, StepRecord, TeacherPosition, Timings, TrafficRecord

SAMPLING = SamplingRecord(
    temperature=0.8,
    top_k=0,
    top_p=0.95,
    min_p=0.0,
    repetition_penalty=1.0,
    presence_penalty=0.0,
    frequency_penalty=0.0,
    seed=None,
    coupling="maximal",
)


def record(request_id: str = "r0", **changes: Any) -> TrafficRecord:
    """The worked example of `redraft.traffic.record`: 3 tokens drafted, 1 accepted, 4 positions captured."""
    example = TrafficRecord(
        request_id=request_id,
        sample_index=0,
        created_unix_s=1_795_527_000.0,
        tenant="t",
        model="demo",
        target_fingerprint="sha256:1",
        tokenizer_fingerprint="sha256:2",
        draft_version="d-1",
        prompt_token_ids=(1, 2),
        output_token_ids=(7, 8, 9, 3),
        finish_reason="length",
        sampling=SAMPLING,
        timings=Timings(queue_s=0.5, ttft_s=1.0, decode_s=2.0),
        steps=(StepRecord(2, (9, 4, 5), 1, "draft_model", "d-1"),),
        teacher=tuple(
            TeacherPosition(index, context, ids=(9, 3), logits=(1.5, 0.25), logsumexp=2.0)
            for index, context in ((2, ()), (3, ()), (4, (4,)), (5, (4, 5)))
        ),
    )
    return replace(example, **changes)


class Observer:
    """Counts like the metrics do; `settled` lets a test wait for a number of written or dropped records."""

    def __init__(self) -> None:
        self.results: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.patterns: Counter[str] = Counter()
        self.shards: list[int] = []
        self.spool: tuple[int, float | None] = (0, None)
        self.upload_failures = 0
        self._changed = threading.Condition()

    def observe_traffic_records(self, result: str, count: int) -> None:
        with self._changed:
            self.results[result] += count
            self._changed.notify_all()

    def observe_traffic_dropped(self, reason: str, count: int) -> None:
        self.reasons[reason] += count

    def observe_traffic_redacted(self, pattern: str, count: int) -> None:
        self.patterns[pattern] += count

    def observe_traffic_flush(self, num_bytes: int, seconds: float, unix_s: float) -> None:
        self.shards.append(num_bytes)

    def set_traffic_spool(self, num_bytes: int, oldest_unix_s: float | None) -> None:
        self.spool = (num_bytes, oldest_unix_s)

    def observe_traffic_upload_failure(self) -> None:
        with self._changed:
            self.upload_failures += 1
            self._changed.notify_all()

    def wait_for_failures(self, count: int) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.upload_failures >= count, timeout=20)

    def wait_for(self, result: str, count: int) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self.results[result] >= count, timeout=20)
