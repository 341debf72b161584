"""Privacy settings: what they mean, and what is refused at start."""

from __future__ import annotations

from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from redraft.telemetry.metrics import ServerMetrics
from redraft_server.banner import traffic_log_notice
from redraft_server.config import ServerConfig, TrafficLogConfig
from redraft_server.settings import ConfigErrors, load_config
from redraft_server.traffic_log import TrafficLog
from tests.unit.traffic.fakes import record


@pytest.mark.parametrize(
    ("settings", "covered", "not_covered"),
    [
        ({}, {"", "acme", "other"}, set()),
        ({"tenants": ["acme"]}, {"acme"}, {"", "other"}),
        ({"tenants": [""]}, {""}, {"acme"}),
        ({"exclude_tenants": ["acme"]}, {"", "other"}, {"acme"}),
        ({"exclude_tenants": [""]}, {"acme"}, {""}),
        ({"tenants": ["acme", "b"], "exclude_tenants": ["b"]}, {"acme"}, {"", "b", "other"}),
    ],
)
def test_which_tenants_are_recorded(settings: dict[str, list[str]], covered: set[str], not_covered: set[str]) -> None:
    config = TrafficLogConfig.model_validate(settings)
    assert {tenant for tenant in covered | not_covered if config.covers(tenant)} == covered


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--traffic_log.redact", "emial"], "traffic_log.redact.0: input should be 'email'"),
        (["--traffic_log.redact_patterns", "("], "traffic_log.redact_patterns: pattern 1 is no RE2 expression"),
        (["--traffic_log.redact_patterns", "a,b*"], "traffic_log.redact_patterns: pattern 2 matches the empty text"),
        (["--traffic_log.redact_patterns", "[ab]c"], "between double quotes"),
        (["--traffic_log.tenants", "a b"], "traffic_log.tenants.0"),
    ],
)
def test_what_is_wrong_is_named_at_start(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigErrors) as refusal:
        load_config(flags, {})
    assert message in str(refusal.value)


def test_a_list_in_the_environment_that_is_no_json_is_refused() -> None:
    with pytest.raises(ConfigErrors, match=r"a list is given as JSON, such as \[\"email\"\]"):
        load_config([], {"REDRAFT_SERVER__TRAFFIC_LOG__REDACT": "email"})


def test_patterns_arrive_as_they_were_written() -> None:
    flags = ["--traffic_log.redact_patterns", r'"\d{2,4}"', "--traffic_log.redact_patterns", r'"[ab]c"']
    assert load_config(flags, {}).config.traffic_log.redact_patterns == (r"\d{2,4}", "[ab]c")


def test_the_banner_says_what_is_withheld() -> None:
    config = ServerConfig(
        traffic_log=TrafficLogConfig(url="log", retention_days=None, redact=("email", "card"), redact_patterns=("x",))
    )
    assert traffic_log_notice(config) == (
        "ON: prompts and completions of all requests are stored in log until something else deletes them, "
        "but for those with email, card, custom patterns"
    )


async def test_nothing_is_stored_before_the_tokenizer_is_there(tmp_path: Path) -> None:
    registry = CollectorRegistry()
    config = TrafficLogConfig(url=str(tmp_path), redact=("email",))
    log = TrafficLog(str(tmp_path), config, ServerMetrics(registry, "m"))
    log.writer.offer(record("early"))
    assert log.writer.flush(20)
    log.read_with(lambda ids: "plain words")
    log.writer.offer(record("later"))
    await log.close()
    dropped = registry.get_sample_value("redraft_traffic_log_dropped_total", {"reason": "redaction_error"})
    written = registry.get_sample_value("redraft_traffic_log_records_total", {"result": "written"})
    assert (dropped, written) == (1, 1)
    assert b"early" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*.parquet"))
