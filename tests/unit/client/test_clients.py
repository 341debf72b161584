"""Both clients against a scripted server: what they send, and what they make of the answers."""

import asyncio
import math
import subprocess
import sys
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from grpc_health.v1 import health_pb2

from redraft.v1 import draft_pb2, model_pb2, tokenizer_pb2
from redraft.v1 import generation_pb2 as pb
from redraft_client.aio import AsyncClient
from redraft_client.channel import DEFAULT_TIMEOUT, Tls
from redraft_client.client import Client
from redraft_client.errors import InvalidArgumentError, NotFoundError, ProtocolError
from redraft_client.types import Coupling, DraftState, FinishReason, GenerationResult, Message
from tests.unit.client.conftest import Driver
from tests.unit.client.fake_server import HANG, Failure, FakeServer, completion, response, stream_responses


def test_every_parameter_reaches_its_field(fake: FakeServer, driver: Driver) -> None:
    fake.answers["Generate"] = [response()]
    driver.call(
        "generate",
        [Message("system", "be brief"), Message("user", "hi")],
        request_id="r-1", model="demo", add_generation_prompt=False, temperature=0.0, top_p=0.5, top_k=0,
        min_p=0.25, repetition_penalty=1.5, presence_penalty=-1.0, frequency_penalty=0.5, seed=2**64 - 1,
        logit_bias={3: -100.0}, coupling=Coupling.MAXIMAL, n=2, max_new_tokens=9, min_new_tokens=1,
        stop_sequences=["\n"], stop_token_ids=[5], include_stop_sequence=True, ignore_eos=True, logprobs=0,
        prompt_logprobs=2, token_ids=True, truncate_prompt_tokens=8, speculation=True, max_draft_tokens=3,
        exclude_from_traffic_log=True, domain="sql",
    )  # fmt: skip
    chat = pb.Chat(
        messages=[
            pb.ChatMessage(role="system", content="be brief"),
            pb.ChatMessage(role="user", content="hi"),
        ],
        add_generation_prompt=False,
    )
    assert fake.last_request.generation == pb.Generation(
        request_id="r-1",
        model="demo",
        chat=chat,
        sampling=pb.SamplingParams(
            temperature=0.0, top_p=0.5, top_k=0, min_p=0.25, repetition_penalty=1.5, presence_penalty=-1.0,
            frequency_penalty=0.5, seed=2**64 - 1, logit_bias={3: -100.0}, coupling=pb.COUPLING_MAXIMAL, n=2,
        ),
        stopping=pb.StoppingParams(
            max_new_tokens=9, min_new_tokens=1, stop_sequences=["\n"], stop_token_ids=[5],
            include_stop_sequence=True, ignore_eos=True,
        ),
        output=pb.OutputOptions(logprobs=0, prompt_logprobs=2, token_ids=True, truncate_prompt_tokens=8),
        speculation=pb.SpeculationOptions(enabled=True, max_draft_tokens=3),
        exclude_from_traffic_log=True,
        domain="sql",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("prompt", "generation"),
    [
        ("text", pb.Generation(text="text")),
        ("", pb.Generation(text="")),
        ([1, 2], pb.Generation(token_ids=pb.TokenIds(ids=[1, 2]))),
        ([], pb.Generation(token_ids=pb.TokenIds())),
    ],
)
def test_left_out_and_none_parameters_are_not_set(
    fake: FakeServer, driver: Driver, prompt: Any, generation: pb.Generation
) -> None:
    fake.answers["Generate"] = [response()]
    driver.call("generate", prompt, temperature=None)
    assert fake.last_request.generation == generation


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"top_k": -1}, "generation.sampling.top_k"),
        ({"seed": 2**64}, "generation.sampling.seed"),
        ({"seed": "7"}, "generation.sampling.seed"),
        ({"logit_bias": {-1: 0.0}}, "generation.sampling.logit_bias"),
        ({"coupling": "loose"}, "generation.sampling.coupling"),
        ({"coupling": Coupling.UNKNOWN}, "generation.sampling.coupling"),
        ({"stop_sequences": "abc"}, "generation.stopping.stop_sequences"),
        ({"logprobs": 1.5}, "generation.output.logprobs"),
        ({"max_draft_tokens": -2}, "generation.speculation.max_draft_tokens"),
    ],
)
def test_values_that_fit_no_field_are_refused_before_any_call(
    fake: FakeServer, driver: Driver, params: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        driver.call("generate", "x", **params)
    assert [violation.field for violation in caught.value.field_violations] == [field]
    assert fake.requests == []


def test_bad_token_ids_and_misspelt_parameters(fake: FakeServer, driver: Driver) -> None:
    with pytest.raises(InvalidArgumentError, match=r"generation\.token_ids\.ids"):
        driver.call("generate", [1, -2])
    with pytest.raises(TypeError, match="temprature"):
        driver.call("generate", "x", temprature=1.0)
    assert fake.requests == []


def _check_result(result: GenerationResult) -> None:
    assert result.request_id == "r-1"
    assert result.text == "Hello there"
    (choice,) = result.choices
    assert choice.finish_reason is FinishReason.STOP_SEQUENCE
    assert choice.matched_stop == "\n"
    assert choice.token_ids == (1, 2, 3, 4, 5, 6)
    assert choice.logprobs[0].logprob == -0.5
    assert choice.logprobs[0].top[0].text == "Hel"
    assert result.prompt_logprobs[0].logprob is None
    assert result.usage.total_tokens == 13
    assert result.timings.decode == 1.5
    assert result.timings.time_to_first_token == pytest.approx(0.02)
    assert result.completion.seed == 2**64 - 1
    assert result.completion.coupling is Coupling.DRAFTER_INVARIANT
    stats = result.speculation
    assert stats.draft_version == "v7"
    assert stats.acceptance_rate == 3 / 8
    assert stats.mean_acceptance_length == 1 + 3 / 2
    assert stats.expected_acceptance == 0.5
    assert stats.acceptance_histogram == (1, 0, 0, 1, 0)
    assert result.usage.completion_tokens == stats.accepted_tokens + stats.verify_steps


def test_unary_result(fake: FakeServer, driver: Driver) -> None:
    fake.answers["Generate"] = [response()]
    _check_result(driver.call("generate", "x"))


def test_stream_gives_chunks_and_the_same_result(fake: FakeServer, driver: Driver) -> None:
    fake.answers["StreamGenerate"] = [stream_responses()]
    chunks, result = driver.stream("x", temperature=0.0)
    assert [chunk.text for chunk in chunks] == ["Hello", " there", ""]
    assert [chunk.completion is not None for chunk in chunks] == [False, False, True]
    assert chunks[0].deltas[0].finish_reason is None
    assert result is not None
    _check_result(result)
    assert fake.last_request.generation.sampling.HasField("temperature")


def test_interleaved_choices_are_put_together(fake: FakeServer, driver: Driver) -> None:
    eos = pb.FINISH_REASON_EOS
    fake.answers["StreamGenerate"] = [[
        pb.StreamGenerateResponse(deltas=[pb.ChoiceDelta(index=1, text="b"), pb.ChoiceDelta(index=0, text="a")]),
        pb.StreamGenerateResponse(
            deltas=[pb.ChoiceDelta(index=1, text="d", finish_reason=eos, matched_stop=pb.MatchedStop(token_id=2))]
        ),
        pb.StreamGenerateResponse(deltas=[pb.ChoiceDelta(index=0, text="c", finish_reason=eos)]),
        pb.StreamGenerateResponse(completion=completion()),
    ]]  # fmt: skip
    _, result = driver.stream("x", n=2)
    assert result is not None
    assert [choice.text for choice in result.choices] == ["ac", "bd"]
    assert [choice.matched_stop for choice in result.choices] == [None, 2]


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        (stream_responses()[:2], "without its last message"),
        ([stream_responses()[0], stream_responses()[2]], None),  # no finish reason
        ([*stream_responses(), stream_responses()[0]], "after the last one"),
        ([stream_responses()[1], *stream_responses()], "after its finish reason"),
    ],
)
def test_a_stream_that_breaks_the_rules_is_an_error(
    fake: FakeServer, driver: Driver, messages: list[Any], complaint: str | None
) -> None:
    fake.answers["StreamGenerate"] = [messages]
    with pytest.raises(ProtocolError, match=complaint):
        driver.stream("x")


