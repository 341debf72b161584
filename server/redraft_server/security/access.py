"""Lets calls in or not: key, right, tenant, limits, in this order. Only used where there is a keys file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from redraft_server.security.errors import AccessRefused
from redraft_server.security.keys import ApiKey, KeyRing
from redraft_server.security.limits import Admission, TenantLimits
from redraft_server.security.reloaded import Reloaded

AUTHORIZATION_KEY = "authorization"
TENANT_KEY = "x-redraft-tenant"

Metadata = Iterable[tuple[str, str | bytes]]

_GENERATION = "/redraft.v1.GenerationService/"
_OPEN_TO_USERS = (
    _GENERATION,
    "/redraft.v1.TokenizerService/",
    "/redraft.v1.ModelService/",
    "/redraft.v1.DraftService/ListDrafts",
    "/redraft.v1.DraftService/GetDraft",
    "/grpc.reflection.",
)
"""By prefix. Whatever else there is or will be needs the role admin."""

_HOW = "send the metadata `authorization: Bearer KEY`"


class AccessMetrics(Protocol):
    """The part of `redraft.telemetry.security_metrics.SecurityMetrics` that counts refusals."""

    def observe_refusal(self, reason: str) -> None: ...


class AccessControl:
    """`now` is the wall clock, for expiry; `clock` a monotonic one, for rates; both in seconds."""

    def __init__(
        self,
        keys: Reloaded[KeyRing],
        metrics: AccessMetrics,
        *,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keys = keys
        self._metrics = metrics
        self._now = now
        self._limits = TenantLimits(clock)

    def identify(self, path: str, metadata: Metadata) -> ApiKey:
        """Whose call this is, by its metadata alone. Raises `AccessRefused`."""
        metadata = list(metadata)
        try:
            key = self._authenticate([value for name, value in metadata if name == AUTHORIZATION_KEY])
            if key.role != "admin" and not path.startswith(_OPEN_TO_USERS):
                raise AccessRefused("role", "this call needs an API key with the role admin")
            if any(value not in ("", key.tenant) for name, value in metadata if name == TENANT_KEY):
                message = f"the API key is one of tenant {key.tenant}: leave out {TENANT_KEY}, or send that"
                raise AccessRefused("tenant", message)
        except AccessRefused as refusal:
            self._metrics.observe_refusal(refusal.reason)
            raise
        return key

    @contextmanager
    def admitted(self, key: ApiKey, path: str) -> Iterator[Admission]:
        """Around the call that `identify` has let pass. Raises `AccessRefused` on entering."""
        try:
            admission = self._limits.admit(key, generates=path.startswith(_GENERATION))
        except AccessRefused as refusal:
            self._metrics.observe_refusal(refusal.reason)
            raise
        try:
            yield admission
        finally:
            admission.end()

    def keys_changed(self) -> None:
        """To be called after the keys file was read anew."""
        self._limits.forget_all_but(self._keys.value.tenants)

    def _authenticate(self, authorizations: list[str | bytes]) -> ApiKey:
        if not authorizations:
            raise AccessRefused("missing_key", f"this server wants an API key: {_HOW}")
        if len(authorizations) > 1:
            raise AccessRefused("missing_key", f"there are several authorizations: {_HOW}, once")
        scheme, _, secret = str(authorizations[0]).partition(" ")
        if scheme.lower() != "bearer" or not secret.strip():
            raise AccessRefused("missing_key", f"the authorization is none: {_HOW}")
        key = self._keys.value.find(secret.strip())
        if key is None:
            raise AccessRefused("unknown_key", "this server does not know the API key")
        if key.expires is not None and key.expires.timestamp() <= self._now():
            raise AccessRefused("expired_key", f"the API key expired at {key.expires:%Y-%m-%d %H:%M} UTC: get another")
        return key
