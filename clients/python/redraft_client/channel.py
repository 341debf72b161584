"""How to connect: address, TLS, load balancing, keepalive, retries. One place for sync and asyncio."""

import json
import os
from dataclasses import dataclass, field

import grpc
import grpc.aio

from redraft_client.errors import InvalidArgumentError

API_KEY_VARIABLE = "REDRAFT_API_KEY"
DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT = 300.0
"""Deadline of a call in seconds, if none is given."""

_MAX_MESSAGE_BYTES = 16 * 1024 * 1024
_READINESS = "redraft.v1.GenerationService"
"""What a server's health service calls ready."""

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
    private_key: bytes | None = field(default=None, repr=False)
    server_name: str | None = None

    def __post_init__(self) -> None:
        if (self.certificate_chain is None) != (self.private_key is None):
            raise ValueError("mutual TLS needs both certificate_chain and private_key")

    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.root_certificates, self.private_key, self.certificate_chain)


def service_config(address: str) -> str:
    """The gRPC service config: round robin over all addresses, and the retry policy.

    gRPC itself obeys the server's `grpc-retry-pushback-ms` in place of the back-off. Of several servers only those that
    say they are ready are called, so that one that drains is left alone from then on. With a single server every call
    goes through: health checks must get their answer, and there is no other to turn to.
    """
    config: dict[str, object] = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [{"name": _RETRIED, "retryPolicy": _RETRY_POLICY}],
    }
    if names_several(address):
        config["healthCheckConfig"] = {"serviceName": _READINESS}
    return json.dumps(config)


def names_several(address: str) -> bool:
    """Whether an address may stand for more than one server: `dns:///name:port`, `ipv4:1.2.3.4:1,1.2.3.5:1`."""
    return address.startswith("dns:") or "," in address


def channel_options(
    address: str, tls: Tls | None = None, max_message_bytes: int = _MAX_MESSAGE_BYTES
) -> list[tuple[str, str | int]]:
    """Channel arguments. Keepalive finds dead peers in 40 s, and stays above the server's minimum of 10 s."""
    options: list[tuple[str, str | int]] = [
        ("grpc.service_config", service_config(address)),
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
    """A sync channel. It connects at the first call. Several servers: `dns:///name:port`, or `ipv4:` and a list."""
    options = channel_options(address, tls)
    if tls is None:
        return grpc.insecure_channel(address, options)
    return grpc.secure_channel(address, tls.credentials(), options)


def open_aio_channel(address: str, tls: Tls | None = None) -> grpc.aio.Channel:
    """The same for asyncio; call it with the event loop running."""
    options = channel_options(address, tls)
    if tls is None:
        return grpc.aio.insecure_channel(address, options)
    return grpc.aio.secure_channel(address, tls.credentials(), options)


def call_metadata(api_key: str | None, tenant: str | None = None) -> tuple[tuple[str, str], ...]:
    """Metadata of each call. Without `api_key` it is taken from the environment; "" sends none.

    The key travels in clear unless the channel has TLS. Raises InvalidArgumentError if it cannot be sent.
    """
    if api_key is None:
        api_key = os.environ.get(API_KEY_VARIABLE)
    if api_key and not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        # grpc would raise an error that quotes it
        raise InvalidArgumentError("the API key has a character that no key has: is there a line break at its end?")
    pairs = (("authorization", api_key and f"Bearer {api_key}"), ("x-redraft-tenant", tenant))
    return tuple((key, value) for key, value in pairs if value)
