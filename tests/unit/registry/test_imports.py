"""The registry is files: reading it needs no model code."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
import redraft.registry.store, redraft.registry.watcher
print(sorted(name for name in sys.modules if name in ("torch", "transformers", "numpy")
             or name.startswith(("redraft.models", "redraft.sampling", "redraft.speculation"))))
"""


def test_the_registry_imports_neither_torch_nor_models() -> None:
    finished = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True, timeout=60)
    assert finished.stdout.strip() == "[]"
