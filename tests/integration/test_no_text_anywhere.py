"""One word, sent wherever a client can send text, through a server that logs, counts, traces and records everything.

It must come back in replies only. Every kind of failure is provoked on the way, ours included.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry

from redraft.telemetry.metrics import ServerMetrics
from redraft.telemetry.otel import OtelTracer
from redraft.traffic.record import TrafficRecord
from redraft.v1 import draft_pb2, draft_pb2_grpc, model_pb2, model_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc
from redraft.v1 import generation_pb2 as pb
from redraft_server.app import App
from redraft_server.config import AuthConfig, GrpcConfig, MetricsConfig
from redraft_server.engine.api import EngineUnavailable, QueueFull, RequestTooLarge
from tests.edge import Edge, edge_config
from tests.engine_harness import EngineSpec, running_engine
from tests.fake_engine import FakeEngine
from tests.integration.test_auth import USER, keys_text
from tests.log_lines import LogLines, json_log

WORD = "Zanzibar7"

METADATA = (
    ("x-redraft-tenant", WORD),
    ("user-agent-note", WORD),
    ("traceparent", f"00-{WORD}"),
    ("tracestate", f"vendor={WORD}"),
    ("baggage", f"user={WORD}"),
)
Code = grpc.StatusCode


class Evidence:
    """All that a server leaves behind beside its replies."""

    def __init__(self, log: LogLines, registry: CollectorRegistry) -> None:
        self.log = log
        self.registry = registry
        self.spans = InMemorySpanExporter()
        self.metrics = ""
        self.messages: list[str] = []
        """Of the errors that clients got."""

    def check(self, ids: Sequence[int] = tuple(WORD.encode())) -> None:
        """`ids`: the word as the server's tokenizer has it; the fake one takes bytes."""
        spans = "".join(span.to_json() for span in self.spans.get_finished_spans())
        places = {"log": self.log.text, "metrics": self.metrics, "spans": spans, "errors": "\n".join(self.messages)}
        for place, text in places.items():
            assert text, f"nothing in the {place}: the test has lost its object"
            for wanted in (WORD, ", ".join(map(str, ids))):
                found = re.search(f".*{re.escape(wanted)}.*", text)
                assert found is None, f"{place}: {found.group(0) if found else ''}"

    def keep(self, error: grpc.aio.AioRpcError) -> None:
        trailers = "".join(f"{key}: {value!r}\n" for key, value in error.trailing_metadata() or ())
        self.messages.append(f"{error.code()}: {error.details()}\n{trailers}")


@pytest.fixture
def evidence() -> Iterator[Evidence]:
    with json_log("debug") as log:
        logging.getLogger().setLevel(logging.DEBUG)  # the libraries' lines too
        yield Evidence(log, CollectorRegistry())


@asynccontextmanager
async def server(engine: Any, evidence: Evidence, **groups: Any) -> AsyncIterator[Edge]:
    """Everything on. Afterwards the evidence is complete."""
    metrics = ServerMetrics(evidence.registry, "served")
    tracer = OtelTracer(evidence.spans, 1.0, metrics)
    config = edge_config(metrics=MetricsConfig(port=0), **groups)
    app = App(config, engine, metrics, evidence.registry, tracer=tracer)
    async with app, grpc.aio.insecure_channel(app.address) as channel:
        yield Edge(app, engine, channel, evidence.registry)
        page = f"http://{app.metrics_address}/metrics"
        evidence.metrics = await asyncio.to_thread(lambda: urllib.request.urlopen(page).read().decode())
        await app.drain()


def generation(tokens: int = 3, **parts: Any) -> pb.Generation:
    parts.setdefault("text", WORD)
    stopping = parts.pop("stopping", pb.StoppingParams(max_new_tokens=tokens, stop_sequences=[WORD]))
    return pb.Generation(stopping=stopping, domain=WORD, **parts)


async def test_of_answers(evidence: Evidence, tmp_path: Path) -> None:
    """The word is in prompts, options, metadata and in the text that the model makes of them. (Whose key was sent is
    logged: that name is the operator's.)"""

    def emit(position: int) -> tuple[int, str]:
        if position == 2 * len(WORD):
            engine.gate.clear()  # a request without a limit never ends by itself
        letter = WORD[position % len(WORD)]
        return ord(letter), letter

    engine = FakeEngine(emit=emit)
    keys = tmp_path / "keys.yaml"
    keys.write_text(keys_text())
    key = ("authorization", f"Bearer {USER}")
    identity = (key, *METADATA[1:])
    async with server(engine, evidence, auth=AuthConfig(keys_file=keys)) as edge:
        reply = await edge.generate(generation(len(WORD)), metadata=identity)
        assert reply.choices[0].text == WORD
        output = pb.OutputOptions(logprobs=2, prompt_logprobs=1, token_ids=True)
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content=WORD)])
        streamed = edge.stream(pb.Generation(chat=chat, output=output, domain=WORD), metadata=identity, timeout=0.5)
        with pytest.raises(grpc.aio.AioRpcError) as late:
            async for _ in streamed:
                pass
        evidence.keep(late.value)
        engine.gate.set()
        tokenizer: Any = tokenizer_pb2_grpc.TokenizerServiceStub(edge.channel)
        source = tokenizer_pb2.TokenizerInput(text=WORD)
        await tokenizer.Tokenize(tokenizer_pb2.TokenizeRequest(input=source), metadata=identity)
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await edge.generate(generation(), metadata=(("authorization", f"Bearer {WORD}"), *METADATA))
        evidence.keep(refused.value)
        assert refused.value.code() is Code.UNAUTHENTICATED
        await fails(evidence, edge.generate(generation(), metadata=(key, *METADATA)), Code.PERMISSION_DENIED)
    evidence.check()


