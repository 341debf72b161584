"""Where a draft comes from, in a form that goes into its manifest. No prompt text, no host or user name."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("redraft", "torch", "transformers", "accelerate", "safetensors", "numpy")
_GIT_TIMEOUT_S = 10.0


def provenance(
    *,
    settings: Mapping[str, Any],
    parent_draft: str,
    parent_fingerprint: str,
    target_fingerprint: str,
    data_watermark: Mapping[str, Any],
    tokens: int,
    steps: int,
    wall_seconds: float,
    cpu_seconds: float,
    world_size: int,
) -> dict[str, Any]:
    """What made a draft, ready for JSON: `DraftManifest.training`.

    `parent_draft` is the version or name of the draft that training began from, `data_watermark` what the dataset says
    about how far into the traffic log it has read. Seconds are the main process's, of all sessions of a resumed run.
    """
    return {
        "code": git_state(Path(__file__).parent),
        "packages": package_versions(),
        "machine": machine(),
        "settings": dict(settings),
        "parent_draft": parent_draft,
        "parent_fingerprint": parent_fingerprint,
        "target_fingerprint": target_fingerprint,
        "data_watermark": dict(data_watermark),
        "tokens": tokens,
        "steps": steps,
        "wall_seconds": round(wall_seconds, 3),
        "cpu_seconds": round(cpu_seconds, 3),
        "world_size": world_size,
    }


def git_state(directory: Path) -> dict[str, Any]:
    """`{"git_sha", "git_dirty"}` of the repository that `directory` is tracked in; both None outside of one."""
    # an installed package may lie inside somebody else's repository: only a tracked file counts
    if _git(directory, "ls-files", "--error-unmatch", Path(__file__).name) is None:
        return {"git_sha": None, "git_dirty": None}
    status = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return {"git_sha": _git(directory, "rev-parse", "HEAD"), "git_dirty": None if status is None else bool(status)}


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide the result; one that is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """CPU model, cores, threads and accelerator."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
