"""What the server says at start of how open it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from redraft_server.banner import exposure_notice
from redraft_server.config import AuthConfig, GrpcConfig, ServerConfig

KEYS = AuthConfig(keys_file=Path("keys.yaml"))
TLS = {"tls_cert": Path("c"), "tls_key": Path("k")}


@pytest.mark.parametrize(
    ("grpc", "auth", "word"),
    [
        ({"host": "0.0.0.0"}, AuthConfig(), "whoever reaches 0.0.0.0 is served"),
        ({"host": "::", **TLS}, AuthConfig(), "whoever reaches :: is served"),
        ({"host": "10.0.0.1"}, KEYS, "in clear"),
        ({"host": "0.0.0.0", **TLS}, KEYS, None),
        ({"host": "0.0.0.0", **TLS, "tls_client_ca": Path("a")}, AuthConfig(), None),
        ({"host": "127.0.0.1"}, AuthConfig(), None),
        ({"host": "localhost"}, KEYS, None),
    ],
)
def test_exposure(grpc: dict[str, str | Path], auth: AuthConfig, word: str | None) -> None:
    notice = exposure_notice(ServerConfig(grpc=GrpcConfig.model_validate(grpc), auth=auth))
    assert (notice is None) if word is None else (notice is not None and word in notice)
