"""TokenizerService: the target's tokenizer and chat template, without generating."""

# ruff: noqa: N802 - the methods are named by the proto

from __future__ import annotations

import grpc
from google.protobuf.message import Message

from redraft.v1 import tokenizer_pb2 as pb
from redraft.v1 import tokenizer_pb2_grpc
from redraft_server.engine.api import EngineClient
from redraft_server.rpc.convert import TextPrompt, check_model, check_token_ids, parse_chat
from redraft_server.rpc.status import FieldViolation, invalid_argument
from redraft_server.rpc.text import TextService

_Context = grpc.aio.ServicerContext[Message, Message]


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    def __init__(self, engine: EngineClient, text: TextService) -> None:
        self._engine = engine
        self._text = text

    async def Tokenize(self, request: pb.TokenizeRequest, context: _Context) -> pb.TokenizeResponse:
        check_model(request.model, self._engine.info)
        token_ids = await self._encode(request.input)
        texts = await self._text.token_texts(token_ids) if request.token_texts else ()
        return pb.TokenizeResponse(token_ids=token_ids, token_texts=texts)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: _Context) -> pb.DetokenizeResponse:
        info = self._engine.info
        check_model(request.model, info)
        check_token_ids(request.token_ids, "token_ids", info)
        skip_special = not request.include_special_tokens
        text = await self._text.decode(tuple(request.token_ids), skip_special_tokens=skip_special)
        return pb.DetokenizeResponse(text=text)

    async def CountTokens(self, request: pb.CountTokensRequest, context: _Context) -> pb.CountTokensResponse:
        info = self._engine.info
        check_model(request.model, info)
        token_ids = await self._encode(request.input)
        return pb.CountTokensResponse(token_count=len(token_ids), context_length=info.context_length)

    async def _encode(self, source: pb.TokenizerInput) -> list[int]:
        match source.WhichOneof("input"):
            case "text":
                add_special = not source.HasField("add_special_tokens") or source.add_special_tokens
                return await self._text.encode(
                    TextPrompt(source.text, field="input.text"), add_special_tokens=add_special
                )
            case "chat":
                return await self._text.encode(parse_chat(source.chat, "input.chat"))
            case _:
                raise invalid_argument([FieldViolation("input", "is required: set text or chat")])
