"""The docs' tables and references, held to the code."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pyarrow as pa
import pytest
from prometheus_client import CollectorRegistry

from redraft.telemetry.metrics import ServerMetrics
from redraft.telemetry.observations import DraftDescription, RequestObservation, SequenceStep, StepObservation
from redraft.traffic.record import ARROW_SCHEMA
from redraft.traffic.writer import DROP_REASONS
from scripts.config_docs import PAGE, render

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
CODE_REFERENCE = r"`((?:core|server|clients|draft_training|tests|scripts)/[\w/]+\.py)(?::([\w.]+))?`"


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_configuration_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python -m scripts.config_docs"


def exported_families() -> dict[str, tuple[str, frozenset[str]]]:
    """Name as PromQL spells it -> (type, labels), after every kind of event was reported once."""
    registry = CollectorRegistry()
    metrics = ServerMetrics(registry, "m")
    step = SequenceStep("d", 2, 1, 0.5, 1)
    metrics.observe_step(StepObservation((step,), 0.1, 1, 3, {"d": 0.1}, {"no_draft": 1}, inter_token_seconds=(0.1,)))
    metrics.observe_preemptions(1)
    metrics.set_load(1, 1, 1, 2)
    metrics.set_active_drafts(["d"])
    metrics.observe_request_finished(
        RequestObservation("Generate", "OK", "eos", 1.0, 1.0, 1.0, 1.0, 1.0, generation_tokens=4)
    )
    metrics.observe_rpc("s", "m", "OK", 1.0)
    metrics.observe_spans("ended", 1)
    metrics.observe_traffic_records("written", 1)
    metrics.observe_traffic_dropped("queue_full", 1)
    metrics.observe_traffic_redacted("email", 1)
    metrics.observe_traffic_flush(1, 1.0, 1.0)
    metrics.set_traffic_spool(1, 1.0)
    metrics.observe_traffic_upload_failure()
    metrics.rollout.set_drafts({"d": DraftDescription("active", 1.0, 1.0, 0.5, 0.4)})
    metrics.rollout.observe_shadow("d", 0.5, 1)
    metrics.rollout.set_refused(1)
    metrics.security.set_certificate_expiry("server", 1.0)
    found: dict[str, tuple[str, frozenset[str]]] = {}
    for family in registry.collect():
        samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
        assert samples, f"{family.name} was not reported: add its event above"
        name = f"{family.name}_total" if family.type == "counter" else family.name
        found[name] = (family.type, frozenset(samples[0].labels) - {"le"})
    return found


def test_every_metric_is_in_the_table() -> None:
    rows = [row for row in table_rows((DOCS / "metrics.md").read_text()) if row[0].startswith("`")]
    documented = {name.strip("`"): (kind, frozenset(re.findall(r"`(\w+)`", labels))) for name, kind, labels, *_ in rows}
    assert len(documented) == len(rows)
    assert documented == exported_families()


def test_promql_uses_metrics_that_exist() -> None:
    text = (DOCS / "metrics.md").read_text()
    families = exported_families()
    used = set(re.findall(r"\b(?:redraft|grpc_server)_\w+", "".join(re.findall(r"```promql(.*?)```", text, re.S))))
    assert used
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in used} <= families.keys()


def test_dependencies_are_all_justified() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = (DOCS / "dependencies.md").read_text()
    groups = {"Base": project["dependencies"], **project["optional-dependencies"]}
    groups = {name: {_bare(item) for item in items} - {"redraft"} for name, items in groups.items()}
    documented = {}
    for section in text.split("\n## ")[1:]:
        title = section.splitlines()[0].strip("`").split(":")[0].strip("`")
        documented[title] = {row[0].strip("`") for row in table_rows(section) if row[0].startswith("`")}
    assert documented == {name: items for name, items in groups.items() if items}


def _bare(requirement: str) -> str:
    return re.split(r"[\[<>=!~; ]", requirement)[0]


def test_traffic_log_schema_and_drop_reasons() -> None:
    text = (DOCS / "traffic-log.md").read_text()
    schema = {row[0].strip("`"): row for row in table_rows(text.split("## Schema")[1]) if len(row) == 3}
    for field in ARROW_SCHEMA:
        assert field.name in schema
        kind = field.type.value_type if pa.types.is_list(field.type) else field.type
        if pa.types.is_struct(kind):
            assert re.findall(r"`(\w+)`", schema[field.name][2]) == [part.name for part in kind]
    for reason in DROP_REASONS:
        assert f"| `{reason}` |" in text


def test_pyarrow_example_reads_a_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from redraft.traffic.record import SamplingRecord, StepRecord, Timings, TrafficRecord
    from redraft.traffic.writer import TrafficWriter

    record = TrafficRecord(
        *("r", 0, 1.0, "", "m", "t", "v", "d", (1, 2), (7, 8, 9, 3), "eos"),
        sampling=SamplingRecord(1.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, None, "maximal"),
        timings=Timings(0.0, 0.1, 0.2),
        steps=(StepRecord(2, (9, 4, 5), 1, "draft_model", "d"),),
    )
    writer = TrafficWriter(str(tmp_path / "traffic"), ServerMetrics(CollectorRegistry(), "m"))
    assert writer.offer(record)
    assert writer.close(30.0)
    monkeypatch.chdir(tmp_path)
    for example in re.findall(r"```python\n(.*?)```", (DOCS / "traffic-log.md").read_text(), re.S):
        exec(compile(example, "docs/traffic-log.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "1 completions, acceptance rate 0.3333333333333333" in printed
    assert "ScanReport(shards=1, records=1" in printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_code_references(page: Path) -> None:
    """Relative links lead somewhere, and every `path.py:name` in backticks exists."""
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for path, name in re.findall(CODE_REFERENCE, text):
        assert (ROOT / path).is_file(), path
        if name:
            assert name in _definitions(ROOT / path), f"{path}:{name}"


def _definitions(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        if isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.ClassDef):
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
            found |= {f"{node.name}.{method.name}" for method in methods}
    return found


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 120
