"""Requests: protobuf in, validated plain data out. (`convert_reply.py` is the way back.)

Validation has two stages, because a long text should not be tokenized for a request that is wrong anyway:

1. `parse_generation` checks everything that needs no tokens and collects all violations;
2. `to_engine_request` checks the prompt's tokens against the context and builds the `EngineRequest`.

Fields are named by their path from the request message, for example `generation.sampling.top_p`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from redraft.sampling.params import (
    MAX_LOGIT_BIAS_ENTRIES,
    Coupling,
    InvalidParameter,
    SamplingParams,
    StoppingParams,
)
from redraft.v1 import generation_pb2 as pb
from redraft_server.config import LimitsConfig
from redraft_server.engine.api import EngineInfo, EngineRequest
from redraft_server.rpc.status import FieldViolation, in_generation, invalid_argument, model_not_found

MAX_MESSAGES = 1024
PROMPT_PER_POSITION = 16
"""Characters, or token ids, for each position of the context; a prompt of more cannot be meant, and is refused before
it costs anything: tokenizing takes up to 250 bytes of memory for each character."""
MAX_REQUEST_ID = 128
MAX_LABEL = 64

_LABEL = re.compile(rf"[A-Za-z0-9._-]{{1,{MAX_LABEL}}}")
_LABEL_RULE = f"1 to {MAX_LABEL} characters out of A-Z a-z 0-9 . _ -"
_SAMPLING_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_COUPLINGS = {
    pb.COUPLING_UNSPECIFIED: None,
    pb.COUPLING_MAXIMAL: Coupling.MAXIMAL,
    pb.COUPLING_DRAFTER_INVARIANT: Coupling.DRAFTER_INVARIANT,
}

_Params = TypeVar("_Params", SamplingParams, StoppingParams)


@dataclass(frozen=True, slots=True)
class TextPrompt:
    text: str
    field: str = "generation.text"


@dataclass(frozen=True, slots=True)
class TokenPrompt:
    token_ids: tuple[int, ...]
    field: str = "generation.token_ids.ids"


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    messages: tuple[tuple[str, str], ...]  # (role, content), oldest first
    add_generation_prompt: bool
    field: str = "generation.chat"


Prompt = TextPrompt | TokenPrompt | ChatPrompt


@dataclass(frozen=True, slots=True)
class ParsedGeneration:
    """A request that is right as far as can be told before its prompt is tokenized."""

    request_id: str
    prompt: Prompt
    sampling: SamplingParams
    stopping: StoppingParams  # max_new_tokens is the asked-for value, or the server's ceiling
    max_new_tokens: int | None  # as asked for
    n: int
    logprobs: int | None
    prompt_logprobs: int | None
    truncate_prompt_tokens: int | None
    wants_token_ids: bool
    speculation: bool
    max_draft_tokens: int | None
    log_traffic: bool
    domain: str


@dataclass(slots=True)
class _Checker:
    """Collects violations."""

    violations: list[FieldViolation] = field(default_factory=list)

    def require(self, condition: bool, name: str, description: str) -> bool:
        if not condition:
            self.violations.append(FieldViolation(name, description))
        return condition

    def build(self, make: Callable[..., _Params], values: dict[str, Any]) -> _Params | None:
        """Build parameters, reporting each bad value on its own where there are several."""
        try:
            return make(**values)
        except InvalidParameter as first:
            found = {first.field: first.description}
        for name, value in values.items():
            try:
                make(**{name: value})
            except InvalidParameter as error:
                # A value that is only wrong beside a default is reported, if at all, by the whole.
                if error.field.partition(".")[2].partition("[")[0] == name:
                    found.setdefault(error.field, error.description)
        self.violations += [FieldViolation(in_generation(name), text) for name, text in found.items()]
        return None

    def raise_if_any(self) -> None:
        if self.violations:
            raise invalid_argument(self.violations)


def check_model(name: str, info: EngineInfo) -> None:
    """Raise NOT_FOUND unless `name` is empty or the served model."""
    if name not in ("", info.model):
        raise model_not_found(name, info.model)


def is_request_id(text: str) -> bool:
    """Whether a client may call its request so."""
    return 0 < len(text) <= MAX_REQUEST_ID and text.isascii() and text.isprintable()


def parse_generation(
    generation: pb.Generation, info: EngineInfo, limits: LimitsConfig, *, own_id: str
) -> ParsedGeneration:
    """The first stage; `own_id` is the request's id if the client gave none.

    Raises `StatusError`: NOT_FOUND for the model, INVALID_ARGUMENT with all violations.
    """
    check_model(generation.model, info)
    check = _Checker()
    request_id = generation.request_id or own_id
    description = f"must be at most {MAX_REQUEST_ID} printable ASCII characters"
    check.require(is_request_id(request_id), "generation.request_id", description)
    prompt = _parse_prompt(generation, info, check)
    sampling = _parse_sampling(generation.sampling, info, check)
    stopping = _parse_stopping(generation.stopping, info, limits, check)
    output, speculation = generation.output, generation.speculation
    n = generation.sampling.n if generation.sampling.HasField("n") else 1
    check.require(1 <= n <= limits.max_n, "generation.sampling.n", f"must be between 1 and {limits.max_n}")
    logprobs = _optional(output, "logprobs")
    prompt_logprobs = _optional(output, "prompt_logprobs")
    for name, count in (("logprobs", logprobs), ("prompt_logprobs", prompt_logprobs)):
        check.require(
            count is None or count <= limits.max_logprobs,
            f"generation.output.{name}",
            f"must be at most {limits.max_logprobs}",
        )
    truncate = _optional(output, "truncate_prompt_tokens")
    check.require(truncate is None or truncate >= 1, "generation.output.truncate_prompt_tokens", "must be at least 1")
    has_domain = generation.domain == "" or _LABEL.fullmatch(generation.domain) is not None
    check.require(has_domain, "generation.domain", f"must be {_LABEL_RULE}")
    check.raise_if_any()
    assert prompt is not None
    assert sampling is not None
    assert stopping is not None
    max_draft_tokens = _optional(speculation, "max_draft_tokens")
    if max_draft_tokens is not None:
        max_draft_tokens = min(max_draft_tokens, info.num_speculative_tokens)
    enabled = not speculation.HasField("enabled") or speculation.enabled
    return ParsedGeneration(
        request_id=request_id,
        prompt=prompt,
        sampling=sampling,
        stopping=stopping,
        max_new_tokens=_optional(generation.stopping, "max_new_tokens"),
        n=n,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        truncate_prompt_tokens=truncate,
        wants_token_ids=output.token_ids,
        speculation=enabled and max_draft_tokens != 0,
        max_draft_tokens=max_draft_tokens,
        log_traffic=not generation.exclude_from_traffic_log,
        domain=generation.domain,
    )


def to_engine_request(
    parsed: ParsedGeneration,
    token_ids: Sequence[int],
    info: EngineInfo,
    limits: LimitsConfig,
    *,
    deadline: float,
    tenant: str,
    may_log: bool,
) -> EngineRequest:
    """The second stage: fit the prompt's tokens and the completion into the context.

    `deadline` is in seconds of `time.monotonic`; `may_log` says whether the tenant's traffic is recorded at all. Raises
    `StatusError` INVALID_ARGUMENT.
    """
    check = _Checker()
    prompt_field = parsed.prompt.field
    if parsed.truncate_prompt_tokens is not None:
        token_ids = token_ids[-parsed.truncate_prompt_tokens :]
    longest = min(info.max_prompt_tokens, info.context_length - 1)
    check.require(len(token_ids) > 0, prompt_field, "must give at least one token")
    check.require(
        len(token_ids) <= longest,
        prompt_field,
        f"has {len(token_ids)} tokens, but at most {longest} fit; shorten it or set output.truncate_prompt_tokens",
    )
    check.raise_if_any()
    room = info.context_length - len(token_ids)
    asked = parsed.max_new_tokens
    check.require(
        asked is None or asked <= room,
        "generation.stopping.max_new_tokens",
        f"{asked} do not fit: the prompt has {len(token_ids)} tokens and the context {info.context_length}",
    )
    max_new_tokens = asked if asked is not None else min(room, _ceiling(info, limits))
    check.require(
        parsed.stopping.min_new_tokens <= max_new_tokens,
        "generation.stopping.min_new_tokens",
        f"must be at most {max_new_tokens}, which is what max_new_tokens comes to",
    )
    check.raise_if_any()
    return EngineRequest(
        request_id=parsed.request_id,
        prompt_token_ids=tuple(token_ids),
        sampling=parsed.sampling,
        stopping=dataclasses.replace(parsed.stopping, max_new_tokens=max_new_tokens),
        n=parsed.n,
        logprobs=parsed.logprobs,
        prompt_logprobs=parsed.prompt_logprobs,
        speculation=parsed.speculation,
        max_draft_tokens=parsed.max_draft_tokens,
        deadline=deadline,
        tenant=tenant,
        domain=parsed.domain,
        log_traffic=parsed.log_traffic and may_log,
    )


def parse_tenant(values: Iterable[str | bytes]) -> str:
    """The tenant from the `x-redraft-tenant` metadata; empty if there is none. Raises INVALID_ARGUMENT."""
    given = [value for value in values if value]
    if not given:
        return ""
    tenant = given[0]
    if len(given) > 1 or not isinstance(tenant, str) or not _LABEL.fullmatch(tenant):
        description = f"give one value of {_LABEL_RULE}"
        raise invalid_argument([FieldViolation("metadata.x-redraft-tenant", description)])
    return tenant


def parse_chat(chat: pb.Chat, path: str) -> ChatPrompt:
    """Raise INVALID_ARGUMENT unless the conversation has between 1 and 1024 messages, each with a role."""
    check = _Checker()
    prompt = _parse_chat(chat, path, check)
    check.raise_if_any()
    return prompt


def check_token_ids(token_ids: Sequence[int], path: str, info: EngineInfo) -> None:
    """Raise INVALID_ARGUMENT at the first id that is not in the vocabulary, or if there are far too many."""
    check = _Checker()
    most = PROMPT_PER_POSITION * info.context_length
    if check.require(len(token_ids) <= most, path, f"must be at most {most} ids, but there are {len(token_ids)}"):
        _check_vocabulary(token_ids, path, info, check)
    check.raise_if_any()


def _parse_prompt(generation: pb.Generation, info: EngineInfo, check: _Checker) -> Prompt | None:
    match generation.WhichOneof("prompt"):
        case "text":
            check.require(generation.text != "", "generation.text", "must not be empty")
            return TextPrompt(generation.text)
        case "token_ids":
            return _parse_token_ids(generation.token_ids.ids, "generation.token_ids.ids", info, check)
        case "chat":
            return _parse_chat(generation.chat, "generation.chat", check)
        case _:
            check.require(False, "generation.prompt", "is required: set text, token_ids or chat")
            return None


def _parse_token_ids(ids: Sequence[int], path: str, info: EngineInfo, check: _Checker) -> TokenPrompt | None:
    most = PROMPT_PER_POSITION * info.context_length
    if not check.require(0 < len(ids) <= most, path, f"must be 1 to {most} ids, but there are {len(ids)}"):
        return None
    _check_vocabulary(ids, path, info, check)
    return TokenPrompt(tuple(ids))


def _parse_chat(chat: pb.Chat, path: str, check: _Checker) -> ChatPrompt:
    check.require(1 <= len(chat.messages) <= MAX_MESSAGES, f"{path}.messages", f"must be 1 to {MAX_MESSAGES} messages")
    for index, message in enumerate(chat.messages[:MAX_MESSAGES]):
        if not check.require(message.role != "", f"{path}.messages[{index}].role", "must not be empty"):
            break
    return ChatPrompt(
        messages=tuple((message.role, message.content) for message in chat.messages[:MAX_MESSAGES]),
        add_generation_prompt=not chat.HasField("add_generation_prompt") or chat.add_generation_prompt,
        field=path,
    )


def _parse_sampling(sampling: pb.SamplingParams, info: EngineInfo, check: _Checker) -> SamplingParams | None:
    values: dict[str, Any] = {name: getattr(sampling, name) for name in _SAMPLING_FLOATS if sampling.HasField(name)}
    values |= {name: getattr(sampling, name) for name in ("top_k", "seed") if sampling.HasField(name)}
    few = f"at most {MAX_LOGIT_BIAS_ENTRIES} entries"
    if check.require(len(sampling.logit_bias) <= MAX_LOGIT_BIAS_ENTRIES, "generation.sampling.logit_bias", few):
        values["logit_bias"] = tuple(sorted(sampling.logit_bias.items()))
        outside = [token_id for token_id in sampling.logit_bias if token_id >= info.vocab_size]
        if outside:
            name = f"generation.sampling.logit_bias[{outside[0]}]"
            check.require(False, name, f"token ids must be below {info.vocab_size}")
    if check.require(
        sampling.coupling in _COUPLINGS, "generation.sampling.coupling", f"{sampling.coupling} is no known coupling"
    ):
        values["coupling"] = _COUPLINGS[sampling.coupling]
    return check.build(SamplingParams, values)


def _parse_stopping(
    stopping: pb.StoppingParams, info: EngineInfo, limits: LimitsConfig, check: _Checker
) -> StoppingParams | None:
    ceiling = _ceiling(info, limits)
    asked = _optional(stopping, "max_new_tokens")
    in_range = check.require(
        asked is None or asked <= ceiling, "generation.stopping.max_new_tokens", f"must be at most {ceiling}"
    )
    most_ids = StoppingParams.MAX_STOP_TOKEN_IDS
    stop_token_ids = stopping.stop_token_ids[:most_ids]
    _check_vocabulary(stop_token_ids, "generation.stopping.stop_token_ids", info, check)
    few = f"at most {most_ids} ids"
    check.require(len(stopping.stop_token_ids) <= most_ids, "generation.stopping.stop_token_ids", few)
    return check.build(
        StoppingParams,
        {
            "max_new_tokens": asked if asked is not None and in_range else ceiling,
            "min_new_tokens": stopping.min_new_tokens,
            "stop_sequences": tuple(stopping.stop_sequences[: StoppingParams.MAX_STOP_SEQUENCES + 1]),
            "stop_token_ids": frozenset(stop_token_ids),
            "include_stop_sequence": stopping.include_stop_sequence,
            "ignore_eos": stopping.ignore_eos,
        },
    )


def _check_vocabulary(token_ids: Iterable[int], path: str, info: EngineInfo, check: _Checker) -> None:
    for index, token_id in enumerate(token_ids):
        if token_id >= info.vocab_size:
            check.require(False, f"{path}[{index}]", f"is {token_id}, but token ids are below {info.vocab_size}")
            return


def _ceiling(info: EngineInfo, limits: LimitsConfig) -> int:
    return min(info.max_new_tokens_limit, limits.max_new_tokens)


def _optional(message: Any, name: str) -> int | None:
    return int(getattr(message, name)) if message.HasField(name) else None
