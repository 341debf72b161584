"""A TCP proxy that goes down, hangs or breaks off when told to: a network and a store at their worst."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

_HOST = "127.0.0.1"
_CHUNK_BYTES = 2**16


class TcpProxy:
    """Passes connections on to a port of this machine, from enter to exit. Methods may be called from any thread."""

    def __init__(self, target_port: int) -> None:
        self.port = 0
        self.num_lost = 0
        """Replies, so far."""
        self.stalled = threading.Event()
        """Set once `stall` holds something back."""
        self._target_port = target_port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tcp-proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._is_down = False
        self._flowing = asyncio.Event()
        self._budget: int | None = None  # bytes from clients until it stalls
        self._unanswered = b""  # what is in the request whose reply is to be lost

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._call(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def down(self) -> None:
        """Break off every connection, and each new one at once."""
        self._call(self._break_off())

    def stall(self, after_bytes: int = 0) -> None:
        """Accept connections, and pass nothing on once clients have sent so many bytes more."""
        self.stalled.clear()
        self._call(self._set_budget(after_bytes))

    def lose_reply_to(self, request: bytes) -> None:
        """Let the next request that holds these bytes through, and break off when its reply comes."""
        self._call(self._set_unanswered(request))

    def up(self) -> None:
        """Work again; what was held back flows on."""
        self._call(self._restore())

    def _call(self, action: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(action, self._loop).result()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accepted, _HOST, 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _restore(self) -> None:
        self._is_down, self._budget = False, None
        self._flowing.set()

    async def _break_off(self) -> None:
        self._is_down = True
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _end(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._break_off()

    async def _set_budget(self, num_bytes: int) -> None:
        self._is_down, self._budget = False, num_bytes

    async def _set_unanswered(self, request: bytes) -> None:
        self._unanswered = request

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        target = None
        is_lost = asyncio.Event()
        try:
            if self._is_down:
                return
            target_reader, target = await asyncio.open_connection(_HOST, self._target_port)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._send(reader, target, is_lost))
                group.create_task(self._reply(target_reader, writer, is_lost))
        except (OSError, ExceptionGroup, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(task)
            for end in (writer, target):
                if end is not None:
                    end.transport.abort()

    async def _send(self, reader: asyncio.StreamReader, target: asyncio.StreamWriter, is_lost: asyncio.Event) -> None:
        while data := await reader.read(_CHUNK_BYTES):
            if self._budget is not None:
                self._budget -= len(data)
                if self._budget < 0:
                    self._flowing.clear()
                    self.stalled.set()
            if self._unanswered and self._unanswered in data:
                self._unanswered = b""
                is_lost.set()
            await self._pass_on(data, target)
        with suppress(OSError):
            target.write_eof()

    async def _reply(self, target: asyncio.StreamReader, writer: asyncio.StreamWriter, is_lost: asyncio.Event) -> None:
        while data := await target.read(_CHUNK_BYTES):
            if is_lost.is_set():
                self.num_lost += 1
                raise ConnectionAbortedError
            await self._pass_on(data, writer)
        with suppress(OSError):
            writer.write_eof()

    async def _pass_on(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        await self._flowing.wait()
        writer.write(data)
        await writer.drain()
