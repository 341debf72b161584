"""What clients are told about speculation adds up, exactly, to what /metrics says."""

from __future__ import annotations

import asyncio
import subprocess
from dataclasses import dataclass
from urllib.request import urlopen

import pytest

from redraft_client.types import GenerateParams, GenerationResult, SpeculationStats
from redraft_server.engine import api
from tests.engine_harness import EngineSpec
from tests.ops.charts import require
from tests.served_engine import Served, served_engine

SPEC = EngineSpec("ngram+draft", k=4, max_running=32, num_blocks=256, max_catch_up=64)
PREFIX = "redraft_spec_decode_"
REPEATING = "abab abab abab ab"


@dataclass(frozen=True)
class Request:
    prompt: str
    params: GenerateParams


def requests() -> list[Request]:
    """Every way to draft, and every way to end: by length, end of text, stop string, stop token, several samples."""
    plain: list[GenerateParams] = [
        {"temperature": 0.0},
        {"temperature": 0.0, "speculation": False},
        {"temperature": 1.0, "max_draft_tokens": 1},
        {"temperature": 0.8, "top_p": 0.9, "seed": 5},
        {"temperature": 1.2, "n": 4},
        {"temperature": 1.0, "n": 3, "seed": 9, "stop_sequences": ["a", "e 1", "!"]},
        {"temperature": 1.5, "stop_token_ids": [7, 9, 12, 15, 30], "n": 2},
        {"temperature": 1.0, "ignore_eos": False, "logit_bias": {0: 3.0}, "n": 2},
        {"temperature": 1.0, "logprobs": 2, "presence_penalty": 0.5, "max_draft_tokens": 0},
        {"temperature": 0.9, "min_new_tokens": 8, "stop_sequences": ["b", "c"]},
    ]
    defaults: GenerateParams = {"max_new_tokens": 20, "ignore_eos": True}
    prompts = (REPEATING, "hello there", "one two three one two")
    return [Request(prompt, {**defaults, **params}) for params in plain for prompt in prompts]


async def run_all(served: Served) -> list[GenerationResult]:
    gate = asyncio.Semaphore(12)

    async def one(index: int, request: Request) -> GenerationResult:
        async with gate:
            if index % 2:
                return await served.client.generate(request.prompt, **request.params)
            stream = served.client.stream(request.prompt, **request.params)
            async for _ in stream:
                pass
            return stream.result

    return await asyncio.gather(*(one(index, request) for index, request in enumerate(requests())))


def assert_counters_equal(served: Served, stats: list[SpeculationStats] | list[api.SpeculationStats]) -> None:
    """Sums of per-request statistics against the counters; only the sum of floats is compared up to rounding."""
    for name, total in {
        "num_drafts_total": sum(one.spec_steps for one in stats),
        "num_draft_tokens_total": sum(one.draft_tokens for one in stats),
        "num_accepted_tokens_total": sum(one.accepted_tokens for one in stats),
        "num_draft_tokens_per_pos_total": sum(one.draft_tokens for one in stats),
        "num_accepted_tokens_per_pos_total": sum(one.accepted_tokens for one in stats),
        "expected_acceptance_positions_total": sum(one.expected_acceptance_positions for one in stats),
        "skipped_steps_total": sum(one.verify_steps - one.spec_steps for one in stats),
        "accepted_length_count": sum(one.spec_steps for one in stats),
        "accepted_length_sum": sum(one.accepted_tokens for one in stats),
    }.items():
        assert served.metric(PREFIX + name) == total, name
    expected = sum(one.expected_acceptance_sum for one in stats)
    assert served.metric(PREFIX + "expected_acceptance_sum_total") == pytest.approx(expected, rel=1e-9)
    for position in range(SPEC.k):
        at_least = sum(sum(one.acceptance_histogram[position + 1 :]) for one in stats)
        assert by_position(served, position) == at_least, position


def by_position(served: Served, position: int) -> float:
    return sum(
        sample.value
        for family in served.registry.collect()
        for sample in family.samples
        if sample.name == PREFIX + "num_accepted_tokens_per_pos_total" and sample.labels["position"] == str(position)
    )


def assert_consistent(result: GenerationResult) -> None:
    stats = result.speculation
    emitted = stats.accepted_tokens + stats.verify_steps - stats.truncated_tokens
    assert result.usage.completion_tokens == emitted
    assert sum(stats.acceptance_histogram) == stats.spec_steps
    assert sum(i * count for i, count in enumerate(stats.acceptance_histogram)) == stats.accepted_tokens
    assert stats.accepted_tokens <= stats.draft_tokens <= stats.spec_steps * stats.max_draft_tokens
    assert 0 <= stats.expected_acceptance_sum <= stats.expected_acceptance_positions <= stats.draft_tokens


async def test_sum_over_clients_equals_the_counters() -> None:
    async with served_engine(SPEC) as served:
        results = await run_all(served)
        await served.idle()
        for result in results:
            assert_consistent(result)
        assert_counters_equal(served, [result.speculation for result in results])
        usage = [result.usage for result in results]
        assert served.metric("redraft_generation_tokens_total") == sum(one.completion_tokens for one in usage)
        assert served.metric("redraft_prompt_tokens_total") == sum(one.prompt_tokens for one in usage)
        assert served.metric("redraft_cached_prompt_tokens_total") == sum(one.cached_prompt_tokens for one in usage)
        assert served.metric("redraft_requests_total") == len(results)
    # the mix must have exercised what is compared
    assert any(result.speculation.truncated_tokens for result in results)
    assert any(result.speculation.accepted_tokens for result in results)
    assert {result.speculation.draft_version for result in results} >= {"", "ngram"}
    assert len({choice.finish_reason for result in results for choice in result.choices}) == 3


async def test_each_draft_version_has_its_own_counters() -> None:
    async with served_engine(SPEC) as served:
        await run_all(served)
        await served.idle()
        versions = {
            sample.labels["draft_version"]: sample.value
            for family in served.registry.collect()
            for sample in family.samples
            if sample.name == PREFIX + "num_draft_tokens_total"
        }
    assert set(versions) == {"ngram", "draft-11"}
    assert all(versions.values())


async def test_cancelled_requests_count_for_what_they_did() -> None:
    """A client that leaves sees no figures; the engine's own account of its request closes the sum."""
    async with served_engine(SPEC) as served:
        results = await run_all(served)
        for index in range(12):
            stream = served.client.stream(REPEATING, max_new_tokens=200, ignore_eos=True, n=1 + index % 3)
            for _ in range(1 + index % 4):
                await anext(stream)
            await stream.aclose()
        await served.idle()
        assert len(served.finished) == len(results) + 12
        assert_counters_equal(served, [one.speculation for one in served.finished])
        for one in served.finished:
            stats = one.speculation
            assert one.completion_tokens == stats.accepted_tokens + stats.verify_steps - stats.truncated_tokens
        by_clients = sum(result.speculation.verify_steps for result in results)
        assert by_clients < sum(one.speculation.verify_steps for one in served.finished)


async def test_the_metrics_page_is_clean() -> None:
    promtool = str(require("promtool"))
    async with served_engine(SPEC) as served:
        await run_all(served)
        await served.idle()
        page = await asyncio.to_thread(fetch, f"http://{served.metrics_address}/metrics")
        command = [promtool, "check", "metrics"]
        checked = await asyncio.to_thread(subprocess.run, command, input=page, capture_output=True, timeout=30)
    assert b"redraft_spec_decode_num_drafts_total{" in page
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def fetch(url: str) -> bytes:
    with urlopen(url, timeout=10) as page:
        body: bytes = page.read()
        return body
