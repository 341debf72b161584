"""A fake server, and both clients behind one face, so that every behaviour is asserted for both."""

import asyncio
from collections.abc import Iterator
from typing import Any, Protocol

import pytest

from redraft_client.aio import AsyncClient, AsyncStream
from redraft_client.client import Client, Stream
from redraft_client.types import GenerationResult, StreamChunk
from tests.unit.client.fake_server import FakeServer, running


class Driver(Protocol):
    """A client, sync or asyncio, called from a sync test."""

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any: ...

    def stream(
        self, *args: Any, stop_after: int | None = None, **kwargs: Any
    ) -> tuple[list[StreamChunk], GenerationResult | None]:
        """All chunks and the result; or the first `stop_after` chunks and None, after closing the stream."""
        ...

    def close(self) -> None: ...


class SyncDriver:
    def __init__(self, address: str, **options: Any) -> None:
        self.client = Client(address, **options)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.client, method)(*args, **kwargs)

    def stream(
        self, *args: Any, stop_after: int | None = None, **kwargs: Any
    ) -> tuple[list[StreamChunk], GenerationResult | None]:
        stream: Stream = self.client.stream(*args, **kwargs)
        if stop_after is None:
            return list(stream), stream.result
        with stream:
            return [next(stream) for _ in range(stop_after)], None

    def close(self) -> None:
        self.client.close()


class AsyncDriver:
    def __init__(self, address: str, **options: Any) -> None:
        self.runner = asyncio.Runner()
        self.client = self.runner.run(self._open(address, options))

    async def _open(self, address: str, options: dict[str, Any]) -> AsyncClient:
        return AsyncClient(address, **options)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return self.runner.run(getattr(self.client, method)(*args, **kwargs))

    def stream(
        self, *args: Any, stop_after: int | None = None, **kwargs: Any
    ) -> tuple[list[StreamChunk], GenerationResult | None]:
        return self.runner.run(self._stream(args, stop_after, kwargs))

    async def _stream(
        self, args: tuple[Any, ...], stop_after: int | None, kwargs: dict[str, Any]
    ) -> tuple[list[StreamChunk], GenerationResult | None]:
        stream: AsyncStream = self.client.stream(*args, **kwargs)
        if stop_after is None:
            return [chunk async for chunk in stream], stream.result
        async with stream:
            return [await anext(stream) for _ in range(stop_after)], None

    def close(self) -> None:
        self.runner.run(self.client.close())
        self.runner.close()


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with running(FakeServer()) as server:
        yield server


@pytest.fixture(params=[SyncDriver, AsyncDriver], ids=["sync", "asyncio"])
def driver_kind(request: pytest.FixtureRequest) -> type[SyncDriver] | type[AsyncDriver]:
    kind: type[SyncDriver] | type[AsyncDriver] = request.param
    return kind


@pytest.fixture
def driver(fake: FakeServer, driver_kind: type[SyncDriver] | type[AsyncDriver]) -> Iterator[Driver]:
    opened = driver_kind(fake.address, api_key="secret-key")
    yield opened
    opened.close()