def test_a_response_without_choices_is_an_error(fake: FakeServer, driver: Driver) -> None:
    fake.answers["Generate"] = [pb.GenerateResponse(completion=completion())]
    with pytest.raises(ProtocolError):
        driver.call("generate", "x")


def test_reasons_of_a_newer_server_are_unknown(fake: FakeServer, driver: Driver) -> None:
    newer = response()
    newer.choices[0].finish_reason = 99  # type: ignore[assignment]
    fake.answers["Generate"] = [newer]
    assert driver.call("generate", "x").choices[0].finish_reason is FinishReason.UNKNOWN


def test_stats_without_speculation_have_no_rates(fake: FakeServer, driver: Driver) -> None:
    plain = response()
    plain.completion.ClearField("speculation")
    fake.answers["Generate"] = [plain]
    stats = driver.call("generate", "x").speculation
    assert (stats.acceptance_rate, stats.mean_acceptance_length, stats.expected_acceptance) == (None,) * 3


def test_the_tenant_travels_with_every_call(fake: FakeServer) -> None:
    fake.answers["ListModels"] = [model_pb2.ListModelsResponse()]
    with Client(fake.address, tenant="team-a") as client:
        client.list_models()
    with Client(fake.address) as client:
        client.list_models()
    assert [metadata.get("x-redraft-tenant") for metadata in fake.metadata] == ["team-a", None]


