"""What the chart would create in a cluster, for one machine: its manifests, its alerts on a faster clock, and the
command and environment of its containers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scripts.monitoring_process import duration

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "build" / "tools" / "bin"

Manifest = dict[str, Any]

_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
# [10m], [6h:1m] and offset 12h, but not the 10m in the name of a recording rule
_DURATION = re.compile(r"(?P<before>\[|(?<=\d[smhd]):|\boffset )(?P<number>\d+)(?P<unit>[smhd])\b")

# increase10m > 2000, increase(...[10m])) > 20
_GUARD = re.compile(r"(?P<before>increase10m > |\bincrease\([^()]*\[10m\]\)\) > )(?P<number>\d+)")


@dataclass(frozen=True, slots=True)
class Container:
    """What a container would run, and with which variables."""

    args: Sequence[str]
    environment: Mapping[str, str]


def render(values: Mapping[str, Any]) -> list[Manifest]:
    """`helm template`. Raises RuntimeError with helm's message."""
    with tempfile.TemporaryDirectory() as home:
        path = Path(home) / "values.json"
        path.write_text(json.dumps(values))
        folders = {f"HELM_{kind}_HOME": home for kind in ("CACHE", "CONFIG", "DATA")}
        done = subprocess.run(
            [str(TOOLS / "helm4"), "template", "story", str(ROOT / "helm" / "redraft"), "--values", str(path)],
            capture_output=True,
            text=True,
            check=False,
            env={"PATH": os.environ["PATH"], "HOME": home, **folders},
        )
    if done.returncode != 0:
        raise RuntimeError(f"helm template: {done.stderr}")
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def one(manifests: Sequence[Manifest], kind: str) -> Manifest:
    """The only manifest of a kind."""
    (found,) = (manifest for manifest in manifests if manifest["kind"] == kind)
    return found


def container(pod_template: Mapping[str, Any], secrets: Mapping[str, str]) -> Container:
    """The first container of a Pod. `secrets` has the values by their key in the Secret."""
    spec = pod_template["spec"]["containers"][0]

    def value(entry: Mapping[str, Any]) -> str:
        if "value" in entry:
            return str(entry["value"])
        source = entry["valueFrom"]
        if "secretKeyRef" in source:
            return secrets[source["secretKeyRef"]["key"]]
        _, name = source["resourceFieldRef"]["resource"].split(".")
        return str(spec["resources"]["limits"][name])

    return Container(spec["args"], {entry["name"]: value(entry) for entry in spec["env"]})


def faster_rules(manifests: Sequence[Manifest], speed: float, shortest_s: float) -> Manifest:
    """The PrometheusRule as a rule file, with every duration divided by `speed`.

    That is `for`, the ranges of rates and their like, and offsets. A range stays at `shortest_s` seconds at least,
    since a rate needs two samples. What the rules ask of ten minutes (500 positions, 20 requests, ...) is asked of what
    ten minutes have become.
    """

    def shorter(seconds: float) -> float:
        return max(seconds / speed, shortest_s)

    def duration_of(match: re.Match[str]) -> str:
        return match["before"] + duration(shorter(float(match["number"]) * _SECONDS[match["unit"]]))

    def guard_of(match: re.Match[str]) -> str:
        return f"{match['before']}{float(match['number']) * shorter(600.0) / 600.0:g}"

    groups = one(manifests, "PrometheusRule")["spec"]["groups"]
    for rule in (rule for group in groups for rule in group["rules"]):
        rule["expr"] = _DURATION.sub(duration_of, _GUARD.sub(guard_of, rule["expr"]))
        if "for" in rule:
            number, unit = rule["for"][:-1], rule["for"][-1]
            rule["for"] = duration(float(number) * _SECONDS[unit] / speed)
    return {"groups": groups}
