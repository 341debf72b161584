"""The cost profile's arithmetic: floors, pairs, and shares of a real step."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks.cells import Cells
from benchmarks.engine.alternate import alternate
from benchmarks.engine.floors import Ceilings, Footprint
from benchmarks.engine.models import Models
from benchmarks.engine.page import write
from benchmarks.engine.share_clock import Probe, ShareClock
from benchmarks.engine.shares import FORWARDS, SHARES, Window, probes
from benchmarks.engine.spec_bench import ALL
from redraft.kernels.library import library
from redraft.models.draft_vocab import DraftVocab
from redraft.models.loader import load_model
from redraft.models.packed import pack_linears_int8
from redraft.models.ref import ModelKind, ModelRef
from redraft.models.runner import ModelRunner
from redraft.sampling.params import SamplingParams
from tests.engine_harness import Collected, EngineSpec, make_runner, request, running_engine
from tests.fakes import save_tiny, tiny_model

CEILINGS = Ceilings(bandwidth_gb_s=1.0, peak_gflop_s=1.0)


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class _Work:
    """Functions that take a known time on the clock they are given."""

    def __init__(self, clock: _Clock) -> None:
        self.clock = clock

    def outer(self) -> None:
        self.clock.now += 1.0
        self.inner()
        self.clock.now += 2.0

    def inner(self) -> None:
        self.clock.now += 10.0


def test_an_inner_share_is_not_counted_twice() -> None:
    now = _Clock()
    clock, work = ShareClock(now), _Work(now)
    with clock.watching([Probe("outer", _Work, ["outer"]), Probe("inner", work, ["inner"])]):
        work.outer()
        now.now += 100.0  # nobody's
        work.inner()
    assert clock.seconds == {"outer": 3.0, "inner": 20.0}
    assert clock.calls == {"outer": 1, "inner": 2}
    work.outer()
    assert "inner" not in vars(work)
    assert clock.seconds == {"outer": 3.0, "inner": 20.0}  # nothing is watched any more


def test_a_share_that_is_open_at_the_restart_counts_from_there() -> None:
    now = _Clock()
    clock = ShareClock(now)
    with clock.share("step"):
        now.now = 5.0
        clock.restart()
        now.now = 7.0
        assert clock.read() == {"step": 2.0}


def test_other_threads_are_not_counted() -> None:
    now = _Clock()
    clock, work = ShareClock(now), _Work(now)
    with clock.watching([Probe("inner", _Work, ["inner"])]):
        thread = threading.Thread(target=work.inner)
        thread.start()
        thread.join()
    assert not clock.seconds


def test_a_probe_of_what_is_gone_says_so() -> None:
    with pytest.raises(AttributeError, match="renamed"), ShareClock().watching([Probe("x", _Work, ["renamed"])]):
        pass


def test_pairs_alternate_and_are_compared_within_a_cycle() -> None:
    order: list[str] = []

    def run(name: str, speeds: dict[int, float]) -> Any:
        def at(cycle: int) -> float:
            order.append(f"{name}{cycle}")
            return speeds[cycle]

        return at

    pairs = alternate(run("off", {0: 10.0, 1: 20.0, 2: 40.0}), run("on", {0: 11.0, 1: 18.0, 2: 44.0}), 3)
    assert order == ["off0", "on0", "off0", "on0", "on1", "off1", "off2", "on2"]  # the first two warm up
    assert pairs.values()["ratio"] == 1.1
    assert pairs.values()["quartiles"] == [1.0, 1.1]


def _footprint(directory: Path, output_ids: Any = None, *, int8: bool = False) -> Footprint:
    loaded = load_model(ModelRef(ModelKind.DIRECTORY, str(directory)), progress=lambda _: None)
    if int8:
        assert pack_linears_int8(loaded.model, head=None) == 2 * 7 or library() is None
    runner = ModelRunner(loaded.model, num_blocks=4, block_size=4, vocab_size=64, output_ids=output_ids)
    return Footprint.of(loaded, runner)


def test_footprint_counts_every_matrix_once(tmp_path: Path) -> None:
    """hidden 32, 4 heads and 2 kv heads of 8, two layers, a head of 64 ids."""
    directory = save_tiny(tmp_path / "model")
    config = load_model(ModelRef(ModelKind.DIRECTORY, str(directory)), progress=lambda _: None).config
    layer = 32 * 8 * (4 + 2 + 2 + 4) + 3 * 32 * config.intermediate_size
    whole = _footprint(directory)
    assert whole == Footprint((2 * layer + 64 * 32) * 4, 2 * layer + 64 * 32, 2 * 2 * 2 * 8 * 4)
    small = _footprint(directory, DraftVocab(tuple(range(16))).tensor(), int8=True)
    assert small.products == 2 * layer + 16 * 32
    assert small.weight_bytes == (2 * layer if library() else 8 * layer) + 16 * 32 * 4


def test_the_floor_is_the_harder_of_the_two_limits() -> None:
    footprint = Footprint(weight_bytes=4_000_000, products=1_000_000, kv_bytes=1000)
    one = footprint.floor(batch=1, rows=1, context=99, ceilings=CEILINGS)
    assert (one.bound, round(one.seconds * 1e3, 3)) == ("memory", 4.1)
    many = footprint.floor(batch=4, rows=8, context=99, ceilings=CEILINGS)
    assert (many.bound, round(many.seconds * 1e3, 3)) == ("arithmetic", 64.0)


@pytest.mark.parametrize("proposer", ["none", "draft"])
def test_shares_of_a_real_step_add_up(proposer: str) -> None:
    spec = EngineSpec(proposer=proposer)
    clock = ShareClock()
    window = Window(clock, 2, lambda: 0.0)
    draft = make_runner(tiny_model("llama"), spec) if proposer == "none" else None
    with running_engine(spec) as engine:
        parts = engine._parts
        draft = draft or cast(Any, parts.proposer).runner
        models = SimpleNamespace(target=SimpleNamespace(runner=parts.target), draft=SimpleNamespace(runner=draft))
        with clock.watching(probes(cast(Models, models))):
            sinks = [_watched(window, f"r{index}") for index in range(2)]

            def submit_both() -> None:  # between two steps: neither may end before the other has begun
                for index, sink in enumerate(sinks):
                    engine.submit(request([5, 6, 7 + index], SamplingParams(temperature=0.0), 12), sink)

            engine.between_steps(submit_both).result()
            for sink in sinks:
                sink.wait()
    values = cast(dict[str, Any], window.values())
    assert set(values["shares"]) <= set(SHARES)
    assert abs(sum(values["shares"].values()) - 1.0) < 0.01
    assert 0 < values["steps"] <= 12
    assert all(values["shares"].get(name, 0.0) > 0.0 for name in FORWARDS[: 1 if proposer == "none" else 2])


def _watched(window: Window, request_id: str) -> Collected:
    class Sink(Collected):
        def __call__(self, events: Any) -> None:
            window.on_events(request_id, events)
            super().__call__(events)

    return Sink()


def test_page_shows_goals_and_warns_of_noise(tmp_path: Path) -> None:
    cells = Cells(tmp_path / "engine.json")
    times = {"quartiles_ms": [1.0, 2.0], "floor_ms": 1.0, "ratio": 1.5, "bound": "memory", "to_first": 1.0}
    limits = {"bandwidth_gb_s": 20.0, "peak_gflop_s": 90.0}
    identity = {"experiment": "forward", "model": "target", "batch": 1, "k": 1}
    cells.keep(identity, {"forward_ms": 1.5, **times, **limits, "other_cores": 0.9})
    pair = {"quartiles": [0.9, 1.0], "cycles": 4, "tokens_per_s": 9.0, "tokens_per_s_off": 10.0, "other_cores": 0.0}
    cells.keep({"experiment": "part", "part": "metrics", "streams": 16}, {**pair, "ratio": 0.995})
    cells.keep({"experiment": "speculation", "proposer": "draft", "streams": 8}, {**pair, "ratio": 0.9})
    text = write(cells, "models", "prompts").read_text()
    assert "0.99 reached" in text
    assert "BELOW" in text
    assert "1 cells were measured beside other busy processes" in text


def test_page_shows_spec_bench_by_task(tmp_path: Path) -> None:
    cells = Cells(tmp_path / "engine.json")
    values = {"quartiles": [1.0, 1.5], "decode_ratio": 1.5, "prompts": 4, "other_cores": 0.0}
    for temperature, ratio in ((0.0, 1.31), (0.7, 1.19)):
        for task in ("rag", ALL):
            identity = {"experiment": "spec_bench", "temperature": temperature, "proposer": "draft", "task": task}
            cells.keep(identity, {**values, "ratio": ratio})
    text = write(cells, "models", "prompts").read_text()
    assert "1.3 reached" in text
    assert "1.2 MISSED" in text
    assert text.count("| rag |") == 2
