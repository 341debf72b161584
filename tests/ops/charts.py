"""The tools of `make tools`, and the chart as they see it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "redraft"
TOOLS = ROOT / "build" / "tools"

Manifest = dict[str, Any]


def require(tool: str) -> Path:
    """The tool's path; without it the test is skipped, and the reason says what is not tested and why."""
    environment = {"hadolint": "checks", "python": "checks", "moto_server": "s3"}.get(tool, "")
    path = TOOLS / environment / "bin" / tool
    if path.is_file():
        return path
    note = TOOLS / "missing" / (environment or tool)
    reason = note.read_text().strip() if note.is_file() else "run `make tools`"
    pytest.skip(f"NOT TESTED, no {tool}: {reason}")


class HelmFailed(Exception):
    """Helm refused; the message is its own."""


class Helm:
    """One version of helm, with folders of its own, so that nothing of the user's is read or written."""

    def __init__(self, program: Path, home: Path) -> None:
        self._program, self._home = program, home
        self._rendered: dict[str, str] = {}

    def run(self, *arguments: str) -> str:
        """Standard output. Raises `HelmFailed`."""
        folders = {f"HELM_{kind}_HOME": str(self._home / kind) for kind in ("CACHE", "CONFIG", "DATA")}
        done = subprocess.run(
            [str(self._program), *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self._home),
                "KUBECONFIG": str(self._home / "none"),
                **folders,
            },
        )
        if done.returncode != 0:
            raise HelmFailed(done.stderr + done.stdout)
        return done.stdout

    def lint(self, values: Mapping[str, Any]) -> None:
        self.run("lint", "--strict", str(CHART), "--values", self.values_file(values))

    def template(self, values: Mapping[str, Any], *arguments: str) -> str:
        """The manifests as text, rendered for a release named `r` in the namespace `ns`; the same once only."""
        key = json.dumps([values, arguments], sort_keys=True)
        if key not in self._rendered:
            self._rendered[key] = self.fresh_template(values, *arguments)
        return self._rendered[key]

    def fresh_template(self, values: Mapping[str, Any], *arguments: str) -> str:
        return self.run(
            "template", "r", str(CHART), "--namespace", "ns", "--values", self.values_file(values), *arguments
        )

    def render(self, values: Mapping[str, Any], *arguments: str) -> list[Manifest]:
        return [document for document in yaml.load_all(self.template(values, *arguments), UniqueKeys) if document]

    def values_file(self, values: Mapping[str, Any]) -> str:
        path = self._home / "values.json"
        path.write_text(json.dumps(values))
        return str(path)


class UniqueKeys(yaml.CSafeLoader if hasattr(yaml, "CSafeLoader") else yaml.SafeLoader):  # type: ignore[misc]
    """Refuses a mapping with the same key twice, which YAML readers otherwise accept silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"the same key twice: {keys}, {node.start_mark}"
        return dict(super().construct_mapping(node, deep))


def one(manifests: Sequence[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The only manifest of a kind (and name)."""
    found = [m for m in manifests if m["kind"] == kind and (name is None or m["metadata"]["name"] == name)]
    assert len(found) == 1, f"{len(found)} of {kind} {name or ''}: {[m['metadata']['name'] for m in found]}"
    return found[0]


def kinds(manifests: Sequence[Manifest]) -> list[str]:
    return sorted(m["kind"] for m in manifests)


def pod_specs(manifests: Sequence[Manifest]) -> list[dict[str, Any]]:
    """The specs of all Pods that the manifests would start."""
    found = []
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "CronJob":
            spec = spec["jobTemplate"]["spec"]
        if manifest["kind"] == "Pod":
            found.append(spec)
        elif "template" in spec:
            found.append(spec["template"]["spec"])
    return found


def environment(pod_spec: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> value or valueFrom of the first container; a name that occurs twice is an error."""
    entries = pod_spec["containers"][0].get("env", [])
    found = {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in entries}
    assert len(found) == len(entries), "an environment variable twice"
    return found
