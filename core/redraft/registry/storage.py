"""The registry's only contact with a file system: a local directory or any fsspec URL.

Three ways to write, each of which shows a file whole or not at all, on every store:

- `put` replaces a file;
- `create` writes one that must not exist yet, and exactly one of several writers succeeds. CURRENT rests on it;
- `upload` copies a local file of any size.

Locally: temporary file, fsync, then rename, or a hard link where the name must be new. In object storage one
conditional request does it (`If-None-Match: *` on S3, `ifGenerationMatch=0` on Google Cloud Storage, no overwrite
on Azure). A store that has no such request gets a check before and a read after the write, which is not proof
against two writers in the same instant; nothing is corrupted then, the later one counts.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from redraft.errors import ConfigError, RedraftError
from redraft.files import sync_directory
from redraft.object_store import PART_BYTES, explain, few_tries, is_local, is_misconfigured, is_missing_bucket, open_url
from redraft.object_store import upload as upload_object
from redraft.registry.errors import CorruptDraft, RegistryFull, RegistryUnavailable
from redraft.registry.names import TEMPORARY_SUFFIX

_Result = TypeVar("_Result")

CHUNK_BYTES = 2**20
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_OUR_MISTAKES = (TypeError, AttributeError, NameError, AssertionError)


class Storage:
    """Files by name under one root. Touches nothing until it is asked to.

    All methods raise `RegistryUnavailable` (or `RegistryFull`) when the store fails, after a few tries if it is
    a remote one, and `FileNotFoundError` where a file does not exist. The constructor raises `ConfigError` for
    a URL that cannot be used.
    """

    def __init__(self, url: str) -> None:
        self.shown_url = re.sub(r"//[^/@]*@", "//", url)  # credentials do not belong into messages
        try:
            self._filesystem, self._root = open_url(url)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"cannot use {self.shown_url} as a draft registry: {error}") from error
        self.is_local = is_local(self._filesystem)
        if self.is_local and not self._root:
            raise ConfigError("the draft registry needs a directory of its own, not the root of the disk")

    def read(self, name: str, limit: int) -> bytes:
        """A small file. Raises `CorruptDraft` if it is larger than `limit` bytes."""

        def attempt() -> bytes:
            if self.is_local:
                with open(self._path(name), "rb") as file:
                    return file.read(limit + 1)
            data: bytes = self._filesystem.cat_file(self._path(name), start=0, end=limit + 1)
            return data

        data = self._try(attempt, f"read {name}")
        if len(data) > limit:
            raise CorruptDraft(f"{name} is larger than {limit} bytes")
        return data

    def chunks(self, name: str) -> Iterator[bytes]:
        """The bytes of a file of any size, in pieces."""
        if not self.is_local:
            yield from self._remote_chunks(name)
            return
        with self._translated(f"read {name}"), open(self._path(name), "rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk

    def _remote_chunks(self, name: str) -> Iterator[bytes]:
        """Each piece is one request, tried again by itself: a long file survives a short break."""
        path, doing = self._path(name), f"read {name}"
        size = self._try(lambda: int(self._filesystem.size(path)), doing)
        for start in range(0, size, PART_BYTES):
            end = min(start + PART_BYTES, size)
            yield self._try(partial(self._filesystem.cat_file, path, start=start, end=end), doing)

    def put(self, name: str, data: bytes) -> None:
        """Write a small file, or replace it."""

        def attempt() -> None:
            if self.is_local:
                _write_local(Path(self._path(name)), lambda file: file.write(data), os.replace)
            else:
                self._filesystem.pipe_file(self._path(name), data)

        self._write(attempt, f"write {name}")

    def create(self, name: str, data: bytes) -> None:
        """Write a small file that must be new; otherwise raises `FileExistsError` and changes nothing.

        After a lost reply the file that exists may be one's own: compare its contents.
        """

        def attempt() -> None:
            path = self._path(name)
            if self.is_local:
                _write_local(Path(path), lambda file: file.write(data), _link)
                return
            try:
                self._filesystem.pipe_file(path, data, mode="create")
            except (NotImplementedError, ValueError):  # the store has no such request
                if self.exists(name):
                    raise FileExistsError(name) from None
                self._filesystem.pipe_file(path, data)
            except Exception:
                # Every store has its own error for a condition that does not hold
                if self.exists(name):
                    raise FileExistsError(name) from None
                raise

        self._write(attempt, f"create {name}")

    def upload(self, source: Path, name: str) -> None:
        """Copy a local file into the store, or replace the one there."""

        def attempt() -> None:
            if not self.is_local:
                upload_object(self._filesystem, source, self._path(name))
                return
            with source.open("rb") as original:
                _write_local(
                    Path(self._path(name)), lambda file: shutil.copyfileobj(original, file, CHUNK_BYTES), os.replace
                )

        self._write(attempt, f"write {name}")

    def list(self, under: str = "") -> dict[str, int]:
        """All files under a directory: name under the root → size in bytes. No such directory: none."""

        def attempt() -> dict[str, int]:
            base = self._path(under)
            if self.is_local:
                found = _walk_local(base)
            else:
                self._filesystem.invalidate_cache()
                infos = self._filesystem.find(base, detail=True)
                found = {path: int(info.get("size") or 0) for path, info in infos.items()}
            return {path.removeprefix(self._root).lstrip("/"): size for path, size in found.items()}

        try:
            return self._try(attempt, f"list {under or 'the registry'}")
        except FileNotFoundError:
            return {}

    def exists(self, name: str) -> bool:
        """Whether there is such a file now."""

        def attempt() -> bool:
            if self.is_local:  # unlike os.path.exists, this tells "no such file" from "cannot look"
                with suppress(FileNotFoundError):
                    os.stat(self._path(name))
                    return True
                return False
            self._filesystem.invalidate_cache()
            return bool(self._filesystem.isfile(self._path(name)))

        return self._try(attempt, f"look for {name}")

    def delete(self, name: str) -> None:
        """Delete a file; one that does not exist is no error."""
        with suppress(FileNotFoundError):
            self._try(lambda: self._filesystem.rm_file(self._path(name)), f"delete {name}")

    def delete_empty_directory(self, name: str) -> None:
        """Remove a directory once its files are gone. Object stores have none."""
        if self.is_local:
            with suppress(OSError):
                os.rmdir(self._path(name))

    def modified_unix_s(self, name: str) -> float | None:
        """When a file was written; None if the store does not say."""
        try:
            changed = self._try(lambda: self._filesystem.modified(self._path(name)), f"look at {name}")
        except NotImplementedError:
            return None
        if not isinstance(changed, datetime):
            return None
        return (changed if changed.tzinfo else changed.replace(tzinfo=UTC)).timestamp()

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _write(self, attempt: Callable[[], None], doing: str) -> None:
        try:
            self._try(attempt, doing)
        except FileNotFoundError as error:  # no such bucket, or the directory went away
            raise RegistryUnavailable(
                f"cannot {doing}: the draft registry {self.shown_url} is not there; make its bucket or directory"
            ) from error

    def _try(self, attempt: Callable[[], _Result], doing: str) -> _Result:
        def translated() -> _Result:
            with self._translated(doing):
                return attempt()

        if self.is_local:
            return translated()
        return few_tries(_may_pass)(translated)

    @contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        """Turn whatever a store raises into our errors. Remote stores raise exceptions of many libraries."""
        try:
            yield
        except (RedraftError, FileExistsError, NotImplementedError):
            raise
        except FileNotFoundError as error:
            if not is_missing_bucket(error):
                raise
            raise self._unavailable(doing, error) from error
        except PermissionError as error:
            why = "" if self.is_local else f": {explain(error)}"
            raise RegistryUnavailable(
                f"no permission to {doing} in the draft registry {self.shown_url}{why}"
            ) from error
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise RegistryFull(
                    f"cannot {doing}: no space left in the draft registry {self.shown_url}; "
                    "free some (`prune` deletes old drafts) and run it again"
                ) from error
            raise self._unavailable(doing, error) from error
        except Exception as error:
            if self.is_local or isinstance(error, _OUR_MISTAKES):
                raise
            raise self._unavailable(doing, error) from error

    def _unavailable(self, doing: str, error: Exception) -> RegistryUnavailable:
        return RegistryUnavailable(f"cannot {doing} in the draft registry {self.shown_url}: {explain(error)}")


def _may_pass(error: BaseException) -> bool:
    return type(error) is RegistryUnavailable and not is_misconfigured(error.__cause__ or error)


def sha256_chunks(chunks: Iterator[bytes], limit: int, write: Callable[[bytes], object] | None = None) -> str | None:
    """SHA-256 of the pieces, each passed to `write`; None as soon as there are more than `limit` bytes."""
    digest, num_bytes = hashlib.sha256(), 0
    for chunk in chunks:
        num_bytes += len(chunk)
        if num_bytes > limit:
            return None
        digest.update(chunk)
        if write is not None:
            write(chunk)
    return digest.hexdigest()


def _write_local(path: Path, write: Callable[[BinaryIO], object], place: Callable[[Path, Path], None]) -> None:
    """Write a hidden file beside `path`, make it durable, then `place` it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        place(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink()
    sync_directory(path.parent)


def _link(temporary: Path, path: Path) -> None:
    os.link(temporary, path)


def _walk_local(base: str) -> dict[str, int]:
    """Every file under `base` with its size. A directory that cannot be read raises, it does not look empty."""
    found: dict[str, int] = {}
    waiting = [base]
    while waiting:
        directory = waiting.pop()
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    else:
                        found[entry.path] = entry.stat(follow_symlinks=False).st_size
        except FileNotFoundError:
            continue  # never made, or deleted while we looked
    return found
