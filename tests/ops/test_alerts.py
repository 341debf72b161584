"""The alert rules: they parse, they fire when they should and only then, and they use metrics that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ops.charts import CHART, ROOT, Helm, one, require
from tests.unit.test_docs_tables import exported_families

RULES = CHART / "files" / "alerts.yaml"
CASES: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "alert_cases.yaml").read_text())
ALERTS = {
    rule["alert"]: rule
    for group in yaml.safe_load(RULES.read_text())["groups"]
    for rule in group["rules"]
    if "alert" in rule
}


def promtool(*arguments: str) -> str:
    done = subprocess.run([str(require("promtool")), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rules_are_valid() -> None:
    assert f"{len(ALERTS) + 2} rules found" in promtool("check", "rules", str(RULES))


def test_every_alert_has_cases() -> None:
    assert CASES.keys() == ALERTS.keys()
    assert all(case["quiet"] for case in CASES.values())


def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    """One run of promtool for all cases, since it takes a second to start; a failure names its case."""
    tests = []
    for alert, case in CASES.items():
        # Label values come from the case; what the rule says word for word need not be repeated there
        annotations = {**ALERTS[alert]["annotations"], "summary": case["summary"]}
        expected = [{"exp_labels": case["labels"], "exp_annotations": annotations}]
        tests.append(_promtool_test(f"{alert} fires", alert, case["at"], case["input"], expected))
        for why, change in case["quiet"].items():
            tests.append(_promtool_test(f"{alert}: {why}", alert, case["at"], {**case["input"], **change}, []))
    nobody = {**ALERTS["RedraftTargetAbsent"]["annotations"], "summary": "Prometheus scrapes no redraft server "}
    expected = [{"exp_labels": {"severity": "critical"}, "exp_annotations": nobody}]
    tests.append(_promtool_test("no server was ever seen", "RedraftTargetAbsent", "20m", {"up": "0+0x60"}, expected))
    paths = []
    for interval, over_hours in (("1m", False), ("10m", True)):
        path = tmp_path / f"{interval}.yaml"
        some = [test for test in tests if test["alert_rule_test"][0]["eval_time"].endswith("h") == over_hours]
        content = {"rule_files": [str(RULES)], "evaluation_interval": interval, "tests": some}
        path.write_text(yaml.safe_dump(content, sort_keys=False, width=1000))
        paths.append(str(path))
    promtool("test", "rules", *paths)


def _promtool_test(
    name: str, alert: str, at: str, series: dict[str, str | None], expected: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "name": name,
        "interval": "1m",
        "input_series": [{"series": key, "values": values} for key, values in series.items() if values is not None],
        "alert_rule_test": [{"eval_time": at, "alertname": alert, "exp_alerts": expected}],
    }


@pytest.mark.parametrize("alert", ALERTS)
def test_alert_is_complete(alert: str) -> None:
    rule = ALERTS[alert]
    assert rule["for"]
    assert rule["labels"]["severity"] in ("info", "warning", "critical")
    page, _, anchor = rule["annotations"]["runbook_url"].partition("#")
    assert anchor == alert.lower()
    section = (ROOT / page).read_text().partition(f"\n## {alert}\n")[2]
    assert len(section.split("\n## ")[0].split()) > 30, f"docs/runbook.md says too little of {alert}"


def test_rules_use_metrics_that_exist() -> None:
    families = exported_families()
    used = set(re.findall(r"(?<!:)\b(redraft_\w+)\b(?!:)", _expressions()))
    assert len(used) > 10
    for name in used:
        bare = re.sub(r"_(bucket|sum|count)$", "", name)
        assert name in families or families.get(bare, ("",))[0] == "histogram", f"{name} is not exported"


def test_rules_use_labels_that_exist() -> None:
    """A matcher on a label that a metric does not have silently matches nothing."""
    families = exported_families()
    for name, matchers in re.findall(r"\b(redraft_\w+)\{([^}]*)\}", _expressions()):
        assert set(re.findall(r"(\w+)=", matchers)) <= families[name][1], name


def test_rules_use_label_values_that_exist() -> None:
    from redraft.telemetry.metrics import SKIP_REASONS
    from redraft.telemetry.rollout_metrics import ROLLBACK_REASONS
    from redraft.telemetry.security_metrics import RELOAD_RESULTS

    text = _expressions()
    for metric, label, known in (
        ("redraft_spec_decode_skipped_steps_total", "reason", SKIP_REASONS),
        ("redraft_draft_rollbacks_total", "reason", ROLLBACK_REASONS),
        ("redraft_draft_info", "role", ("active", "previous")),
        ("redraft_traffic_log_records_total", "result", ("dropped",)),
        ("redraft_credential_reloads_total", "result", RELOAD_RESULTS),
    ):
        named = re.findall(metric + r"\{" + label + r'=~?"([^"]+)"', text)
        assert named, metric
        assert {value for match in named for value in match.split("|")} <= set(known), metric


def _expressions() -> str:
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    return "\n".join(rule["expr"] for rule in rules)


def rendered_rules(helm: Helm, **settings: Any) -> dict[str, dict[str, Any]]:
    manifests = helm.render({"metrics": {"prometheusRule": {"enabled": True, **settings}}})
    groups = one(manifests, "PrometheusRule")["spec"]["groups"]
    return {rule.get("alert", rule.get("record")): rule for group in groups for rule in group["rules"]}


def test_chart_renders_the_file_as_it_is(helm: Helm) -> None:
    rendered = rendered_rules(helm)
    for alert, rule in ALERTS.items():
        expected = rule["expr"].replace(".*redraft.*-", "r-redraft-")
        assert rendered[alert] == {**rule, "expr": expected}


def test_every_limit_can_be_set(helm4: Helm, default_values: dict[str, Any], tmp_path: Path) -> None:
    limits = default_values["metrics"]["prometheusRule"]["thresholds"]
    in_file = dict(re.findall(r"([0-9.]+) # (\w+)", RULES.read_text()))
    assert {name: float(value) for value, name in re.findall(r"([0-9.]+) # (\w+)", RULES.read_text())} == {
        name: float(value) for name, value in limits.items()
    }, f"the file's limits are not the chart's: {in_file}"
    rules = rendered_rules(helm4, thresholds=dict.fromkeys(limits, 12345.5))
    text = "\n".join(rule["expr"] for rule in rules.values())
    for name in limits:
        assert f"12345.5 # {name}" in text
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "g", "rules": list(rules.values())}]}))
    promtool("check", "rules", str(path))


def test_alerts_can_be_left_out_and_link_elsewhere(helm4: Helm) -> None:
    rules = rendered_rules(helm4, disabled=["RedraftQueueLong"], runbookUrl="https://wiki.example/redraft")
    assert ALERTS.keys() - rules.keys() == {"RedraftQueueLong"}
    alert = rules["RedraftTargetAbsent"]
    assert alert["annotations"]["runbook_url"] == "https://wiki.example/redraft#redrafttargetabsent"