def test_api_key_and_deadlines(fake: FakeServer, driver: Driver) -> None:
    fake.answers["Generate"] = [response()]
    driver.call("generate", "x")
    driver.call("generate", "x", timeout=60.0)
    assert [metadata["authorization"] for metadata in fake.metadata] == ["Bearer secret-key"] * 2
    default, own = fake.time_remaining
    assert default is not None
    assert own is not None
    assert own < 61.0 < default < DEFAULT_TIMEOUT + 1.0  # the server rounds up


def test_closing_a_stream_cancels_the_call(fake: FakeServer, driver: Driver) -> None:
    fake.answers["StreamGenerate"] = [[stream_responses()[0], HANG]]
    chunks, _ = driver.stream("x", stop_after=1)
    assert chunks[0].text == "Hello"
    assert fake.call_ended.wait(timeout=10)


def test_dropping_a_stream_cancels_the_call(fake: FakeServer) -> None:
    fake.answers["StreamGenerate"] = [[stream_responses()[0], HANG]]
    with Client(fake.address) as client:
        for _ in client.stream("x"):
            break
        assert fake.call_ended.wait(timeout=10)


def test_a_closed_stream_ends_and_has_no_result(fake: FakeServer) -> None:
    fake.answers["StreamGenerate"] = [[stream_responses()[0], HANG]]
    with Client(fake.address) as client:
        stream = client.stream("x")
        next(stream)
        stream.close()
        stream.close()
        assert list(stream) == []
        with pytest.raises(ProtocolError):
            _ = stream.result


async def test_cancelling_the_task_cancels_the_call(fake: FakeServer) -> None:
    fake.answers["StreamGenerate"] = [[stream_responses()[0], HANG]]
    got_chunk = asyncio.Event()

    async def read(client: AsyncClient) -> None:
        async for _ in client.stream("x"):
            got_chunk.set()

    async with AsyncClient(fake.address) as client:
        task = asyncio.create_task(read(client))
        await got_chunk.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(fake.call_ended.wait, 10)


def test_tokenizer(fake: FakeServer, driver: Driver) -> None:
    fake.answers["Tokenize"] = [tokenizer_pb2.TokenizeResponse(token_ids=[4, 5], token_texts=["a", "b"])]
    fake.answers["Detokenize"] = [tokenizer_pb2.DetokenizeResponse(text="ab")]
    fake.answers["CountTokens"] = [tokenizer_pb2.CountTokensResponse(token_count=2, context_length=8)]
    tokens = driver.call("tokenize", "ab", add_special_tokens=False, token_texts=True)
    assert (tokens.token_ids, tokens.token_texts) == ((4, 5), ("a", "b"))
    assert fake.last_request == tokenizer_pb2.TokenizeRequest(
        input=tokenizer_pb2.TokenizerInput(text="ab", add_special_tokens=False), token_texts=True
    )
    assert driver.call("detokenize", (4, 5), include_special_tokens=True) == "ab"
    assert fake.last_request == tokenizer_pb2.DetokenizeRequest(token_ids=[4, 5], include_special_tokens=True)
    count = driver.call("count_tokens", [Message("user", "ab")])
    assert (count.token_count, count.context_length) == (2, 8)
    assert fake.last_request.input.chat.messages[0].content == "ab"
    assert not fake.last_request.input.HasField("add_special_tokens")


