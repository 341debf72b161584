"""The engine's promises to its callers: every request ends exactly once, with the right reason and sums that add up."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from redraft.sampling.params import SamplingParams, StoppingParams
from redraft_server.engine.api import (
    DuplicateRequestId,
    EngineEvent,
    EngineRequest,
    EngineUnavailable,
    FinishReason,
    QueueFull,
    RequestFinished,
    RequestTooLarge,
)
from redraft_server.engine.engine import Engine
from tests.engine_harness import WAIT_S, Collected, EngineSpec, generate, make_proposer, request, running_engine
from tests.fakes import EOS_ID

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95)
PROMPT = tuple(range(5, 25))


class Acting(Collected):
    """A sink that does something, on the engine's thread, when its n-th delivery comes."""

    def __init__(self, action: Callable[[], object], at: int = 1) -> None:
        super().__init__()
        self.action, self.at, self.deliveries = action, at, 0

    def __call__(self, events: list[EngineEvent]) -> None:
        super().__call__(events)
        self.deliveries += 1
        if self.deliveries == self.at:
            self.action()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """The engine stands between two steps, so that what is submitted meanwhile waits."""
    entered, go = threading.Event(), threading.Event()

    def stand() -> None:
        entered.set()
        assert go.wait(WAIT_S)

    future = engine.between_steps(stand)
    assert entered.wait(WAIT_S)
    try:
        yield
    finally:
        go.set()
        future.result(WAIT_S)


def submit(engine: Engine, one: EngineRequest, sink: Collected | None = None) -> Collected:
    sink = sink or Collected()
    engine.submit(one, sink)
    return sink


def check_identities(collected: Collected, n: int = 1) -> None:
    finished = collected.finished
    stats = finished.speculation
    assert collected.events[-1] is finished
    assert sum(isinstance(e, RequestFinished) for e in collected.events) == 1
    assert finished.completion_tokens == sum(len(collected.token_ids(i)) for i in range(n))
    assert finished.completion_tokens == stats.accepted_tokens + stats.verify_steps - stats.truncated_tokens
    assert sum(stats.acceptance_histogram) == stats.spec_steps
    assert sum(j * count for j, count in enumerate(stats.acceptance_histogram)) == stats.accepted_tokens
    assert stats.spec_steps <= stats.verify_steps
    assert stats.accepted_tokens <= stats.draft_tokens
    assert stats.expected_acceptance_positions <= stats.draft_tokens
    for index in range(n):
        assert [d.finish_reason for d in collected.deltas(index)[:-1]] == [None] * (len(collected.deltas(index)) - 1)
        assert collected.finish_reason(index) is not None


# -- ends ------------------------------------------------------------------------------------------------------


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
        running = submit(engine, request(PROMPT, GREEDY), Acting(lambda: engine.cancel(waiting.request_id)))
        sink = submit(engine, waiting).wait()
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


# -- samples and the prefix cache ------------------------------------------------------------------------------


def test_samples_differ_share_the_prompt_and_are_each_the_seeds_own() -> None:
    seeded = replace(SAMPLED, seed=7)
    with running_engine(EngineSpec(proposer="self")) as engine:
        used = engine.scheduler.pool.num_blocks - engine.scheduler.pool.num_free
        assert used == 0
        [three] = generate(engine, [request(PROMPT, seeded, 12, n=3)])
        texts = [tuple(three.token_ids(i)) for i in range(3)]
        assert len(set(texts)) == 3
        check_identities(three, 3)
        assert three.finished.completion_tokens == 36
        assert three.finished.speculation.accepted_tokens == three.finished.speculation.draft_tokens > 0
        [again] = generate(engine, [request(PROMPT, seeded, 12, n=3)])
        assert [tuple(again.token_ids(i)) for i in range(3)] == texts
        [unseeded, other] = generate(engine, [request(PROMPT, SAMPLED, 12), request(PROMPT, SAMPLED, 12)])
        assert unseeded.token_ids() != other.token_ids()


