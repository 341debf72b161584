"""CURRENT: which draft is meant to serve, and the compare-and-swap that moves it.

Every move is a small file of its own, `moves/<generation>.json`, and the highest generation counts. A move reads
generation g, decides, and creates g + 1, which must not exist yet: of any number of processes that saw g exactly
one creates g + 1, and the others look again. So one rule gives the same guarantee on a local disk and in object
storage, a crash leaves either the old move or the new one, and the files are the history.

The file `CURRENT` repeats the last move for people and scripts. It is written after the fact, so a crash may
leave it a move behind; nothing here reads it.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from redraft.registry.errors import CorruptRegistry, CurrentChanged, RegistryError
from redraft.registry.names import CURRENT, MOVES, is_version, move_generation, move_name
from redraft.registry.storage import Storage

logger = logging.getLogger(__name__)

MAX_HISTORY = 16
KEPT_MOVES = 1000  # a process would have to sleep through as many moves, and a prune, to be fooled by a reused number
_MAX_BYTES = 2**14
_MAX_ATTEMPTS = 100

_Version = Annotated[str, StringConstraints(min_length=1, max_length=256)]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a move shall make of CURRENT."""

    version: str
    history: tuple[str, ...]
    """Versions that were current before and may be again, oldest first."""
    pinned: bool
    reason: str
    proven: str | None = None
    """None: `version` itself."""


class Current(BaseModel):
    """The draft that is meant to serve. `generation` grows by one with each move."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    schema_version: Annotated[int, Field(ge=1, le=1)] = 1
    version: _Version
    previous: _Version | None
    """What a roll-back would bring back, unless it was rolled back itself meanwhile."""
    pinned: bool
    generation: int = Field(ge=1)
    updated_unix_s: float = Field(ge=0.0)
    reason: str = Field(max_length=4096)
    """What moved it: published, activated, the reason of a roll-back, ..."""
    history: Annotated[tuple[_Version, ...], Field(max_length=MAX_HISTORY)] = ()
    """Versions that were current before and may be again, oldest first; `previous` is the last."""
    proven: _Version | None = None
    """The last draft that a server promoted or somebody chose by hand; None in records of older versions. It differs
    from `version` while that is published and not yet promoted: whatever starts in the meantime serves this one."""
    token: str = Field(min_length=1, max_length=64)
    """Random; tells a writer whether the record that exists is its own."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(is_version(version) for version in (self.version, *self.history, self.proven or self.version)):
            raise ValueError("not a version")
        if self.previous != (self.history[-1] if self.history else None):
            raise ValueError("previous is not the last of history")
        return self

    @property
    def is_on_trial(self) -> bool:
        """Whether `version` was published and nothing has promoted it yet."""
        return self.proven not in (None, self.version)

    def encode(self) -> bytes:
        """As indented JSON."""
        return (self.model_dump_json(indent=2) + "\n").encode()


class Pointer:
    """Reads and moves CURRENT. Raises `RegistryUnavailable` and `CorruptRegistry`."""

    def __init__(self, storage: Storage, clock: Callable[[], float]) -> None:
        self._storage = storage
        self._clock = clock

    def read(self) -> Current | None:
        """The last move; None if there was none yet."""
        for _ in range(_MAX_ATTEMPTS):
            generations = self._generations()
            if not generations:
                return None
            with suppress(FileNotFoundError):  # trimmed since it was listed: then there are newer ones
                return self._read(generations[-1])
        raise CorruptRegistry("the moves of CURRENT are listed but cannot be read")

    def move(self, decide: Callable[[Current | None], Wanted | None]) -> Current | None:
        """Move CURRENT to what `decide` makes of the current move; return the move in force afterwards.

        `decide` may be called again when another process was faster. It returns None to leave everything as it
        is, and raises to refuse.
        """
        for _ in range(_MAX_ATTEMPTS):
            seen = self.read()
            wanted = decide(seen)
            if wanted is None:
                return seen
            made = self._record(wanted, seen.generation + 1 if seen else 1)
            if self._create(made):
                self._copy(made)
                return made
        raise CurrentChanged("CURRENT was moved by others again and again; try later")

    def trim(self) -> None:
        """Delete all but the last `KEPT_MOVES` records."""
        for generation in self._generations()[:-KEPT_MOVES]:
            self._storage.delete(move_name(generation))

    def _generations(self) -> list[int]:
        found = (move_generation(name) for name in self._storage.list(MOVES))
        return sorted(generation for generation in found if generation is not None)

    def _read(self, generation: int) -> Current:
        name = move_name(generation)
        try:
            record = Current.model_validate_json(self._storage.read(name, _MAX_BYTES))
        except ValidationError as error:
            raise CorruptRegistry(
                f"{name} in the draft registry is damaged, or a newer redraft wrote it. "
                "If it is damaged, delete it: the move before it then counts"
            ) from error
        if record.generation != generation:
            raise CorruptRegistry(f"{name} in the draft registry holds another move, number {record.generation}")
        return record

    def _record(self, wanted: Wanted, generation: int) -> Current:
        history = wanted.history[-MAX_HISTORY:]
        return Current(
            version=wanted.version,
            previous=history[-1] if history else None,
            pinned=wanted.pinned,
            generation=generation,
            updated_unix_s=self._clock(),
            reason=wanted.reason[:4096],
            history=history,
            proven=wanted.proven or wanted.version,
            token=secrets.token_hex(8),
        )

    def _create(self, record: Current) -> bool:
        """Whether this process made the move. Reading it back settles a lost reply and a store without conditions."""
        with suppress(FileExistsError):
            self._storage.create(move_name(record.generation), record.encode())
        with suppress(FileNotFoundError):
            return self._read(record.generation).token == record.token
        return False

    def _copy(self, record: Current) -> None:
        """Bring the file CURRENT up to date. The move is made already, so a failure is only logged."""
        try:
            for _ in range(3):
                self._storage.put(CURRENT, record.encode())
                newest = self.read()
                if newest is None or newest.generation <= record.generation:
                    return
                record = newest  # somebody moved on, and we may have overwritten their copy
        except RegistryError as error:
            logger.warning("CURRENT was moved to %s, but its copy was not written: %s", record.version, error)
