"""The metric families of API keys and certificates. Part of :class:`redraft.telemetry.metrics.ServerMetrics`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge

REFUSAL_REASONS = (
    *("missing_key", "unknown_key", "expired_key", "role", "tenant"),
    *("concurrent_requests", "requests_per_minute", "tokens_per_minute"),
)
"""Why a call was not let in: who it is, what it may do, how much it may use. Never by tenant or key."""

CREDENTIAL_KINDS = ("keys", "tls")
RELOAD_RESULTS = ("ok", "failed")


class SecurityMetrics:
    """Refused calls, reloads of the credentials, and when certificates expire. Any thread."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._refusals = Counter(
            "redraft_access_refusals_total", "Calls that were not let in, by reason.", ("reason",), registry=registry
        )
        self._reloads = Counter(
            "redraft_credential_reloads_total",
            "Files of keys or certificates that were read anew, or could not be.",
            ("kind", "result"),
            registry=registry,
        )
        self._expiry = Gauge(
            "redraft_tls_certificate_expiry_timestamp_seconds",
            "Unix time at which a certificate in use expires.",
            ("certificate",),
            registry=registry,
        )
        for reason in REFUSAL_REASONS:
            self._refusals.labels(reason)
        for kind in CREDENTIAL_KINDS:
            for result in RELOAD_RESULTS:
                self._reloads.labels(kind, result)

    def observe_refusal(self, reason: str) -> None:
        """Count a call that was not let in, by one of `REFUSAL_REASONS`."""
        self._refusals.labels(reason).inc()

    def observe_reload(self, kind: str, result: str) -> None:
        """Count one look at changed files: `ok`, or `failed` while they cannot be used."""
        self._reloads.labels(kind, result).inc()

    def set_certificate_expiry(self, certificate: str, unix_s: float) -> None:
        """State when the certificate `server` or `client_ca` expires."""
        self._expiry.labels(certificate).set(unix_s)
