"""The rollout over the API: a publisher on one side, clients on the other, and the automation in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from redraft.registry.manifest import DraftState as Stored
from redraft.registry.store import DraftRegistry
from redraft_client import errors
from redraft_client.aio import AsyncClient
from redraft_client.types import Draft, DraftState, GenerateParams
from redraft_server.app import App, build
from tests.rollout_harness import GOOD, POOR, Checkpoints, Publisher, Served, rollout_config, rollout_server

SAMPLING: GenerateParams = {"temperature": 0.8, "max_new_tokens": 16, "ignore_eos": True, "token_ids": True}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def publisher(checkpoints: Checkpoints, tmp_path: Path) -> Publisher:
    return Publisher(checkpoints, DraftRegistry(str(tmp_path / "registry")))


@asynccontextmanager
async def served(publisher: Publisher, **settings: object) -> AsyncIterator[tuple[Served, AsyncClient]]:
    config = rollout_config(publisher.checkpoints, publisher.registry.url, **settings)
    with rollout_server(config) as server:
        app = App(config, server.engine, server.metrics, server.page, rollout=server.rollout)
        async with app, AsyncClient(app.address, tenant="tests") as client:
            yield server, client


async def traffic_until(client: AsyncClient, version: str, state: DraftState) -> list[tuple[int, ...]]:
    """The same eight requests again and again until the draft is in that state; their tokens."""
    outputs: list[tuple[int, ...]] = []
    for _ in range(200):
        calls = (client.generate("abc", seed=seed, domain="sql", **SAMPLING) for seed in range(8))
        outputs += [result.choices[0].token_ids for result in await asyncio.gather(*calls)]
        if any(draft.version == version and draft.state is state for draft in await client.list_drafts()):
            return outputs
    raise AssertionError(f"{version} never was {state}")


async def test_published_drafts_go_into_service_or_back_out_by_themselves(publisher: Publisher) -> None:
    first = publisher.publish(POOR)
    async with served(publisher) as (server, client):
        better = publisher.publish(GOOD, promised=0.9, make_current=False)
        outputs = await traffic_until(client, better, DraftState.ACTIVE)
        current = publisher.registry.current()
        assert current is not None
        assert current.version == better
        degraded = publisher.publish(POOR, promised=0.9, make_current=False)
        outputs += await traffic_until(client, degraded, DraftState.ROLLED_BACK)
        drafts = {draft.version: draft for draft in await client.list_drafts()}
        assert (await client.get_draft()).version == better
        assert (await client.list_models())[0].draft_version == better
    assert drafts[better].state is DraftState.ACTIVE
    assert drafts[better].share == 1.0
    assert drafts[better].expected_acceptance == 0.9
    assert drafts[better].realised_acceptance == pytest.approx(1.0)
    assert drafts[first].state in (DraftState.PREVIOUS, DraftState.RETIRED)
    assert 0.0 < (drafts[first].realised_acceptance or 0.0) < 0.9
    assert publisher.registry.get(degraded).state is Stored.ROLLED_BACK
    assert server.value("redraft_draft_swaps_total") == 1
    # whatever drafted, the seed alone says what the text is
    async with served(publisher) as (_, client):
        calls = (client.generate("abc", seed=seed, **SAMPLING, speculation=False) for seed in range(8))
        plain = [result.choices[0].token_ids for result in await asyncio.gather(*calls)]
    assert len(outputs) >= 24
    assert outputs == plain * (len(outputs) // 8)


def shown(drafts: tuple[Draft, ...]) -> dict[str, tuple[DraftState, float]]:
    return {draft.version: (draft.state, draft.share) for draft in drafts}


async def test_by_hand(publisher: Publisher) -> None:
    a = publisher.publish(POOR)
    async with served(publisher, shadow_positions=10**6) as (_, client):
        assert shown(await client.list_drafts()) == {a: (DraftState.ACTIVE, 1.0)}
        b = publisher.publish(GOOD)
        with pytest.raises(errors.AbortedError):
            await client.activate_draft(b, expected_active=b)
        swap = await client.activate_draft(b, expected_active=a)
        assert (swap.active.version, swap.previous and swap.previous.version) == (b, a)
        split = await client.set_traffic_split({a: 0.25, b: 0.75})
        assert shown(split) == {a: (DraftState.CANARY, 0.25), b: (DraftState.ACTIVE, 0.75)}
        swap = await client.rollback_draft(expected_active=b)
        assert (swap.active.version, swap.previous and swap.previous.state) == (a, DraftState.ROLLED_BACK)
        with pytest.raises(errors.FailedPreconditionError, match="rolled back"):
            await client.activate_draft(b)
        with pytest.raises(errors.FailedPreconditionError, match="no earlier draft"):
            await client.rollback_draft()
        with pytest.raises(errors.NotFoundError):
            await client.activate_draft("v99")
        with pytest.raises(errors.InvalidArgumentError):
            await client.activate_draft("../v1")
        with pytest.raises(errors.InvalidArgumentError):
            await client.set_traffic_split({a: 0.5})
        with pytest.raises(errors.NotFoundError):
            await client.set_traffic_split({a: 0.5, "v99": 0.5})
        foreign = publisher.publish(GOOD, make_current=False, tokenizer_fingerprint="sha256:" + "1" * 64)
        with pytest.raises(errors.FailedPreconditionError, match="vocabulary"):
            await client.activate_draft(foreign)
        publisher.registry.pin()
        other = publisher.publish(12, make_current=False)
        with pytest.raises(errors.FailedPreconditionError, match="pinned"):
            await client.activate_draft(other)
        assert (await client.get_draft()).version == a
        assert (await client.generate("abc", **SAMPLING)).speculation.draft_version == a


async def test_a_registry_that_is_away_is_a_passing_fault_of_commands_only(publisher: Publisher) -> None:
    a = publisher.publish(POOR)
    b = publisher.publish(GOOD, make_current=False)
    path = Path(publisher.registry.url)
    async with served(publisher, shadow_positions=10**6) as (_, client):
        assert len(await client.list_drafts()) == 2
        path.rename(path.with_name("away"))
        assert a in shown(await client.list_drafts())
        with pytest.raises(errors.UnavailableError):
            await client.activate_draft(b, timeout=60)
        assert (await client.generate("abc", **SAMPLING)).choices[0].token_ids


async def test_a_server_as_it_is_started_serves_the_current_draft_and_drains(publisher: Publisher) -> None:
    a = publisher.publish(POOR)
    app = build(rollout_config(publisher.checkpoints, publisher.registry.url))
    async with app, AsyncClient(app.address) as client:
        assert shown(await client.list_drafts()) == {a: (DraftState.ACTIVE, 1.0)}
        assert (await client.generate("abc", **SAMPLING)).speculation.draft_version == a
        await app.drain()
        with pytest.raises(errors.UnavailableError):
            await client.list_drafts(timeout=5)
