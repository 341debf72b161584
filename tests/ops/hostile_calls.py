"""Hostile calls: what a broken or malicious client can put into a gRPC call. Each returns the status it was given.

Every call is drawn from the `random.Random` that it is handed, so a seed names the whole attack.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
from collections.abc import Callable, Iterable, Iterator

import grpc
import grpc.aio

from redraft.v1 import draft_pb2, generation_pb2, model_pb2, tokenizer_pb2
from redraft.v1 import generation_pb2 as pb

MAX_MESSAGE_BYTES = 2**20
"""Of the server that is attacked: small, so that messages beyond it are cheap to send."""
CALL_TIMEOUT_S = 120.0
"""A call that takes longer is a server that hangs."""

METHODS = [
    f"/{service.full_name}/{method.name}"
    for file in (generation_pb2, tokenizer_pb2, model_pb2, draft_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]
STREAM = "/redraft.v1.GenerationService/StreamGenerate"
UNARY = "/redraft.v1.GenerationService/Generate"
STANDARD = ["/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/List"]
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"

Metadata = tuple[tuple[str, str | bytes], ...]


class Attacker:
    """Calls over one channel, below the level of messages: bytes in, status out."""

    def __init__(self, address: str, channel: grpc.aio.Channel) -> None:
        self._address, self._channel = address, channel

    async def unary(
        self, path: str, data: bytes, *, timeout: float = CALL_TIMEOUT_S, metadata: Metadata = ()
    ) -> grpc.StatusCode:
        call = self._channel.unary_unary(path)(data, timeout=timeout, metadata=metadata)
        return await call.code()

    async def stream(
        self, path: str, data: bytes, *, timeout: float = CALL_TIMEOUT_S, messages: int = 10**9
    ) -> grpc.StatusCode:
        """Read so many messages, then cancel."""
        call = self._channel.unary_stream(path)(data, timeout=timeout)
        try:
            while messages > 0 and await call.read() is not grpc.aio.EOF:
                messages -= 1
        except grpc.aio.AioRpcError:
            return await call.code()
        call.cancel()
        return await call.code()

    async def many(self, path: str, parts: Iterable[bytes], *, half_close: bool = True) -> grpc.StatusCode:
        """Send any number of messages, be it to a method that takes one; without `half_close`, then cancel."""
        return await asyncio.to_thread(self._many, path, parts, half_close)

    def _many(self, path: str, parts: Iterable[bytes], half_close: bool) -> grpc.StatusCode:
        """The sync client: the asyncio one calls it INTERNAL if the server answers while it is still sending."""
        sent, over = threading.Event(), threading.Event()

        def requests() -> Iterator[bytes]:
            yield from parts
            sent.set()
            if not half_close:
                over.wait()

        with grpc.insecure_channel(self._address) as channel:
            call = channel.stream_stream(path)(requests(), timeout=CALL_TIMEOUT_S)
            if not half_close and call.add_callback(sent.set):
                sent.wait()
                call.cancel()
            with contextlib.suppress(grpc.RpcError):
                for _ in call:
                    pass
            over.set()
            return call.code()


def small(rng: random.Random) -> pb.Generation:
    """A proper request, and cheap."""
    stopping = pb.StoppingParams(max_new_tokens=rng.randrange(1, 5))
    return pb.Generation(text=words(rng, 20), stopping=stopping, exclude_from_traffic_log=True)


def words(rng: random.Random, longest: int) -> str:
    return "".join(rng.choice("abc \n\0é\U0001f525") for _ in range(rng.randrange(1, longest)))


def wrapped(generation: pb.Generation) -> bytes:
    """Of Generate and of StreamGenerate alike."""
    return pb.GenerateRequest(generation=generation).SerializeToString()


async def garbage(attacker: Attacker, rng: random.Random) -> grpc.StatusCode:
    return await attacker.unary(rng.choice(METHODS + STANDARD), rng.randbytes(rng.randrange(0, 4096)))


async def garbage_for_reflection(attacker: Attacker, rng: random.Random) -> grpc.StatusCode:
    return await attacker.many(REFLECTION, [rng.randbytes(rng.randrange(0, 64)) for _ in range(rng.randrange(1, 5))])


async def mutated(attacker: Attacker, rng: random.Random) -> grpc.StatusCode:
    """A proper message with some bytes changed, cut off or doubled."""
    data = bytearray(wrapped(extreme(rng)))
    for _ in range(rng.randrange(1, 4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    start, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    cut: bytes = rng.choice([bytes(data), bytes(data[:end]), bytes(data + data[start:end])])
    return await attacker.unary(rng.choice([UNARY, STREAM]), cut)


FLOATS = [float("nan"), float("inf"), -float("inf"), -1.0, 1e-38, 3e38, 0.0, 100.5]
NUMBERS = [0, 1, 17, 2**31 - 1, 2**31, 2**32 - 1]


def extreme(rng: random.Random) -> pb.Generation:
    """A well-formed request with a few fields at or beyond their limits."""
    generation = small(rng)
    for change in rng.sample(EXTREMES, rng.randrange(1, 4)):
        change(generation, rng)
    return generation


def _sampling(generation: pb.Generation, rng: random.Random) -> None:
    fields = ["temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"]
    for name in rng.sample(fields, 2):
        setattr(generation.sampling, name, rng.choice(FLOATS))
    generation.sampling.seed = rng.choice([0, 2**63, 2**64 - 1])


def _counts(generation: pb.Generation, rng: random.Random) -> None:
    setattr(generation.sampling, rng.choice(["n", "top_k"]), rng.choice(NUMBERS))
    setattr(generation.output, rng.choice(["logprobs", "prompt_logprobs"]), rng.choice(NUMBERS))
    generation.output.truncate_prompt_tokens = rng.choice(NUMBERS)
    generation.speculation.max_draft_tokens = rng.choice(NUMBERS)


def _stopping(generation: pb.Generation, rng: random.Random) -> None:
    setattr(generation.stopping, rng.choice(["max_new_tokens", "min_new_tokens"]), rng.choice([0, *NUMBERS[2:]]))
    generation.stopping.stop_sequences.extend([words(rng, 300) for _ in range(rng.randrange(40))])
    generation.stopping.stop_token_ids.extend([rng.choice(NUMBERS) for _ in range(rng.randrange(400))])


def _bias(generation: pb.Generation, rng: random.Random) -> None:
    for _ in range(rng.choice([1, 100, 2000])):
        generation.sampling.logit_bias[rng.randrange(400)] = rng.choice(FLOATS)
    generation.sampling.coupling = rng.randrange(-2, 9)  # type: ignore[assignment]  # an open enumeration


def _names(generation: pb.Generation, rng: random.Random) -> None:
    generation.request_id = rng.choice([words(rng, 200), " ", " x ", "-bin", "a" * 128, "a" * 129, '"\\%0a'])
    generation.domain = rng.choice(["", "../..", words(rng, 80), "model=x/dt=1"])
    generation.model = rng.choice(["", words(rng, 5000)])


def _prompts(generation: pb.Generation, rng: random.Random) -> None:
    match rng.randrange(4):
        case 0:
            generation.token_ids.ids.extend([rng.choice([*NUMBERS, 5, 6]) for _ in range(rng.randrange(2000))])
        case 1:
            roles = ["user", "", "assistant", "{{ 7*7 }}", words(rng, 100)]
            messages = [pb.ChatMessage(role=rng.choice(roles), content=words(rng, 9)) for _ in range(rng.randrange(9))]
            generation.chat.messages.extend(messages * rng.choice([1, 1, 200]))
        case 2:
            generation.text = "x" * rng.choice([0, 511, 512, 5000, 200_000])
        case _:
            generation.text = rng.choice(["{% for i in range(10**9) %}a{% endfor %}", "<eos>" * 2000, "\0" * 3000])


EXTREMES: list[Callable[[pb.Generation, random.Random], None]] = [
    _sampling,
    _counts,
    _stopping,
    _bias,
    _names,
    _prompts,
]


async def extremes(attacker: Attacker, rng: random.Random) -> grpc.StatusCode:
    data = wrapped(extreme(rng))
    return await (attacker.unary(UNARY, data) if rng.random() < 0.5 else attacker.stream(STREAM, data))


async def invalid_utf8(attacker: Attacker, rng: random.Random) -> grpc.StatusCode:
    """Field 1 of the request, field 1 (request_id) or 3 (text) of the generation, with bytes that are no text."""
    text = rng.choice([b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"ok\x80"])
    inner = bytes([rng.choice([0x0A, 0x1A]), len(text)]) + text
    return await attacker.unary(UNARY, bytes([0x0A, len(inner)]) + inner)


async def deep_nesting(attacker: Attacker, rng: random.Random) -> grpc.StatusCode:
    """Groups within groups, an unknown field to every method: parsers recurse."""
    return await attacker.unary(rng.choice(METHODS), b"\xab\x06" * rng.choice([50, 99, 101, 20_000]))


async def tokenizer_extremes(attacker: Attacker, rng: random.Random) -> grpc.StatusCode:
    """The answer to a large text with every token's text is far larger than the text."""
    text = tokenizer_pb2.TokenizerInput(text=words(rng, 100) * rng.choice([1, 1, 1, 5000]))
    tokenize = tokenizer_pb2.TokenizeRequest(input=text, token_texts=True)
    ids = [rng.choice([3, 4, 2**32 - 1]) if rng.random() < 0.001 else 5 for _ in range(rng.choice([0, 10, 20_000]))]
    detokenize = tokenizer_pb2.DetokenizeRequest(token_ids=ids, model=rng.choice(["", "x"]))
    if rng.random() < 0.5:
        return await attacker.unary("/redraft.v1.TokenizerService/Tokenize", tokenize.SerializeToString())
    return await attacker.unary("/redraft.v1.TokenizerService/Detokenize", detokenize.SerializeToString())


