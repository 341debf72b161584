"""ModelService: what this server serves."""

# ruff: noqa: N802 - the methods are named by the proto

from __future__ import annotations

import grpc
from google.protobuf.message import Message

from redraft.v1 import model_pb2 as pb
from redraft.v1 import model_pb2_grpc
from redraft_server.engine.api import EngineClient
from redraft_server.rpc.convert import check_model
from redraft_server.rpc.convert_reply import model_to_pb
from redraft_server.rpc.text import TextService

_Context = grpc.aio.ServicerContext[Message, Message]


class ModelServicer(model_pb2_grpc.ModelServiceServicer):
    def __init__(self, engine: EngineClient, text: TextService) -> None:
        self._engine = engine
        self._text = text

    async def ListModels(self, request: pb.ListModelsRequest, context: _Context) -> pb.ListModelsResponse:
        return pb.ListModelsResponse(models=[self._model()])

    async def GetModel(self, request: pb.GetModelRequest, context: _Context) -> pb.GetModelResponse:
        check_model(request.model, self._engine.info)
        return pb.GetModelResponse(model=self._model())

    def _model(self) -> pb.Model:
        return model_to_pb(self._engine.info, has_chat_template=self._text.has_chat_template)
