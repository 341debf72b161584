"""Certificates for tests, by an authority of the test's own."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import trustme

from redraft_server.config import GrpcConfig

HOST = "localhost"


class Authority:
    """Signs servers and clients."""

    def __init__(self) -> None:
        self._ca = trustme.CA()
        self.pem = self._ca.cert_pem.bytes()

    def server(self, *, days: float = 30.0, since_days: float = -1.0) -> Pair:
        """A certificate for `HOST`, valid for a time that begins and ends so many days from now."""
        now = datetime.now(UTC)
        leaf = self._ca.issue_cert(
            HOST, not_before=now + timedelta(days=since_days), not_after=now + timedelta(days=days)
        )
        return Pair.of(leaf)

    def client(self) -> Pair:
        return Pair.of(self._ca.issue_cert("client@example.org"))

    def channel(self, client: Pair | None = None) -> grpc.ChannelCredentials:
        """What a client trusts and, for mutual TLS, who it is."""
        if client is None:
            return grpc.ssl_channel_credentials(self.pem)
        return grpc.ssl_channel_credentials(self.pem, client.key, client.chain)


@dataclass(frozen=True)
class Pair:
    key: bytes
    chain: bytes

    @classmethod
    def of(cls, leaf: trustme.LeafCert) -> Pair:
        return cls(leaf.private_key_pem.bytes(), b"".join(pem.bytes() for pem in leaf.cert_chain_pems))


class TlsFiles:
    """The three files of a server in a folder; without `authority` they are there already."""

    def __init__(self, folder: Path, authority: Authority | None = None) -> None:
        self.key, self.cert, self.client_ca = (folder / name for name in ("tls.key", "tls.crt", "ca.crt"))
        if authority is not None:
            self.client_ca.write_bytes(authority.pem)
            self.put(authority.server())

    def put(self, pair: Pair) -> None:
        self.key.write_bytes(pair.key)
        self.cert.write_bytes(pair.chain)

    def config(self, *, mutual: bool = False) -> GrpcConfig:
        return GrpcConfig(
            port=0, tls_key=self.key, tls_cert=self.cert, tls_client_ca=self.client_ca if mutual else None
        )
