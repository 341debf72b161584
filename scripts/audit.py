"""The dependencies, in `make check`: each one pinned, under a licence we accept, not withdrawn, not known to be unsafe.

The first two need no network. The last two ask the package index (pip) and its advisories (pip-audit); where these do
not answer, a loud line says what was not checked, and the check does not fail for it. Run: python -m scripts.audit
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import Distribution, distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

Completed = subprocess.CompletedProcess[str]

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
TIMEOUT_S = 300.0

OWN = {"redraft", "pip", "setuptools", "wheel"}
"""Ourselves, and what an environment brings along."""

LICENCES = {
    # SPDX
    *("0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0"),
    *("CNRI-Python", "ISC", "MIT", "MIT-0", "MIT-CMU", "MPL-2.0", "PSF-2.0", "Python-2.0", "Unlicense", "Zlib"),
    # classifiers, of packages without an SPDX expression
    *("Apache Software License", "BSD License", "ISC License (ISCL)", "MIT License"),
    *("Mozilla Public License 2.0 (MPL 2.0)", "Python Software Foundation License"),
    # the free text of packages without either
    *("Apache License 2.0", "Apache 2.0 License", "3-Clause BSD License"),
}
"""Those that the image may be distributed with under our own, Apache-2.0: permissive ones, and MPL by file."""


def main() -> int:
    """0 unless something was found. Prints what was looked at, and what could not be."""
    installed = [found for found in distributions() if canonicalize_name(found.name) not in OWN]
    pins = read_pins(CONSTRAINTS.read_text())
    faults = [*unpinned(installed, pins), *forbidden(installed)]
    say(f"{len(installed)} packages: pins and licences checked")
    with ThreadPoolExecutor() as pool:
        online = {what: pool.submit(check) for what, check in ONLINE.items()}
    for what, answer in online.items():
        try:
            faults += answer.result()
            say(f"{what} checked")
        except NotChecked as reason:
            say(f"{what.upper()} NOT CHECKED: {reason}")
    for fault in faults:
        say(fault)
    return 1 if faults else 0


def say(line: str) -> None:
    sys.stderr.write(f"audit: {line}\n")


class NotChecked(Exception):
    """A service did not answer; the message says which and why."""


def read_pins(constraints: str) -> dict[str, Version]:
    """Canonical name -> version of every `name==version` line."""
    lines = [line.partition("#")[0].strip() for line in constraints.splitlines()]
    pins = [line.split("==") for line in lines if line]
    return {canonicalize_name(name): Version(version) for name, version in pins}


def unpinned(installed: Iterable[Distribution], pins: Mapping[str, Version]) -> list[str]:
    """What is installed in another version than it is pinned to, or pinned nowhere.

    A package that a pinned one requires by `==` is pinned too: torch names its CUDA libraries so.
    """
    known = list(installed)
    exact = {
        canonicalize_name(needed.name)
        for found in known
        for needed in map(Requirement, found.requires or ())
        if any(clause.operator == "==" and "*" not in clause.version for clause in needed.specifier)
    }
    faults = []
    for found in known:
        name = canonicalize_name(found.name)
        pin = pins.get(name)
        if pin is None and name not in exact:
            faults.append(f"{name} {found.version} is not in constraints.txt")
        elif pin is not None and Version(found.version).public != pin.public:
            faults.append(f"{name} {found.version} is installed, constraints.txt has {pin}")
    return faults


def forbidden(installed: Iterable[Distribution]) -> list[str]:
    """Packages under a licence that is not in `LICENCES`, or that do not say which."""
    faults = []
    for found in installed:
        named = licences_of(found)
        unknown = sorted(named - LICENCES)
        if unknown or not named:
            faults.append(f"{found.name}: licence {' and '.join(unknown) or 'not stated'} is not in scripts/audit.py")
    return faults


def licences_of(package: Distribution) -> set[str]:
    """What the package says, by the best of the three ways in which it may."""
    about: Any = package.metadata
    if expression := about.get("License-Expression"):
        return {part.strip() for part in re.split(r"\b(?:AND|OR)\b|[()]", expression) if part.strip()}
    classifiers = [line.split(" :: ")[-1] for line in about.get_all("Classifier", []) if "License :: OSI" in line]
    if classifiers:
        return set(classifiers)
    text = (about.get("License") or "").strip()
    return {part.strip() for part in re.split(r"\b(?:AND|OR)\b", text.partition("\n")[0]) if part.strip()}


def withdrawn() -> list[str]:
    """Pinned releases that their authors have withdrawn ("yanked"). Raises NotChecked."""
    with tempfile.NamedTemporaryFile(suffix=".json") as report:
        run(
            *("pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--only-binary", ":all:"),
            *("--report", report.name, "-r", str(CONSTRAINTS)),
            has_answer=lambda done: done.returncode == 0,
        )
        found = json.loads(Path(report.name).read_text())["install"]
    return [f"{item['metadata']['name']}: the pinned release was withdrawn" for item in found if item["is_yanked"]]


def vulnerable() -> list[str]:
    """Pinned releases with a known vulnerability. Raises NotChecked, also if only some could be looked up."""
    done = run(
        *("pip_audit", "-r", str(CONSTRAINTS), "--no-deps", "--disable-pip", "--format", "json"),
        *("--progress-spinner", "off"),
        has_answer=lambda done: done.stdout.startswith("{"),  # its exit status is 1 both for findings and for failures
    )
    packages = json.loads(done.stdout)["dependencies"]
    faults = [
        f"{package['name']} {package['version']}: {found['id']}, fixed in {found['fix_versions'] or 'no release'}"
        for package in packages
        for found in package.get("vulns", ())
    ]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if skipped and not faults:
        raise NotChecked(f"the index has none for {len(skipped)} of {len(packages)} packages, e.g. {skipped[0]}")
    return faults


ONLINE = {"withdrawn releases": withdrawn, "advisories": vulnerable}


def run(module: str, *arguments: str, has_answer: Callable[[Completed], bool]) -> Completed:
    """Run a Python module. Raises NotChecked where it has no answer, or none in time."""
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise NotChecked(f"no answer within {TIMEOUT_S:.0f} s") from None
    if not has_answer(done):
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise NotChecked(lines[-1] if lines else f"exit status {done.returncode}")
    return done


if __name__ == "__main__":
    sys.exit(main())
