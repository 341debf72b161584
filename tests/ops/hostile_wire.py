"""Hostile bytes: what can be sent to the port below the level of gRPC. Each connection is one request."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from collections.abc import Callable

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = 0, 1, 3, 4, 6, 7, 8, 9
END_STREAM, END_HEADERS = 1, 4
READ_TIMEOUT_S = 0.05
"""How long the answer is read, which may never come; a hostile client does not wait either."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def headers(path: bytes, *more: tuple[bytes, bytes]) -> bytes:
    """HPACK without compression: literals that are not indexed. Values below 127 bytes."""
    pairs = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", path), (b":authority", b"a")]
    pairs += [(b"te", b"trailers"), (b"content-type", b"application/grpc"), *more]
    return b"".join(bytes([0, len(name)]) + name + bytes([len(value)]) + value for name, value in pairs)


def message(data: bytes, *, compressed: int = 0, length: int | None = None) -> bytes:
    """gRPC's frame of one message, with any length claimed."""
    return struct.pack(">BI", compressed, len(data) if length is None else length) + data


def noise(rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(1, 2000))


def http1(rng: random.Random) -> bytes:
    line = rng.choice([b"GET / HTTP/1.1", b"POST /redraft.v1.GenerationService/Generate HTTP/1.1", b"GET /metrics"])
    return line + b"\r\nHost: a\r\n" + b"X: " + b"y" * rng.randrange(9000) + b"\r\n\r\n"


def tls(rng: random.Random) -> bytes:
    return b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + rng.randbytes(508)


def preface_alone(rng: random.Random) -> bytes:
    return PREFACE[: rng.randrange(1, len(PREFACE) + 1)]


def noise_frames(rng: random.Random) -> bytes:
    """Frames of every kind with nonsense inside, on streams that do not exist."""
    frames = [
        frame(rng.randrange(12), rng.randrange(256), rng.randrange(4), rng.randbytes(rng.randrange(64)))
        for _ in range(rng.randrange(1, 30))
    ]
    return PREFACE + frame(SETTINGS, 0, 0) + b"".join(frames)


def resets(rng: random.Random) -> bytes:
    """Many streams, each opened and reset at once (CVE-2023-44487)."""
    block = headers(b"/redraft.v1.GenerationService/StreamGenerate")
    pairs = [
        frame(HEADERS, END_HEADERS, stream, block) + frame(RST_STREAM, 0, stream, struct.pack(">I", 8))
        for stream in range(1, 2 * rng.randrange(2, 100), 2)
    ]
    return PREFACE + frame(SETTINGS, 0, 0) + b"".join(pairs)


def floods(rng: random.Random) -> bytes:
    """Frames that ask for an answer each, or headers that never end."""
    kind = rng.choice([PING, SETTINGS, CONTINUATION, WINDOW_UPDATE])
    if kind == CONTINUATION:
        first = frame(HEADERS, 0, 1, headers(b"/a"))
        return PREFACE + frame(SETTINGS, 0, 0) + first + frame(CONTINUATION, 0, 1, b"\0\x01a\x01b" * 50) * 100
    payload = {PING: b"12345678", SETTINGS: b"", WINDOW_UPDATE: struct.pack(">I", 2**31 - 1)}[kind]
    return PREFACE + frame(SETTINGS, 0, 0) + frame(kind, 0, 0, payload) * rng.randrange(1, 500)


def broken_messages(rng: random.Random) -> bytes:
    """A proper call whose message claims to be compressed, or longer or shorter than it is, or never comes."""
    method = rng.choice([b"/redraft.v1.GenerationService/Generate", b"/redraft.v1.TokenizerService/Tokenize"])
    encoding = rng.choice([(b"grpc-encoding", b"gzip"), (b"grpc-encoding", b"zzz"), (b"grpc-timeout", b"9999999999H")])
    length = rng.choice([None, 0, 1, 100, 2**31, 2**32 - 1])
    body = message(rng.randbytes(20), compressed=rng.choice([0, 1, 1, 7]), length=length)
    start = PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, headers(method, encoding))
    return start + frame(DATA, rng.choice([0, END_STREAM]), 1, body[: rng.choice([0, 3, len(body)])])


KINDS: list[Callable[[random.Random], bytes]] = [
    noise,
    http1,
    tls,
    preface_alone,
    noise_frames,
    resets,
    floods,
    broken_messages,
    broken_messages,
]


async def attack(address: str, data: bytes) -> None:
    """Send it all, look whether something comes back, and go."""
    host, port = address.rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        with contextlib.suppress(ConnectionError, TimeoutError):
            writer.write(data)
            await writer.drain()
            async with asyncio.timeout(READ_TIMEOUT_S):
                while await reader.read(65536):
                    pass
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def hold(address: str, data: bytes) -> asyncio.StreamWriter:
    """Send a beginning and stay connected; the caller closes."""
    host, port = address.rsplit(":", 1)
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    await writer.drain()
    return writer
