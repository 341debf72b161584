"""What the traffic log is given is what was streamed, and its teacher is what the target says."""

from __future__ import annotations

import math

import pytest
import torch
from prometheus_client import CollectorRegistry

from redraft.sampling.params import Coupling, SamplingParams, StoppingParams
from redraft.traffic.record import TrafficRecord
from redraft_server.engine.api import FinishReason
from redraft_server.engine.recorder import Recorder
from tests.engine_harness import TARGET_SEED, Acting, EngineSpec, generate, request, running_engine, submit
from tests.fakes import tiny_model

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(
    temperature=0.8, top_p=0.95, presence_penalty=0.5, logit_bias=((9, 1.0),), seed=3, coupling=Coupling.MAXIMAL
)
PROMPT = tuple(range(5, 20))
TOP_N = 4


class Log:
    """A `RecordSink` that keeps everything, unless told to fail."""

    def __init__(self, *, fails: bool = False) -> None:
        self.records: list[TrafficRecord] = []
        self.fails = fails

    def offer(self, record: TrafficRecord) -> bool:
        if self.fails:
            raise OSError("disk on fire")
        self.records.append(record)
        return True


def spec(proposer: str = "draft") -> EngineSpec:
    return EngineSpec(proposer=proposer, k=4, teacher_top_n=TOP_N)


def check_teacher(record: TrafficRecord) -> None:
    """Every position against a plain forward pass of transformers over the prefix that the record gives."""
    model = tiny_model("llama", vocab_size=64, seed=TARGET_SEED)
    for position in record.teacher:
        prefix = record.prefix_of(position)
        assert len(prefix) == len(record.prompt_token_ids) + position.output_index
        with torch.inference_mode():
            logits = model(torch.tensor([prefix])).logits[0, -1]
        best = logits.topk(TOP_N)
        torch.testing.assert_close(torch.tensor(position.logits), best.values, atol=1e-4, rtol=0)
        torch.testing.assert_close(logits[list(position.ids)], best.values, atol=1e-4, rtol=0)
        assert position.logsumexp == pytest.approx(float(logits.logsumexp(0)), abs=1e-4)


@pytest.mark.parametrize("proposer", ["none", "ngram", "draft", "ngram+draft"])
@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_teacher_is_the_targets_own_prediction_at_accepted_and_rejected_positions(
    proposer: str, params: SamplingParams
) -> None:
    log = Log()
    with running_engine(spec(proposer), sink=log) as engine:
        [sink] = generate(engine, [request([5, 6, 7] * 4, params, 16)])
    [record] = log.records
    check_teacher(record)
    drafted = sum(len(step.drafted_token_ids) for step in record.steps)
    assert len(record.teacher) == sink.finished.speculation.verify_steps + drafted
    on_path = [p.output_index for p in record.teacher if not p.context_drafted]
    assert sorted(on_path) == list(range(len(record.output_token_ids))), "each emitted token's prediction, once"
    if proposer != "none":
        assert any(position.context_drafted for position in record.teacher), "no rejected position was tested"


def test_teacher_is_right_when_a_stop_cuts_accepted_tokens_off() -> None:
    log = Log()
    with running_engine(spec("self"), sink=log) as engine:
        [plain] = generate(engine, [request(PROMPT, GREEDY, 24)])
        stop_at = plain.token_ids()[9]
        stopping = StoppingParams(max_new_tokens=24, stop_token_ids=frozenset({stop_at}), ignore_eos=True)
        [cut] = generate(engine, [request(PROMPT, GREEDY, stopping=stopping)])
    record = log.records[1]
    assert cut.finished.speculation.truncated_tokens > 0, "the stop fell on the end of a run: choose another"
    assert list(record.output_token_ids) == cut.token_ids()
    assert record.finish_reason == "stop_sequence"
    check_teacher(record)


