"""Everything that the chart renders, against the API of Kubernetes 1.29 to 1.37 and of the Prometheus operator."""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.ops.charts import Helm, Manifest, one, require
from tests.ops.values_sets import VALUES

VERSIONS = [f"1.{minor}" for minor in range(29, 38)]


def validate(manifests: Sequence[Manifest], versions: Sequence[str] = VERSIONS) -> tuple[int, list[str]]:
    """How many validations were made, and what was found."""
    script = Path(__file__).parent / "validate_manifests.py"
    done = subprocess.run(
        [str(require("python")), str(script)],
        input=json.dumps({"versions": versions, "manifests": manifests}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    return answer["validated"], answer["problems"]


def rendered(helm: Helm) -> list[Manifest]:
    """Of all sets of values, each different manifest once."""
    found = {json.dumps(m, sort_keys=True): m for values in VALUES.values() for m in helm.render(values)}
    return list(found.values())


def test_everything_fits_every_version(helm4: Helm) -> None:
    manifests = rendered(helm4)
    kinds = {manifest["kind"] for manifest in manifests}
    assert len(kinds) == 14, kinds
    validated, problems = validate(manifests)
    assert problems == []
    assert validated > len(manifests) * 8
    print(f"{len(manifests)} manifests of {len(kinds)} kinds: {validated} validations")  # noqa: T201


def test_both_helms_render_the_same(helm4: Helm, helm3: Helm) -> None:
    for name, values in VALUES.items():
        assert helm4.render(values) == helm3.render(values), name


def _broken(manifests: list[Manifest]) -> list[tuple[Manifest, str]]:
    def changed(kind: str, *path: Any, to: Any) -> Manifest:
        manifest = copy.deepcopy(one(manifests, kind))
        node: Any = manifest
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = to
        return manifest

    pod = ("spec", "template", "spec")
    return [
        (changed("Deployment", *pod, "terminationGracePeriodSecond", to=3), "terminationGracePeriodSecond"),
        (changed("Deployment", *pod, "containers", 0, "env", 0, "value", to=5), "value"),
        (changed("ServiceMonitor", "spec", "endpoints", 0, "intervall", to="5s"), "intervall: unknown field"),
        (changed("ServiceMonitor", "spec", "endpoints", 0, "interval", to="often"), "interval"),
        (changed("PrometheusRule", "spec", "groups", 0, "rules", 0, "severity", to="x"), "severity: unknown field"),
        (changed("Deployment", "apiVersion", to="extensions/v1beta1"), "does not exist"),
    ]


def test_the_check_finds_mistakes(helm4: Helm) -> None:
    broken = _broken(helm4.render(VALUES["monitoring"]))
    for number, (manifest, _) in enumerate(broken):
        manifest["metadata"]["name"] = f"broken-{number}"
    _, problems = validate([manifest for manifest, _ in broken], VERSIONS[-1:])
    for number, (_, message) in enumerate(broken):
        found = [problem for problem in problems if f"/broken-{number}" in problem]
        assert found, message
        assert all(message in problem for problem in found), found


@pytest.mark.parametrize("name", ["CronJob on object storage", "mutual TLS"])
def test_kubectl_reads_it(helm4: Helm, name: str, tmp_path: Path) -> None:
    """kubectl, without a cluster: the manifests as one kustomization."""
    (tmp_path / "all.yaml").write_text(helm4.template(VALUES[name]))
    (tmp_path / "kustomization.yaml").write_text("resources: [all.yaml]\n")
    done = subprocess.run(
        [str(require("kubectl")), "kustomize", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nkind: ") == len(helm4.render(VALUES[name]))
