"""Fixtures of the tests with the tools of `make tools`. A tool that is not there skips its tests, with the reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ops.charts import CHART, Helm, require


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "ops: chart, image, alerts and S3, with the tools of `make tools`")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker("ops")


@pytest.fixture(scope="session")
def helm4(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(require("helm4"), tmp_path_factory.mktemp("helm4"))


@pytest.fixture(scope="session")
def helm3(tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(require("helm3"), tmp_path_factory.mktemp("helm3"))


@pytest.fixture(scope="session", params=["helm4", "helm3"])
def helm(request: pytest.FixtureRequest) -> Helm:
    """Helm 4, then Helm 3."""
    loaded: Helm = request.getfixturevalue(request.param)
    return loaded


@pytest.fixture(scope="session")
def default_values() -> Mapping[str, Any]:
    loaded: Mapping[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    return loaded
