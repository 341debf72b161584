"""A fault ends what it touched, and nothing else; and nobody is left without an end."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from redraft.sampling.params import SamplingParams
from redraft_server.engine.api import (
    EngineUnavailable,
    FinishReason,
)
from redraft_server.engine.engine import Engine
from tests.engine_harness import (
    WAIT_S,
    Acting,
    Collected,
    EngineSpec,
    check_identities,
    generate,
    held,
    request,
    running_engine,
    submit,
)

GREEDY = SamplingParams(temperature=0.0)
PROMPT = tuple(range(5, 25))


def fail_times(monkeypatch: pytest.MonkeyPatch, engine: Engine, times: int) -> None:
    target = engine._parts.target
    forward, left = target.forward, [times]

    def failing(chunks: Any, drawn: Any = None) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise RuntimeError("out of memory")
        return forward(chunks, drawn)

    monkeypatch.setattr(target, "forward", failing)


def test_a_failed_step_ends_its_requests_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_engine(EngineSpec(max_running=2)) as engine:
        fail_times(monkeypatch, engine, 1)
        with held(engine):
            sinks = [submit(engine, request(PROMPT, GREEDY, 4)) for _ in range(3)]
        assert [sink.wait().finish_reason() for sink in sinks] == [FinishReason.ERROR] * 2 + [FinishReason.LENGTH]
        error = sinks[0].finished.error
        assert error is not None
        assert "memory" not in error
        assert sinks[2].finished.error is None
        assert engine.is_ready
        assert engine.num_unfinished() == 0


def test_faults_between_good_steps_do_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_engine() as engine:
        for _ in range(4):
            fail_times(monkeypatch, engine, 1)
            assert generate(engine, [request(PROMPT, GREEDY, 4)])[0].finish_reason() is FinishReason.ERROR
            assert generate(engine, [request(PROMPT, GREEDY, 4)])[0].finish_reason() is FinishReason.LENGTH
        assert engine.is_ready


def test_three_faults_in_a_row_end_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_engine(EngineSpec(max_running=1)) as engine:
        fail_times(monkeypatch, engine, 99)
        with held(engine):
            sinks = [submit(engine, request(PROMPT, GREEDY)) for _ in range(5)]
        assert {sink.wait().finish_reason() for sink in sinks} == {FinishReason.ERROR}
        for sink in sinks:
            check_identities(sink)
        assert not engine.is_ready
        with pytest.raises(EngineUnavailable) as refused:
            submit(engine, request(PROMPT, GREEDY))
        assert refused.value.reason == "ENGINE_DEAD"


def test_a_request_that_arrives_while_the_engine_dies_ends_once(monkeypatch: pytest.MonkeyPatch) -> None:
    late = Collected()
    with running_engine(EngineSpec(max_running=1)) as engine:
        left = [3]

        def failing(chunks: Any, drawn: Any = None) -> Any:
            left[0] -= 1
            if left[0] == 0:
                engine.submit(request(PROMPT, GREEDY), late)  # admitted, but not yet begun when all are ended
            raise RuntimeError("out of memory")

        monkeypatch.setattr(engine._parts.target, "forward", failing)
        with held(engine):
            for _ in range(3):
                submit(engine, request(PROMPT, GREEDY))
        assert late.wait().finish_reason() is FinishReason.ERROR
        assert engine.between_steps(lambda: len(engine.scheduler.waiting)).result(WAIT_S) == 0
        check_identities(late)


def test_a_fault_outside_a_step_leaves_nobody_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_engine(EngineSpec(max_running=1)) as engine:

        def broken() -> None:
            raise RuntimeError("a bug")

        with held(engine):
            sinks = [submit(engine, request(PROMPT, GREEDY)) for _ in range(2)]
            monkeypatch.setattr(engine.scheduler, "schedule", broken)
            pending = engine.between_steps(lambda: 7)
        assert {sink.wait().finish_reason() for sink in sinks} == {FinishReason.ERROR}
        assert pending.result(WAIT_S) == 7
        with pytest.raises(EngineUnavailable):
            submit(engine, request(PROMPT, GREEDY))
        assert not engine.is_ready


def test_a_fault_while_delivering_ends_the_steps_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with running_engine() as engine:

        def broken(*_: object) -> None:
            raise RuntimeError("a bug")

        with monkeypatch.context() as patch:
            patch.setattr("redraft_server.engine.output.CompletionOutput.push", broken)
            assert generate(engine, [request(PROMPT, GREEDY)])[0].finish_reason() is FinishReason.ERROR
        assert generate(engine, [request(PROMPT, GREEDY)])[0].finish_reason() is FinishReason.LENGTH


@pytest.mark.parametrize("runs_ahead", [False, True])  # ahead of a device: the step it breaks in goes on without it
def test_a_broken_sink_ends_its_own_request_only(runs_ahead: bool) -> None:
    class Broken(Acting):
        def __init__(self) -> None:
            super().__init__(self._raise, at=2)

        def _raise(self) -> None:
            raise RuntimeError("the reader is gone")

    with running_engine(EngineSpec(runs_ahead=runs_ahead)) as engine:
        with held(engine):
            broken = submit(engine, request(PROMPT, GREEDY, 200), Broken())
            healthy = submit(engine, request(PROMPT, GREEDY, 30))
        assert healthy.wait().finish_reason() is FinishReason.LENGTH
        assert engine.between_steps(engine.num_unfinished).result(WAIT_S) == 0
        assert isinstance(broken, Broken)
        assert broken.deliveries == 2
        assert engine.is_ready


def test_logits_that_are_not_finite_end_their_own_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    poison = 63
    with running_engine(EngineSpec(proposer="none")) as engine:
        target = engine._parts.target
        forward = target.forward

        def poisoned(chunks: Any, drawn: Any = None) -> Any:
            logits = forward(chunks, drawn)
            row = 0
            for chunk in chunks:
                if poison in chunk.token_ids:
                    logits[row : row + chunk.num_logits] = float("nan")
                row += chunk.num_logits
            return logits

        monkeypatch.setattr(target, "forward", poisoned)
        healthy = replace(GREEDY, logit_bias=((poison, -100.0),))
        with held(engine):
            sick = submit(engine, request([*PROMPT, poison], healthy, 12, n=2))
            well = submit(engine, request(PROMPT, healthy, 12))
        assert [sick.wait().finish_reason(i) for i in range(2)] == [FinishReason.ERROR] * 2
        check_identities(sick, 2)
        assert well.wait().finish_reason() is FinishReason.LENGTH
        assert engine.is_ready
