"""The audit of the dependencies: what it finds, and that it never takes silence for an answer."""

from __future__ import annotations

import json
import subprocess
from email.message import Message
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from scripts import audit


class Package:
    """As much of an installed distribution as the audit reads."""

    def __init__(self, name: str, version: str = "1.0", requires: tuple[str, ...] = (), **about: Any) -> None:
        self.name = name
        self.version = version
        self.requires = list(requires)
        self.metadata = Message()
        for key, values in about.items():
            for value in values if isinstance(values, list) else [values]:
                self.metadata[key.replace("_", "-")] = value


def test_every_package_is_pinned_by_us_or_by_one_that_is() -> None:
    installed: Any = [
        Package("torch", "2.13.0+cpu", ("nvidia-cudnn==9.1; sys_platform == 'linux'", "numpy>=2", "sympy==1.*")),
        Package("nvidia_cudnn", "9.1"),
        Package("sympy", "1.4"),
        Package("numpy", "2.4.6"),
        Package("Left.Pad"),
    ]
    pins = audit.read_pins("# comment\ntorch==2.13.0\nnumpy==2.4.5  # why\n")
    assert pins == {"torch": Version("2.13.0"), "numpy": Version("2.4.5")}
    assert audit.unpinned(installed, pins) == [
        "sympy 1.4 is not in constraints.txt",
        "numpy 2.4.6 is installed, constraints.txt has 2.4.5",
        "left-pad 1.0 is not in constraints.txt",
    ]


@pytest.mark.parametrize(
    ("about", "fault"),
    [
        ({"License_Expression": "(MIT OR Apache-2.0 WITH LLVM-exception) AND BSD-3-Clause"}, None),
        ({"License_Expression": "MIT AND GPL-3.0-only"}, "GPL-3.0-only"),
        ({"License_Expression": "GPL-3.0-only", "Classifier": ["License :: OSI Approved :: MIT License"]}, "GPL-3"),
        ({"Classifier": ["License :: OSI Approved :: BSD License", "Topic :: Software"], "License": "x"}, None),
        ({"License": "MIT\nThe rest of the text"}, None),
        ({"License": "Proprietary"}, "Proprietary"),
        ({}, "not stated"),
    ],
)
def test_licences(about: dict[str, Any], fault: str | None) -> None:
    package: Any = Package("p", **about)
    found = audit.forbidden([package])
    assert found == [] if fault is None else fault in found[0]


def answer(monkeypatch: pytest.MonkeyPatch, stdout: str = "", stderr: str = "", returncode: int = 0) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, returncode, stdout, stderr)

    monkeypatch.setattr(subprocess, "run", run)


def test_a_known_vulnerability_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"id": "PYSEC-2024-1", "fix_versions": ["3.1.4"]}
    packages = [{"name": "jinja2", "version": "3.1.2", "vulns": [found]}, {"name": "rich", "version": "1", "vulns": []}]
    answer(monkeypatch, json.dumps({"dependencies": packages, "fixes": []}), returncode=1)
    assert audit.vulnerable() == ["jinja2 3.1.2: PYSEC-2024-1, fixed in ['3.1.4']"]


@pytest.mark.parametrize(
    ("stdout", "stderr", "reason"),
    [
        ("", "Traceback ...\nrequests.exceptions.ConnectionError: no route", "ConnectionError"),
        (
            json.dumps({"dependencies": [{"name": "rich", "skip_reason": "not found"}]}),
            "",
            "1 of 1 packages, e.g. rich",
        ),
    ],
)
def test_silence_is_not_a_clean_bill(monkeypatch: pytest.MonkeyPatch, stdout: str, stderr: str, reason: str) -> None:
    answer(monkeypatch, stdout, stderr, returncode=1)
    with pytest.raises(audit.NotChecked, match=reason):
        audit.vulnerable()


def test_a_service_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(audit.NotChecked, match="no answer"):
        audit.withdrawn()


def test_a_withdrawn_release_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        entries = [{"metadata": {"name": name}, "is_yanked": name == "bad"} for name in ("good", "bad")]
        Path(command[command.index("--report") + 1]).write_text(json.dumps({"install": entries}))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert audit.withdrawn() == ["bad: the pinned release was withdrawn"]


def test_what_could_not_be_checked_is_said_aloud_and_does_not_fail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away() -> list[str]:
        raise audit.NotChecked("no route")

    monkeypatch.setattr(audit, "distributions", lambda: [Package("rich", "15.0.0", License_Expression="MIT")])
    monkeypatch.setattr(audit, "ONLINE", {"withdrawn releases": list, "advisories": away})
    assert audit.main() == 0
    assert "audit: ADVISORIES NOT CHECKED: no route" in capsys.readouterr().err
    monkeypatch.setattr(audit, "ONLINE", {"advisories": lambda: ["jinja2 3.1.2: PYSEC-2024-1"]})
    assert audit.main() == 1
    assert "PYSEC-2024-1" in capsys.readouterr().err
