"""Values of another version of the chart, kept by `helm upgrade --reuse-values`: refused by name, not by accident."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.ops.charts import CHART, Helm, HelmFailed


@pytest.fixture
def old_chart(tmp_path: Path) -> Path:
    """The chart, whose values a test replaces by what an older one had."""
    return Path(shutil.copytree(CHART, tmp_path / "chart"))


def paths(values: Mapping[str, Any], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every group of values, two levels deep: what a new version of the chart may add."""
    for name, value in values.items():
        if isinstance(value, dict) and value and name != "config":
            yield (*above, name)
            if not above and not name.endswith("ecurityContext"):  # Kubernetes' own, passed on as it is
                yield from paths(value, (name,))


def without(values: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    found = copy.deepcopy(dict(values))
    parent = found
    for name in path[:-1]:
        parent = parent[name]
    del parent[path[-1]]
    return found


def render(helm: Helm, chart: Path, values: Mapping[str, Any]) -> str:
    (chart / "values.yaml").write_text(json.dumps(values))
    return helm.run("template", "r", str(chart))


def test_a_group_that_came_later_is_named(helm4: Helm, old_chart: Path, default_values: Mapping[str, Any]) -> None:
    found = list(paths(default_values))
    assert len(found) > 20
    for path in found:
        with pytest.raises(HelmFailed) as refusal:
            render(helm4, old_chart, without(default_values, path))
        message = str(refusal.value)
        assert "nil pointer" not in message, path
        assert path[-1] in message.partition("specifications of the schema")[2], path


@pytest.mark.parametrize("path", [("networkPolicy",), ("server", "probes")])
def test_helm_3_says_the_same(
    helm3: Helm, old_chart: Path, default_values: Mapping[str, Any], path: tuple[str, ...]
) -> None:
    with pytest.raises(HelmFailed, match=path[-1]):
        render(helm3, old_chart, without(default_values, path))


def test_a_group_that_is_gone_is_named(helm4: Helm, old_chart: Path, default_values: Mapping[str, Any]) -> None:
    with pytest.raises(HelmFailed, match="sidecar"):
        render(helm4, old_chart, {**default_values, "sidecar": {"enabled": True}})


def test_unchanged_values_still_render(helm4: Helm, old_chart: Path, default_values: Mapping[str, Any]) -> None:
    assert "kind: Deployment" in render(helm4, old_chart, default_values)