def test_siblings_use_the_first_ones_prompt_blocks() -> None:
    tables: list[list[list[int]]] = []
    with running_engine(EngineSpec(proposer="none")) as engine:
        sink = Acting(lambda: tables.append([list(c.state.block_ids) for c in engine.scheduler.running]), at=4)
        submit(engine, request(PROMPT, SAMPLED, 12, n=3), sink).wait()
    prompt_blocks = [table[: (len(PROMPT) - 1) // 4] for table in tables[0]]
    assert len(prompt_blocks) == 3
    assert prompt_blocks[0] == prompt_blocks[1] == prompt_blocks[2]


def test_siblings_of_a_completion_that_ends_with_its_first_token_still_run() -> None:
    with running_engine() as engine:
        [sink] = generate(engine, [request(PROMPT, SAMPLED, 1, n=4)])
        assert [len(sink.token_ids(i)) for i in range(4)] == [1] * 4
        check_identities(sink, 4)


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_prefix_hit_has_the_drafts_kv_too(prefix_cache: bool) -> None:
    """The target drafting for itself is always right, so one wrong or missing slot of its KV shows."""
    with running_engine(EngineSpec(proposer="self", prefix_cache=prefix_cache)) as engine:
        for number in range(3):
            params = replace(SAMPLED, seed=number) if number else GREEDY
            [sink] = generate(engine, [request(PROMPT, params, 24)])
            stats = sink.finished.speculation
            assert stats.accepted_tokens == stats.draft_tokens > 0
            assert stats.expected_acceptance_sum == pytest.approx(stats.expected_acceptance_positions, abs=1e-4)
            hits = (len(PROMPT) - 1) // 4 * 4 if prefix_cache and number else 0
            assert sink.finished.cached_prompt_tokens == hits


def test_a_prefix_left_by_a_request_without_speculation_is_made_up_for() -> None:
    with running_engine(EngineSpec(proposer="self")) as engine:
        generate(engine, [request(PROMPT, GREEDY, 8, speculation=False)])
        [sink] = generate(engine, [request(PROMPT, GREEDY, 24)])
        assert sink.finished.cached_prompt_tokens > 0
        assert sink.finished.speculation.accepted_tokens == sink.finished.speculation.draft_tokens > 0


def test_a_multi_turn_prompt_hits_its_earlier_completion() -> None:
    with running_engine(EngineSpec(proposer="self")) as engine:
        [turn] = generate(engine, [request(PROMPT, GREEDY, 17)])
        longer = (*PROMPT, *turn.token_ids(), 9, 9)
        [next_turn] = generate(engine, [request(longer, GREEDY, 12)])
        assert next_turn.finished.cached_prompt_tokens >= len(PROMPT) + 12
        assert next_turn.finished.speculation.accepted_tokens == next_turn.finished.speculation.draft_tokens > 0
    with running_engine(EngineSpec(proposer="none", prefix_cache=False)) as plain:
        assert generate(plain, [request(longer, GREEDY, 12)])[0].token_ids() == next_turn.token_ids()


# -- sums ------------------------------------------------------------------------------------------------------


def metric(registry: CollectorRegistry, name: str, **labels: str) -> float:
    """Sum over all series of a sample name that have these labels."""
    samples = [s for family in registry.collect() for s in family.samples if s.name == name]
    return sum(s.value for s in samples if labels.items() <= s.labels.items())


@pytest.mark.parametrize("proposer", ["none", "ngram", "draft", "self", "ngram+draft"])
def test_counters_are_the_sum_over_requests(proposer: str) -> None:
    registry, rng = CollectorRegistry(), random.Random(3)
    with running_engine(EngineSpec(proposer=proposer, k=4, max_running=6, num_blocks=64), registry=registry) as engine:
        requests = []
        for number in range(16):
            stopping = StoppingParams(max_new_tokens=rng.randint(1, 24), stop_token_ids=frozenset({20, 21, 22}))
            prompt = [rng.randrange(3, 64) for _ in range(rng.randint(1, 30))] * rng.randint(1, 2)
            params = [GREEDY, SAMPLED, replace(SAMPLED, seed=number)][number % 3]
            requests.append(request(prompt, params, stopping=stopping, n=1 + (number % 4 == 0)))
        done = generate(engine, requests)
        live = [d.finished for d in done]
        for one, sink in zip(requests, done, strict=True):
            check_identities(sink, one.n)
        gaps = sum(max(0, len([d for d in s.deltas(i) if d.token_ids]) - 1) for s in done for i in range(2))
        assert metric(registry, "redraft_inter_token_latency_seconds_count") == gaps
    stats = [one.speculation for one in live]
    prefix = "redraft_spec_decode_"
    assert metric(registry, f"{prefix}num_drafts_total") == sum(s.spec_steps for s in stats)
    assert metric(registry, f"{prefix}num_draft_tokens_total") == sum(s.draft_tokens for s in stats)
    assert metric(registry, f"{prefix}num_accepted_tokens_total") == sum(s.accepted_tokens for s in stats)
    assert metric(registry, f"{prefix}num_accepted_tokens_per_pos_total") == sum(s.accepted_tokens for s in stats)
    assert metric(registry, f"{prefix}expected_acceptance_positions_total") == sum(
        s.expected_acceptance_positions for s in stats
    )
    assert metric(registry, f"{prefix}expected_acceptance_sum_total") == pytest.approx(
        sum(s.expected_acceptance_sum for s in stats)
    )
    skipped = metric(registry, f"{prefix}skipped_steps_total")
    assert skipped + sum(s.spec_steps for s in stats) == sum(s.verify_steps for s in stats)
    if proposer != "none":
        assert any(s.truncated_tokens for s in stats) or proposer != "self", "no stop in the middle of a run"


def test_drafting_time_of_a_mixed_batch_is_the_draft_models() -> None:
    registry = CollectorRegistry()
    with running_engine(EngineSpec(proposer="ngram+draft"), registry=registry) as engine:
        generate(engine, [request([5, 6, 7] * 6, GREEDY), *(request([n, n + 1], GREEDY) for n in range(9, 13))])
    assert metric(registry, "redraft_spec_decode_num_drafts_total", draft_version="ngram") > 0
    assert metric(registry, "redraft_draft_step_seconds_count", draft_version="draft-11") > 0


def test_load_returns_to_nothing() -> None:
    registry = CollectorRegistry()
    with running_engine(EngineSpec(num_blocks=16, max_running=4), registry=registry) as engine:
        generate(engine, [request(PROMPT, GREEDY, 30) for _ in range(4)])
        engine.between_steps(lambda: None).result(WAIT_S)
        assert metric(registry, "redraft_preemptions_total") > 0
    assert metric(registry, "redraft_requests_running") == 0
    assert metric(registry, "redraft_requests_waiting") == 0
    assert metric(registry, "redraft_kv_cache_free_blocks") == 16


def test_logprobs_belong_to_the_emitted_tokens() -> None:
    with running_engine(EngineSpec(proposer="self", k=4)) as engine:
        [plain, scored] = generate(
            engine, [request(PROMPT, GREEDY, 11), request(PROMPT, GREEDY, 11, logprobs=2, prompt_logprobs=1)]
        )
    logprobs = [score for delta in scored.deltas() for score in delta.logprobs]
    assert [score.token_id for score in logprobs] == scored.token_ids() == plain.token_ids()
    assert all(score.rank == 1 and score.top[0][0] == score.token_id for score in logprobs)
    prompt_scores = scored.finished.prompt_logprobs
    assert prompt_scores is not None
    assert [score and score.token_id for score in prompt_scores] == [None, *PROMPT[1:]]


def test_end_of_text_and_minimum_length() -> None:
    bias = replace(GREEDY, logit_bias=((EOS_ID, 100.0),))
    with running_engine() as engine:
        stopping = StoppingParams(max_new_tokens=9, min_new_tokens=5)
        [sink, at_once] = generate(
            engine, [request(PROMPT, bias, stopping=stopping), request(PROMPT, bias, stopping=StoppingParams())]
        )
    assert (sink.finish_reason(), len(sink.token_ids())) == (FinishReason.EOS, 6)
    assert (at_once.finish_reason(), at_once.token_ids(), at_once.text()) == (FinishReason.EOS, [EOS_ID], "")


# -- faults ----------------------------------------------------------------------------------------------------


def fail_times(monkeypatch: pytest.MonkeyPatch, engine: Engine, times: int) -> None:
    target = engine._parts.target
    forward, left = target.forward, [times]

    def failing(chunks: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise RuntimeError("out of memory")
        return forward(chunks)

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


def test_a_broken_sink_ends_its_own_request_only() -> None:
    class Broken(Acting):
        def __init__(self) -> None:
            super().__init__(self._raise, at=2)

        def _raise(self) -> None:
            raise RuntimeError("the reader is gone")

    with running_engine() as engine:
        with held(engine):
            broken = submit(engine, request(PROMPT, GREEDY, 200), Broken())
            healthy = submit(engine, request(PROMPT, GREEDY, 30))
        assert healthy.wait().finish_reason() is FinishReason.LENGTH
        assert engine.between_steps(engine.num_unfinished).result(WAIT_S) == 0
        assert isinstance(broken, Broken)
        assert broken.deliveries == 2
        assert engine.is_ready


# -- between steps ---------------------------------------------------------------------------------------------


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