async def unknown_method(attacker: Attacker, rng: random.Random) -> grpc.StatusCode:
    name = "".join(rng.choice("ab./%-_A1") for _ in range(rng.choice([1, 10, 2000])))
    paths = [f"/{name}", f"/redraft.v1.GenerationService/{name}", "/redraft.v1.", "/redraft.", "//", f"{UNARY}/", "/"]
    return await attacker.unary(rng.choice(paths), rng.randbytes(20))


async def oversized(attacker: Attacker, rng: random.Random) -> grpc.StatusCode:
    generation = pb.Generation(text="x" * (MAX_MESSAGE_BYTES + rng.choice([-20, 0, 1, 2**16])))
    return await attacker.unary(rng.choice([UNARY, STREAM]), wrapped(generation))


async def cancelled(attacker: Attacker, rng: random.Random) -> grpc.StatusCode:
    generation = small(rng)
    generation.stopping.max_new_tokens = 200
    generation.stopping.ignore_eos = True
    return await attacker.stream(STREAM, wrapped(generation), messages=rng.randrange(3))


async def impatient(attacker: Attacker, rng: random.Random) -> grpc.StatusCode:
    generation = small(rng)
    generation.stopping.max_new_tokens = 200
    timeout = rng.choice([0.0, 1e-4, 0.001, 0.01, 0.05])
    return await attacker.unary(rng.choice([UNARY, STREAM]), wrapped(generation), timeout=timeout)


