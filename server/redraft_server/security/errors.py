"""Why a call is not let in."""

from __future__ import annotations


class AccessRefused(Exception):
    """`reason` is one of `redraft.telemetry.security_metrics.REFUSAL_REASONS`; the message is for the caller.

    `retry_after_s` is the time after which the same call would be let in, if that is a matter of time.
    """

    def __init__(self, reason: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s
