"""What comes out: samples, prefix hits that keep the draft's KV, log-probabilities, and sums that add up."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from redraft.sampling.params import Coupling, SamplingParams, StoppingParams
from redraft_server.engine.api import (
    FinishReason,
)
from tests.engine_harness import WAIT_S, Acting, EngineSpec, check_identities, generate, request, running_engine, submit
from tests.fakes import EOS_ID

GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.8, top_p=0.95)
PROMPT = tuple(range(5, 25))


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
            seeded = replace(SAMPLED, seed=number)
            params = [GREEDY, seeded, replace(seeded, coupling=Coupling.MAXIMAL)][number % 3]
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
