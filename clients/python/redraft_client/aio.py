"""The asyncio client: the methods of `client.Client`, awaited. Belongs to one event loop."""

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Self, TypeVar, Unpack

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from redraft.v1 import draft_pb2, generation_pb2, model_pb2
from redraft.v1.draft_pb2_grpc import DraftServiceStub
from redraft.v1.generation_pb2_grpc import GenerationServiceStub
from redraft.v1.model_pb2_grpc import ModelServiceStub
from redraft.v1.tokenizer_pb2_grpc import TokenizerServiceStub
from redraft_client import _codec, _codec_admin
from redraft_client._assembler import StreamAssembler
from redraft_client.channel import DEFAULT_ADDRESS, DEFAULT_TIMEOUT, Tls, call_metadata, open_aio_channel
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


class AsyncStream(AsyncIterator[StreamChunk]):
    """A running generation: iterate for chunks, then read `result`. Closing it cancels the generation."""

    def __init__(
        self,
        call: grpc.aio.UnaryStreamCall[generation_pb2.StreamGenerateRequest, generation_pb2.StreamGenerateResponse],
    ) -> None:
        self._call = call
        self._responses = call.__aiter__()
        self._assembler = StreamAssembler()
        self._closed = False

    async def __anext__(self) -> StreamChunk:
        """Raises a RedraftClientError if the generation fails, ProtocolError if the stream is cut short.

        Cancelling the task that waits here cancels the generation.
        """
        if self._closed:
            raise StopAsyncIteration
        try:
            response = await self._responses.__anext__()
        except StopAsyncIteration:
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
            await self.aclose()
            raise
        return chunk

    @property
    def result(self) -> GenerationResult:
        """The whole generation, once the last chunk has been read; ProtocolError before."""
        return self._assembler.result()

    async def aclose(self) -> None:
        """Cancels the generation if it still runs; no more chunks come. Safe to call twice."""
        self._closed = True
        self._call.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()


