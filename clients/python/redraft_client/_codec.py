"""Pure functions between the client's types and the messages of GenerationService; shared by both clients."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, Unpack, cast

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as ProtoMessage

from redraft.v1 import generation_pb2 as pb
from redraft_client import types as t
from redraft_client.errors import FieldViolation, InvalidArgumentError, ProtocolError

_SAMPLING = frozenset(pb.SamplingParams.DESCRIPTOR.fields_by_name)
_STOPPING = frozenset(pb.StoppingParams.DESCRIPTOR.fields_by_name)
_OUTPUT = frozenset(pb.OutputOptions.DESCRIPTOR.fields_by_name)
_GENERATION = frozenset(("request_id", "model", "exclude_from_traffic_log", "domain"))
_COUPLINGS = {
    t.Coupling.MAXIMAL: pb.COUPLING_MAXIMAL,
    t.Coupling.DRAFTER_INVARIANT: pb.COUPLING_DRAFTER_INVARIANT,
}


@contextmanager
def checked_field(path: str) -> Iterator[None]:
    """Turns protobuf's own type and range errors into InvalidArgumentError naming the field."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise invalid_field(path, str(error)) from error


def invalid_field(path: str, description: str) -> InvalidArgumentError:
    error = InvalidArgumentError(f"{path}: {description}")
    error.field_violations = (FieldViolation(path, description),)
    return error


def build_generation(prompt: t.Prompt, **params: Unpack[t.GenerateParams]) -> pb.Generation:
    """Builds the request. Raises InvalidArgumentError for values that fit no field (limits of a field are
    the server's to check), TypeError for an unknown parameter."""
    generation = pb.Generation()
    add_prompt = params.pop("add_generation_prompt", None)
    set_prompt(generation, prompt, add_prompt)
    for name, value in cast(Mapping[str, Any], params).items():
        if value is not None:
            _set_param(generation, name, value)
    return generation


def set_prompt(generation: pb.Generation, prompt: t.Prompt, add_generation_prompt: bool | None) -> None:
    """Sets the member of the `prompt` oneof that fits the Python type."""
    if isinstance(prompt, str):
        _merge_field(generation, "generation", "text", prompt)
    elif prompt and isinstance(prompt[0], t.Message):
        with checked_field("generation.chat"):
            generation.chat.CopyFrom(chat(cast(Sequence[t.Message], prompt), add_generation_prompt))
    else:
        generation.token_ids.SetInParent()  # so that an empty list is an empty prompt, not a missing one
        _merge_field(generation.token_ids, "generation.token_ids", "ids", prompt)


def chat(messages: Sequence[t.Message], add_generation_prompt: bool | None = None) -> pb.Chat:
    return pb.Chat(
        messages=[pb.ChatMessage(role=m.role, content=m.content) for m in messages],
        add_generation_prompt=add_generation_prompt,
    )


def _set_param(generation: pb.Generation, name: str, value: Any) -> None:
    if name in _SAMPLING:
        if name == "coupling":
            value = _coupling(value)
        _merge_field(generation.sampling, "generation.sampling", name, value)
    elif name in _STOPPING:
        if isinstance(value, str):  # would be taken for a list of one-letter stops
            raise invalid_field(f"generation.stopping.{name}", "expected a list, got a string")
        _merge_field(generation.stopping, "generation.stopping", name, value)
    elif name in _OUTPUT:
        _merge_field(generation.output, "generation.output", name, value)
    elif name in _GENERATION:
        _merge_field(generation, "generation", name, value)
    elif name == "speculation":
        _merge_field(generation.speculation, "generation.speculation", "enabled", value)
    elif name == "max_draft_tokens":
        _merge_field(generation.speculation, "generation.speculation", name, value)
    else:
        raise TypeError(f"unknown parameter {name!r}")


def _coupling(value: str) -> pb.Coupling:
    with checked_field("generation.sampling.coupling"):
        coupling = _COUPLINGS.get(t.Coupling(value))
    if coupling is None:
        raise invalid_field("generation.sampling.coupling", f"cannot ask for {value!r}")
    return coupling


def _merge_field(message: ProtoMessage, path: str, name: str, value: Any) -> None:
    with checked_field(f"{path}.{name}"):
        message.MergeFrom(type(message)(**{name: value}))  # one way for scalars, lists and maps


