"""Every query of the dashboard and every alert against a real Prometheus that scraped the real server under traffic."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.ops.charts import require
from tests.ops.live_run import SCRAPE_S, LiveRun, live_run
from tests.ops.test_alerts import ALERTS
from tests.ops.test_dashboard import DASHBOARD, PANELS

# As Grafana fills them in: a rate over four scrapes and more
VARIABLES = {"$__rate_interval": f"{5 * SCRAPE_S:g}s", "$namespace": "ns", "$model": ".*", "$draft_version": ".*"}

WITHOUT_LABELS = {"RedraftTargetAbsent"}  # nobody is there to take them from

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveRun]:
    with live_run(tmp_path_factory.mktemp("live")) as run:
        yield run


def filled_in(query: str) -> str:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query
    return query


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
def test_panel_has_data(run: LiveRun, panel: dict[str, Any]) -> None:
    """Every query of it, and more than zeros: whatever it is about was provoked."""
    for target in panel["targets"]:
        found = run.prometheus.query_range(filled_in(target["expr"]), run.started, run.ended, SCRAPE_S)
        values = [value for series in found for _, value in series.finite]
        assert any(value > 0 for value in values), f"{target['expr']}: {len(values)} values, all zero"
        legend = re.findall(r"{{(\w+)}}", target["legendFormat"])
        assert all(series.labels[label] for series in found for label in legend), target["legendFormat"]


@pytest.mark.parametrize("annotation", DASHBOARD["annotations"]["list"], ids=lambda annotation: str(annotation["name"]))
def test_annotation_has_data(run: LiveRun, annotation: dict[str, Any]) -> None:
    assert run.prometheus.query_range(filled_in(annotation["expr"]), run.started, run.ended, SCRAPE_S)


@pytest.mark.parametrize("variable", DASHBOARD["templating"]["list"][1:], ids=lambda variable: str(variable["name"]))
def test_variable_offers_values(run: LiveRun, variable: dict[str, Any]) -> None:
    match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
    assert match is not None
    selector, label = filled_in(match[1]), match[2]
    answer = run.prometheus.get(f"/api/v1/label/{label}/values", **{"match[]": selector, "start": run.started})
    assert answer["data"]


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_reaches_alertmanager(run: LiveRun, alert: str) -> None:
    """With its labels, and a text in which nothing is missing."""
    found = next(one for one in run.notifications if (one.labels["alertname"], one.status) == (alert, "firing"))
    rule = ALERTS[alert]
    if alert not in WITHOUT_LABELS:
        assert found.labels["namespace"] == "ns"
        for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
            assert found.labels[label] in found.annotations["summary"]
    assert found.labels["severity"] == rule["labels"]["severity"]
    assert not re.search(r"no value|<|%!|NaN|Inf", found.annotations["summary"])
    assert found.annotations["runbook_url"] == rule["annotations"]["runbook_url"]


def test_no_rule_ever_failed(run: LiveRun) -> None:
    """Many-to-many matches show only with the series of a real server."""
    assert run.prometheus.rule_problems() == {}
    (failures,) = run.prometheus.query("sum(prometheus_rule_evaluation_failures_total)")
    assert failures.points[0][1] == 0


def test_promtool_accepts_the_page(run: LiveRun) -> None:
    checked = subprocess.run(
        [str(require("promtool")), "check", "metrics"],
        input=run.metrics_page,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
