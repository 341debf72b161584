"""Many streams, most of them cut short: blocks come back, others notice nothing, memory stays flat."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import grpc.aio
import pytest

from redraft.speculation.state import SequenceState
from redraft.v1 import generation_pb2 as pb
from redraft.v1 import generation_pb2_grpc
from redraft_client.errors import DeadlineExceededError
from redraft_client.types import GenerateParams
from redraft_server.engine.request import Completion, Request
from redraft_server.rpc.call import GenerationCall
from redraft_server.rpc.mailbox import Mailbox
from tests.engine_harness import EngineSpec
from tests.served_engine import Served, served_engine

SPEC = EngineSpec("ngram+draft", k=3, max_running=16, num_blocks=128, max_batch_tokens=96, max_catch_up=64)
STREAMS, ROUNDS, WARM_UP_ROUNDS = 64, 10, 4
NUM_PROMPTS = 8
PER_REQUEST = (Request, Completion, SequenceState, GenerationCall, Mailbox)
MAX_GROWTH_BLOCKS = 3000
"""Of Python's small-object allocator, over the six rounds after the warm-up: below eight for each request, while one
that is kept alive holds about a hundred."""
MAX_GROWTH_RSS_BYTES = 24 * 2**20
"""What C++ may still be warming up; 384 requests that each leaked their KV would be more."""


@dataclass(frozen=True)
class Plan:
    """One stream: which prompt, and what happens to it."""

    prompt: int
    cancel_after: int | None  # messages read before the client leaves; None: never
    timeout: float | None


def plans(rng: random.Random) -> list[Plan]:
    """Half are cancelled, a quarter have deadlines that many will miss, a quarter are left alone."""
    made = []
    for index in range(STREAMS):
        prompt = rng.randrange(NUM_PROMPTS)
        if index % 2:
            made.append(Plan(prompt, rng.choice([0, 0, 1, 2, 4, 8]), None))
        elif index % 4:
            made.append(Plan(prompt, None, rng.choice([0.001, 0.02, 0.1, 0.3, 1.0])))
        else:
            made.append(Plan(prompt, None, None))
    rng.shuffle(made)
    return made


def params(prompt: int) -> GenerateParams:
    return {"seed": prompt, "max_new_tokens": 24, "ignore_eos": True, "n": 1 + prompt % 2}


def prompt_text(prompt: int) -> str:
    return f"prompt {prompt} " * (1 + prompt)


async def run(served: Served, plan: Plan) -> tuple[str, str | None]:
    """How the stream ended, and its text if it was complete."""
    stream = served.client.stream(prompt_text(plan.prompt), timeout=plan.timeout, **params(plan.prompt))
    try:
        if plan.cancel_after is not None:
            for _ in range(plan.cancel_after):
                if await anext(stream, None) is None:
                    break
            await stream.aclose()
            return "cancelled", None
        async for _ in stream:
            pass
    except DeadlineExceededError:
        assert plan.timeout is not None
        return "deadline", None
    return "complete", "|".join(choice.text for choice in stream.result.choices)


def live_objects() -> Counter[str]:
    gc.collect()
    return Counter(type(one).__name__ for one in gc.get_objects() if type(one) in PER_REQUEST)


@pytest.fixture
def left_behind() -> Callable[[], Counter[str]]:
    """Per-request objects that have come to stay since the test began (an earlier test's may still be around)."""
    before = live_objects()
    return lambda: live_objects() - before


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def test_cancelled_and_late_streams_leave_nothing_behind(left_behind: Callable[[], Counter[str]]) -> None:
    rng = random.Random(2)
    ends: Counter[str] = Counter()
    async with served_engine(SPEC) as served:
        pool = served.engine.scheduler.pool
        expected = [
            "|".join(c.text for c in (await served.client.generate(prompt_text(p), **params(p))).choices)
            for p in range(NUM_PROMPTS)
        ]
        memory: list[tuple[int, int]] = []
        for _ in range(ROUNDS):
            batch = plans(rng)
            for plan, (end, text) in zip(batch, await asyncio.gather(*(run(served, p) for p in batch)), strict=True):
                ends[end] += 1
                assert plan.timeout is not None or end == ("complete" if plan.cancel_after is None else "cancelled")
                assert text is None or text == expected[plan.prompt]
            await served.idle()
            assert pool.num_free == pool.num_blocks == SPEC.num_blocks
            await asyncio.wrap_future(served.engine.between_steps(served.engine.scheduler.check_integrity))
            assert not left_behind()
            memory.append((sys.getallocatedblocks(), resident_bytes()))
        codes = codes_of(served)
    assert set(codes) <= {"OK", "CANCELLED", "DEADLINE_EXCEEDED"}
    assert min(ends["cancelled"], ends["complete"], ends["deadline"]) >= ROUNDS, ends
    blocks, resident = zip(*memory[WARM_UP_ROUNDS - 1 :], strict=True)
    assert blocks[-1] - blocks[0] < MAX_GROWTH_BLOCKS, memory
    assert resident[-1] - resident[0] < MAX_GROWTH_RSS_BYTES, memory


def codes_of(served: Served) -> Counter[str]:
    codes: Counter[str] = Counter()
    for family in served.registry.collect():
        for sample in family.samples:
            if sample.name == "grpc_server_handled_total":
                codes[sample.labels["grpc_code"]] += int(sample.value)
    return codes


async def test_a_client_that_never_reads_costs_no_blocks_and_loses_nothing(
    left_behind: Callable[[], Counter[str]],
) -> None:
    """Its stream is far larger than what gRPC buffers; the engine finishes it all the same."""
    wide: GenerateParams = {
        "max_new_tokens": 100,
        "ignore_eos": True,
        "n": 8,
        "logprobs": 20,
        "token_ids": True,
        "seed": 1,
    }
    spec = replace(SPEC, num_blocks=512)
    async with served_engine(spec) as served:
        unread = served.client.stream("never read", **wide)
        other = await served.client.generate("somebody else", max_new_tokens=16, ignore_eos=True)
        assert other.usage.completion_tokens == 16
        async with asyncio.timeout(60):
            while len(served.finished) < 2:
                await asyncio.wrap_future(served.engine.between_steps(lambda: None))
        # finished in the engine while the client still has not asked for a single message
        assert served.engine.scheduler.pool.num_free == spec.num_blocks
        num_messages = 0
        async for _ in unread:
            num_messages += 1
        assert unread.result.usage.completion_tokens == 800
        assert all(len(choice.logprobs) == 100 for choice in unread.result.choices)
        assert num_messages < 100  # what piled up was merged
        same = await served.client.generate("never read", **wide)
        assert [c.token_ids for c in same.choices] == [c.token_ids for c in unread.result.choices]
    assert not left_behind()


@pytest.mark.parametrize("read_first", [False, True])
async def test_a_client_that_vanishes_ends_its_requests(read_first: bool) -> None:
    generation = pb.Generation(
        text="gone", stopping=pb.StoppingParams(max_new_tokens=256, ignore_eos=True), sampling=pb.SamplingParams(n=2)
    )
    async with served_engine(SPEC) as served:
        async with grpc.aio.insecure_channel(served.address) as channel:
            stub = generation_pb2_grpc.GenerationServiceStub(channel)
            calls = [stub.StreamGenerate(pb.StreamGenerateRequest(generation=generation)) for _ in range(6)]
            for call in calls:
                await (call.read() if read_first else call.initial_metadata())
            # the channel closes under the calls
        other = await served.client.generate("still here", max_new_tokens=16, ignore_eos=True)
        assert other.usage.completion_tokens == 16
        await served.idle()
        assert len(served.finished) == 7
        assert sum(one.completion_tokens < 512 for one in served.finished[:-1]) >= 5
        assert served.engine.scheduler.pool.num_free == SPEC.num_blocks
        assert codes_of(served) == {"CANCELLED": 6, "OK": 1}
