"""Single drafts in the store: written so that the manifest comes last, read so that every byte is checked."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from redraft.files import atomic_directory
from redraft.registry.contents import check_directory
from redraft.registry.errors import CorruptDraft, RegistryError, RegistryFull
from redraft.registry.manifest import (
    MAX_MANIFEST_BYTES,
    DraftEntry,
    DraftManifest,
    DraftState,
    DraftStatus,
    parse_manifest,
    parse_status,
)
from redraft.registry.names import DRAFTS, MANIFEST, REFUSED, STATUS, is_version
from redraft.registry.storage import Storage, sha256_chunks

logger = logging.getLogger(__name__)

_MAX_STATUS_BYTES = 2**14
_PARALLEL_READS = 8


class DraftFiles:
    """The drafts under `drafts/` and `refused/`. Raises `RegistryUnavailable` whenever the store fails."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def versions(self, area: str) -> tuple[str, ...]:
        """The complete drafts of an area, unordered."""
        suffix = f"/{MANIFEST}"
        names = (name.removeprefix(f"{area}/") for name in self._storage.list(area) if name.endswith(suffix))
        return tuple(version for name in names if is_version(version := name.removesuffix(suffix)))

    def find(self, version: str) -> tuple[str, DraftEntry] | None:
        """A draft and its area; None if there is none. Raises `CorruptDraft` if its manifest cannot be read."""
        if not is_version(version):
            return None
        for area in (DRAFTS, REFUSED):
            with suppress(FileNotFoundError):
                return area, self.read(area, version)
        return None

    def read(self, area: str, version: str) -> DraftEntry:
        """A draft's manifest and state. Raises `FileNotFoundError` if it is not complete, and `CorruptDraft`."""
        data = self._storage.read(f"{area}/{version}/{MANIFEST}", MAX_MANIFEST_BYTES)
        manifest = parse_manifest(data, version)
        try:
            status = parse_status(self._storage.read(f"{area}/{version}/{STATUS}", _MAX_STATUS_BYTES), version)
        except FileNotFoundError as error:
            if not self._storage.exists(f"{area}/{version}/{MANIFEST}"):
                raise  # pruned between the two reads
            raise CorruptDraft(f"draft {version} has no {STATUS}") from error
        return DraftEntry(manifest, status.state, status.reason, status.updated_unix_s)

    def read_all(self, area: str) -> list[DraftEntry]:
        """Every readable draft of an area, unordered; the others are logged."""

        def read(version: str) -> DraftEntry | None:
            try:
                return self.read(area, version)
            except FileNotFoundError:  # pruned meanwhile
                return None
            except CorruptDraft as error:
                logger.warning("a draft in the registry cannot be read: %s", error)
                return None

        with ThreadPoolExecutor(_PARALLEL_READS) as pool:
            return [entry for entry in pool.map(read, self.versions(area)) if entry is not None]

    def write(self, area: str, directory: Path, manifest: DraftManifest, status: DraftStatus) -> None:
        """Store the manifest's files from `directory`, then the manifest. Interrupted, it can be done again.

        Raises `FileExistsError` if the manifest has come to exist meanwhile.
        """
        data = manifest.encode()
        prefix = f"{area}/{manifest.version}"
        for name in manifest.files:
            self._storage.upload(directory / name, f"{prefix}/{name}")
        sizes = self._storage.list(prefix)
        for name, file in manifest.files.items():
            if sizes.get(f"{prefix}/{name}") != file.bytes:
                raise CorruptDraft(f"{name} of draft {manifest.version} did not arrive whole: publish it again")
        self.write_status(area, manifest.version, status)
        self._storage.create(f"{prefix}/{MANIFEST}", data)

    def write_status(self, area: str, version: str, status: DraftStatus) -> None:
        """Replace a draft's state."""
        self._storage.put(f"{area}/{version}/{STATUS}", status.encode())

    def verify(self, area: str, manifest: DraftManifest) -> None:
        """Read every file of a draft. Raises `CorruptDraft` for the first that is missing, cut or changed."""
        prefix = f"{area}/{manifest.version}"
        sizes = self._storage.list(prefix)
        for name, file in manifest.files.items():
            size = sizes.get(f"{prefix}/{name}")
            if size is None:
                raise CorruptDraft(f"draft {manifest.version} misses {name}")
            if size != file.bytes:
                raise CorruptDraft(f"{name} of draft {manifest.version} has {size} bytes instead of {file.bytes}")
        for name in manifest.files:
            self._stream(area, manifest, name, None)

    def copy_to(self, area: str, manifest: DraftManifest, destination: Path) -> None:
        """Copy a draft's files to a new directory, which appears whole and verified or not at all.

        A destination that holds exactly this draft is left as it is. Raises `CorruptDraft`, or `RegistryError`
        if the destination holds something else or cannot be written.
        """
        if not destination.exists():
            try:
                with atomic_directory(destination) as temporary:
                    for name in manifest.files:
                        self._stream(area, manifest, name, temporary / name)
                return
            except OSError as error:
                is_there = isinstance(error, FileExistsError) and destination.exists()
                if not is_there:  # else another process fetched it at the same time
                    raise _not_written(error, manifest.version, destination) from error
        try:
            check_directory(destination, manifest.files)
        except CorruptDraft as error:
            raise RegistryError(
                f"{destination} exists and is not draft {manifest.version}: remove it, or fetch to another place"
            ) from error

    def delete(self, area: str, version: str) -> None:
        """Delete a draft, the manifest first: from then on it does not exist, whatever happens to the rest."""
        prefix = f"{area}/{version}"
        self._storage.delete(f"{prefix}/{MANIFEST}")
        self.delete_files(self._storage.list(prefix))
        self._storage.delete_empty_directory(prefix)

    def delete_files(self, names: Iterable[str]) -> None:
        """Delete files by their names under the root."""
        for name in names:
            self._storage.delete(name)

    def _stream(self, area: str, manifest: DraftManifest, name: str, destination: Path | None) -> None:
        """Read one file to its end, copy it to `destination` if given, and compare its hash."""
        expected = manifest.files[name]
        chunks = self._storage.chunks(f"{area}/{manifest.version}/{name}")
        try:
            if destination is None:
                digest = sha256_chunks(chunks, expected.bytes)
            else:
                with destination.open("wb") as file:
                    digest = sha256_chunks(chunks, expected.bytes, file.write)
        except FileNotFoundError as error:
            raise CorruptDraft(f"draft {manifest.version} misses {name}") from error
        if digest != expected.sha256:
            raise CorruptDraft(f"{name} of draft {manifest.version} is not the file that its manifest names")


def published(unix_s: float) -> DraftStatus:
    """The state of a draft that may serve."""
    return DraftStatus(state=DraftState.PUBLISHED, updated_unix_s=unix_s)


def _not_written(error: OSError, version: str, destination: Path) -> RegistryError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RegistryFull(f"no space left for draft {version} in {destination.parent}")
    return RegistryError(f"cannot copy draft {version} to {destination}: {error.strerror or type(error).__name__}")
