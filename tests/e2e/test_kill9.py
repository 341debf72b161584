"""`kill -9` of a server that logs its traffic: every shard written before reads, what was in the making is named."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from redraft.models.tokenizer import load_tokenizer
from redraft.traffic.reader import Problem, TrafficReader
from redraft.traffic.record import TrafficRecord
from redraft_client.aio import AsyncClient
from redraft_client.errors import RedraftClientError
from redraft_client.types import Choice, Message
from scripts.server_process import ServerProcess
from tests.demo_models import DEMO
from tests.fixtures_prompts import HAND_WRITTEN

pytestmark = pytest.mark.model

TEACHER_TOP_N = 4
MIN_SHARDS = 4


async def traffic_until_killed(server: ServerProcess, root: Path) -> dict[tuple[str, int], Choice]:
    """Streams without end; SIGKILL once some shards are there. What clients got in full, by (request, sample)."""
    received: dict[tuple[str, int], Choice] = {}

    async def keep_asking(client: AsyncClient, worker: int) -> None:
        for turn in range(1000):
            stream = client.stream(
                [Message("user", HAND_WRITTEN[(worker + turn) % len(HAND_WRITTEN)])],
                request_id=f"{worker}-{turn}",
                max_new_tokens=12,
                seed=turn,
                n=1 + turn % 2,
                token_ids=True,
            )
            async for _ in stream:
                pass
            received.update({(stream.result.request_id, choice.index): choice for choice in stream.result.choices})

    async with AsyncClient(server.address) as client:
        await client.generate("not to be logged", max_new_tokens=4, request_id="private", exclude_from_traffic_log=True)
        workers = [asyncio.create_task(keep_asking(client, worker)) for worker in range(3)]
        async with asyncio.timeout(120):
            while len(list(root.rglob("*.parquet"))) < MIN_SHARDS:
                await asyncio.sleep(0.02)  # polling another process, which has no other way to tell
        await asyncio.to_thread(server.kill)
        for worker in workers:
            with contextlib.suppress(RedraftClientError):
                await worker
    return received


def read(root: Path) -> tuple[list[TrafficRecord], list[Problem]]:
    problems: list[Problem] = []
    return list(TrafficReader(str(root)).iter_records(on_problem=problems.append)), problems


async def test_every_finished_shard_reads(server_flags: list[str], tmp_path: Path) -> None:
    root = tmp_path / "traffic"
    flags = [
        *("--traffic_log.url", str(root), "--traffic_log.roll_bytes", "20000"),
        *("--traffic_log.teacher_top_n", str(TEACHER_TOP_N)),
    ]
    with ServerProcess([*server_flags, *flags]) as server:
        received = await traffic_until_killed(server, root)
    shards = sorted(root.rglob("*.parquet"))
    records, problems = read(root)
    assert len(shards) >= MIN_SHARDS
    assert {problem.kind for problem in problems} <= {"temporary"}
    assert TrafficReader(str(root)).scan().shards == len(shards)
    check_against_clients(records, received)
    check_capture(records)

    # A crash of the machine, rather than of the process, may also cut a shard that was already renamed.
    torn = shards[-1]
    lost = {key_of(record) for record in TrafficReader(str(root)).iter_records()}
    torn.write_bytes(torn.read_bytes()[:-100])
    kept, problems = read(root)
    assert [problem.path for problem in problems if problem.kind == "torn"] == [str(torn)]
    assert 0 < len(kept) < len(records)
    assert {key_of(record) for record in kept} < lost


def key_of(record: TrafficRecord) -> tuple[str, int]:
    return record.request_id, record.sample_index


def check_against_clients(records: list[TrafficRecord], received: dict[tuple[str, int], Choice]) -> None:
    """What clients got is what was recorded, once; the unfinished and the private are not there."""
    assert len({key_of(record) for record in records}) == len(records)
    assert "private" not in {record.request_id for record in records}
    tokenizer = load_tokenizer(DEMO)
    both = [(record, received[key_of(record)]) for record in records if key_of(record) in received]
    assert len(both) >= len(records) - 6  # the last turn of three workers, two samples each, may have missed its end
    for record, choice in both:
        assert record.output_token_ids == choice.token_ids
        assert record.finish_reason == choice.finish_reason.value
        assert tokenizer.decode(list(record.output_token_ids)) == choice.text
        assert any(text in tokenizer.decode(list(record.prompt_token_ids)) for text in HAND_WRITTEN)


def check_capture(records: list[TrafficRecord]) -> None:
    """Teacher rows at every verified position, with the drafts they belong to."""
    for record in records:
        assert record.model == "SmolLM2-135M-Instruct"
        assert record.sampling.seed == int(record.request_id.split("-")[1])
        verified = sum(len(step.drafted_token_ids) for step in record.steps)
        assert len(record.teacher) >= max(verified, 1)
        for position in record.teacher:
            assert len(position.ids) == TEACHER_TOP_N
            assert list(position.logits) == sorted(position.logits, reverse=True)
            assert position.logits[0] <= position.logsumexp
    assert any(record.steps for record in records)