BAD = [
    generation(request_id=WORD + "\n"),
    generation(text=WORD * 1000),
    generation(sampling=pb.SamplingParams(temperature=-1, top_p=7)),
    generation(stopping=pb.StoppingParams(stop_sequences=[WORD] * 100)),
    generation(text=None, chat=pb.Chat(messages=[pb.ChatMessage(role=WORD, content=WORD)])),
    generation(text=None, token_ids=pb.TokenIds(ids=[10**6, *WORD.encode()])),
    generation(output=pb.OutputOptions(logprobs=1000)),
]


async def test_of_refusals(evidence: Evidence) -> None:
    async with server(FakeEngine(), evidence, grpc=GrpcConfig(port=0, max_message_bytes=2**15)) as edge:
        for message in BAD:
            await fails(evidence, edge.generate(message, metadata=METADATA), Code.INVALID_ARGUMENT)
        await fails(evidence, edge.generate(generation(text=WORD * 2**13)), Code.RESOURCE_EXHAUSTED)
        raw = edge.channel.unary_unary("/redraft.v1.GenerationService/Generate")
        await fails(evidence, raw(b"\x0a\xff" + WORD.encode(), metadata=METADATA), Code.INVALID_ARGUMENT)
        unknown = edge.channel.unary_unary(f"/redraft.v1.GenerationService/{WORD}")
        await fails(evidence, unknown(WORD.encode(), metadata=METADATA), Code.UNIMPLEMENTED)
        engine: Any = edge.engine
        for error, code in (
            (QueueFull("the queue is full", 0.1), Code.RESOURCE_EXHAUSTED),
            (RequestTooLarge("prompt", "too long"), Code.INVALID_ARGUMENT),
            (EngineUnavailable("ENGINE_DEAD", "the engine has stopped"), Code.UNAVAILABLE),
            (KeyError(WORD), Code.INTERNAL),
        ):
            engine.submit_error = error
            await fails(evidence, edge.generate(generation(), metadata=METADATA), code)
        # What a client named is quoted to that client, and to nobody else
        models: Any = model_pb2_grpc.ModelServiceStub(edge.channel)
        drafts: Any = draft_pb2_grpc.DraftServiceStub(edge.channel)
        for named in (
            edge.generate(generation(model=WORD)),
            models.GetModel(model_pb2.GetModelRequest(model=WORD)),
            drafts.GetDraft(draft_pb2.GetDraftRequest(version=WORD)),
        ):
            with pytest.raises(grpc.aio.AioRpcError):
                await named
    evidence.check()


async def fails(evidence: Evidence, call: Any, code: grpc.StatusCode) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is code
    evidence.keep(caught.value)


class FailingSink:
    """A traffic log that quotes what it was to keep."""

    def offer(self, record: TrafficRecord) -> bool:
        raise ValueError(f"{WORD}: {record.prompt_token_ids}")


async def test_of_failures_of_ours(evidence: Evidence, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real engine: a record that cannot be made, a model that fails in a step, a tokenizer that fails."""
    spec = EngineSpec(vocab_size=300, proposer="ngram")
    with running_engine(spec, sink=FailingSink(), registry=CollectorRegistry()) as engine:
        async with server(engine, evidence) as edge:
            await edge.generate(generation(), metadata=METADATA)
            call = edge.stream(generation(200), metadata=METADATA)
            await call.read()
            call.cancel()
            assert await call.code() is Code.CANCELLED

            def quoting(*_: Any, **__: Any) -> Any:
                raise ValueError(WORD)

            with monkeypatch.context() as patch:
                patch.setattr(engine._parts.target, "forward", quoting)
                await fails(evidence, edge.generate(generation(), metadata=METADATA), Code.INTERNAL)
            with monkeypatch.context() as patch:
                patch.setattr(engine.tokenizer, "encode", quoting)
                await fails(evidence, edge.generate(generation(), metadata=METADATA), Code.INTERNAL)
            await edge.generate(generation(), metadata=METADATA)
        word_ids = engine.tokenizer.encode(WORD)
    evidence.check(word_ids)
    lines = [json.loads(line) for line in evidence.log.text.splitlines()]
    errors = {line["message"]: line for line in lines if line["level"] == "error"}
    assert errors.keys() == {"traffic record not made", "engine step failed", "unexpected error in an rpc"}
    assert errors["engine step failed"]["request_ids"]
    assert errors["traffic record not made"]["request_id"]
    assert errors["unexpected error in an rpc"]["request_id"]
