"""Each peer's own virtual environment under `build/peers/<name>`, from the pinned versions in `requirements/`.

torch comes as its CPU build where pip's index or find-links has one; vLLM needs that build, from elsewhere give pip
another index with PIP_EXTRA_INDEX_URL.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path("build", "peers")
LLAMA_CPP_SDIST = "llama-cpp-python==0.3.36"
"""Ships the sources of llama.cpp; its Python binding is not built."""

_REQUIREMENTS = Path(__file__).with_name("requirements")
_BUILD_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=OFF",
    "-DBUILD_SHARED_LIBS=OFF",
    *(f"-DLLAMA_{part}=OFF" for part in ("OPENSSL", "BUILD_UI", "USE_PREBUILT_UI", "BUILD_TESTS", "BUILD_EXAMPLES")),
)
# Not GGML_NATIVE: it takes AMX too, which a virtual machine may announce and then fault at with q8_0 and q4_1 weights.
_INSTRUCTIONS = {
    **{name: name.upper() for name in ("avx", "avx2", "fma", "f16c", "bmi2", "avx_vnni", "avx512_vnni", "avx512_bf16")},
    "sse4_2": "SSE42",
    "avx512f": "AVX512",
    "avx512vbmi": "AVX512_VBMI",
}
"""Options of llama.cpp by the flag in /proc/cpuinfo."""

# Dragged in by dependencies, made for another torch than the pinned one, and then the import of all fails.
_UNWANTED = {"openvino": ("torchvision",), "vllm": ("torchvision", "torchaudio", "torchcodec")}
_TCMALLOC = "libtcmalloc_minimal.so.4"
_TCMALLOC_PACKAGE = "libtcmalloc-minimal4"
_REASON_LINES = 3


class PeerUnavailable(Exception):
    """A peer cannot be set up or started here; the message says why."""


@dataclass(frozen=True, slots=True)
class Environment:
    """A virtual environment with one peer in it."""

    name: str

    @property
    def folder(self) -> Path:
        return FOLDER / self.name

    @property
    def python(self) -> Path:
        return self.folder / "venv" / "bin" / "python"

    @property
    def log(self) -> Path:
        """What setting it up printed."""
        return self.folder / "setup.log"

    def ensure(self) -> None:
        """Create and fill it, unless that was done with the same requirements. Raises PeerUnavailable."""
        requirements = _REQUIREMENTS / f"{self.name}.txt"
        stamp, wanted = self.folder / "installed", hashlib.sha256(requirements.read_bytes()).hexdigest()
        if stamp.is_file() and stamp.read_text() == wanted:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.run([sys.executable, "-m", "venv", "--clear", str(self.python.parent.parent)])
        self.pip("install", "--requirement", str(requirements))
        if self.name in _UNWANTED:
            self.pip("uninstall", "--yes", *_UNWANTED[self.name])
        stamp.write_text(wanted)

    def pip(self, *arguments: str) -> None:
        """Run the environment's pip. Raises PeerUnavailable."""
        self.run([str(self.python), "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments])

    def run(
        self, command: Sequence[str], environment: dict[str, str] | None = None, folder: Path | None = None
    ) -> None:
        """Run a command, in `folder`, into the log. Raises PeerUnavailable with the end of what it printed."""
        with self.log.open("a", encoding="utf-8") as log:
            log.write(f"$ {' '.join(command)}\n")
            log.flush()
            start = log.tell()
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=folder,
                check=False,
            )
        if done.returncode != 0:
            printed = self.log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
            reason = " / ".join(line.strip() for line in printed[-_REASON_LINES:])
            raise PeerUnavailable(f"`{Path(command[0]).name} {' '.join(command[1:])[:80]}` failed: {reason[:400]}")


def llama_server(environment: Environment) -> Path:
    """The `llama-server` binary, built for this CPU if it is not there yet. Raises PeerUnavailable."""
    binary = environment.folder / "build" / "bin" / "llama-server"
    if not binary.is_file():
        source, bin_dir = llama_cpp_source(environment), environment.python.parent
        cmake, ninja = bin_dir / "cmake", (bin_dir / "ninja").resolve()
        build = ["-S", str(source), "-B", str(environment.folder / "build"), "-G", "Ninja"]
        environment.run([str(cmake), *build, f"-DCMAKE_MAKE_PROGRAM={ninja}", *_BUILD_FLAGS, *_instruction_flags()])
        environment.run([str(cmake), "--build", str(environment.folder / "build"), "--target", "llama-server"])
    return binary


def _instruction_flags() -> list[str]:
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    has = next((set(line.split()) for line in lines if line.startswith("flags")), set())
    return [f"-DGGML_{option}={'ON' if flag in has else 'OFF'}" for flag, option in _INSTRUCTIONS.items()]


def llama_cpp_source(environment: Environment) -> Path:
    """llama.cpp's source tree, taken out of the sdist once. Raises PeerUnavailable."""
    source = environment.folder / "source"
    if not source.is_dir():
        with tempfile.TemporaryDirectory(dir=environment.folder) as temporary:
            download = ("--no-deps", "--no-binary", LLAMA_CPP_SDIST.partition("=")[0], "--dest", temporary)
            environment.pip("download", *download, LLAMA_CPP_SDIST)
            with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as archive:
                archive.extractall(temporary, filter="data")
            next(Path(temporary).glob("*/vendor/llama.cpp")).rename(source)
    return source


def vllm_preloads(environment: Environment) -> tuple[Path, Path]:
    """The OpenMP and the allocator that vLLM is to run with, else it is slower than it can be.

    The latter is the system's, or Debian's package unpacked beside the environment. Raises PeerUnavailable.
    """
    openmp = sorted((environment.folder / "venv").glob("lib*/libiomp5.so"))
    if not openmp:
        raise PeerUnavailable("intel-openmp, a dependency of vLLM, has no libiomp5.so")
    places = [*Path("/usr").glob(f"lib*/{_TCMALLOC}"), *Path("/usr").glob(f"lib/*/{_TCMALLOC}")]
    unpacked = environment.folder / "tcmalloc"
    if not places and not unpacked.is_dir():
        if shutil.which("apt-get") is None:
            raise PeerUnavailable(f"vLLM wants {_TCMALLOC}, which the system lacks")
        with tempfile.TemporaryDirectory(dir=environment.folder) as temporary:
            environment.run(["apt-get", "download", _TCMALLOC_PACKAGE], folder=Path(temporary))
            package = next(Path(temporary).glob("*.deb"))
            environment.run(["dpkg-deb", "--extract", str(package), str(unpacked)])
    places += unpacked.glob(f"usr/lib/*/{_TCMALLOC}")
    return openmp[0].resolve(), places[0].resolve()
