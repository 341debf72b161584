"""What the operations story takes from the chart, and what it makes of Prometheus's answers; the story itself is `make
ops-story`."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from redraft_server.settings import load_config
from redraft_training.__main__ import app as trainer_app
from redraft_training.settings import load_settings
from scripts import ops_story_timeline
from scripts.monitoring_process import Series
from scripts.ops_story import SCRAPE_S, SPEED, values
from scripts.ops_story_chart import Container, Manifest, container, faster_rules, one, render
from scripts.ops_story_timeline import Moment, Timeline, load, save
from tests.ops.charts import require
from tests.ops.test_alerts import ALERTS
from tests.ops.test_settings import parse

SECRET = {"access-key-id": "id", "secret-access-key": "secret"}


@pytest.fixture(scope="module")
def manifests() -> list[Manifest]:
    require("helm4")
    return render(values(9000))


def trainer(manifests: list[Manifest]) -> Container:
    return container(one(manifests, "CronJob")["spec"]["jobTemplate"]["spec"]["template"], SECRET)


def test_the_job_is_the_cronjobs_and_means_the_servers_log_and_registry(manifests: list[Manifest]) -> None:
    server = container(one(manifests, "Deployment")["spec"]["template"], SECRET)
    job = trainer(manifests)
    assert (server.args, list(job.args[:2])) == (["server"], ["train", "run"])
    command, given = parse(trainer_app, list(job.args[1:]))
    settings = load_settings(
        None, given["set_"], **{name: given[name] for name in ("target", "traffic", "registry", "work_dir")}
    )
    config = load_config([], {name: value for name, value in server.environment.items() if "__" in name}).config
    assert command == "run"
    assert (settings.traffic, settings.registry) == (config.traffic_log.url, config.registry.url)
    assert settings.draft == config.model.draft == "demo-draft"
    for variables in (server.environment, job.environment):
        assert variables["AWS_SECRET_ACCESS_KEY"] == "secret"
        assert variables["AWS_ENDPOINT_URL"] == "http://127.0.0.1:9000"
        assert variables["OMP_NUM_THREADS"] == "1"


def test_every_duration_of_the_rules_is_shorter(tmp_path: Path) -> None:
    rules = faster_rules(render(values(9000)), SPEED, shortest_s=4 * SCRAPE_S)
    path = tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(rules))
    checked = subprocess.run([str(require("promtool")), "check", "rules", str(path)], capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr
    found = {rule["alert"]: rule for group in rules["groups"] for rule in group["rules"] if "alert" in rule}
    assert found.keys() == ALERTS.keys()
    assert found["RedraftAcceptanceCollapsed"]["for"] == "90000ms"
    assert "increase10m > 50" in found["RedraftAcceptanceCollapsed"]["expr"]
    assert "[2160000ms:6000ms]" in found["RedraftRegressionAfterSwap"]["expr"]
    assert "offset 360000ms" in found["RedraftTargetAbsent"]["expr"]
    assert "> 3" in found["RedraftRegistryUnavailable"]["expr"]
    text = "".join(rule["expr"] for rule in found.values())
    assert re.findall(r"\[\d+", text) == re.findall(r"\[\d+(?=ms)", text)


def test_a_series_with_a_gap_is_two_spells() -> None:
    series = Series({}, [(at, 1.0) for at in (0.0, 3.0, 6.0, 30.0, 33.0)])
    assert ops_story_timeline._spells(series) == [(0.0, 6.0), (30.0, 33.0)]


def test_timeline_is_written_and_read_again(tmp_path: Path) -> None:
    def series(label: str, name: str, *points: tuple[float, float]) -> Series:
        return Series({label: name}, points)

    steady: Any = [(1000.0 + 3 * step, 0.6) for step in range(40)]
    found = {
        "live": [series("draft_version", "v1", *steady), series("draft_version", "v2", *steady)],
        "promised": [series("draft_version", "v1", *steady)],
        "share": [series("draft_version", "v1", *steady), series("draft_version", "v2", *steady)],
        "state": [series("state", "idle", (1000.0, 1.0)), series("state", "shadow", (1009.0, 1.0), (1012.0, 1.0))],
        "active": [series("draft_version", "v1", *steady)],
        "alert": [Series({"draft_version": "v1", "alertstate": "firing"}, [(1006.0, 1.0), (1009.0, 1.0)])],
        "alerts": [Series({"alertname": "RedraftQueueLong", "alertstate": "pending"}, [(1003.0, 1.0)])],
        "tokens": [series("", "", *steady)],
        "failed": [series("", "", *steady)],
    }
    moments = [Moment(1065.0, "Job: started", "script"), Moment(1070.0, "Job: ended with status 0", "script")]
    timeline = Timeline(1000.0, found, moments)
    save(timeline, tmp_path)
    assert "| 1:05 | Job: started | script |" in (tmp_path / "timeline.md").read_text()
    assert (tmp_path / "timeline.png").stat().st_size > 10_000
    assert load(tmp_path / "timeline.json").moments == timeline.moments
