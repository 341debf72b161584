"""A request's beginning and end: admission, cancellation, deadlines, draining, and work between steps."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from redraft.sampling.params import SamplingParams
from redraft.transfer import Download
from redraft_server.engine.api import (
    DuplicateRequestId,
    EngineEvent,
    EngineUnavailable,
    FinishReason,
    QueueFull,
    RequestTooLarge,
)
from tests.engine_harness import (
    WAIT_S,
    Acting,
    Clock,
    Collected,
    EngineSpec,
    check_identities,
    generate,
    held,
    make_proposer,
    request,
    running_engine,
    submit,
)

GREEDY = SamplingParams(temperature=0.0)
PROMPT = tuple(range(5, 25))


def test_cancel_while_running_ends_at_the_next_step() -> None:
    with running_engine() as engine:
        one = request(PROMPT, GREEDY, 200)
        sink = submit(engine, one, Acting(lambda: engine.cancel(one.request_id), at=2)).wait()
        assert sink.finish_reason() is FinishReason.CANCELLED
        assert 2 <= sink.finished.completion_tokens <= 8
        check_identities(sink)
        assert engine.num_unfinished() == 0
        engine.cancel(one.request_id)
        engine.cancel("never heard of")
        assert generate(engine, [request(PROMPT, GREEDY, 4)])[0].finish_reason() is FinishReason.LENGTH


def test_cancel_while_waiting_never_runs() -> None:
    with running_engine(EngineSpec(max_running=1)) as engine:
        waiting = request(PROMPT, GREEDY)
        with held(engine):  # both are there before the first step
            running = submit(engine, request(PROMPT, GREEDY), Acting(lambda: engine.cancel(waiting.request_id)))
            sink = submit(engine, waiting)
        sink.wait()
        assert sink.finish_reason() is FinishReason.CANCELLED
        assert sink.finished.time_to_first_token_s is None
        assert sink.finished.completion_tokens == 0
        check_identities(sink)
        assert running.wait().finish_reason() is FinishReason.LENGTH


def test_cancel_right_after_submit_is_never_lost() -> None:
    with running_engine() as engine:
        with held(engine):
            one = request(PROMPT, GREEDY, 200)
            sink = submit(engine, one)
            engine.cancel(one.request_id)
        assert sink.wait().finish_reason() is FinishReason.CANCELLED
        assert sink.finished.completion_tokens == 0


def test_a_deadline_ends_running_and_waiting_requests() -> None:
    clock = Clock()
    with running_engine(EngineSpec(max_running=1), clock=clock) as engine:
        with held(engine):
            late = Acting(lambda: clock.advance(20.0), at=3)
            first = submit(engine, request(PROMPT, GREEDY, 200, deadline=1010.0), late)
            second = submit(engine, request(PROMPT, GREEDY, deadline=1019.0))
            third = submit(engine, request(PROMPT, GREEDY, 4, deadline=1021.0))
            past = submit(engine, request(PROMPT, GREEDY, deadline=999.0))
        assert first.wait().finish_reason() is FinishReason.DEADLINE
        assert first.finished.completion_tokens >= 3
        assert first.finished.total_s == 20.0
        assert second.wait().finish_reason() is FinishReason.DEADLINE
        assert second.finished.completion_tokens == 0
        assert past.wait().finish_reason() is FinishReason.DEADLINE
        assert third.wait().finish_reason() is FinishReason.LENGTH


def test_stop_ends_everything_and_refuses_more() -> None:
    with running_engine(EngineSpec(max_running=2)) as engine:
        with held(engine):
            sinks = [submit(engine, request(PROMPT, GREEDY, 200, n=n)) for n in (1, 2, 1)]
        stopper = threading.Thread(target=engine.stop, args=(WAIT_S,))
        stopper.start()
        stopper.join(WAIT_S)
        for sink, n in zip(sinks, (1, 2, 1), strict=True):
            assert {sink.wait().finish_reason(i) for i in range(n)} == {FinishReason.SHUTDOWN}
            check_identities(sink, n)
        assert not engine.is_ready
        with pytest.raises(EngineUnavailable):
            submit(engine, request(PROMPT, GREEDY))
        with pytest.raises(EngineUnavailable):
            engine.between_steps(lambda: None).result(WAIT_S)


def test_drain_refuses_new_requests_and_finishes_old_ones() -> None:
    with running_engine() as engine:
        sink = submit(engine, request(PROMPT, GREEDY, 40))
        engine.drain()
        for _ in range(2):
            with pytest.raises(EngineUnavailable) as refused:
                submit(engine, request(PROMPT, GREEDY))
            assert refused.value.reason == "SERVER_DRAINING"
            assert len(list(iter_traceback(refused.value))) <= 3, "a shared exception gathers every caller's frames"
        assert sink.wait().finish_reason() is FinishReason.LENGTH
        assert not engine.is_ready


def iter_traceback(error: BaseException) -> Iterator[Any]:
    traceback = error.__traceback__
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


# -- admission -------------------------------------------------------------------------------------------------


def test_a_live_id_is_refused_and_free_again_afterwards() -> None:
    with running_engine() as engine:
        one = request(PROMPT, GREEDY, 4)
        with held(engine):
            sink = submit(engine, one)
            with pytest.raises(DuplicateRequestId):
                submit(engine, one)
        sink.wait()
        assert submit(engine, one).wait().token_ids() == sink.token_ids()


def test_a_full_queue_says_when_to_retry() -> None:
    with running_engine(EngineSpec(max_running=1, max_waiting=2)) as engine:
        generate(engine, [request(PROMPT, GREEDY, 4)])
        with held(engine):
            sinks = [submit(engine, request(PROMPT, GREEDY, 4)) for _ in range(3)]
            with pytest.raises(QueueFull) as full:
                submit(engine, request(PROMPT, GREEDY))
            assert full.value.retry_after_s > 0
            assert engine.estimated_queue_delay_s() > 0
        assert [sink.wait().finish_reason() for sink in sinks] == [FinishReason.LENGTH] * 3
        assert engine.estimated_queue_delay_s() == 0


def test_the_queue_delay_is_that_of_the_requests_so_far() -> None:
    clock = Clock()
    with running_engine(EngineSpec(max_running=1), clock=clock) as engine:
        assert engine.estimated_queue_delay_s() == 0
        submit(engine, request(PROMPT, GREEDY, 4), Acting(lambda: clock.advance(8.0))).wait()
        with held(engine):
            sinks = [submit(engine, request(PROMPT, GREEDY, 4)) for _ in range(2)]
            assert engine.estimated_queue_delay_s() == 16.0
        for sink in sinks:
            sink.wait()


def test_what_can_never_fit_is_refused_naming_the_field() -> None:
    with running_engine(EngineSpec(num_blocks=8, max_running=2)) as engine:
        for one, field in ((request([5] * 32, GREEDY), "prompt"), (request([5], GREEDY, n=3), "n")):
            with pytest.raises(RequestTooLarge) as refused:
                submit(engine, one)
            assert refused.value.field == field
        [longest] = generate(engine, [request([5] * 31, GREEDY, 100)])
        assert longest.finish_reason() is FinishReason.LENGTH
        assert longest.finished.completion_tokens == 1


def test_between_steps_runs_on_the_engine_thread_and_hands_back_value_or_error() -> None:
    with running_engine() as engine:
        assert engine.between_steps(lambda: threading.current_thread().name).result(WAIT_S) == "redraft-engine"
        with pytest.raises(ZeroDivisionError):
            engine.between_steps(lambda: 1 // 0).result(WAIT_S)
        assert generate(engine, [request(PROMPT, GREEDY, 3)])[0].finish_reason() is FinishReason.LENGTH


def test_a_swapped_draft_is_the_one_that_counts() -> None:
    spec = EngineSpec(proposer="draft")
    with running_engine(spec) as engine:
        [before] = generate(engine, [request(PROMPT, GREEDY)])
        own = make_proposer(replace(spec, proposer="self"), engine._parts.target_cost, epoch=1)
        engine.replace_proposer(own, 1).result(WAIT_S)
        [after] = generate(engine, [request(PROMPT, GREEDY)])
    assert before.token_ids() == after.token_ids()
    assert (before.finished.speculation.draft_version, after.finished.speculation.draft_version) == (
        "draft-11",
        "draft-0",
    )
    stats = after.finished.speculation
    assert stats.accepted_tokens == stats.draft_tokens > 0


def test_a_step_is_told_of_while_the_device_is_at_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    with running_engine(EngineSpec(runs_ahead=True, proposer="none")) as engine:
        forward, wait = engine._parts.target.forward, Download.wait

        def enqueued(chunks: Any, drawn: Any = None) -> Any:
            happened.append("enqueued")
            return forward(chunks, drawn)

        def waited(self: Download) -> Any:
            happened.append("waited")
            return wait(self)

        class Reader(Collected):
            def __call__(self, events: list[EngineEvent]) -> None:
                happened.append("told")
                super().__call__(events)

        monkeypatch.setattr(engine._parts.target, "forward", enqueued)
        monkeypatch.setattr(Download, "wait", waited)
        submit(engine, request(PROMPT, GREEDY, 4), Reader()).wait()
    # nobody is told late, either: the last step has none after it
    assert happened == ["enqueued", "waited", *(["enqueued", "told", "waited"] * 3), "told"]
