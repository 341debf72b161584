"""DraftService: the rollout, seen and steered by hand. Without a registry: the draft in service, read-only."""

# ruff: noqa: N802 - the methods are named by the proto

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc
from google.protobuf.message import Message

from redraft.errors import ModelError, RedraftError
from redraft.registry import errors as registry_errors
from redraft.v1 import draft_pb2 as pb
from redraft.v1 import draft_pb2_grpc
from redraft_server.engine.api import AdmissionError, EngineClient
from redraft_server.rpc.convert_draft import check_version, draft_to_pb, parse_split
from redraft_server.rpc.status import (
    StatusError,
    aborted,
    draft_not_found,
    failed_precondition,
    from_admission,
    unavailable,
    unimplemented,
)

if TYPE_CHECKING:  # the rollout brings torch
    from redraft_server.rollout.view import DraftView, Swap

T = TypeVar("T")
_Context = grpc.aio.ServicerContext[Message, Message]


class RolloutClient(Protocol):
    """The rollout as the edge sees it."""

    def views(self) -> list[DraftView]: ...

    def submit(self, command: Callable[[], T]) -> Future[T]: ...

    def activate(self, version: str, expected: str = "") -> Swap: ...

    def rollback(self, expected: str = "") -> Swap: ...

    def split(self, shares: dict[str, float]) -> list[DraftView]: ...


class DraftServicer(draft_pb2_grpc.DraftServiceServicer):
    def __init__(self, engine: EngineClient, rollout: RolloutClient | None = None) -> None:
        self._engine = engine
        self._rollout = rollout

    async def ListDrafts(self, request: pb.ListDraftsRequest, context: _Context) -> pb.ListDraftsResponse:
        drafts = await self._drafts()
        return pb.ListDraftsResponse(drafts=[d for d in drafts if not request.states or d.state in request.states])

    async def GetDraft(self, request: pb.GetDraftRequest, context: _Context) -> pb.GetDraftResponse:
        for draft in await self._drafts():
            if draft.version == request.version or (not request.version and draft.state == pb.DRAFT_STATE_ACTIVE):
                return pb.GetDraftResponse(draft=draft)
        raise draft_not_found(request.version or "active")

    async def ActivateDraft(self, request: pb.ActivateDraftRequest, context: _Context) -> pb.ActivateDraftResponse:
        rollout = self._steered()
        check_version("version", request.version)
        command = partial(rollout.activate, request.version, request.expected_active_version)
        swap = await _obeyed(rollout, command, request.version)
        return pb.ActivateDraftResponse(active=_or_unset(swap.active), previous=_or_unset(swap.previous))

    async def RollbackDraft(self, request: pb.RollbackDraftRequest, context: _Context) -> pb.RollbackDraftResponse:
        rollout = self._steered()
        swap = await _obeyed(rollout, partial(rollout.rollback, request.expected_active_version), "previous")
        return pb.RollbackDraftResponse(active=_or_unset(swap.active), previous=_or_unset(swap.previous))

    async def SetTrafficSplit(
        self, request: pb.SetTrafficSplitRequest, context: _Context
    ) -> pb.SetTrafficSplitResponse:
        rollout = self._steered()
        shares = parse_split(request.shares)
        drafts = await _obeyed(rollout, partial(rollout.split, shares), ", ".join(shares))
        return pb.SetTrafficSplitResponse(drafts=[draft_to_pb(draft) for draft in drafts])

    async def _drafts(self) -> list[pb.Draft]:
        if self._rollout is not None:
            return [draft_to_pb(view) for view in await asyncio.to_thread(self._rollout.views)]
        info = self._engine.info
        if info.draft_name is None:
            return []
        return [
            pb.Draft(
                version=info.draft_version,
                state=pb.DRAFT_STATE_ACTIVE,
                target_fingerprint=info.target_fingerprint,
                tokenizer_fingerprint=info.tokenizer_fingerprint,
                share=1.0,
            )
        ]

    def _steered(self) -> RolloutClient:
        if self._rollout is None:
            raise unimplemented(
                "this server has no draft registry and serves the draft it was started with; to change drafts "
                "while it runs, start it with --registry.url"
            )
        return self._rollout


def _or_unset(view: DraftView | None) -> pb.Draft | None:
    return None if view is None else draft_to_pb(view)


async def _obeyed(rollout: RolloutClient, command: Callable[[], T], subject: str) -> T:
    try:
        return await asyncio.wrap_future(rollout.submit(command))
    except AdmissionError as error:
        raise from_admission(error) from None
    except RedraftError as error:
        raise _status(error, subject) from None


def _status(error: RedraftError, subject: str) -> StatusError:
    match error:
        case registry_errors.DraftNotFound():
            return draft_not_found(subject)
        case registry_errors.CurrentChanged():
            return aborted(str(error))
        case registry_errors.RegistryUnavailable():
            return unavailable("REGISTRY_UNAVAILABLE", str(error))
        case registry_errors.RegistryError() | ModelError():
            return failed_precondition("DRAFT", subject[:64], str(error))
        case _:
            return failed_precondition("ROLLOUT", subject[:64], str(error))
