import datetime

from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DraftState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DRAFT_STATE_UNSPECIFIED: _ClassVar[DraftState]
    DRAFT_STATE_CANDIDATE: _ClassVar[DraftState]
    DRAFT_STATE_SHADOW: _ClassVar[DraftState]
    DRAFT_STATE_CANARY: _ClassVar[DraftState]
    DRAFT_STATE_ACTIVE: _ClassVar[DraftState]
    DRAFT_STATE_PREVIOUS: _ClassVar[DraftState]
    DRAFT_STATE_REFUSED: _ClassVar[DraftState]
    DRAFT_STATE_RETIRED: _ClassVar[DraftState]
    DRAFT_STATE_ROLLED_BACK: _ClassVar[DraftState]
DRAFT_STATE_UNSPECIFIED: DraftState
DRAFT_STATE_CANDIDATE: DraftState
DRAFT_STATE_SHADOW: DraftState
DRAFT_STATE_CANARY: DraftState
DRAFT_STATE_ACTIVE: DraftState
DRAFT_STATE_PREVIOUS: DraftState
DRAFT_STATE_REFUSED: DraftState
DRAFT_STATE_RETIRED: DraftState
DRAFT_STATE_ROLLED_BACK: DraftState

class Draft(_message.Message):
    __slots__ = ("version", "parent_version", "state", "target_fingerprint", "tokenizer_fingerprint", "create_time", "expected_acceptance", "realised_acceptance", "draft_tokens", "share", "refusal_reason")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    CREATE_TIME_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_ACCEPTANCE_FIELD_NUMBER: _ClassVar[int]
    REALISED_ACCEPTANCE_FIELD_NUMBER: _ClassVar[int]
    DRAFT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_REASON_FIELD_NUMBER: _ClassVar[int]
    version: str
    parent_version: str
    state: DraftState
    target_fingerprint: str
    tokenizer_fingerprint: str
    create_time: _timestamp_pb2.Timestamp
    expected_acceptance: float
    realised_acceptance: float
    draft_tokens: int
    share: float
    refusal_reason: str
    def __init__(self, version: _Optional[str] = ..., parent_version: _Optional[str] = ..., state: _Optional[_Union[DraftState, str]] = ..., target_fingerprint: _Optional[str] = ..., tokenizer_fingerprint: _Optional[str] = ..., create_time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., expected_acceptance: _Optional[float] = ..., realised_acceptance: _Optional[float] = ..., draft_tokens: _Optional[int] = ..., share: _Optional[float] = ..., refusal_reason: _Optional[str] = ...) -> None: ...

class ListDraftsRequest(_message.Message):
    __slots__ = ("states",)
    STATES_FIELD_NUMBER: _ClassVar[int]
    states: _containers.RepeatedScalarFieldContainer[DraftState]
    def __init__(self, states: _Optional[_Iterable[_Union[DraftState, str]]] = ...) -> None: ...

class ListDraftsResponse(_message.Message):
    __slots__ = ("drafts",)
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    drafts: _containers.RepeatedCompositeFieldContainer[Draft]
    def __init__(self, drafts: _Optional[_Iterable[_Union[Draft, _Mapping]]] = ...) -> None: ...

class GetDraftRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: str
    def __init__(self, version: _Optional[str] = ...) -> None: ...

class GetDraftResponse(_message.Message):
    __slots__ = ("draft",)
    DRAFT_FIELD_NUMBER: _ClassVar[int]
    draft: Draft
    def __init__(self, draft: _Optional[_Union[Draft, _Mapping]] = ...) -> None: ...

class ActivateDraftRequest(_message.Message):
    __slots__ = ("version", "expected_active_version")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_ACTIVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    version: str
    expected_active_version: str
    def __init__(self, version: _Optional[str] = ..., expected_active_version: _Optional[str] = ...) -> None: ...

class ActivateDraftResponse(_message.Message):
    __slots__ = ("active", "previous")
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    active: Draft
    previous: Draft
    def __init__(self, active: _Optional[_Union[Draft, _Mapping]] = ..., previous: _Optional[_Union[Draft, _Mapping]] = ...) -> None: ...

class RollbackDraftRequest(_message.Message):
    __slots__ = ("expected_active_version",)
    EXPECTED_ACTIVE_VERSION_FIELD_NUMBER: _ClassVar[int]
    expected_active_version: str
    def __init__(self, expected_active_version: _Optional[str] = ...) -> None: ...

class RollbackDraftResponse(_message.Message):
    __slots__ = ("active", "previous")
    ACTIVE_FIELD_NUMBER: _ClassVar[int]
    PREVIOUS_FIELD_NUMBER: _ClassVar[int]
    active: Draft
    previous: Draft
    def __init__(self, active: _Optional[_Union[Draft, _Mapping]] = ..., previous: _Optional[_Union[Draft, _Mapping]] = ...) -> None: ...

class DraftShare(_message.Message):
    __slots__ = ("version", "share")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    version: str
    share: float
    def __init__(self, version: _Optional[str] = ..., share: _Optional[float] = ...) -> None: ...

class SetTrafficSplitRequest(_message.Message):
    __slots__ = ("shares",)
    SHARES_FIELD_NUMBER: _ClassVar[int]
    shares: _containers.RepeatedCompositeFieldContainer[DraftShare]
    def __init__(self, shares: _Optional[_Iterable[_Union[DraftShare, _Mapping]]] = ...) -> None: ...

class SetTrafficSplitResponse(_message.Message):
    __slots__ = ("drafts",)
    DRAFTS_FIELD_NUMBER: _ClassVar[int]
    drafts: _containers.RepeatedCompositeFieldContainer[Draft]
    def __init__(self, drafts: _Optional[_Iterable[_Union[Draft, _Mapping]]] = ...) -> None: ...
