"""The sync client. Safe to share between threads; each stream belongs to one thread."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Self, TypeVar, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from redraft.v1 import draft_pb2, generation_pb2, model_pb2
from redraft.v1.draft_pb2_grpc import DraftServiceStub
from redraft.v1.generation_pb2_grpc import GenerationServiceStub
from redraft.v1.model_pb2_grpc import ModelServiceStub
from redraft.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from redraft_client import _codec, _codec_admin
from redraft_client._assembler import StreamAssembler
from redraft_client.channel import DEFAULT_ADDRESS, DEFAULT_TIMEOUT, Tls, call_metadata, open_channel
from redraft_client.errors import ProtocolError, map_rpc_error
from redraft_client.types import (
    Draft,
    DraftSwap,
    GenerateParams,
    GenerationResult,
    Message,
    ModelInfo,
    Prompt,
    StreamChunk,
    TokenCount,
    Tokens,
)

_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


class Stream(Iterator[StreamChunk]):
    """A running generation: iterate for chunks, then read `result`. Closing it cancels the generation."""

    def __init__(self, call: "grpc._CallIterator[generation_pb2.StreamGenerateResponse]") -> None:
        self._call = call
        self._assembler = StreamAssembler()
        self._closed = False

    def __next__(self) -> StreamChunk:
        """Raises a RedraftClientError if the generation fails, ProtocolError if the stream is cut short."""
        if self._closed:
            raise StopIteration
        try:
            response = next(self._call)
        except StopIteration:
            self._closed = True
            self._assembler.result()  # raises if the stream is incomplete
            raise
        except grpc.RpcError as error:
            self._closed = True
            raise map_rpc_error(error) from None
        chunk = _codec.parse_chunk(response)
        try:
            self._assembler.add(chunk)
        except ProtocolError:
            self.close()
            raise
        return chunk

    @property
    def result(self) -> GenerationResult:
        """The whole generation, once the last chunk has been read; ProtocolError before."""
        return self._assembler.result()

    def close(self) -> None:
        """Cancels the generation if it still runs; no more chunks come. Safe to call twice."""
        self._closed = True
        self._call.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class Client:
    """Calls a redraft server.

    address: `host:port`, or several servers to spread calls over: `dns:///name:port`, all addresses of a name, or
    `ipv4:1.2.3.4:50051,1.2.3.5:50051`. Of several, those that are not ready are left out, and UnavailableError means
    that none is.
    tls: None connects in clear. api_key: sent as bearer token; None takes it from REDRAFT_API_KEY, "" sends none.
    tenant: whom the calls are made for, if the server does not know it from the key; it is fair between tenants
    and keeps the name in its traffic log. timeout: deadline in seconds of calls that
    give none; None waits for ever. channel: use this channel instead of opening one (it stays the caller's
    to close); address and tls are then unused.

    Every method raises a RedraftClientError (see `errors`) and takes a `timeout` in seconds.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        tls: Tls | None = None,
        api_key: str | None = None,
        tenant: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        channel: grpc.Channel | None = None,
    ) -> None:
        self._own_channel = open_channel(address, tls) if channel is None else None
        connected = channel or self._own_channel
        assert connected is not None
        self._metadata = call_metadata(api_key, tenant)
        self._timeout = timeout
        self._generation = GenerationServiceStub(connected)
        self._tokenizer = TokenizerServiceStub(connected)
        self._models = ModelServiceStub(connected)
        self._drafts = DraftServiceStub(connected)
        self._check_health: grpc.UnaryUnaryMultiCallable[
            health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        ] = health_pb2_grpc.HealthStub(connected).Check  # type: ignore[attr-defined]  # gap in its stubs

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **params: Unpack[GenerateParams]
    ) -> GenerationResult:
        """Generates and returns when all is done. Parameters: see GenerateParams."""
        request = generation_pb2.GenerateRequest(generation=_codec.build_generation(prompt, **params))
        return _codec.parse_result(self._call(self._generation.Generate, request, timeout))

    def stream(self, prompt: Prompt, *, timeout: float | None = None, **params: Unpack[GenerateParams]) -> Stream:
        """Starts to generate; returns at once. Use it in a `with` block if you may stop early."""
        request = generation_pb2.StreamGenerateRequest(generation=_codec.build_generation(prompt, **params))
        return Stream(
            self._generation.StreamGenerate(request, timeout=self._deadline(timeout), metadata=self._metadata)
        )

    def tokenize(
        self,
        source: str | Sequence[Message],
        *,
        model: str = "",
        add_special_tokens: bool | None = None,
        token_texts: bool = False,
        timeout: float | None = None,
    ) -> Tokens:
        """Token ids of a text, or of chat messages in the model's template."""
        request = _codec_admin.build_tokenize(source, model, add_special_tokens, token_texts)
        return _codec_admin.parse_tokens(self._call(self._tokenizer.Tokenize, request, timeout))

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str = "",
        include_special_tokens: bool = False,
        timeout: float | None = None,
    ) -> str:
        """Text of token ids."""
        request = _codec_admin.build_detokenize(token_ids, model, include_special_tokens)
        return self._call(self._tokenizer.Detokenize, request, timeout).text

    def count_tokens(
        self,
        source: str | Sequence[Message],
        *,
        model: str = "",
        add_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> TokenCount:
        """Number of tokens that `tokenize` would return."""
        request = _codec_admin.build_count_tokens(source, model, add_special_tokens)
        return _codec_admin.parse_count(self._call(self._tokenizer.CountTokens, request, timeout))

    def list_models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """The loaded targets."""
        response = self._call(self._models.ListModels, model_pb2.ListModelsRequest(), timeout)
        return tuple(_codec_admin.parse_model(model) for model in response.models)

    def get_model(self, model: str = "", *, timeout: float | None = None) -> ModelInfo:
        """One target; the server's only one if `model` is empty."""
        request = model_pb2.GetModelRequest(model=model)
        return _codec_admin.parse_model(self._call(self._models.GetModel, request, timeout).model)

    def list_drafts(self, *, timeout: float | None = None) -> tuple[Draft, ...]:
        """All drafts, newest first."""
        response = self._call(self._drafts.ListDrafts, draft_pb2.ListDraftsRequest(), timeout)
        return tuple(_codec_admin.parse_draft(draft) for draft in response.drafts)

    def get_draft(self, version: str = "", *, timeout: float | None = None) -> Draft:
        """One draft; the active one if `version` is empty."""
        request = draft_pb2.GetDraftRequest(version=version)
        return _codec_admin.parse_draft(self._call(self._drafts.GetDraft, request, timeout).draft)

    def activate_draft(self, version: str, *, expected_active: str = "", timeout: float | None = None) -> DraftSwap:
        """Makes a draft serve all traffic; AbortedError if `expected_active` is given and not active."""
        request = draft_pb2.ActivateDraftRequest(version=version, expected_active_version=expected_active)
        return _codec_admin.parse_swap(self._call(self._drafts.ActivateDraft, request, timeout))

    def rollback_draft(self, *, expected_active: str = "", timeout: float | None = None) -> DraftSwap:
        """Makes the previous draft serve again; AbortedError as in `activate_draft`."""
        request = draft_pb2.RollbackDraftRequest(expected_active_version=expected_active)
        return _codec_admin.parse_swap(self._call(self._drafts.RollbackDraft, request, timeout))

    def set_traffic_split(self, shares: Mapping[str, float], *, timeout: float | None = None) -> tuple[Draft, ...]:
        """Shares of requests by draft version; they add up to 1."""
        request = _codec_admin.build_split(shares)
        response = self._call(self._drafts.SetTrafficSplit, request, timeout)
        return tuple(_codec_admin.parse_draft(draft) for draft in response.drafts)

    def is_serving(self, service: str = "", *, timeout: float | None = None) -> bool:
        """Standard health check: "" is the process, "redraft.v1.GenerationService" the loaded model."""
        request = health_pb2.HealthCheckRequest(service=service)
        response = self._call(self._check_health, request, timeout)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def close(self) -> None:
        """Closes the channel if the client opened it; running streams are cancelled."""
        if self._own_channel is not None:
            self._own_channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _deadline(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else timeout

    def _call(
        self,
        method: "grpc.UnaryUnaryMultiCallable[_Request, _Response]",
        request: _Request,
        timeout: float | None,
    ) -> _Response:
        try:
            return method(request, timeout=self._deadline(timeout), metadata=self._metadata)
        except grpc.RpcError as error:
            raise map_rpc_error(error) from None
