"""The Grafana dashboard: well-formed, every query parses, and asks for metrics and labels that exist."""

from __future__ import annotations

import json
import re
import subprocess
from typing import Any

from tests.ops.charts import CHART, Helm, one, require
from tests.unit.test_docs_tables import exported_families

DASHBOARD: dict[str, Any] = json.loads((CHART / "files" / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
# Added to every series by Prometheus
TARGET_LABELS = {"namespace", "pod", "le"}


def queries() -> list[str]:
    """All of them, annotations included, with Grafana's variables replaced."""
    found = [target["expr"] for panel in PANELS for target in panel["targets"]]
    found += [annotation["expr"] for annotation in DASHBOARD["annotations"]["list"]]
    return [re.sub(r"\$\w+", "x", query.replace("$__rate_interval", "5m")) for query in found]


def test_ids_are_unique_and_panels_do_not_overlap() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not taken & cells, panel["title"]
        taken |= cells


def test_every_panel_asks_the_chosen_data_source() -> None:
    source = {"type": "prometheus", "uid": "${datasource}"}
    assert all(panel["datasource"] == source for panel in PANELS)
    assert all(target["datasource"] == source for panel in PANELS for target in panel["targets"])
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$(\w+)", json.dumps([panel["targets"] for panel in PANELS]))) - {"__rate_interval"}
    assert used == variables - {"datasource"}


def test_rows_are_what_an_operator_looks_for() -> None:
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    expected = ["Overview", "Speculation", "Drafts", "Latency", "Scheduler and KV cache", "Traffic log", "gRPC"]
    assert rows == expected


def test_every_query_parses() -> None:
    code = "import json, sys, promql_parser\nfor query in json.load(sys.stdin): promql_parser.parse(query)"
    done = subprocess.run(
        [str(require("python")), "-c", code], input=json.dumps(queries()), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_queries_use_metrics_and_labels_that_exist() -> None:
    families = exported_families()
    for query in queries():
        names = re.findall(r"\b((?:redraft|grpc_server)_\w+)\{([^}]*)\}", query)
        assert names, query
        labels: set[str] = set(TARGET_LABELS)
        for name, matchers in names:
            bare = re.sub(r"_(bucket|sum|count)$", "", name)
            kind, own = families.get(name) or families[bare]
            assert (name == bare) or kind == "histogram", name
            assert set(re.findall(r"(\w+)=", matchers)) <= own | TARGET_LABELS, query
            labels |= own
        for group in re.findall(r"by \(([^)]*)\)", query):
            assert {label.strip() for label in group.split(",")} <= labels, query


def test_chart_ships_it_unchanged(helm4: Helm) -> None:
    """Legends such as {{draft_version}} must not be taken for templates."""
    config = one(helm4.render({"metrics": {"dashboard": {"enabled": True}}}), "ConfigMap")
    assert json.loads(config["data"]["redraft.json"]) == DASHBOARD
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