def test_models(fake: FakeServer, driver: Driver) -> None:
    model = model_pb2.Model(
        id="demo",
        context_length=8192,
        vocab_size=49152,
        eos_token_ids=[2],
        speculation=model_pb2.SpeculationConfig(proposer="ngram", max_draft_tokens=4, draft_version="v7"),
    )
    fake.answers["ListModels"] = [model_pb2.ListModelsResponse(models=[model])]
    fake.answers["GetModel"] = [model_pb2.GetModelResponse(model=model), Failure(grpc.StatusCode.NOT_FOUND)]
    assert driver.call("list_models") == (driver.call("get_model", "demo"),)
    assert fake.last_request.model == "demo"
    with pytest.raises(NotFoundError) as caught:
        driver.call("get_model", "other")
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


def test_drafts(fake: FakeServer, driver: Driver) -> None:
    created = Timestamp(seconds=1_700_000_000)
    active = draft_pb2.Draft(
        version="v8", state=draft_pb2.DRAFT_STATE_ACTIVE, create_time=created, expected_acceptance=0.0, share=1.0
    )
    old = draft_pb2.Draft(version="v7", state=draft_pb2.DRAFT_STATE_PREVIOUS)
    fake.answers["ListDrafts"] = [draft_pb2.ListDraftsResponse(drafts=[active, old])]
    fake.answers["GetDraft"] = [draft_pb2.GetDraftResponse(draft=old)]
    fake.answers["ActivateDraft"] = [draft_pb2.ActivateDraftResponse(active=active, previous=old)]
    fake.answers["RollbackDraft"] = [draft_pb2.RollbackDraftResponse(active=old)]
    fake.answers["SetTrafficSplit"] = [draft_pb2.SetTrafficSplitResponse(drafts=[active])]
    first, second = driver.call("list_drafts")
    assert (first.state, second.state) == (DraftState.ACTIVE, DraftState.PREVIOUS)
    assert first.create_time is not None
    assert first.create_time.timestamp() == created.seconds
    assert (first.expected_acceptance, first.realised_acceptance) == (0.0, None)
    assert driver.call("get_draft", "v7") == second
    swap = driver.call("activate_draft", "v8", expected_active="v7")
    assert (swap.active, swap.previous) == (first, second)
    assert fake.last_request == draft_pb2.ActivateDraftRequest(version="v8", expected_active_version="v7")
    assert driver.call("rollback_draft").previous is None
    assert driver.call("set_traffic_split", {"v8": 0.9, "v7": 0.1}) == (first,)
    assert [(s.version, s.share) for s in fake.last_request.shares] == [("v8", 0.9), ("v7", 0.1)]


def test_health(fake: FakeServer, driver: Driver) -> None:
    check = health_pb2.HealthCheckResponse
    fake.answers["Check"] = [check(status=check.SERVING), check(status=check.NOT_SERVING)]
    assert driver.call("is_serving") is True
    assert driver.call("is_serving", "redraft.v1.GenerationService") is False
    assert fake.last_request.service == "redraft.v1.GenerationService"


def test_a_given_channel_is_used_and_stays_open(fake: FakeServer) -> None:
    fake.answers["Generate"] = [response()]
    with grpc.insecure_channel(fake.address) as channel:
        for _ in range(2):
            with Client("256.0.0.1:1", channel=channel) as client:
                assert client.generate("x").text == "Hello there"


async def test_a_given_aio_channel_is_used_and_stays_open(fake: FakeServer) -> None:
    fake.answers["Generate"] = [response()]
    async with grpc.aio.insecure_channel(fake.address) as channel:
        for _ in range(2):
            async with AsyncClient("256.0.0.1:1", channel=channel) as client:
                assert (await client.generate("x")).text == "Hello there"


def test_mutual_tls_needs_both_halves() -> None:
    with pytest.raises(ValueError, match="both"):
        Tls(certificate_chain=b"pem")


def test_client_and_cli_import_no_heavy_library() -> None:
    code = (
        "import sys, redraft_client.cli, redraft_client.aio; "
        "print([m for m in ('torch', 'transformers', 'numpy', 'pyarrow') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_nan_travels_to_the_server_which_decides(fake: FakeServer, driver: Driver) -> None:
    fake.answers["Generate"] = [response()]
    driver.call("generate", "x", temperature=math.nan)
    assert math.isnan(fake.last_request.generation.sampling.temperature)