async def wrong_arity(attacker: Attacker, rng: random.Random) -> grpc.StatusCode:
    """No message, or several, for methods that take one; or one that is never followed by an end."""
    parts = [wrapped(small(rng)) for _ in range(rng.choice([0, 0, 2, 5]))]
    return await attacker.many(rng.choice(METHODS), parts, half_close=rng.random() < 0.7)


async def metadata(attacker: Attacker, rng: random.Random) -> grpc.StatusCode:
    """Headers that we read, with nonsense in them, and others by the dozen."""
    word = "".join(rng.choice("abc-01 ;,=%") for _ in range(rng.randrange(1, 60)))
    pairs: Metadata = (
        ("x-redraft-tenant", rng.choice(["", "a" * 65, "..", word])),
        ("traceparent", rng.choice(["00-" + "0" * 32 + "-" + "0" * 16 + "-00", word, "ff-" + "f" * 60])),
        ("authorization", rng.choice(["Bearer", "Bearer " + word, "Basic eDp5", word])),
        ("x-request-id", word),
        ("extra-bin", rng.randbytes(rng.randrange(200))),
        *((f"x-{number}", word) for number in range(rng.choice([0, 0, 40]))),
    )
    chosen = tuple(rng.sample(pairs, rng.randrange(1, min(len(pairs), 8) + 1))) if len(pairs) < 8 else pairs
    return await attacker.unary(UNARY, wrapped(small(rng)), metadata=chosen)


KINDS: list[Callable[[Attacker, random.Random], object]] = [
    garbage,
    garbage,
    garbage_for_reflection,
    mutated,
    mutated,
    extremes,
    extremes,
    extremes,
    invalid_utf8,
    deep_nesting,
    tokenizer_extremes,
    unknown_method,
    oversized,
    cancelled,
    impatient,
    wrong_arity,
    metadata,
]
