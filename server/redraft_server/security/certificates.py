"""The server's certificate and the authority of its clients, checked before gRPC sees them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from redraft.errors import ConfigError
from redraft_server.config import GrpcConfig
from redraft_server.security.reloaded import Reloaded


@dataclass(frozen=True, slots=True)
class Certificates:
    """PEM texts that go together and are valid now."""

    private_key: bytes = field(repr=False)
    chain: bytes
    client_ca: bytes | None
    expiry: dict[str, float]
    """When `server` and `client_ca` expire, in Unix seconds: the first of a chain, the last of several authorities."""

    def configuration(self) -> grpc.ServerCertificateConfiguration:
        """The same for gRPC."""
        return grpc.ssl_server_certificate_configuration([(self.private_key, self.chain)], self.client_ca)


def load_certificates(config: GrpcConfig, now: Callable[[], float] = time.time) -> Reloaded[Certificates] | None:
    """The configured certificates, None if there is no TLS. Raises `ConfigError`."""
    if config.tls_key is None or config.tls_cert is None:
        return None
    files: list[tuple[str, Path]] = [("grpc.tls_key", config.tls_key), ("grpc.tls_cert", config.tls_cert)]
    if config.tls_client_ca is not None:
        files.append(("grpc.tls_client_ca", config.tls_client_ca))
    return Reloaded("tls", files, partial(_parse, now=now))


def server_credentials(certificates: Reloaded[Certificates]) -> grpc.ServerCredentials:
    """Credentials of the certificates as they are when a client connects. Connections that stand are not touched."""
    given = certificates.value

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        """Called by grpc before each handshake, on a thread of its own, one at a time; None is "as before"."""
        nonlocal given
        current = certificates.value
        if current is given:
            return None
        given = current
        return current.configuration()

    return grpc.dynamic_ssl_server_credentials(
        given.configuration(),
        fetch,  # type: ignore[arg-type]  # the stubs leave out that it may return None
        require_client_authentication=given.client_ca is not None,
    )


def _parse(contents: Sequence[bytes], now: Callable[[], float]) -> Certificates:
    key, chain, *rest = contents
    client_ca = rest[0] if rest else None
    try:
        public_key = load_pem_private_key(key, password=None).public_key()
    except (ValueError, TypeError):  # TypeError: it is encrypted
        raise ConfigError("grpc.tls_key: is no private key in PEM, or it is encrypted") from None
    own = _certificates("grpc.tls_cert", chain)
    if own[0].public_key() != public_key:
        raise ConfigError("grpc.tls_cert, grpc.tls_key: the key is not that of the (first) certificate")
    time = datetime.fromtimestamp(now(), UTC)
    _require_valid("grpc.tls_cert", own, time)
    expiry = {"server": min(certificate.not_valid_after_utc.timestamp() for certificate in own)}
    if client_ca is not None:
        # While authorities change, an old one may stand beside the new one.
        authorities = _certificates("grpc.tls_client_ca", client_ca)
        last = max(authorities, key=lambda authority: authority.not_valid_after_utc)
        _require_valid("grpc.tls_client_ca", [last], time)
        expiry["client_ca"] = last.not_valid_after_utc.timestamp()
    return Certificates(key, chain, client_ca, expiry)


def _certificates(setting: str, pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ConfigError(f"{setting}: is no certificate in PEM") from None


def _require_valid(setting: str, certificates: Sequence[x509.Certificate], time: datetime) -> None:
    for certificate in certificates:
        name = certificate.subject.rfc4514_string() or f"number {certificate.serial_number:x}"
        if certificate.not_valid_after_utc <= time:
            until = f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
            raise ConfigError(f"{setting}: the certificate {name} expired at {until}; put a valid one there")
        if certificate.not_valid_before_utc > time:
            since = f"{certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
            raise ConfigError(
                f"{setting}: the certificate {name} is valid from {since} only, and it is {time:%Y-%m-%d %H:%M} "
                "here: is this machine's clock right?"
            )
