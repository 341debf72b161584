"""The keys file: API keys by tenant, each as its SHA-256, and what the tenant may use.

```yaml
tenants:
  acme:
    requests_per_minute: 600
    concurrent_requests: 32
    tokens_per_minute: 200000
    keys:
      - {sha256: "9b74c9897bac770ffc029102a200c5de...", role: user, expires: 2027-06-30T00:00:00Z}
```

`redraft keys new` makes a key and its entry. A hash without salt is enough because a key is 256 random bits: there is
no dictionary to try. Comparing in constant time with every entry would take longer the more there are; instead the key
is looked up, at a place that is a hash under a secret of this process: the time says nothing of any stored hash.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from redraft.errors import ConfigError

SETTING = "auth.keys_file"

Role = Literal["user", "admin"]


def _in_utc(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time


Tenant = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Time = Annotated[datetime, AfterValidator(_in_utc)]
Limit = Annotated[int, Field(ge=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(_Part):
    """What all keys of a tenant may use together, at each server. None: no limit."""

    requests_per_minute: Limit | None = None
    """Calls of the API, in bursts of at most as many."""
    concurrent_requests: Limit | None = None
    """Calls at the same time."""
    tokens_per_minute: Limit | None = None
    """Prompt and completion tokens."""


class _Key(_Part):
    sha256: Sha256
    role: Role = "user"
    expires: Time | None = None


class _Tenant(Limits):
    keys: list[_Key]


class _File(_Part):
    tenants: dict[Tenant, _Tenant] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What a key stands for."""

    tenant: str
    role: Role
    limits: Limits
    expires: datetime | None = None


class KeyRing:
    """The keys that count now."""

    def __init__(self, keys: Mapping[str, ApiKey]) -> None:
        """`keys` are by SHA-256 in hex."""
        self._secret = secrets.token_bytes(32)
        self._keys = {self._place(bytes.fromhex(sha256)): key for sha256, key in keys.items()}
        self.tenants = frozenset(key.tenant for key in keys.values())

    def find(self, secret: str) -> ApiKey | None:
        """What a key as sent by a client stands for; None if nobody knows it."""
        return self._keys.get(self._place(hashlib.sha256(secret.encode()).digest()))

    def __len__(self) -> int:
        return len(self._keys)

    def _place(self, digest: bytes) -> bytes:
        return hmac.digest(self._secret, digest, "sha256")


def parse_keys(contents: Sequence[bytes]) -> KeyRing:
    """The key ring of a keys file. Raises `ConfigError`, whose message has names and places but nothing of a value."""
    (text,) = contents
    try:
        loaded = yaml.safe_load(text.decode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{SETTING}: is not valid YAML or JSON{line}") from None
    if not isinstance(loaded, dict):  # also the empty file of a write that is under way
        raise ConfigError(f"{SETTING}: must be a mapping that begins with `tenants:`")
    try:
        file = _File.model_validate(loaded)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)
        raise ConfigError("; ".join(f"{SETTING}: {_explain(detail)}" for detail in found[:3])) from None
    return KeyRing(_by_hash(file))


def _by_hash(file: _File) -> dict[str, ApiKey]:
    keys: dict[str, ApiKey] = {}
    for name, tenant in file.tenants.items():
        limits = Limits(**{field: getattr(tenant, field) for field in Limits.model_fields})
        for index, key in enumerate(tenant.keys):
            if key.sha256 in keys:
                owner = keys[key.sha256].tenant
                raise ConfigError(f"{SETTING}: tenants.{name}.keys[{index}]: is a key of {owner} already")
            keys[key.sha256] = ApiKey(name, key.role, limits, key.expires)
    return keys


def _explain(detail: Any) -> str:
    path = ""
    for part in detail["loc"]:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    if path.endswith(".sha256"):  # somebody may have written the key itself here
        return f"{path[1:]}: must be the key's SHA-256, 64 digits out of 0-9 a-f"
    message = str(detail["msg"])
    return f"{path[1:]}: {message[0].lower()}{message[1:]}"
