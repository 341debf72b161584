"""Build hook: compile the CPU kernels where a C compiler exists. Without one the install goes on and torch computes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_SOURCES = "core/redraft/kernels"
_LIBRARY = f"{_SOURCES}/_cpu.so"
_FLAGS = ("-O3", "-shared", "-fPIC", "-fno-math-errno")


class KernelBuildHook(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if self.target_name != "wheel" or not self._compile():
            return
        build_data["artifacts"].append(_LIBRARY)
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def _compile(self) -> bool:
        compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None or not sys.platform.startswith("linux"):
            self.app.display_warning("redraft: no C compiler found, installing without native CPU kernels")
            return False
        root = Path(self.root)
        # beside the final name, then renamed: a process that has the old library mapped keeps it
        fresh = root / f"{_LIBRARY}.{os.getpid()}"
        sources = [str(path) for path in sorted((root / _SOURCES).glob("*.c"))]
        command = [*compiler.split(), *_FLAGS, "-o", str(fresh), *sources, "-lpthread", "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            self.app.display_warning(
                f"redraft: cannot compile the CPU kernels, going on without:\n{done.stderr[-2000:]}"
            )
            return False
        fresh.replace(root / _LIBRARY)
        return True