class AsyncClient:
    """Calls a redraft server from asyncio. Arguments are those of `client.Client`.

    Create it with the event loop running. Cancelling a task that awaits a call cancels the call.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        tls: Tls | None = None,
        api_key: str | None = None,
        tenant: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        channel: grpc.aio.Channel | None = None,
    ) -> None:
        self._own_channel = open_aio_channel(address, tls) if channel is None else None
        connected = channel or self._own_channel
        assert connected is not None
        self._metadata = call_metadata(api_key, tenant)
        self._timeout = timeout
        self._generation = GenerationServiceStub(connected)
        self._tokenizer = TokenizerServiceStub(connected)
        self._models = ModelServiceStub(connected)
        self._drafts = DraftServiceStub(connected)
        self._check_health: grpc.aio.UnaryUnaryMultiCallable[
            health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
        ] = health_pb2_grpc.HealthStub(connected).Check  # type: ignore[attr-defined]  # gap in its stubs

    async def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **params: Unpack[GenerateParams]
    ) -> GenerationResult:
        """Generates and returns when all is done. Parameters: see GenerateParams."""
        request = generation_pb2.GenerateRequest(generation=_codec.build_generation(prompt, **params))
        return _codec.parse_result(await self._call(self._generation.Generate, request, timeout))

    def stream(self, prompt: Prompt, *, timeout: float | None = None, **params: Unpack[GenerateParams]) -> AsyncStream:
        """Starts to generate; returns at once. Use it in a `with` block if you may stop early."""
        request = generation_pb2.StreamGenerateRequest(generation=_codec.build_generation(prompt, **params))
        return AsyncStream(
            self._generation.StreamGenerate(request, timeout=self._deadline(timeout), metadata=self._metadata)
        )

    async def tokenize(
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
        return _codec_admin.parse_tokens(await self._call(self._tokenizer.Tokenize, request, timeout))

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        model: str = "",
        include_special_tokens: bool = False,
        timeout: float | None = None,
    ) -> str:
        """Text of token ids."""
        request = _codec_admin.build_detokenize(token_ids, model, include_special_tokens)
        return (await self._call(self._tokenizer.Detokenize, request, timeout)).text

    async def count_tokens(
        self,
        source: str | Sequence[Message],
        *,
        model: str = "",
        add_special_tokens: bool | None = None,
        timeout: float | None = None,
    ) -> TokenCount:
        """Number of tokens that `tokenize` would return."""
        request = _codec_admin.build_count_tokens(source, model, add_special_tokens)
        return _codec_admin.parse_count(await self._call(self._tokenizer.CountTokens, request, timeout))

    async def list_models(self, *, timeout: float | None = None) -> tuple[ModelInfo, ...]:
        """The loaded targets."""
        response = await self._call(self._models.ListModels, model_pb2.ListModelsRequest(), timeout)
        return tuple(_codec_admin.parse_model(model) for model in response.models)

    async def get_model(self, model: str = "", *, timeout: float | None = None) -> ModelInfo:
        """One target; the server's only one if `model` is empty."""
        request = model_pb2.GetModelRequest(model=model)
        return _codec_admin.parse_model((await self._call(self._models.GetModel, request, timeout)).model)

    async def list_drafts(self, *, timeout: float | None = None) -> tuple[Draft, ...]:
        """All drafts, newest first."""
        response = await self._call(self._drafts.ListDrafts, draft_pb2.ListDraftsRequest(), timeout)
        return tuple(_codec_admin.parse_draft(draft) for draft in response.drafts)

    async def get_draft(self, version: str = "", *, timeout: float | None = None) -> Draft:
        """One draft; the active one if `version` is empty."""
        request = draft_pb2.GetDraftRequest(version=version)
        return _codec_admin.parse_draft((await self._call(self._drafts.GetDraft, request, timeout)).draft)

    async def activate_draft(
        self, version: str, *, expected_active: str = "", timeout: float | None = None
    ) -> DraftSwap:
        """Makes a draft serve all traffic; AbortedError if `expected_active` is given and not active."""
        request = draft_pb2.ActivateDraftRequest(version=version, expected_active_version=expected_active)
        response = await self._call(self._drafts.ActivateDraft, request, timeout)
        return _codec_admin.parse_swap(response)

    async def rollback_draft(self, *, expected_active: str = "", timeout: float | None = None) -> DraftSwap:
        """Makes the previous draft serve again; AbortedError as in `activate_draft`."""
        request = draft_pb2.RollbackDraftRequest(expected_active_version=expected_active)
        response = await self._call(self._drafts.RollbackDraft, request, timeout)
        return _codec_admin.parse_swap(response)

    async def set_traffic_split(
        self, shares: Mapping[str, float], *, timeout: float | None = None
    ) -> tuple[Draft, ...]:
        """Shares of requests by draft version; they add up to 1."""
        request = _codec_admin.build_split(shares)
        response = await self._call(self._drafts.SetTrafficSplit, request, timeout)
        return tuple(_codec_admin.parse_draft(draft) for draft in response.drafts)

    async def is_serving(self, service: str = "", *, timeout: float | None = None) -> bool:
        """Standard health check: "" is the process, "redraft.v1.GenerationService" the loaded model."""
        request = health_pb2.HealthCheckRequest(service=service)
        response = await self._call(self._check_health, request, timeout)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Closes the channel if the client opened it; running calls are cancelled."""
        if self._own_channel is not None:
            await self._own_channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def _deadline(self, timeout: float | None) -> float | None:
        return self._timeout if timeout is None else timeout

    async def _call(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[_Request, _Response],
        request: _Request,
        timeout: float | None,
    ) -> _Response:
        try:
            return await method(request, timeout=self._deadline(timeout), metadata=self._metadata)
        except grpc.RpcError as error:
            raise map_rpc_error(error) from None
