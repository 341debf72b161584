"""Validation: every field, its limits, and that nothing but a named violation ever comes out."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.sampling.params import Coupling
from redraft.v1 import generation_pb2 as pb
from redraft_server.config import LimitsConfig
from redraft_server.engine.api import (
    ChoiceDelta,
    EngineRequest,
    FinishReason,
    RequestFinished,
    SpeculationStats,
    TokenLogprob,
)
from redraft_server.rpc import convert
from redraft_server.rpc.convert_reply import ReplyBuilder
from redraft_server.rpc.mailbox import join_by_choice
from redraft_server.rpc.status import StatusError
from tests.fake_engine import CONTEXT_LENGTH, INFO, VOCAB_SIZE, FakeTokenizer

LIMITS = LimitsConfig(max_new_tokens=1000, max_n=4, max_logprobs=5)


def parse(generation: pb.Generation, *, info: Any = INFO) -> EngineRequest:
    """Both stages, with the fake tokenizer."""
    parsed = convert.parse_generation(generation, info, LIMITS, own_id="own")
    match parsed.prompt:
        case convert.TextPrompt(text=text):
            ids = FakeTokenizer().encode(text)
        case convert.TokenPrompt(token_ids=token_ids):
            ids = list(token_ids)
        case convert.ChatPrompt(messages=messages):
            ids = [b for _, content in messages for b in content.encode()]
    return convert.to_engine_request(parsed, ids, info, LIMITS, deadline=1.0, tenant="t", may_log=True)


def fields_of(error: StatusError) -> list[str]:
    """The fields that a client finds in the status details."""
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    packed = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    detail = error_details_pb2.BadRequest()
    assert packed.details[0].Unpack(detail)
    assert all(violation.description for violation in detail.field_violations)
    return [violation.field for violation in detail.field_violations]


def violations(generation: pb.Generation) -> list[str]:
    with pytest.raises(StatusError) as caught:
        parse(generation)
    return fields_of(caught.value)


def test_defaults() -> None:
    request = parse(pb.Generation(text="abc"))
    assert request.prompt_token_ids == (97, 98, 99)
    assert request.request_id == "own"
    assert request.sampling.temperature == 1.0
    assert request.sampling.coupling is None
    assert request.stopping.max_new_tokens == 1000  # the ceiling, as the context has more room
    assert (request.n, request.logprobs, request.prompt_logprobs) == (1, None, None)
    assert (request.speculation, request.max_draft_tokens, request.log_traffic) == (True, None, True)
    assert (request.deadline, request.tenant) == (1.0, "t")


def test_max_new_tokens_defaults_to_the_rest_of_the_context() -> None:
    ids = [1] * (CONTEXT_LENGTH - 10)
    request = parse(pb.Generation(token_ids=pb.TokenIds(ids=ids)))
    assert request.stopping.max_new_tokens == 10


def test_every_field_arrives() -> None:
    request = parse(
        pb.Generation(
            request_id="r 1",
            model="fake",
            token_ids=pb.TokenIds(ids=[1, 2, 3, 4]),
            sampling=pb.SamplingParams(
                temperature=0.0,
                top_p=0.5,
                top_k=7,
                min_p=0.25,
                repetition_penalty=1.5,
                presence_penalty=-0.5,
                frequency_penalty=0.5,
                seed=2**64 - 1,
                logit_bias={5: -100.0, 2: 1.5},
                coupling=pb.COUPLING_MAXIMAL,
                n=3,
            ),
            stopping=pb.StoppingParams(
                max_new_tokens=9,
                min_new_tokens=2,
                stop_sequences=["x", "yy"],
                stop_token_ids=[8, 9],
                include_stop_sequence=True,
                ignore_eos=True,
            ),
            output=pb.OutputOptions(logprobs=0, prompt_logprobs=5, token_ids=True, truncate_prompt_tokens=3),
            speculation=pb.SpeculationOptions(enabled=True, max_draft_tokens=99),
            exclude_from_traffic_log=True,
        )
    )
    assert request.request_id == "r 1"
    assert request.prompt_token_ids == (2, 3, 4)
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.0, 0.5, 7, 0.25)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.5, -0.5, 0.5)
    assert (sampling.seed, sampling.coupling) == (2**64 - 1, Coupling.MAXIMAL)
    assert sampling.logit_bias == ((2, 1.5), (5, -100.0))
    stopping = request.stopping
    assert (stopping.max_new_tokens, stopping.min_new_tokens) == (9, 2)
    assert (stopping.stop_sequences, stopping.stop_token_ids) == (("x", "yy"), {8, 9})
    assert (stopping.include_stop_sequence, stopping.ignore_eos) == (True, True)
    assert (request.n, request.logprobs, request.prompt_logprobs) == (3, 0, 5)
    assert (request.max_draft_tokens, request.log_traffic) == (4, False)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (pb.SpeculationOptions(), (True, None)),
        (pb.SpeculationOptions(enabled=False), (False, None)),
        (pb.SpeculationOptions(max_draft_tokens=0), (False, 0)),
        (pb.SpeculationOptions(enabled=True, max_draft_tokens=2), (True, 2)),
    ],
)
def test_speculation_options(options: pb.SpeculationOptions, expected: tuple[bool, int | None]) -> None:
    request = parse(pb.Generation(text="a", speculation=options))
    assert (request.speculation, request.max_draft_tokens) == expected


def text(**parts: Any) -> pb.Generation:
    return pb.Generation(text="abc", **parts)


S, P, Out = pb.SamplingParams, pb.StoppingParams, pb.OutputOptions
TOO_MANY_BIASES = dict.fromkeys(range(1025), 0.0)


@pytest.mark.parametrize(
    ("generation", "field"),
    [
        (pb.Generation(), "generation.prompt"),
        (pb.Generation(text=""), "generation.text"),
        (pb.Generation(token_ids=pb.TokenIds()), "generation.token_ids.ids"),
        (pb.Generation(token_ids=pb.TokenIds(ids=[1, VOCAB_SIZE])), "generation.token_ids.ids[1]"),
        (pb.Generation(token_ids=pb.TokenIds(ids=[2**32 - 1])), "generation.token_ids.ids[0]"),
        (pb.Generation(chat=pb.Chat()), "generation.chat.messages"),
        (pb.Generation(chat=pb.Chat(messages=[pb.ChatMessage(content="a")])), "generation.chat.messages[0].role"),
        (pb.Generation(chat=pb.Chat(messages=[pb.ChatMessage(role="user")])), "generation.chat"),
        (pb.Generation(text="a" * CONTEXT_LENGTH), "generation.text"),
        (pb.Generation(token_ids=pb.TokenIds(ids=[1] * CONTEXT_LENGTH)), "generation.token_ids.ids"),
        (text(request_id="x" * 129), "generation.request_id"),
        (text(request_id="new\nline"), "generation.request_id"),
        (text(request_id="é"), "generation.request_id"),
        *((text(sampling=S(**{name: bad})), f"generation.sampling.{name}") for name in (
            "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"
        ) for bad in (math.nan, math.inf, -math.inf, -3.0, 1e30)),
        (text(sampling=S(top_p=0.0)), "generation.sampling.top_p"),
        (text(sampling=S(repetition_penalty=0.0)), "generation.sampling.repetition_penalty"),
        (text(sampling=S(logit_bias={5: 1e6})), "generation.sampling.logit_bias[5]"),
        (text(sampling=S(logit_bias={5: math.nan})), "generation.sampling.logit_bias[5]"),
        (text(sampling=S(logit_bias={VOCAB_SIZE: 1.0})), f"generation.sampling.logit_bias[{VOCAB_SIZE}]"),
        (text(sampling=S(coupling=99)), "generation.sampling.coupling"),  # type: ignore[arg-type]
        (text(sampling=S(n=0)), "generation.sampling.n"),
        (text(sampling=S(n=5)), "generation.sampling.n"),
        (text(stopping=P(max_new_tokens=0)), "generation.stopping.max_new_tokens"),
        (text(stopping=P(max_new_tokens=1001)), "generation.stopping.max_new_tokens"),
        (text(stopping=P(min_new_tokens=1001)), "generation.stopping.min_new_tokens"),
        (text(stopping=P(min_new_tokens=6, max_new_tokens=5)), "generation.stopping.min_new_tokens"),
        (text(stopping=P(stop_sequences=["stop"] * 10_000)), "generation.stopping.stop_sequences"),
        (text(stopping=P(stop_sequences=["a", ""])), "generation.stopping.stop_sequences[1]"),
        (text(stopping=P(stop_sequences=["a" * 257])), "generation.stopping.stop_sequences[0]"),
        (text(stopping=P(stop_token_ids=[1, 2, VOCAB_SIZE])), "generation.stopping.stop_token_ids[2]"),
        (text(stopping=P(stop_token_ids=range(257))), "generation.stopping.stop_token_ids"),
        (text(output=Out(logprobs=6)), "generation.output.logprobs"),
        (text(output=Out(prompt_logprobs=6)), "generation.output.prompt_logprobs"),
        (text(output=Out(truncate_prompt_tokens=0)), "generation.output.truncate_prompt_tokens"),
    ],
)  # fmt: skip
def test_a_violation_names_its_field(generation: pb.Generation, field: str) -> None:
    assert violations(generation) == [field]


def test_too_many_biases() -> None:
    info = dataclasses.replace(INFO, vocab_size=5000)
    with pytest.raises(StatusError) as caught:
        parse(text(sampling=S(logit_bias=TOO_MANY_BIASES)), info=info)
    assert fields_of(caught.value) == ["generation.sampling.logit_bias"]


def test_prompt_and_completion_must_fit_the_context() -> None:
    ids = pb.TokenIds(ids=[1] * (CONTEXT_LENGTH - 10))
    stopping = P(max_new_tokens=11)
    assert violations(pb.Generation(token_ids=ids, stopping=stopping)) == ["generation.stopping.max_new_tokens"]
    assert violations(pb.Generation(token_ids=ids, stopping=P(min_new_tokens=11))) == [
        "generation.stopping.min_new_tokens"
    ]
    assert parse(pb.Generation(token_ids=ids, stopping=P(max_new_tokens=10))).stopping.max_new_tokens == 10


def test_truncation_makes_a_long_prompt_fit() -> None:
    letters = "ab" * CONTEXT_LENGTH
    request = parse(pb.Generation(text=letters, output=Out(truncate_prompt_tokens=3)))
    assert request.prompt_token_ids == tuple(b"bab")
    too_little = pb.Generation(text=letters, output=Out(truncate_prompt_tokens=CONTEXT_LENGTH + 5))
    assert violations(too_little) == ["generation.text"]


def test_all_violations_are_collected() -> None:
    generation = pb.Generation(
        sampling=S(top_p=0.0, temperature=-1.0, n=99), stopping=P(stop_sequences=[""]), output=Out(logprobs=99)
    )
    assert set(violations(generation)) == {
        "generation.prompt",
        "generation.sampling.top_p",
        "generation.sampling.temperature",
        "generation.sampling.n",
        "generation.stopping.stop_sequences[0]",
        "generation.output.logprobs",
    }


def test_an_unknown_model_is_not_found() -> None:
    with pytest.raises(StatusError) as caught:
        parse(text(model="other"))
    assert caught.value.code is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("value", ["a" * 65, "a b", "ü", b"abc", "a/b"])
def test_a_bad_tenant(value: str | bytes) -> None:
    with pytest.raises(StatusError) as caught:
        convert.parse_tenant([value])
    assert fields_of(caught.value) == ["metadata.x-redraft-tenant"]


@pytest.mark.parametrize("domain", ["a b", "x" * 65, "ü", "a/b", "a\n"])
def test_a_bad_domain(domain: str) -> None:
    with pytest.raises(StatusError) as caught:
        convert.parse_generation(pb.Generation(text="x", domain=domain), INFO, LIMITS, own_id="own")
    assert fields_of(caught.value) == ["generation.domain"]


def test_domains() -> None:
    for domain in ("", "sql", "A.b-c_9"):
        assert parse(pb.Generation(text="x", domain=domain)).domain == domain


def test_tenants() -> None:
    assert convert.parse_tenant([]) == ""
    assert convert.parse_tenant(["team-a_1.x"]) == "team-a_1.x"
    with pytest.raises(StatusError):
        convert.parse_tenant(["a", "b"])


floats = st.floats(width=32) | st.floats(min_value=0, max_value=2, width=32)
counts = st.integers(0, 2**32 - 1) | st.integers(0, 5)
ids = st.integers(0, 2**32 - 1) | st.integers(0, VOCAB_SIZE)
words = st.text(max_size=300) | st.sampled_from(["", "a"])


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


samplings = optional(
    temperature=floats, top_p=floats, top_k=counts, min_p=floats, repetition_penalty=floats, presence_penalty=floats,
    frequency_penalty=floats, seed=st.integers(0, 2**64 - 1), n=counts, coupling=st.integers(0, 5),
    logit_bias=st.dictionaries(ids, floats, max_size=5),
).map(lambda values: pb.SamplingParams(**values))  # fmt: skip
stoppings = optional(
    max_new_tokens=counts, min_new_tokens=counts, stop_sequences=st.lists(words, max_size=20),
    stop_token_ids=st.lists(ids, max_size=5), include_stop_sequence=st.booleans(), ignore_eos=st.booleans(),
).map(lambda values: pb.StoppingParams(**values))  # fmt: skip
outputs = optional(logprobs=counts, prompt_logprobs=counts, token_ids=st.booleans(), truncate_prompt_tokens=counts).map(
    lambda values: pb.OutputOptions(**values)
)
messages = st.builds(pb.ChatMessage, role=words, content=words)
prompts = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"text": words}),
    st.fixed_dictionaries({"token_ids": st.builds(pb.TokenIds, ids=st.lists(ids, max_size=5))}),
    st.fixed_dictionaries({"chat": st.builds(pb.Chat, messages=st.lists(messages, max_size=3))}),
)
rest = optional(
    request_id=words, sampling=samplings, stopping=stoppings, output=outputs, exclude_from_traffic_log=st.booleans(),
    speculation=optional(enabled=st.booleans(), max_draft_tokens=counts).map(lambda v: pb.SpeculationOptions(**v)),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(prompts, rest)
def test_any_input_gives_a_request_or_named_violations(prompt: dict[str, Any], others: dict[str, Any]) -> None:
    generation = pb.Generation.FromString(pb.Generation(**prompt, **others).SerializeToString())
    try:
        request = parse(generation)
    except StatusError as error:
        fields = fields_of(error)
        assert fields
        for field in fields:
            root, _, path = field.partition(".")
            assert root == "generation"
            head = path.partition(".")[0]
            assert head == "prompt" or head in pb.Generation.DESCRIPTOR.fields_by_name
        return
    assert request.prompt_token_ids
    assert all(0 <= token_id < VOCAB_SIZE for token_id in request.prompt_token_ids)
    assert len(request.prompt_token_ids) + request.stopping.max_new_tokens <= CONTEXT_LENGTH
    assert request.stopping.min_new_tokens <= request.stopping.max_new_tokens <= LIMITS.max_new_tokens
    assert 1 <= request.n <= LIMITS.max_n
    assert request.request_id


FINISHED = RequestFinished(
    prompt_tokens=2,
    completion_tokens=3,
    cached_prompt_tokens=1,
    seed=None,
    speculation=SpeculationStats(
        draft_version="d1",
        verify_steps=2,
        spec_steps=1,
        draft_tokens=4,
        accepted_tokens=1,
        acceptance_histogram=(0, 1),
        max_draft_tokens=1,
        expected_acceptance_sum=0.75,
        expected_acceptance_positions=2,
    ),
    queue_s=0.5,
    time_to_first_token_s=None,
    prefill_s=0.25,
    decode_s=0.125,
    total_s=1.000000001,
    prompt_logprobs=(None, TokenLogprob(98, -1.0, 2, ((97, -0.5),))),
)


def test_reply_carries_what_was_asked_for_and_no_more() -> None:
    deltas = [
        ChoiceDelta(1, "x", (120,), (TokenLogprob(120, -0.5, 1),)),
        ChoiceDelta(0, "a", (97,), (TokenLogprob(97, -0.5, 1),)),
        ChoiceDelta(1, "y", (121, 0), (), FinishReason.EOS, 0),
        ChoiceDelta(0, "", (98,), (), FinishReason.STOP_SEQUENCE, "b"),
    ]
    request = EngineRequest("r", (97, 98), prompt_logprobs=1, logprobs=0)
    full = ReplyBuilder(INFO, request, wants_token_ids=True, token_text=FakeTokenizer().token_text)
    reply = full.unary(join_by_choice(deltas), FINISHED)
    first, second = reply.choices
    assert (first.index, first.text, list(first.token_ids)) == (0, "a", [97, 98])
    assert (first.finish_reason, first.matched_stop.sequence) == (pb.FINISH_REASON_STOP_SEQUENCE, "b")
    assert (second.text, list(second.token_ids), second.matched_stop.token_id) == ("xy", [120, 121, 0], 0)
    assert second.matched_stop.WhichOneof("stop") == "token_id"
    assert (second.logprobs[0].text, second.logprobs[0].logprob, second.logprobs[0].rank) == ("x", -0.5, 1)
    head, tail = reply.prompt_logprobs
    assert (head.token_id, head.text, head.HasField("logprob"), head.rank) == (97, "a", False, 0)
    assert (tail.logprob, tail.top[0].text, tail.top[0].logprob) == (-1.0, "a", -0.5)
    completion = reply.completion
    assert (completion.model, completion.model_revision) == ("fake", "r1")
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (2, 3)
    assert completion.coupling == pb.COUPLING_MAXIMAL
    assert completion.timings.total.ToNanoseconds() == 1_000_000_001
    assert not completion.timings.HasField("time_to_first_token")
    assert list(completion.speculation.acceptance_histogram) == [0, 1]
    assert completion.speculation.verify_steps == 2

    bare = ReplyBuilder(INFO, EngineRequest("r", (97, 98)), wants_token_ids=False, token_text=lambda _: "")
    reply = bare.unary(join_by_choice(deltas), FINISHED)
    assert not reply.prompt_logprobs
    assert not reply.choices[0].token_ids
    assert not reply.choices[0].logprobs
