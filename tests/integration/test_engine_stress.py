"""Many requests that come, go, run late and vanish: nothing is lost and everything is given back."""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass
from functools import partial

import pytest

from redraft.sampling.params import SamplingParams
from redraft_server.engine.api import EngineRequest, FinishReason, RequestFinished
from redraft_server.engine.engine import Engine
from tests.engine_harness import WAIT_S, Acting, Collected, EngineSpec, request, running_engine

NUM_REQUESTS = 64
ROUNDS = 3


@dataclass(frozen=True)
class Client:
    request: EngineRequest
    sink: Collected
    allowed: frozenset[FinishReason]


def clients(engine: Engine, rng: random.Random) -> list[Client]:
    """Half leave (some at once), a quarter have little time, a quarter want everything."""
    made = []
    for number in range(NUM_REQUESTS):
        prompt = [rng.randrange(3, 64) for _ in range(rng.randint(1, 60))]
        params = SamplingParams(temperature=0.8, seed=number if number % 3 else None)
        deadline = time.monotonic() + rng.uniform(0.0, 0.5) if number % 4 == 1 else None
        one = request(prompt, params, rng.randint(1, 20), n=rng.choice([1, 1, 1, 2]), deadline=deadline)
        if number % 2 == 0:
            leaving = Acting(partial(engine.cancel, one.request_id), at=rng.randint(0, 6))
            made.append(Client(one, leaving, frozenset({FinishReason.CANCELLED, FinishReason.LENGTH})))
        elif deadline is not None:
            made.append(Client(one, Collected(), frozenset({FinishReason.DEADLINE, FinishReason.LENGTH})))
        else:
            made.append(Client(one, Collected(), frozenset({FinishReason.LENGTH})))
    return made


@pytest.mark.parametrize("proposer", ["draft", "ngram+draft"])
def test_everything_comes_back_after_a_crowd(proposer: str) -> None:
    rng = random.Random(8)
    with running_engine(EngineSpec(proposer=proposer, num_blocks=80)) as engine:
        free = engine.scheduler.pool.num_free
        reasons: list[FinishReason | None] = []
        for _ in range(ROUNDS):
            crowd = clients(engine, rng)
            threads = [threading.Thread(target=submit_all, args=(engine, crowd[part::4])) for part in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(WAIT_S)
            for client in crowd:
                client.sink.wait()
                got = {client.sink.finish_reason(index) for index in range(client.request.n)}
                assert got <= client.allowed
                reasons += got
                assert sum(isinstance(event, RequestFinished) for event in client.sink.events) == 1
            engine.between_steps(engine.scheduler.check_integrity).result(WAIT_S)
            assert engine.num_unfinished() == 0
            assert not engine.scheduler.running
            assert len(engine.scheduler.waiting) == 0
            assert engine.scheduler.pool.num_free == free
            assert engine.is_ready
        assert {FinishReason.CANCELLED, FinishReason.DEADLINE, FinishReason.LENGTH} <= set(reasons)


def submit_all(engine: Engine, crowd: list[Client]) -> None:
    for client in crowd:
        engine.submit(client.request, client.sink)
        if isinstance(client.sink, Acting) and client.sink.at == 0:
            client.sink.action()
