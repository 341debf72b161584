"""DraftService, as far as a server without a draft registry can answer it: the draft in service, read-only."""

# ruff: noqa: N802 - the methods are named by the proto

from __future__ import annotations

import grpc
from google.protobuf.message import Message

from redraft.v1 import draft_pb2 as pb
from redraft.v1 import draft_pb2_grpc
from redraft_server.engine.api import EngineClient
from redraft_server.rpc.status import StatusError, draft_not_found, unimplemented

_Context = grpc.aio.ServicerContext[Message, Message]


class DraftServicer(draft_pb2_grpc.DraftServiceServicer):
    def __init__(self, engine: EngineClient) -> None:
        self._engine = engine

    async def ListDrafts(self, request: pb.ListDraftsRequest, context: _Context) -> pb.ListDraftsResponse:
        draft = self._active()
        wanted = draft is not None and (not request.states or draft.state in request.states)
        return pb.ListDraftsResponse(drafts=[draft] if draft is not None and wanted else [])

    async def GetDraft(self, request: pb.GetDraftRequest, context: _Context) -> pb.GetDraftResponse:
        draft = self._active()
        if draft is None or request.version not in ("", draft.version):
            raise draft_not_found(request.version or "active")
        return pb.GetDraftResponse(draft=draft)

    async def ActivateDraft(self, request: pb.ActivateDraftRequest, context: _Context) -> pb.ActivateDraftResponse:
        raise _no_registry()

    async def RollbackDraft(self, request: pb.RollbackDraftRequest, context: _Context) -> pb.RollbackDraftResponse:
        raise _no_registry()

    async def SetTrafficSplit(
        self, request: pb.SetTrafficSplitRequest, context: _Context
    ) -> pb.SetTrafficSplitResponse:
        raise _no_registry()

    def _active(self) -> pb.Draft | None:
        info = self._engine.info
        if info.draft_name is None:
            return None
        return pb.Draft(
            version=info.draft_version,
            state=pb.DRAFT_STATE_ACTIVE,
            target_fingerprint=info.target_fingerprint,
            tokenizer_fingerprint=info.tokenizer_fingerprint,
            share=1.0,
        )


def _no_registry() -> StatusError:
    return unimplemented(
        "this server has no draft registry and serves the draft it was started with; "
        "to change it, restart the server with another --model.draft"
    )
