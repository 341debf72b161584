"""What the counters say after known events, and that Prometheus' own linter accepts the page."""

from __future__ import annotations

import re
import subprocess

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from redraft.telemetry import metrics
from redraft.telemetry.metrics import SKIP_REASONS, ServerMetrics
from redraft.telemetry.observations import RequestObservation, SequenceStep, StepObservation
from tests.ops.charts import require

A, B = "d-20261124-1", "d-20261125-1"


class Page:
    """A registry with its metrics, read by sample name and labels; a series that is not there is None."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.metrics = ServerMetrics(self.registry, "demo", max_draft_tokens=4)

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    def of_model(self, name: str, **labels: str) -> float | None:
        return self.value(f"redraft_{name}", model="demo", **labels)

    def spec(self, name: str, version: str = A, **labels: str) -> float | None:
        return self.of_model(f"spec_decode_{name}", draft_version=version, **labels)


@pytest.fixture
def page() -> Page:
    return Page()


def step(*sequences: SequenceStep, **more: object) -> StepObservation:
    values = {"verify_seconds": 0.01, "num_sequences": len(sequences), "num_tokens": 9} | more
    return StepObservation(sequences, **values)  # type: ignore[arg-type]


def test_a_step_counts_drafts_tokens_and_each_position(page: Page) -> None:
    page.metrics.observe_step(step(SequenceStep(A, 3, 2, 2.5, 3), SequenceStep(A, 1, 0, 0.25, 1)))

    assert page.spec("num_drafts_total") == 2
    assert page.spec("num_draft_tokens_total") == 4
    assert page.spec("num_accepted_tokens_total") == 2
    assert page.spec("expected_acceptance_sum_total") == 2.75
    assert page.spec("expected_acceptance_positions_total") == 4
    drafted = [page.spec("num_draft_tokens_per_pos_total", position=str(i)) for i in range(4)]
    accepted = [page.spec("num_accepted_tokens_per_pos_total", position=str(i)) for i in range(4)]
    assert drafted == [2, 1, 1, None]
    assert accepted == [1, 1, 0, None]


def test_per_position_counters_add_up_to_the_totals(page: Page) -> None:
    for drafted in range(1, 5):
        for accepted in range(drafted + 1):
            page.metrics.observe_step(step(SequenceStep(A, drafted, accepted)))

    def total(name: str) -> float:
        return sum(page.spec(name, position=str(i)) or 0 for i in range(4))

    assert total("num_draft_tokens_per_pos_total") == page.spec("num_draft_tokens_total") == 40
    assert total("num_accepted_tokens_per_pos_total") == page.spec("num_accepted_tokens_total") == 20
    assert page.spec("accepted_length_count") == page.spec("num_drafts_total") == 14
    assert page.spec("accepted_length_sum") == 20


def test_a_step_without_drafted_tokens_is_no_draft(page: Page) -> None:
    page.metrics.observe_step(step(SequenceStep(A, 0, 0), skipped={"no_draft": 1, "disabled": 2}))

    assert page.spec("num_drafts_total") is None
    skipped = [page.of_model("spec_decode_skipped_steps_total", reason=reason) for reason in SKIP_REASONS]
    assert skipped == [2, 1]
    assert page.of_model("verify_step_seconds_count") == 1


def test_versions_in_one_batch_are_counted_apart(page: Page) -> None:
    sequences = (SequenceStep(A, 2, 2), SequenceStep("ngram", 4, 1), SequenceStep(B, 2, 0))
    page.metrics.observe_step(step(*sequences, draft_seconds={A: 0.5, B: 0.25}))

    assert [page.spec("num_accepted_tokens_total", v) for v in (A, "ngram", B)] == [2, 1, 0]
    assert page.of_model("draft_step_seconds_sum", draft_version=A) == 0.5
    assert page.of_model("draft_step_seconds_sum", draft_version=B) == 0.25
    assert page.of_model("draft_step_seconds_count", draft_version="ngram") == 0


def test_a_forgotten_version_leaves_no_series_and_may_come_back(page: Page) -> None:
    page.metrics.set_active_drafts([A])
    page.metrics.observe_step(step(SequenceStep(A, 3, 1), SequenceStep(B, 3, 1), draft_seconds={A: 0.1}))
    page.metrics.forget_draft(A)

    assert A not in generate_latest(page.registry).decode()
    assert page.spec("num_drafts_total", B) == 1
    page.metrics.observe_step(step(SequenceStep(A, 2, 1)))
    assert page.spec("num_draft_tokens_total") == 2
    page.metrics.forget_draft("never seen")


def test_active_drafts_are_exclusive(page: Page) -> None:
    page.metrics.set_active_drafts([A])
    page.metrics.set_active_drafts([B])

    assert page.of_model("draft_active", draft_version=A) == 0
    assert page.of_model("draft_active", draft_version=B) == 1


def test_a_finished_request(page: Page) -> None:
    page.metrics.observe_request_finished(
        RequestObservation(
            method="StreamGenerate",
            code="OK",
            finish_reason="length",
            duration_seconds=3.0,
            queue_seconds=0.5,
            prefill_seconds=0.5,
            time_to_first_token_seconds=1.0,
            decode_seconds=2.0,
            prompt_tokens=10,
            cached_prompt_tokens=4,
            generation_tokens=5,
        )
    )
    labels = {"method": "StreamGenerate"}

    assert page.of_model("requests_total", code="OK", finish_reason="length", **labels) == 1
    assert page.of_model("request_duration_seconds_sum", **labels) == 3.0
    assert page.of_model("queue_time_seconds_sum", **labels) == 0.5
    assert page.of_model("prefill_time_seconds_sum", **labels) == 0.5
    assert page.of_model("time_to_first_token_seconds_sum", **labels) == 1.0
    assert page.of_model("decode_time_seconds_sum", **labels) == 2.0
    assert page.of_model("time_per_output_token_seconds_sum", **labels) == 0.5  # 2 s for the 4 after the first
    tokens = [page.of_model(f"{kind}_tokens_total") for kind in ("prompt", "cached_prompt", "generation")]
    assert tokens == [10, 4, 5]


def test_latency_per_token_of_samples_that_decode_side_by_side(page: Page) -> None:
    for num_samples, tokens in ((2, 10), (2, 2)):
        page.metrics.observe_request_finished(
            RequestObservation(
                "Generate", "OK", "eos", 1.0, decode_seconds=2.0, generation_tokens=tokens, num_samples=num_samples
            )
        )
    # 2 s for 4 later tokens each; the second request has no later token and so no latency between tokens.
    assert page.of_model("time_per_output_token_seconds_sum", method="Generate") == 0.5
    assert page.of_model("time_per_output_token_seconds_count", method="Generate") == 1


def test_a_refused_request_has_no_stage_times(page: Page) -> None:
    page.metrics.observe_request_finished(RequestObservation("Generate", "RESOURCE_EXHAUSTED", "", 0.001))

    refused = {"method": "Generate", "code": "RESOURCE_EXHAUSTED", "finish_reason": ""}
    assert page.of_model("requests_total", **refused) == 1
    assert page.of_model("queue_time_seconds_count", method="Generate") is None


def test_load_and_kv_cache(page: Page) -> None:
    page.metrics.set_load(running=3, waiting=7, kv_free=25, kv_total=100)
    page.metrics.observe_preemptions(2)

    assert page.of_model("requests_running") == 3
    assert page.of_model("requests_waiting") == 7
    assert page.of_model("kv_cache_usage_ratio") == 0.75
    assert page.of_model("kv_cache_blocks") == 100
    assert page.of_model("kv_cache_free_blocks") == 25
    assert page.of_model("preemptions_total") == 2
    page.metrics.set_load(running=0, waiting=0, kv_free=0, kv_total=0)
    assert page.of_model("kv_cache_usage_ratio") == 0


def test_paths_that_clients_make_up_do_not_grow_the_page(page: Page) -> None:
    for i in range(200):
        page.metrics.observe_rpc("redraft.v1.GenerationService", f"Made{i}", "UNIMPLEMENTED", 0.1)
    page.metrics.observe_rpc("redraft.v1.GenerationService", "Made0", "OK", 0.1)

    handled = generate_latest(page.registry).decode().count("grpc_server_handled_total{")
    assert handled == 64 + 1 + 1  # the first 64 paths, "other", and the second code of the first path
    other = {"grpc_service": "other", "grpc_method": "other"}
    assert page.value("grpc_server_handled_total", grpc_code="UNIMPLEMENTED", **other) == 200 - 64
    assert page.value("grpc_server_handling_seconds_count", **other) == 200 - 64


def test_traffic_log(page: Page) -> None:
    page.metrics.observe_traffic_records("written", 10)
    page.metrics.observe_traffic_records("dropped", 2)
    page.metrics.observe_traffic_dropped("queue_full", 2)
    page.metrics.observe_traffic_flush(5000, 0.25, 1_800_000_000.0)

    assert page.value("redraft_traffic_log_records_total", result="written") == 10
    assert page.value("redraft_traffic_log_dropped_total", reason="queue_full") == 2
    assert page.value("redraft_traffic_log_bytes_total") == 5000
    assert page.value("redraft_traffic_log_flush_seconds_sum") == 0.25
    assert page.value("redraft_traffic_log_last_flush_timestamp_seconds") == 1_800_000_000.0


def test_two_servers_in_one_process_share_nothing(page: Page) -> None:
    page.metrics.observe_preemptions(1)
    assert Page().of_model("preemptions_total") == 0


def test_the_documented_queries_name_metrics_that_exist(page: Page) -> None:
    names = set(re.findall(r"rate\((redraft_\w+)", metrics.__doc__ or ""))
    families = {f"{family.name}_total" for family in page.registry.collect() if family.type == "counter"}
    families |= {f"{family.name}_bucket" for family in page.registry.collect() if family.type == "histogram"}
    assert len(names) == 10
    assert names <= families


def test_promtool_accepts_the_page(page: Page) -> None:
    page.metrics.observe_step(step(SequenceStep(A, 3, 2, 2.5, 3), draft_seconds={A: 0.1}, skipped={"disabled": 1}))
    page.metrics.observe_request_finished(
        RequestObservation("Generate", "OK", "eos", 1.0, 0.1, 0.1, 0.2, 0.7, 10, 5, 20)
    )
    page.metrics.set_active_drafts([A])
    page.metrics.set_load(1, 2, 3, 4)
    page.metrics.observe_rpc("redraft.v1.GenerationService", "Generate", "OK", 0.1)
    page.metrics.observe_traffic_records("written", 1)
    page.metrics.observe_traffic_dropped("queue_full", 1)
    page.metrics.observe_traffic_flush(1, 0.1, 1.0)

    lint = subprocess.run(
        [str(require("promtool")), "check", "metrics"],
        input=generate_latest(page.registry),
        capture_output=True,
        check=False,
    )
    assert (lint.returncode, lint.stdout + lint.stderr) == (0, b"")
