"""Small drafts, their manifests, and a registry whose store can be made to fail."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redraft.registry.contents import describe_directory
from redraft.registry.manifest import DraftManifest, EvaluationSummary
from redraft.registry.store import DraftRegistry

TARGET, TOKENIZER = "sha256:target", "sha256:tokenizer"
EVALUATION = EvaluationSummary(
    expected_acceptance=0.5,
    per_domain={"sql": 0.6, "python": 0.4},
    baseline_version="d0",
    baseline_expected_acceptance=0.4,
    gain_low=0.05,
    gain_high=0.15,
    num_positions=4000,
    mean_acceptance_length=1.9,
)


def make_draft(directory: Path, content: str = "a", num_bytes: int = 3000) -> Path:
    """A directory that looks like a checkpoint; `content` decides the weights."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    (directory / "tokenizer.json").write_text("{}", encoding="utf-8")
    (directory / "model.safetensors").write_bytes((content.encode() * num_bytes)[:num_bytes])
    return directory


def manifest_of(directory: Path, version: str, **changes: Any) -> DraftManifest:
    facts: dict[str, Any] = {
        "version": version,
        "created_unix_s": 1_795_541_100.0,
        "files": describe_directory(directory),
        "target_name": "demo",
        "target_fingerprint": TARGET,
        "tokenizer_fingerprint": TOKENIZER,
        "num_parameters": 1000,
    }
    return DraftManifest(**{**facts, **changes})


class Drafts:
    """Makes and publishes drafts: `drafts.publish("v1")`. Later versions are newer."""

    def __init__(self, registry: DraftRegistry, directory: Path) -> None:
        self.registry = registry
        self._directory = directory
        self._count = 0

    def make(self, version: str, **changes: Any) -> tuple[Path, DraftManifest]:
        self._count += 1
        directory = make_draft(self._directory / f"{version}-{self._count}", content=version)
        return directory, manifest_of(directory, version, **{"created_unix_s": 1000.0 + self._count, **changes})

    def publish(self, version: str, **options: Any) -> DraftManifest:
        return self.registry.publish(*self.make(version), **options)

    def refuse(self, version: str, reason: str = "worse", **options: Any) -> DraftManifest:
        return self.registry.refuse(*self.make(version), reason, **options)


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


class FilesystemProxy:
    """Passes everything on to a file system, after telling `before` the operation's name."""

    def __init__(self, filesystem: Any, before: Callable[[str], None]) -> None:
        self._filesystem = filesystem
        self._before = before

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._filesystem, name)
        if not callable(found) or name == "invalidate_cache":
            return found

        def call(*args: Any, **options: Any) -> Any:
            self._before(name)
            return found(*args, **options)

        return call


def intercept(registry: DraftRegistry, before: Callable[[str], None]) -> None:
    """Call `before` ahead of each file system operation of a registry that is not local."""
    storage = registry._storage
    assert not storage.is_local
    storage._filesystem = FilesystemProxy(storage._filesystem, before)
