"""Requests over real gRPC: what comes back, and what every kind of bad input gets."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest

from redraft.v1 import draft_pb2, draft_pb2_grpc, model_pb2, model_pb2_grpc, tokenizer_pb2, tokenizer_pb2_grpc
from redraft.v1 import generation_pb2 as pb
from redraft_server.config import GrpcConfig
from redraft_server.engine.api import EngineUnavailable, FinishReason, QueueFull, RequestTooLarge
from tests.edge import Edge, details_of, edge_config, fields_of, limited, running_edge
from tests.fake_engine import CONTEXT_LENGTH, VOCAB_SIZE, FakeEngine, FakeTokenizer
from tests.log_lines import json_log

Code = grpc.StatusCode


async def test_generate() -> None:
    async with running_edge() as edge:
        call = edge.generation.Generate(pb.GenerateRequest(generation=limited(5, request_id="r1", model="fake")))
        reply = await call
        metadata = dict(await call.initial_metadata())
        assert metadata["x-request-id"] == "r1"
        assert reply.request_id == "r1"
        assert [choice.text for choice in reply.choices] == ["abcde"]
        assert reply.choices[0].finish_reason == pb.FINISH_REASON_LENGTH
        assert reply.completion.usage.prompt_tokens == 2
        assert reply.completion.usage.completion_tokens == 5
        assert edge.metric("redraft_generation_tokens_total", model="fake") == 5


async def test_stream() -> None:
    engine = FakeEngine(eos_at=5)
    async with running_edge(engine) as edge:
        generation = limited(
            9, sampling=pb.SamplingParams(n=2), output=pb.OutputOptions(logprobs=1, prompt_logprobs=0, token_ids=True)
        )
        call = edge.stream(generation)
        texts, ids, reasons = ["", ""], [[], []], [[], []]  # type: list[str], list[list[int]], list[list[int]]
        replies = [reply async for reply in call]
        for reply in replies:
            assert reply.request_id == engine.requests[0].request_id
            for delta in reply.deltas:
                texts[delta.index] += delta.text
                ids[delta.index] += delta.token_ids
                assert len(delta.logprobs) == len(delta.token_ids)
                if delta.finish_reason:
                    reasons[delta.index].append(delta.finish_reason)
        assert texts == ["abcde", "abcde"]
        assert ids[0] == ids[1] == [*b"abcde", 0]
        assert reasons == [[pb.FINISH_REASON_EOS]] * 2
        assert [reply.HasField("completion") for reply in replies] == [False] * (len(replies) - 1) + [True]
        assert not replies[-1].deltas
        assert [entry.token_id for entry in replies[-1].prompt_logprobs] == list(b"hi")


async def test_chat_uses_the_template() -> None:
    async with running_edge() as edge:
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
        await edge.generate(pb.Generation(chat=chat, stopping=pb.StoppingParams(max_new_tokens=1)))
        chat.add_generation_prompt = False
        await edge.generate(pb.Generation(chat=chat, stopping=pb.StoppingParams(max_new_tokens=1)))
        first, second = (bytes(request.prompt_token_ids) for request in edge.engine.requests)
        assert (first, second) == (b"user: hi\nassistant: ", b"user: hi\n")


async def test_a_long_text_is_tokenized_off_the_loop() -> None:
    async with running_edge() as edge:
        text = "x" * 5000
        output = pb.OutputOptions(truncate_prompt_tokens=7)
        reply = await edge.generate(
            pb.Generation(text=text, output=output, stopping=pb.StoppingParams(max_new_tokens=1))
        )
        assert reply.completion.usage.prompt_tokens == 7


async def test_tenant_reaches_the_engine() -> None:
    async with running_edge() as edge:
        await edge.generate(limited(1), metadata=(("x-redraft-tenant", "team-a"),))
        assert edge.engine.requests[0].tenant == "team-a"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await edge.generate(limited(1), metadata=(("x-redraft-tenant", "a b"),))
        assert fields_of(caught.value) == ["metadata.x-redraft-tenant"]


BAD: list[tuple[str, pb.Generation, Code, str]] = [
    ("unknown model", limited(1, model="other"), Code.NOT_FOUND, ""),
    ("no prompt", pb.Generation(), Code.INVALID_ARGUMENT, "generation.prompt"),
    ("empty text", pb.Generation(text=""), Code.INVALID_ARGUMENT, "generation.text"),
    ("empty ids", pb.Generation(token_ids=pb.TokenIds()), Code.INVALID_ARGUMENT, "generation.token_ids.ids"),
    ("empty chat", pb.Generation(chat=pb.Chat()), Code.INVALID_ARGUMENT, "generation.chat.messages"),
    (
        "role the template refuses",
        pb.Generation(chat=pb.Chat(messages=[pb.ChatMessage(role="alien", content="secret")])),
        Code.INVALID_ARGUMENT,
        "generation.chat",
    ),
    ("prompt over context", pb.Generation(text="a" * CONTEXT_LENGTH), Code.INVALID_ARGUMENT, "generation.text"),
    (
        "id out of range",
        pb.Generation(token_ids=pb.TokenIds(ids=[VOCAB_SIZE])),
        Code.INVALID_ARGUMENT,
        "generation.token_ids.ids[0]",
    ),
    (
        "nan",
        limited(1, sampling=pb.SamplingParams(temperature=math.nan)),
        Code.INVALID_ARGUMENT,
        "generation.sampling.temperature",
    ),
    (
        "negative",
        limited(1, sampling=pb.SamplingParams(temperature=-1)),
        Code.INVALID_ARGUMENT,
        "generation.sampling.temperature",
    ),
    ("top_p 0", limited(1, sampling=pb.SamplingParams(top_p=0)), Code.INVALID_ARGUMENT, "generation.sampling.top_p"),
    (
        "huge bias",
        limited(1, sampling=pb.SamplingParams(logit_bias={3: 1e9})),
        Code.INVALID_ARGUMENT,
        "generation.sampling.logit_bias[3]",
    ),
    (
        "10,000 stops",
        pb.Generation(text="hi", stopping=pb.StoppingParams(stop_sequences=[str(i) for i in range(10_000)])),
        Code.INVALID_ARGUMENT,
        "generation.stopping.stop_sequences",
    ),
]


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
async def test_bad_input(method: str) -> None:
    async with running_edge() as edge:
        for name, generation, code, field in BAD:
            call = call_of(edge, method, generation)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await first_of(call)
            assert caught.value.code() is code, name
            assert "x-request-id" not in dict(await call.initial_metadata()), name
            if field:
                assert fields_of(caught.value) == [field], name
                assert field in (caught.value.details() or ""), name
            else:
                assert details_of(caught.value)["ErrorInfo"].reason == "MODEL_NOT_FOUND"
            assert "secret" not in (caught.value.details() or "")
        assert edge.engine.requests == []
        await edge.assert_serves()


def call_of(edge: Edge, method: str, generation: pb.Generation) -> Any:
    if method == "Generate":
        return edge.generation.Generate(pb.GenerateRequest(generation=generation))
    return edge.stream(generation)


async def first_of(call: Any) -> Any:
    return await call.read() if hasattr(call, "read") else await call


@pytest.mark.parametrize("method", ["Generate", "StreamGenerate"])
async def test_a_missing_generation_is_named(method: str) -> None:
    async with running_edge() as edge:
        request = getattr(pb, f"{method}Request")()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await first_of(getattr(edge.generation, method)(request))
        assert fields_of(caught.value) == ["generation"]


async def test_bytes_that_are_no_message_are_refused() -> None:
    """Text that is not UTF-8 (here field 3 of Generation), and bytes that are no protobuf at all."""
    async with running_edge() as edge:
        for data in (b"\x0a\x04\x1a\x02\xff\xfe", b"\xff\xff\xff"):
            for path in ("Generate", "StreamGenerate"):
                raw: Any = edge.channel.unary_unary(f"/redraft.v1.GenerationService/{path}")
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await raw(data)
                assert caught.value.code() is Code.INVALID_ARGUMENT
                assert fields_of(caught.value) == ["request"]
                assert "UTF-8" in (caught.value.details() or "")
        assert edge.engine.requests == []
        await edge.assert_serves()


async def test_an_oversize_message_is_refused() -> None:
    config = edge_config(grpc=GrpcConfig(port=0, max_message_bytes=100_000))
    async with running_edge(config=config) as edge:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await edge.generate(pb.Generation(text="a" * 100_001))
        assert caught.value.code() is Code.RESOURCE_EXHAUSTED
        await edge.assert_serves()


async def test_a_model_without_template_refuses_chat() -> None:
    async with running_edge(FakeEngine(tokenizer=FakeTokenizer(chat_template=False))) as edge:
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await edge.generate(pb.Generation(chat=chat))
        assert caught.value.code() is Code.FAILED_PRECONDITION
        assert details_of(caught.value)["PreconditionFailure"].violations[0].subject == "generation.chat"
        models: Any = model_pb2_grpc.ModelServiceStub(edge.channel)
        assert not (await models.GetModel(model_pb2.GetModelRequest())).model.has_chat_template


async def test_a_full_queue_pushes_back() -> None:
    async with running_edge(FakeEngine(capacity=1, retry_after_s=0.25)) as edge:
        edge.engine.gate.clear()
        running = edge.stream(limited(3, request_id="first"))
        await running.initial_metadata()
        refused = edge.stream(limited(3))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await refused.read()
        assert caught.value.code() is Code.RESOURCE_EXHAUSTED
        trailers = dict(caught.value.trailing_metadata() or ())
        assert trailers["grpc-retry-pushback-ms"] == "250"
        assert details_of(caught.value)["RetryInfo"].retry_delay.ToMilliseconds() == 250
        edge.engine.gate.set()
        assert "".join([d.text async for reply in running for d in reply.deltas]) == "abc"
        labels = {"model": "fake", "method": "StreamGenerate", "finish_reason": ""}
        assert edge.metric("redraft_requests_total", code="RESOURCE_EXHAUSTED", **labels) == 1


async def test_a_refused_stream_is_retried_by_a_client_with_a_retry_policy() -> None:
    """Only possible because a refusal leaves before initial metadata."""
    policy = (
        '{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 3, "initialBackoff": "0.01s",'
        '"maxBackoff": "0.01s", "backoffMultiplier": 1, "retryableStatusCodes": ["RESOURCE_EXHAUSTED"]}}]}'
    )
    engine = _FullOnce()
    async with running_edge(engine, **{"grpc.service_config": policy}) as edge:
        replies = [reply async for reply in edge.stream(limited(3))]
        assert replies[-1].HasField("completion")
        assert engine.refused


class _FullOnce(FakeEngine):
    refused = False

    def submit(self, request: Any, sink: Any) -> None:
        if not self.refused:
            self.refused = True
            raise QueueFull("the queue is full", 0.001)
        super().submit(request, sink)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RequestTooLarge("stopping.max_new_tokens", "can never fit"), Code.INVALID_ARGUMENT),
        (EngineUnavailable("ENGINE_DEAD", "the engine has stopped"), Code.UNAVAILABLE),
        (ValueError("SECRET"), Code.INTERNAL),
    ],
)
async def test_refusals_of_the_engine(error: Exception, code: Code) -> None:
    with json_log() as log:
        await _refused_by_the_engine(error, code)
    errors = [line for line in log.of("redraft.rpc") if line["level"] == "error"]
    if code is Code.INTERNAL:
        assert [(line["request_id"], line["exception"][0]) for line in errors] == [("r7", "ValueError")]
    else:
        assert not errors


async def _refused_by_the_engine(error: Exception, code: Code) -> None:
    async with running_edge(FakeEngine(submit_error=error)) as edge:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await edge.stream(limited(1, request_id="r7")).read()
        assert caught.value.code() is code
        if code is Code.INVALID_ARGUMENT:
            assert fields_of(caught.value) == ["generation.stopping.max_new_tokens"]
        elif code is Code.UNAVAILABLE:
            assert details_of(caught.value)["ErrorInfo"].reason == "ENGINE_DEAD"
        else:
            assert caught.value.details() == "internal error"
        edge.engine.submit_error = None
        await edge.assert_serves()


async def test_a_running_request_keeps_its_id() -> None:
    async with running_edge() as edge:
        edge.engine.gate.clear()
        first = edge.stream(limited(2, request_id="same"))
        await first.initial_metadata()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await edge.generate(limited(2, request_id="same"))
        assert caught.value.code() is Code.ALREADY_EXISTS
        edge.engine.gate.set()
        assert [reply async for reply in first][-1].HasField("completion")
        assert edge.engine.ended == {"same": FinishReason.LENGTH}


async def test_model_service() -> None:
    async with running_edge() as edge:
        stub: Any = model_pb2_grpc.ModelServiceStub(edge.channel)
        (model,) = (await stub.ListModels(model_pb2.ListModelsRequest())).models
        assert (model.id, model.revision, model.context_length, model.vocab_size) == (
            *("fake", "r1"),
            *(CONTEXT_LENGTH, VOCAB_SIZE),
        )
        assert (model.speculation.proposer, model.speculation.max_draft_tokens) == ("draft_model", 4)
        assert model.has_chat_template
        assert (await stub.GetModel(model_pb2.GetModelRequest(model="fake"))).model == model
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetModel(model_pb2.GetModelRequest(model="other"))
        assert caught.value.code() is Code.NOT_FOUND


async def test_tokenizer_service() -> None:
    async with running_edge() as edge:
        stub: Any = tokenizer_pb2_grpc.TokenizerServiceStub(edge.channel)
        source = tokenizer_pb2.TokenizerInput(text="hi")
        reply = await stub.Tokenize(tokenizer_pb2.TokenizeRequest(input=source, token_texts=True))
        assert (list(reply.token_ids), list(reply.token_texts)) == ([*b"hi"], ["h", "i"])
        chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
        source = tokenizer_pb2.TokenizerInput(chat=chat)
        count = await stub.CountTokens(tokenizer_pb2.CountTokensRequest(input=source))
        assert (count.token_count, count.context_length) == (len("user: hi\nassistant: "), CONTEXT_LENGTH)
        ids = [104, 0, 105]
        assert (await stub.Detokenize(tokenizer_pb2.DetokenizeRequest(token_ids=ids))).text == "hi"
        request = tokenizer_pb2.DetokenizeRequest(token_ids=ids, include_special_tokens=True)
        assert (await stub.Detokenize(request)).text == "h<eos>i"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Detokenize(tokenizer_pb2.DetokenizeRequest(token_ids=[1, VOCAB_SIZE]))
        assert fields_of(caught.value) == ["token_ids[1]"]
        for empty in (tokenizer_pb2.TokenizeRequest(), tokenizer_pb2.TokenizeRequest(model="other")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Tokenize(empty)
            assert caught.value.code() is (Code.NOT_FOUND if empty.model else Code.INVALID_ARGUMENT)


async def test_draft_service_answers_for_the_draft_in_service() -> None:
    async with running_edge() as edge:
        stub: Any = draft_pb2_grpc.DraftServiceStub(edge.channel)
        (draft,) = (await stub.ListDrafts(draft_pb2.ListDraftsRequest())).drafts
        assert (draft.version, draft.state, draft.share) == ("d1", draft_pb2.DRAFT_STATE_ACTIVE, 1.0)
        retired = draft_pb2.ListDraftsRequest(states=[draft_pb2.DRAFT_STATE_RETIRED])
        assert not (await stub.ListDrafts(retired)).drafts
        assert (await stub.GetDraft(draft_pb2.GetDraftRequest())).draft == draft
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.GetDraft(draft_pb2.GetDraftRequest(version="d0"))
        assert caught.value.code() is Code.NOT_FOUND
        for method in ("ActivateDraft", "RollbackDraft", "SetTrafficSplit"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await getattr(stub, method)(getattr(draft_pb2, f"{method}Request")())
            assert caught.value.code() is Code.UNIMPLEMENTED
            assert "registry" in (caught.value.details() or "")
