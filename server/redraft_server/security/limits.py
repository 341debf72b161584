"""How much each tenant uses, and for how long it has to wait when that is too much.

Calls and tokens per minute are allowances that refill evenly and hold at most one minute's worth. What a completion
costs is known at its end only, so tokens are paid afterwards: as long as a tenant is overdrawn, it may not begin
another one. Over time it gets what its limit says; at one time it is over by at most what its running requests produce.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Set
from dataclasses import dataclass

from redraft_server.security.errors import AccessRefused
from redraft_server.security.keys import ApiKey

CONCURRENCY_RETRY_S = 1.0
"""When to try again after too many calls at once: nobody knows when one of them ends."""


class Allowance:
    """An amount per minute; `now` is in seconds of a monotonic clock."""

    def __init__(self, per_minute: float, now: float) -> None:
        self._per_minute = per_minute
        self._level = per_minute
        self._time = now

    def change(self, per_minute: float) -> None:
        """From now on, another amount. What has been used stays used."""
        self._per_minute = per_minute
        self._level = min(self._level, per_minute)

    def wait_s(self, now: float) -> float:
        """Seconds until one is left; 0 if there is one."""
        self._level = min(self._per_minute, self._level + (now - self._time) * self._per_minute / 60.0)
        self._time = now
        return max(0.0, 1.0 - self._level) * 60.0 / self._per_minute

    def take(self, amount: float) -> None:
        """Use that much, even if it is not there."""
        self._level -= amount


@dataclass(slots=True)
class _Use:
    """Of one tenant. An allowance exists while there is a limit for it."""

    running: int = 0
    requests: Allowance | None = None
    tokens: Allowance | None = None


class Admission:
    """A call that was let in; `end` must be called once."""

    def __init__(self, tenant: str, use: _Use) -> None:
        self.tenant = tenant
        self._use = use
        use.running += 1

    def pay(self, tokens: int) -> None:
        """Count the prompt and completion tokens of a request that has ended; also after `end`."""
        if self._use.tokens is not None:
            self._use.tokens.take(tokens)

    def end(self) -> None:
        self._use.running -= 1


class TenantLimits:
    """For the event loop only. Holds the use of the tenants in the keys file, and of no others."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._uses: dict[str, _Use] = {}

    def admit(self, key: ApiKey, *, generates: bool) -> Admission:
        """Let a call in. Raises `AccessRefused`, and has then counted nothing."""
        now, limits = self._clock(), key.limits
        use = self._uses.setdefault(key.tenant, _Use())
        use.requests = _adjusted(use.requests, limits.requests_per_minute, now)
        use.tokens = _adjusted(use.tokens, limits.tokens_per_minute, now)
        if limits.concurrent_requests is not None and use.running >= limits.concurrent_requests:
            raise _too_much(key, "concurrent_requests", limits.concurrent_requests, CONCURRENCY_RETRY_S)
        if use.requests is not None and (wait_s := use.requests.wait_s(now)) > 0:
            raise _too_much(key, "requests_per_minute", limits.requests_per_minute, wait_s)
        if generates and use.tokens is not None and (wait_s := use.tokens.wait_s(now)) > 0:
            raise _too_much(key, "tokens_per_minute", limits.tokens_per_minute, wait_s)
        if use.requests is not None:
            use.requests.take(1)
        return Admission(key.tenant, use)

    def forget_all_but(self, tenants: Set[str]) -> None:
        """Drop the use of tenants that are gone."""
        for gone in self._uses.keys() - tenants:
            del self._uses[gone]


def _adjusted(allowance: Allowance | None, per_minute: int | None, now: float) -> Allowance | None:
    """The allowance under the limit as it is now, which may be another one than at the last call."""
    if per_minute is None:
        return None
    if allowance is None:
        return Allowance(per_minute, now)
    allowance.change(per_minute)
    return allowance


def _too_much(key: ApiKey, reason: str, limit: int | None, wait_s: float) -> AccessRefused:
    words = reason.replace("_", " ")
    return AccessRefused(reason, f"tenant {key.tenant} is at its limit of {limit} {words}", retry_after_s=wait_s)
