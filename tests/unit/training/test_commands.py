"""`redraft-train` from outside: exit statuses, one line an error, and the parts of a cycle by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from redraft.models.loader import load_model
from redraft.models.quantised import layer_linears
from redraft.models.ref import ModelKind, ModelRef
from redraft.registry.manifest import DraftState
from redraft_training import settings_text
from redraft_training.__main__ import app
from redraft_training.commands.common import Exit
from redraft_training.cycle_state import Workspace
from redraft_training.evaluate import charts
from redraft_training.settings import CycleSettings, load_settings
from tests.unit.training.cycle_runs import SMALL, Site


@pytest.fixture(autouse=True)
def _no_drawings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("overview", "single"):
        monkeypatch.setattr(charts, name, lambda *_: b"png")


@pytest.fixture(name="site")
def _site(tmp_path: Path) -> Site:
    return Site.make(tmp_path)


def call(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, arguments, terminal_width=200)
    return result.exit_code, result.stdout, result.stderr


def small(*overrides: str) -> list[str]:
    return [part for setting in (*SMALL, *overrides) for part in ("--set", setting)]


def run(site: Site, *overrides: str, command: str = "run") -> tuple[int, str, str]:
    places = [f"--{name.replace('_', '-')}={place}" for name, place in site.places().items()]
    return call(command, *places, *small(*overrides))


def test_run_ends_with_the_status_that_it_documents(site: Site) -> None:
    status, stdout, _ = run(site, "gate.min_first_acceptance=1")
    assert (status, stdout.splitlines()[-1].split()[0]) == (Exit.REFUSED, "refused")
    status, stdout, _ = run(site)
    assert (status, stdout[:15]) == (Exit.NOT_ENOUGH_DATA, "not enough data")
    site.log(40, seed=3)
    status, stdout, stderr = run(site)
    assert (status, stdout.splitlines()[-1].split()[0]) == (Exit.PUBLISHED, "published")
    assert "report.html" in stderr
    with Workspace(site.root / "work").locked():
        status, _, stderr = run(site)
    assert (status, stderr.splitlines()[-1][:35]) == (Exit.ERROR, "error: another cycle is at work in ")
    status, _, stderr = run(site, "distill.epochs=none")
    assert (status, len(stderr.splitlines())) == (Exit.USAGE, 1)
    assert stderr.startswith("error: wrong settings: distill.epochs: ")
    (tail,) = re.findall(r"Exit status: (.*)", call("run", "--help")[1].replace("\n", " "))
    assert all(f" {int(status)} " in f" {tail}" for status in Exit)


def test_loop_runs_cycles_until_it_is_told(site: Site) -> None:
    places = [f"--{name.replace('_', '-')}={place}" for name, place in site.places().items()]
    status, stdout, stderr = call("loop", *places, *small(), "--max-cycles=1", "--poll=0.1")
    assert status == 0
    assert "starting a cycle: " in stderr
    assert stdout.splitlines()[-1].startswith("published ")


def test_by_hand_distil_evaluate_publish(site: Site) -> None:
    root, target, traffic = site.root, f"--target={site.target}", f"--traffic={site.root / 'traffic'}"
    distil = ("distill", target, traffic, f"--output={root / 'run'}", *small("student.quantise=int8"))
    status, _, stderr = call(*distil)
    assert status == 0, stderr
    draft = root / "run" / "draft"
    assert (draft / "draft_quant.json").exists()
    site.log(20, seed=5)  # the log goes on; a run goes on from what it was begun with
    assert call(*distil)[0] == 0
    status, _, stderr = call(*distil, "--set=data.domains=[sql]")
    assert (status, "was begun with other data" in stderr) == (Exit.USAGE, True)

    report, registry = root / "report", f"--registry={root / 'registry'}"
    judge = ("evaluate", f"--draft={draft}", target, traffic, registry, f"--output={report}", *small())
    status, stdout, stderr = call(*judge)
    assert (status, "all" in stdout) == (0, True), stderr
    publish = ("publish", f"--draft={draft}", f"--comparison={report / 'comparison.json'}", target, registry, *small())
    status, stdout, stderr = call(*publish)
    assert (status, stdout.split()[0]) == (Exit.PUBLISHED, "published"), stderr
    assert call(*publish)[1] == stdout  # the same version, once
    current = site.registry.current()
    assert current is not None
    assert site.registry.verify(current.version).target_name == site.target.name

    # now a draft is in service, and the comparison was with none
    status, _, stderr = call("distill", target, traffic, f"--output={root / 'other'}", *small("distill.seed=1"))
    other = (f"--draft={root / 'other' / 'draft'}", *publish[2:])
    status, _, stderr = call("publish", *other)
    assert (status, "run redraft-train evaluate for this draft" in stderr) == (Exit.USAGE, True)
    assert call(*judge)[0] == 0  # the draft against itself
    status, stdout, _ = call(*publish)
    assert status == Exit.ERROR or "refused" in stdout
    assert {entry.state for entry in site.registry.list()} == {DraftState.PUBLISHED}

    for drawn in ("report.html", "report.png"):
        (report / drawn).unlink()
    assert call("report", str(report))[0] == 0
    assert {"report.html", "report.png"} <= {path.name for path in report.iterdir()}


def test_a_trained_draft_is_rounded_on_traffic_and_serves_in_its_place(site: Site) -> None:
    root, target, traffic = site.root, f"--target={site.target}", f"--traffic={site.root / 'traffic'}"
    assert call("distill", target, traffic, f"--output={root / 'run'}", *small())[0] == 0
    whole, rounded = root / "run" / "draft", root / "rounded"
    arguments = ("quantise", f"--draft={whole}", target, traffic, f"--output={rounded}", *small())
    status, _, stderr = call(*arguments)
    assert status == 0, stderr
    about = json.loads((rounded / "draft_quant.json").read_text())
    assert about["bits"] == 8
    before, after = (
        load_model(ModelRef(ModelKind.DIRECTORY, str(each)), progress=lambda _: None) for each in (whole, rounded)
    )
    weights = {name: linear.weight for name, linear in layer_linears(before.model)}
    for name, linear in layer_linears(after.model):
        largest = weights[name].abs().amax(dim=1, keepdim=True)
        assert 0.0 < float(((linear.weight - weights[name]).abs() / largest).median()) < 0.5 / 127
    status, _, stderr = call(*arguments)
    assert (status, "rounded already exists" in stderr) == (Exit.ERROR, True)


def test_dataset_says_what_there_is_to_learn_from(site: Site) -> None:
    site.log(10, seed=9, domain="chat")
    arguments = ("dataset", f"--target={site.target}", f"--traffic={site.root / 'traffic'}", *small())
    status, stdout, _ = call(*arguments, "--json")
    found = json.loads(stdout)
    assert (status, found["records"], set(found["training"])) == (0, 70, {"chat", "sql"})
    assert "sql" in call(*arguments)[1]
    status, _, stderr = call("dataset", f"--target={site.target}", "--traffic=nosuch://bucket")
    assert (status, "cannot use --traffic as a traffic log" in stderr) == (Exit.USAGE, True)
    status, _, stderr = call("dataset", f"--target={site.target}")
    assert (status, "traffic is not set: give --traffic" in stderr) == (Exit.USAGE, True)


def test_sweep_measures_every_size_once(site: Site) -> None:
    arguments = ("sweep", f"--target={site.target}", f"--traffic={site.root / 'traffic'}", "--layers=1,2", "--vocab=60")
    status, stdout, stderr = call(*arguments, f"--output={site.root / 'sweep'}", *small("distill.epochs=1"))
    assert status == 0, stderr
    points = json.loads((site.root / "sweep" / "sweep.json").read_text())
    assert [point["capacity"]["num_layers"] for point in points] == [1, 2]
    assert points[0]["num_parameters"] < points[1]["num_parameters"]
    assert all(0.0 < point["alpha"] <= 1.0 for point in points)
    assert "l2-v60" in stdout


def test_settings_are_a_file_for_config(tmp_path: Path) -> None:
    status, stdout, _ = call("settings")
    assert status == 0
    assert CycleSettings.model_validate(yaml.safe_load(stdout)) == CycleSettings()
    config = tmp_path / "retraining.yaml"
    config.write_text(stdout)
    assert load_settings(config, []) == CycleSettings()
    described = settings_text.describe()
    assert all(
        setting.meaning and f"{setting.name.split('.')[-1]}: {setting.default}" in stdout for setting in described
    )
    assert {"distill.objective.how", "gate.min_positions", "student.quantise"} <= {each.name for each in described}


def test_preset_replaces_the_file_s_objective_and_set_changes_it(tmp_path: Path) -> None:
    from redraft_training.commands.common import settings_from

    config = tmp_path / "retraining.yaml"
    config.write_text("distill:\n  epochs: 7\n  objective: {how: tv, on_policy_fraction: 1}\ndata:\n")
    found = settings_from(
        config, ["distill.objective.beta=0.25", "data.domains=[sql]"], "gkd", target="x", traffic=None
    )
    assert (found.distill.epochs, found.distill.objective.how, found.distill.objective.beta) == (7, "jsd", 0.25)
    assert found.distill.objective.on_policy_fraction == 0.5
    assert (found.target, found.traffic, found.data.domains) == ("x", None, ("sql",))
    with pytest.raises(Exception, match="choose one of"):
        settings_from(None, [], "best")


@pytest.mark.parametrize("text", ["[1, 2", "- a list", "\x00"])
def test_bad_config_file(tmp_path: Path, text: str) -> None:
    config = tmp_path / "retraining.yaml"
    config.write_text(text)
    status, _, stderr = call("run", f"--config={config}")
    assert (status, len(stderr.splitlines())) == (Exit.USAGE, 1)
    assert call("run", f"--config={tmp_path / 'none.yaml'}")[0] == Exit.USAGE


@pytest.mark.parametrize(
    "command", ["init", "run", "loop", "dataset", "distill", "evaluate", "publish", "report", "sweep", "settings"]
)
def test_help_says_what_to_type(command: str) -> None:
    status, stdout, _ = call(command, "--help")
    assert status == 0
    assert f"redraft-train {command}" in stdout