def test_a_record_holds_what_was_streamed() -> None:
    log = Log()
    with running_engine(spec(), sink=log) as engine:
        seeded = SamplingParams(temperature=0.7, top_k=9, seed=2**64 - 1)
        one = request(PROMPT, seeded, 12, n=2, tenant="acme")
        [sink] = generate(engine, [one])
    stats = sink.finished.speculation
    assert sorted(record.sample_index for record in log.records) == [0, 1]
    for record in log.records:
        assert list(record.output_token_ids) == sink.token_ids(record.sample_index)
        assert (record.request_id, record.prompt_token_ids, record.tenant) == (one.request_id, PROMPT, "acme")
        assert (record.finish_reason, record.draft_version) == ("length", "draft-11")
        assert (record.sampling.seed, record.sampling.top_k) == (-1, 9), "the column is signed"
        assert record.sampling.coupling == "drafter_invariant"
        assert all(math.isfinite(t) and t >= 0 for t in (record.timings.ttft_s, record.timings.decode_s))
        for step in record.steps:
            accepted = step.drafted_token_ids[: step.num_accepted]
            assert record.output_token_ids[step.start : step.start + step.num_accepted] == accepted
    assert sum(len(step.drafted_token_ids) for r in log.records for step in r.steps) == stats.draft_tokens
    assert sum(step.num_accepted for r in log.records for step in r.steps) == stats.accepted_tokens


def test_an_opted_out_request_is_neither_recorded_nor_captured() -> None:
    log = Log()
    with running_engine(spec(), sink=log) as engine:
        work = []
        original = engine.scheduler.schedule
        engine.scheduler.schedule = lambda: work.extend(plan := original()) or plan  # type: ignore[method-assign,func-returns-value]
        generate(engine, [request(PROMPT, GREEDY, 8, log_traffic=False)])
    assert log.records == []
    assert {scheduled.work.teacher_top_n for scheduled in work} == {0}


def test_a_cancelled_request_is_recorded_as_far_as_it_came() -> None:
    log = Log()
    with running_engine(spec(), sink=log) as engine:
        one = request(PROMPT, GREEDY, 200)
        sink = submit(engine, one, Acting(lambda: engine.cancel(one.request_id), at=3)).wait()
    [record] = log.records
    assert sink.finish_reason() is FinishReason.CANCELLED
    assert record.finish_reason == "cancelled"
    assert list(record.output_token_ids) == sink.token_ids()
    check_teacher(record)


def test_a_preempted_request_is_recorded_once_and_whole() -> None:
    log, registry = Log(), CollectorRegistry()
    small = EngineSpec(proposer="draft", k=3, num_blocks=16, teacher_top_n=TOP_N)
    with running_engine(small, sink=log, registry=registry) as engine:
        sinks = generate(engine, [request([n, *PROMPT], GREEDY, 30) for n in range(3, 6)])
    assert registry.get_sample_value("redraft_preemptions_total", {"model": "tiny"})
    assert len(log.records) == 3
    streamed = {tuple(sink.token_ids()) for sink in sinks}
    assert {record.output_token_ids for record in log.records} == streamed
    check_teacher(log.records[-1])


@pytest.mark.parametrize("where", ["sink", "record"])
def test_a_record_that_cannot_be_made_is_counted_and_hurts_nobody(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log, registry = Log(fails=where == "sink"), CollectorRegistry()
    if where == "record":

        def broken(*_: object) -> None:
            raise ValueError("parts contradict each other")

        monkeypatch.setattr(Recorder, "_build", broken)
    with running_engine(spec(), sink=log, registry=registry) as engine:
        for _ in range(2):
            assert generate(engine, [request(PROMPT, GREEDY, 6)])[0].finish_reason() is FinishReason.LENGTH
        assert engine.is_ready
    assert registry.get_sample_value("redraft_traffic_log_dropped_total", {"reason": "invalid_record"}) == 2
    assert registry.get_sample_value("redraft_traffic_log_records_total", {"result": "dropped"}) == 2
