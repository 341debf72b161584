"""How to connect: address, TLS, load balancing, keepalive, retries. One place for sync and asyncio."""

import json
from dataclasses import dataclass

import grpc
import grpc.aio

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT = 300.0
"""Deadline of a call in seconds, if none is given."""

_MAX_MESSAGE_BYTES = 16 * 1024 * 1024

_RETRY_POLICY = {
    "maxAttempts": 4,
    "initialBackoff": "0.1s",
    "maxBackoff": "2s",
    "backoffMultiplier": 2,
    "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
}
# A call is retried only until the server's first metadata. Changes of the draft (activate, roll back, split)
# are missing on purpose: a roll-back that is sent twice would undo itself.
_RETRIED = [
    {"service": "redraft.v1.GenerationService"},
    {"service": "redraft.v1.TokenizerService"},
    {"service": "redraft.v1.ModelService"},
    {"service": "redraft.v1.DraftService", "method": "ListDrafts"},
    {"service": "redraft.v1.DraftService", "method": "GetDraft"},
]


@dataclass(frozen=True, slots=True)
class Tls:
    """TLS of the connection; PEM bytes.

    root_certificates: CAs to trust; None uses those that gRPC ships. certificate_chain and private_key: the
    client's own, for mutual TLS; both or none. server_name: name to expect in the server's certificate, if
    it is not the one in the address.
    """

    root_certificates: bytes | None = None
    certificate_chain: bytes | None = None
    private_key: bytes | None = None
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate_chain is None) != (self.private_key is None):
            raise ValueError("mutual TLS needs both certificate_chain and private_key")

    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.root_certificates, self.private_key, self.certificate_chain)


def service_config() -> str:
    """The gRPC service config: round robin over all addresses, and the retry policy.

    gRPC itself obeys the server's `grpc-retry-pushback-ms` in place of the back-off.
    """
    return json.dumps(
        {
            "loadBalancingConfig": [{"round_robin": {}}],
            "methodConfig": [{"name": _RETRIED, "retryPolicy": _RETRY_POLICY}],
        }
    )


def channel_options(tls: Tls | None = None, max_message_bytes: int = _MAX_MESSAGE_BYTES) -> list[tuple[str, str | int]]:
    """Channel arguments. Keepalive finds dead peers in 40 s, and stays above the server's minimum of 10 s."""
    options: list[tuple[str, str | int]] = [
        ("grpc.service_config", service_config()),
        ("grpc.enable_retries", 1),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
    ]
    if tls is not None and tls.server_name is not None:
        options.append(("grpc.ssl_target_name_override", tls.server_name))
    return options


def open_channel(address: str, tls: Tls | None = None) -> grpc.Channel:
    """A sync channel. It connects at the first call. Many servers behind one name: `dns:///name:port`."""
    options = channel_options(tls)
    if tls is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, tls.credentials(), options)


def open_aio_channel(address: str, tls: Tls | None = None) -> grpc.aio.Channel:
    """The same for asyncio; call it with the event loop running."""
    options = channel_options(tls)
    if tls is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, tls.credentials(), options)


def call_metadata(api_key: str | None, tenant: str | None = None) -> tuple[tuple[str, str], ...]:
    """Metadata of each call. The key travels in clear unless the channel has TLS."""
    pairs = (("authorization", api_key and f"Bearer {api_key}"), ("x-redraft-tenant", tenant))
    return tuple((key, value) for key, value in pairs if value)