def parse_result(response: pb.GenerateResponse) -> t.GenerationResult:
    """Raises ProtocolError if the response lacks choices or completion."""
    if not response.choices or not response.HasField("completion"):
        raise ProtocolError("the response has no choice or no completion")
    return t.GenerationResult(
        request_id=response.request_id,
        choices=tuple(_parse_choice(choice) for choice in response.choices),
        completion=_parse_completion(response.completion),
        prompt_logprobs=_parse_logprobs(response.prompt_logprobs),
    )


def _parse_choice(choice: pb.Choice) -> t.Choice:
    return t.Choice(
        index=choice.index,
        text=choice.text,
        finish_reason=_parse_finish_reason(choice.finish_reason) or t.FinishReason.UNKNOWN,
        matched_stop=_parse_stop(choice.matched_stop),
        token_ids=tuple(choice.token_ids),
        logprobs=_parse_logprobs(choice.logprobs),
    )


def parse_chunk(response: pb.StreamGenerateResponse) -> t.StreamChunk:
    return t.StreamChunk(
        request_id=response.request_id,
        deltas=tuple(_parse_delta(delta) for delta in response.deltas),
        prompt_logprobs=_parse_logprobs(response.prompt_logprobs),
        completion=_parse_completion(response.completion) if response.HasField("completion") else None,
    )


def _parse_delta(delta: pb.ChoiceDelta) -> t.ChoiceDelta:
    return t.ChoiceDelta(
        index=delta.index,
        text=delta.text,
        finish_reason=_parse_finish_reason(delta.finish_reason),
        matched_stop=_parse_stop(delta.matched_stop),
        token_ids=tuple(delta.token_ids),
        logprobs=_parse_logprobs(delta.logprobs),
    )


def _parse_finish_reason(value: int) -> t.FinishReason | None:
    return parse_enum(t.FinishReason, pb.FinishReason, value)


_Enum = TypeVar("_Enum", t.FinishReason, t.DraftState, t.Coupling)


def parse_enum(kind: type[_Enum], proto_enum: Any, value: int) -> _Enum | None:
    """PREFIX_NAME of `proto_enum` to `kind("name")`; 0 to None; values of a newer server to UNKNOWN."""
    if value == 0:
        return None
    if value not in proto_enum.values():
        return kind("unknown")
    prefix = proto_enum.Name(0).removesuffix("UNSPECIFIED")
    return kind(proto_enum.Name(value).removeprefix(prefix).lower())


def _parse_stop(stop: pb.MatchedStop) -> str | int | None:
    match stop.WhichOneof("stop"):
        case "sequence":
            return stop.sequence
        case "token_id":
            return stop.token_id
    return None


def _parse_logprobs(entries: Sequence[pb.TokenLogprob]) -> tuple[t.TokenLogprob, ...]:
    return tuple(
        t.TokenLogprob(
            token_id=entry.token_id,
            text=entry.text,
            logprob=entry.logprob if entry.HasField("logprob") else None,
            rank=entry.rank,
            top=tuple(t.TopLogprob(top.token_id, top.text, top.logprob) for top in entry.top),
        )
        for entry in entries
    )


def _parse_completion(completion: pb.Completion) -> t.Completion:
    usage, timings, stats = completion.usage, completion.timings, completion.speculation
    return t.Completion(
        model=completion.model,
        model_revision=completion.model_revision,
        usage=t.Usage(usage.prompt_tokens, usage.completion_tokens, usage.cached_prompt_tokens),
        timings=t.Timings(
            queue=_seconds(timings.queue),
            time_to_first_token=_seconds(timings.time_to_first_token),
            prefill=_seconds(timings.prefill),
            decode=_seconds(timings.decode),
            total=_seconds(timings.total),
        ),
        speculation=t.SpeculationStats(
            draft_version=stats.draft_version,
            spec_steps=stats.spec_steps,
            draft_tokens=stats.draft_tokens,
            accepted_tokens=stats.accepted_tokens,
            acceptance_histogram=tuple(stats.acceptance_histogram),
            max_draft_tokens=stats.max_draft_tokens,
            expected_acceptance_sum=stats.expected_acceptance_sum,
            expected_acceptance_positions=stats.expected_acceptance_positions,
            verify_steps=stats.verify_steps,
            truncated_tokens=stats.truncated_tokens,
        ),
        seed=completion.seed,
        coupling=parse_enum(t.Coupling, pb.Coupling, completion.coupling),
    )


def _seconds(duration: Duration) -> float:
    return duration.seconds + duration.nanos / 1e9
