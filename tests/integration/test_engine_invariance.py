"""One request, one text: whatever drafts, however many tokens, beside whom, in whichever pieces.

Greedy and seeded requests are compared token for token with a request alone on an engine without speculation, prefix
cache or chunking.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import pytest
from prometheus_client import CollectorRegistry

from redraft.sampling.params import SamplingParams
from redraft_server.engine.api import EngineEvent, EngineRequest
from tests.engine_harness import (
    DRAFT_A,
    DRAFT_B,
    Acting,
    Collected,
    EngineSpec,
    generate,
    make_proposer,
    request,
    running_engine,
    submit,
)

GREEDY = SamplingParams(temperature=0.0)
PROPOSERS = ("none", "ngram", "draft", "self", "ngram+draft")
NUM_TOKENS = 20
RUNS_AHEAD = pytest.mark.parametrize("runs_ahead", [False, True])  # the host of the device, as with a GPU
PLAIN = EngineSpec(proposer="none", prefix_cache=False, max_batch_tokens=512, max_running=1)


def seeded(seed: int) -> SamplingParams:
    return SamplingParams(temperature=0.8, top_p=0.95, seed=seed)


def batch(size: int = 16) -> list[EngineRequest]:
    """Prompts of many lengths, some alike at the start, some repetitive; greedy and seeded in turn."""
    rng = random.Random(5)
    shared = [rng.randrange(3, 64) for _ in range(17)]
    requests = []
    for number in range(size):
        own = [rng.randrange(3, 64) for _ in range(rng.randint(1, 20))]
        prompt = [shared + own, own, own * 3][number % 3]
        requests.append(request(prompt, GREEDY if number % 4 == 0 else seeded(number), NUM_TOKENS))
    return requests


@cache
def expected() -> tuple[tuple[int, ...], ...]:
    """Of `batch()`, one after the other, alone."""
    with running_engine(PLAIN) as engine:
        return tuple(tuple(generate(engine, [one])[0].token_ids()) for one in batch())


def check(done: Sequence[Collected], picked: Sequence[int] | None = None) -> None:
    for index, sink in zip(range(len(done)) if picked is None else picked, done, strict=True):
        assert tuple(sink.token_ids()) == expected()[index], f"request {index} has another text"


@pytest.mark.parametrize("k", range(1, 9))
@pytest.mark.parametrize("proposer", PROPOSERS[1:])
def test_any_draft_length_beside_others(proposer: str, k: int) -> None:
    picked = range(k % 4, 16, 4)
    with running_engine(EngineSpec(proposer=proposer, k=k)) as engine:
        check(generate(engine, [batch()[i] for i in picked]), picked)


@RUNS_AHEAD
@pytest.mark.parametrize("proposer", PROPOSERS)
@pytest.mark.parametrize("adaptive", [False, True])
def test_in_a_full_batch(proposer: str, adaptive: bool, runs_ahead: bool) -> None:
    with running_engine(EngineSpec(proposer=proposer, k=4, adaptive=adaptive, runs_ahead=runs_ahead)) as engine:
        check(generate(engine, batch()))


@pytest.mark.parametrize("proposer", PROPOSERS[1:])
def test_alone(proposer: str) -> None:
    with running_engine(EngineSpec(proposer=proposer, k=3)) as engine:
        for index in (0, 1, 2, 5):
            check(generate(engine, [batch()[index]]), [index])


@RUNS_AHEAD
@pytest.mark.parametrize("proposer", PROPOSERS)
def test_in_a_pool_so_small_that_sequences_are_preempted(proposer: str, runs_ahead: bool) -> None:
    registry = CollectorRegistry()
    spec = EngineSpec(proposer=proposer, num_blocks=40, runs_ahead=runs_ahead)
    with running_engine(spec, registry=registry) as engine:
        check(generate(engine, batch()))
    assert registry.get_sample_value("redraft_preemptions_total", {"model": "tiny"})


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_second_time_with_and_without_prefix_cache(prefix_cache: bool) -> None:
    with running_engine(EngineSpec(prefix_cache=prefix_cache, num_blocks=400)) as engine:
        for _ in range(2):
            done = generate(engine, batch())
            check(done)
        assert any(sink.finished.cached_prompt_tokens for sink in done) == prefix_cache


@pytest.mark.parametrize("chunk", [1, 3, 7, 17, 512])
def test_prompts_in_chunks_of_any_size(chunk: int) -> None:
    with running_engine(EngineSpec(max_batch_tokens=chunk, max_running=4)) as engine:
        check(generate(engine, batch(6)), range(6))


@RUNS_AHEAD
@pytest.mark.parametrize("seed", range(3))
def test_neighbours_that_leave_at_random_steps(seed: int, runs_ahead: bool) -> None:
    rng = random.Random(seed)
    with running_engine(EngineSpec(proposer="ngram+draft", num_blocks=64, runs_ahead=runs_ahead)) as engine:
        stayers: list[Collected] = []
        leavers: list[Collected] = []
        for one in batch():
            for _ in range(rng.randint(0, 2)):
                neighbour = request([rng.randrange(3, 64) for _ in range(rng.randint(1, 40))], seeded(1), 40)
                leave = partial(engine.cancel, neighbour.request_id)
                leavers.append(submit(engine, neighbour, Acting(leave, at=rng.randint(1, 8))))
            stayers.append(submit(engine, one))
        check([sink.wait() for sink in stayers])
        for leaver in leavers:
            leaver.wait()


@RUNS_AHEAD
@pytest.mark.parametrize("max_catch_up", [16, 999])
def test_drafts_swapped_at_every_step(max_catch_up: int, runs_ahead: bool) -> None:
    """Also while a new draft has not yet caught up with the text."""
    spec = EngineSpec(proposer="draft", k=4, max_catch_up=max_catch_up, runs_ahead=runs_ahead)
    registry = CollectorRegistry()
    with running_engine(spec, registry=registry) as engine:
        cost = engine._parts.target_cost
        variants = [
            replace(spec, draft_seed=DRAFT_B),
            replace(spec, proposer="none"),
            replace(spec, draft_seed=DRAFT_A),
            replace(spec, proposer="self"),
            replace(spec, proposer="ngram+draft", draft_seed=DRAFT_B),
        ]
        epochs = 0

        class Swapper(Collected):
            def __call__(self, events: list[EngineEvent]) -> None:
                nonlocal epochs
                super().__call__(events)
                epochs += 1
                engine.replace_proposer(make_proposer(variants[epochs % len(variants)], cost, epochs), epochs)

        done = [Swapper(), *(Collected() for _ in range(15))]
        for one, sink in zip(batch(), done, strict=True):
            engine.submit(one, sink)
        check([sink.wait() for sink in done])
    assert epochs >= len(variants)
    for version in (f"draft-{DRAFT_A}", f"draft-{DRAFT_B}", "draft-0") if max_catch_up == 999 else ():
        labels = {"model": "tiny", "draft_version": version}
        assert registry.get_sample_value("redraft_spec_decode_num_drafts_total", labels)
