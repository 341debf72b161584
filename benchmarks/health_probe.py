"""Asks a server for its health every 20 ms until stdin closes; a process of its own, so that it measures no load but
the server's.

Prints one line per answer: monotonic seconds when asked, and seconds until the answer; `inf` for none within 5 s. The
next question never waits for the last answer, so that a stall is seen by every question asked during it.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

PERIOD_S = 0.02
_TIMEOUT_S = 5.0


async def _probe(address: str) -> None:
    closed = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    async with grpc.aio.insecure_channel(address) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its type stubs lack the methods
        pending: set[asyncio.Task[None]] = set()
        due = time.monotonic()
        while not closed.done():
            task = asyncio.create_task(_ask(stub, due))
            pending.add(task)
            task.add_done_callback(pending.discard)
            due += PERIOD_S
            await asyncio.sleep(due - time.monotonic())
        await asyncio.gather(*pending)


async def _ask(stub: Any, due: float) -> None:
    """Time runs from when the question was due, so that the probe's own delay counts as well."""
    try:
        await stub.Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
        seconds = time.monotonic() - due
    except grpc.RpcError:
        seconds = float("inf")
    sys.stdout.write(f"{due:.6f} {seconds:.6f}\n")


if __name__ == "__main__":
    asyncio.run(_probe(sys.argv[1]))
