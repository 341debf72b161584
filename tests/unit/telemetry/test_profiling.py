"""Ranges reach the profiler exactly while one is asked for."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from redraft.telemetry.profiling import profile_range, profiled_by


class Trace:
    def __init__(self) -> None:
        self.events: list[str] = []

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        self.events.append(f"+{name}")
        yield
        self.events.append(f"-{name}")


def test_ranges_are_recorded_only_inside_the_block() -> None:
    trace = Trace()
    with profile_range("before"):
        pass
    with profiled_by(trace.range), profile_range("step"), profile_range("verify"):
        pass
    with profile_range("after"):
        pass
    assert trace.events == ["+step", "+verify", "-verify", "-step"]


def test_an_error_ends_the_profile_and_an_outer_one_goes_on() -> None:
    outer, inner = Trace(), Trace()
    with profiled_by(outer.range):
        with pytest.raises(RuntimeError), profiled_by(inner.range):
            raise RuntimeError
        with profile_range("step"):
            pass
    assert outer.events == ["+step", "-step"]
    assert inner.events == []


def test_off_costs_no_object() -> None:
    assert profile_range("a") is profile_range("b")


@pytest.mark.parametrize(
    "modules",
    [
        "redraft.telemetry.metrics, redraft.telemetry.exporter, redraft.telemetry.logging, redraft.telemetry.profiling",
        "redraft.traffic.writer, redraft.traffic.reader, redraft.traffic.retention, redraft.traffic.redaction",
    ],
)
def test_neither_telemetry_nor_traffic_imports_torch(modules: str) -> None:
    code = f"import sys, {modules}\nraise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
