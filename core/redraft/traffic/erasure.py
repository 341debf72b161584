"""Erasures: what was asked to be deleted from the log, kept in the log itself.

    erasures/1795527000000-5b6f0a1c2d3e4f50.json

An erasure is on record before the first shard is rewritten, and stays. So whoever reads the log skips what it covers,
also in a shard that a server wrote later (records wait in its memory meanwhile), a sweep that was killed is completed
by any later one, and training forgets its own copies when it next looks (`redraft_training.dataset.erase`).
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from redraft.errors import RedraftError
from redraft.object_store import ask, is_local
from redraft.traffic.layout import ERASURES, open_root
from redraft.traffic.store import put_whole

SCHEMA_VERSION = 1


class ErasureUnreadable(RedraftError):
    """An erasure is on record that cannot be understood; nothing may be read until it is."""


@dataclass(frozen=True, slots=True)
class Erasure:
    """Records finished before `before_unix_s` of any of these requests or tenants; of everybody if none is named."""

    before_unix_s: float
    request_ids: frozenset[str] = frozenset()
    tenants: frozenset[str] = frozenset()

    def to_json(self) -> str:
        return json.dumps(
            {
                "schema_version": SCHEMA_VERSION,
                "before_unix_s": self.before_unix_s,
                "request_ids": sorted(self.request_ids),
                "tenants": sorted(self.tenants),
            }
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Erasure:
        """Raises ValueError, KeyError or TypeError."""
        content = json.loads(text)
        if content["schema_version"] != SCHEMA_VERSION:
            raise ValueError("another schema version")
        names = (content["request_ids"], content["tenants"])
        if any(not isinstance(name, str) for part in names for name in part):
            raise ValueError("a name that is no text")
        return cls(float(content["before_unix_s"]), *(frozenset(part) for part in names))


class Erasures:
    """All erasures of a log as one question: is this record covered?"""

    def __init__(self, erasures: Iterable[Erasure] = (), *, names: Iterable[str] = ()) -> None:
        """`names`: of the files that they are in; equal names, equal erasures."""
        self.names = frozenset(names)
        self._requests: dict[str, float] = {}
        self._tenants: dict[str, float] = {}
        self._everybody = float("-inf")
        for erasure in erasures:
            before = erasure.before_unix_s
            for known, ids in ((self._requests, erasure.request_ids), (self._tenants, erasure.tenants)):
                known.update({name: max(before, known.get(name, before)) for name in ids})
            if not erasure.request_ids and not erasure.tenants:
                self._everybody = max(self._everybody, before)

    def __bool__(self) -> bool:
        return self.newest_unix_s > float("-inf")

    @property
    def newest_unix_s(self) -> float:
        """No record finished at or after this is covered; -inf if none is at all."""
        return max(self._everybody, *self._requests.values(), *self._tenants.values(), float("-inf"))

    def cover(self, request_id: str, tenant: str, created_unix_s: float) -> bool:
        """Whether a record must go."""
        never = float("-inf")
        before = max(self._requests.get(request_id, never), self._tenants.get(tenant, never), self._everybody)
        return created_unix_s < before


def keep_erasure(filesystem: Any, root: str, erasure: Erasure) -> None:
    """Put an erasure on record, durably. Raises OSError."""
    name = f"{time.time() * 1000:.0f}-{secrets.token_hex(8)}.json"
    put_whole(filesystem, f"{root}/{ERASURES}/{name}", erasure.to_json().encode())


def read_erasures(filesystem: Any, root: str) -> Erasures:
    """All that are on record. Raises OSError if the store cannot be read, `ErasureUnreadable`."""
    directory = f"{root}/{ERASURES}"
    contents = (
        _read_all(filesystem, directory)
        if is_local(filesystem)
        else ask(f"read {directory}", lambda: _read_all(filesystem, directory))
    )
    erasures = []
    for path, content in sorted(contents.items()):
        try:
            erasures.append(Erasure.from_json(content))
        except (ValueError, KeyError, TypeError) as error:
            raise ErasureUnreadable(
                f"{path} is no erasure that this version understands ({type(error).__name__}): upgrade, or repair it"
            ) from error
    return Erasures(erasures, names=contents)


def _read_all(filesystem: Any, directory: str) -> dict[str, bytes]:
    filesystem.invalidate_cache(directory)
    paths = [path for path in filesystem.find(directory) if path.endswith(".json")]
    contents: dict[str, bytes] = filesystem.cat(paths) if paths else {}
    return contents


def erasures_of(url: str) -> Erasures:
    """All that are on record in the log at `url`. Raises as `read_erasures`; ValueError or ImportError for the URL."""
    return read_erasures(*open_root(url))
