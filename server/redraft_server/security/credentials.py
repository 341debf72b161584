"""Keys and certificates of one server: read at start, before the models, since a wrong one should not cost minutes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redraft_server.config import ServerConfig
from redraft_server.security.certificates import Certificates, load_certificates
from redraft_server.security.keys import SETTING, KeyRing, parse_keys
from redraft_server.security.reloaded import Reloaded


@dataclass(frozen=True, slots=True)
class Credentials:
    keys: Reloaded[KeyRing] | None
    """None: whoever reaches the port may call."""
    certificates: Reloaded[Certificates] | None
    """None: plain text."""

    @property
    def files(self) -> Sequence[Reloaded[Any]]:
        return [file for file in (self.keys, self.certificates) if file is not None]


def load_credentials(config: ServerConfig) -> Credentials:
    """Read what is configured. Raises `ConfigError`."""
    path = config.auth.keys_file
    keys = None if path is None else Reloaded("keys", [(SETTING, path)], parse_keys)
    return Credentials(keys, load_certificates(config.grpc))
