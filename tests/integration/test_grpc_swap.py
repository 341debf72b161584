"""Drafts are exchanged under running streams, and nobody can tell from the text."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import replace

import pytest

from redraft.speculation.cost import StepCost
from redraft.speculation.proposer import Proposer
from redraft_client.types import GenerateParams, GenerationResult
from redraft_server.engine.engine import Engine
from tests.engine_harness import DRAFT_A, DRAFT_B, TARGET_SEED, EngineSpec, make_proposer
from tests.served_engine import Served, served_engine

SPEC = EngineSpec("none", k=4, max_running=16, num_blocks=256, max_batch_tokens=48, max_catch_up=64)
PROMPTS = ("hello there", "one two three one two", "abab abab abab ab", "x", "a long prompt, " * 6, "q: why? a: ")
SAMPLING: GenerateParams = {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 40, "ignore_eos": True}


async def stream_all(served: Served, n: int = 1, speculation: bool = True) -> list[GenerationResult]:
    async def one(seed: int, prompt: str) -> GenerationResult:
        asked: GenerateParams = {**SAMPLING, "seed": seed, "n": n, "speculation": speculation, "token_ids": True}
        stream = served.client.stream(prompt, **asked)
        async for _ in stream:
            pass
        return stream.result

    return await asyncio.gather(*(one(seed, prompt) for seed, prompt in enumerate(PROMPTS * 3)))


def outputs(results: Sequence[GenerationResult]) -> list[tuple[str, tuple[int, ...]]]:
    return [(choice.text, choice.token_ids) for result in results for choice in result.choices]


def draft(seed: int, epoch: int) -> Proposer:
    # "self" drafts with the target's own weights: whatever it drafts from sound KV is accepted
    kind = "self" if seed == TARGET_SEED else "draft"
    proposer = make_proposer(replace(SPEC, proposer=kind, draft_seed=seed), StepCost(), epoch)
    assert proposer is not None
    return proposer


def swap_at_every_step(engine: Engine, proposers: Sequence[tuple[Proposer | None, int]]) -> list[int]:
    """From now on the engine takes the next of the (proposer, epoch) pairs after every scheduling; counts them."""
    turns = itertools.cycle(proposers)
    schedule = engine.scheduler.schedule
    swaps = [0]

    def schedule_and_swap() -> list[object]:
        swaps[0] += 1
        engine.replace_proposer(*next(turns))
        return schedule()  # type: ignore[return-value]

    engine.scheduler.schedule = schedule_and_swap  # type: ignore[method-assign, assignment]
    return swaps


def versions(served: Served, counter: str) -> dict[str, float]:
    name = f"redraft_spec_decode_{counter}_total"
    return {
        sample.labels["draft_version"]: sample.value
        for family in served.registry.collect()
        for sample in family.samples
        if sample.name == name
    }


@pytest.mark.parametrize("n", [1, 2])
async def test_text_is_the_same_when_the_draft_changes_at_every_step(n: int) -> None:
    async with served_engine(SPEC) as served:
        plain = outputs(await stream_all(served, n=n, speculation=False))
    ngram = make_proposer(replace(SPEC, proposer="ngram"), StepCost())
    rotation = [(draft(DRAFT_A, 1), 1), (draft(DRAFT_B, 2), 2), (ngram, 2), (None, 2), (draft(TARGET_SEED, 3), 3)]
    async with served_engine(SPEC) as served:
        swaps = swap_at_every_step(served.engine, rotation)
        swapped = await stream_all(served, n=n)
        await served.idle()
        drafted, accepted = versions(served, "num_draft_tokens"), versions(served, "num_accepted_tokens")
    assert outputs(swapped) == plain
    assert swaps[0] > 2 * len(rotation)
    # every proposer really drafted
    assert set(drafted) == {"draft-11", "draft-12", "draft-0", "ngram"}
    assert all(drafted.values())
    # the target's twin would be refused where it drafted from KV that another draft, or nobody, had written
    assert accepted["draft-0"] == drafted["draft-0"]
    assert accepted["draft-11"] < drafted["draft-11"]


async def test_a_swap_in_the_middle_of_a_stream_shows_in_its_figures_only() -> None:
    async with served_engine(SPEC) as served:
        plain = outputs(await stream_all(served, speculation=False))
        before = await served.client.generate("x", max_new_tokens=20, ignore_eos=True)
        await asyncio.wrap_future(served.engine.replace_proposer(draft(DRAFT_A, 1), 1))
        first = await stream_all(served)
        await asyncio.wrap_future(served.engine.replace_proposer(draft(DRAFT_B, 2), 2))
        second = await stream_all(served)
    assert before.speculation.draft_version == ""
    assert {result.speculation.draft_version for result in first} == {"draft-11"}
    assert {result.speculation.draft_version for result in second} == {"draft-12"}
    assert outputs(first) == outputs(second) == plain


async def test_a_running_stream_goes_on_with_the_new_draft() -> None:
    long: GenerateParams = {**SAMPLING, "seed": 3, "max_new_tokens": 120}
    async with served_engine(SPEC) as served:
        plain = await served.client.generate("hello there", **long)
        await asyncio.wrap_future(served.engine.replace_proposer(draft(DRAFT_A, 1), 1))
        second = draft(DRAFT_B, 2)
        stream = served.client.stream("hello there", **long)
        await anext(stream)
        swapped = served.engine.replace_proposer(second, 2)
        async for _ in stream:
            pass
        assert swapped.done()
    assert stream.result.text == plain.text
    assert stream.result.speculation.draft_version == "draft-12"
