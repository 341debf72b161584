"""The server's Prometheus metrics.

Names follow vLLM's speculative-decoding counters with our prefix, and go-grpc-prometheus for `grpc_server_*`.
Whatever a rate or a ratio is made of is a counter, so that it can be summed over replicas and draft versions.
Metrics of requests, steps and drafts carry `model`; those of a draft also carry `draft_version`.

Acceptance rate (accepted / drafted)::

    sum by (draft_version) (rate(redraft_spec_decode_num_accepted_tokens_total[5m]))
      / sum by (draft_version) (rate(redraft_spec_decode_num_draft_tokens_total[5m]))

Mean acceptance length (the bonus token included)::

    1 + sum by (draft_version) (rate(redraft_spec_decode_num_accepted_tokens_total[5m]))
      / sum by (draft_version) (rate(redraft_spec_decode_num_drafts_total[5m]))

Expected acceptance α, the mean of Σ_v min(p_v, q_v): less noisy than the acceptance rate::

    sum by (draft_version) (rate(redraft_spec_decode_expected_acceptance_sum_total[5m]))
      / sum by (draft_version) (rate(redraft_spec_decode_expected_acceptance_positions_total[5m]))

Acceptance per position (0-based), unconditional; drafts differ in length, hence a denominator per position::

    sum by (draft_version, position) (rate(redraft_spec_decode_num_accepted_tokens_per_pos_total[5m]))
      / sum by (draft_version, position) (rate(redraft_spec_decode_num_draft_tokens_per_pos_total[5m]))

Prefix cache hits, as a share of prompt tokens::

    rate(redraft_cached_prompt_tokens_total[5m]) / rate(redraft_prompt_tokens_total[5m])

What a reader waits between two pieces of text, 95th percentile. As in vLLM, a step that emits several tokens
is one gap, not several short ones: this is how the stream stutters, and `redraft_time_per_output_token_seconds`
is how fast it is::

    histogram_quantile(0.95, sum by (le) (rate(redraft_inter_token_latency_seconds_bucket[5m])))

The sum and the count of expected acceptance end in `_sum_total` and `_positions_total` because the bare
suffixes `_sum` and `_count` belong to histograms: `promtool check metrics` refuses them elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from redraft.telemetry.draft_metrics import STEP_SECONDS_BUCKETS, DraftMetrics
from redraft.telemetry.observations import RequestObservation, StepObservation
from redraft.telemetry.rollout_metrics import RolloutMetrics
from redraft.telemetry.security_metrics import SecurityMetrics
from redraft.telemetry.spool_metrics import SpoolMetrics
from redraft.traffic.writer import DROP_REASONS

SKIP_REASONS = ("disabled", "no_draft")
"""Why a sequence decoded without a draft. Others may be reported; these are on the page from the start."""

# OTel's GenAI bucket edges, widened to what CPU serving and long generations need.
_DURATION_BUCKETS = tuple(0.01 * 2**i for i in range(14))
_TTFT_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0),
    *(2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0),
)
_TOKEN_SECONDS_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)

_MAX_RPC_METHODS = 64
"""A client may call any path: past this many distinct ones, the rest is counted as `other`."""


class ServerMetrics:
    """Everything the server exports, behind one method per kind of event. Safe to call from any thread.

    `registry` must be the caller's own, never the library's global one, so that two servers (or two tests)
    live in one process. `max_draft_tokens` is the largest draft length: it sets one histogram's edges.
    """

    def __init__(self, registry: CollectorRegistry, model: str, *, max_draft_tokens: int = 16) -> None:
        self._model = model
        self._drafts = DraftMetrics(registry, model, max_draft_tokens)
        self._steps = _StepMetrics(registry, model)
        self._requests = _RequestMetrics(registry, model)
        self._traffic = _TrafficMetrics(registry)
        self._rpcs = _RpcMetrics(registry)
        self._spans = Counter(
            "redraft_trace_spans_total", "Trace spans, by what became of them.", ("result",), registry=registry
        )
        self.rollout = RolloutMetrics(registry, model)
        """Of the rollout of drafts."""
        self.security = SecurityMetrics(registry)
        """Of API keys and certificates."""

    def observe_step(self, step: StepObservation) -> None:
        """Count one engine step. A sequence with no drafted token is no draft (vLLM counts likewise)."""
        self._drafts.observe(step.sequences, step.draft_seconds)
        self._steps.observe(step)

    def observe_preemptions(self, count: int) -> None:
        """Count sequences whose KV blocks were taken away, to be recomputed later."""
        self._steps.preemptions.inc(count)

    def set_load(self, running: int, waiting: int, kv_free: int, kv_total: int) -> None:
        """State the queue and the KV cache: sequences running, requests waiting, blocks free and in all."""
        self._steps.set_load(running, waiting, kv_free, kv_total)

    def set_active_drafts(self, versions: Iterable[str]) -> None:
        """State which draft versions serve now; all others seen so far become inactive."""
        self._drafts.set_active(versions)

    def forget_draft(self, version: str) -> None:
        """Drop all series of a draft version that has long been retired."""
        self._drafts.forget(version)
        self.rollout.forget(version)

    def observe_request_finished(self, request: RequestObservation) -> None:
        """Count one request at its end, including one that was refused at admission."""
        self._requests.observe(request)

    def observe_rpc(self, service: str, method: str, code: str, seconds: float) -> None:
        """Count one finished RPC; `service` is the full name, `code` the gRPC status name (`OK`)."""
        self._rpcs.observe(service, method, code, seconds)

    def observe_spans(self, result: str, count: int) -> None:
        """Count trace spans: `ended` ones and, of these, `exported` and `failed` ones."""
        self._spans.labels(result).inc(count)

    # The next six are `redraft.traffic.spool.SpoolObserver`.

    def observe_traffic_records(self, result: str, count: int) -> None:
        """Count records by what became of them: written, dropped, sampled_out, excluded or redacted."""
        self._traffic.records.labels(result).inc(count)

    def observe_traffic_dropped(self, reason: str, count: int) -> None:
        """Count lost records by reason."""
        self._traffic.dropped.labels(reason).inc(count)

    def observe_traffic_redacted(self, pattern: str, count: int) -> None:
        """Count records withheld for their text, by the pattern that found it."""
        self._traffic.redacted.labels(pattern).inc(count)

    def observe_traffic_flush(self, num_bytes: int, seconds: float, unix_s: float) -> None:
        """Count one shard that reached the store at `unix_s`."""
        self._traffic.observe_flush(num_bytes, seconds, unix_s)

    def set_traffic_spool(self, num_bytes: int, oldest_unix_s: float | None) -> None:
        """State what waits for the object store: bytes of shards, and when the oldest was written."""
        self._traffic.spool.set(num_bytes, oldest_unix_s)

    def observe_traffic_upload_failure(self) -> None:
        """Count one try to send a shard that the object store did not take."""
        self._traffic.spool.failures.inc()


class _StepMetrics:
    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"redraft_{name}", text, ("model",), registry=registry).labels(model)

        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            family = Histogram(f"redraft_{name}", text, ("model",), buckets=buckets, registry=registry)
            return family.labels(model)

        self._verify = histogram(
            "verify_step_seconds",
            "Time of one target forward with sampling and acceptance.",
            STEP_SECONDS_BUCKETS,
        )
        self._sequences = histogram("step_sequences", "Sequences in one step.", [2.0**i for i in range(10)])
        self._gaps = histogram(
            "inter_token_latency_seconds",
            "Time between two deliveries of one sequence; a delivery brings the tokens of one step.",
            _TOKEN_SECONDS_BUCKETS,
        )
        self._tokens = histogram("step_tokens", "Positions in one target forward.", [2.0**i for i in range(15)])
        skipped = Counter(
            "redraft_spec_decode_skipped_steps_total",
            "Decode steps of a sequence that went without a draft, by reason.",
            ("model", "reason"),
            registry=registry,
        )
        self._skipped = cache(lambda reason: skipped.labels(model, reason))
        for reason in SKIP_REASONS:
            self._skipped(reason)
        self.preemptions = Counter(
            "redraft_preemptions_total",
            "Sequences whose KV blocks were taken away to be recomputed later.",
            ("model",),
            registry=registry,
        ).labels(model)
        self._running = gauge("requests_running", "Sequences being generated.")
        self._waiting = gauge("requests_waiting", "Requests admitted but not yet running.")
        self._kv_usage = gauge("kv_cache_usage_ratio", "Share of KV cache blocks in use, 0 to 1.")
        self._kv_blocks = gauge("kv_cache_blocks", "KV cache blocks reserved.")
        self._kv_free = gauge("kv_cache_free_blocks", "KV cache blocks not in use.")

    def observe(self, step: StepObservation) -> None:
        self._verify.observe(step.verify_seconds)
        self._sequences.observe(step.num_sequences)
        self._tokens.observe(step.num_tokens)
        for seconds in step.inter_token_seconds:
            self._gaps.observe(seconds)
        for reason, count in step.skipped.items():
            self._skipped(reason).inc(count)

    def set_load(self, running: int, waiting: int, kv_free: int, kv_total: int) -> None:
        self._running.set(running)
        self._waiting.set(waiting)
        self._kv_free.set(kv_free)
        self._kv_blocks.set(kv_total)
        self._kv_usage.set(1.0 - kv_free / kv_total if kv_total else 0.0)


class _RequestMetrics:
    def __init__(self, registry: CollectorRegistry, model: str) -> None:
        def histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
            return Histogram(f"redraft_{name}", text, ("model", "method"), buckets=buckets, registry=registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"redraft_{name}_total", text, ("model",), registry=registry).labels(model)

        self._model = model
        self._duration = histogram("request_duration_seconds", "Arrival to end of a request.", _DURATION_BUCKETS)
        self._first = histogram("time_to_first_token_seconds", "Arrival to first token.", _TTFT_BUCKETS)
        self._per_token = histogram(
            "time_per_output_token_seconds",
            "Mean latency between the tokens of one request after its first.",
            _TOKEN_SECONDS_BUCKETS,
        )
        self._queue = histogram("queue_time_seconds", "Arrival to start of prefill.", _TTFT_BUCKETS)
        self._prefill = histogram("prefill_time_seconds", "Start of prefill to first token.", _TTFT_BUCKETS)
        self._decode = histogram("decode_time_seconds", "First to last token.", _DURATION_BUCKETS)
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens of finished requests.")
        self._cached_tokens = counter("cached_prompt_tokens", "Prompt tokens served from the prefix cache.")
        self._generation_tokens = counter("generation_tokens", "Output tokens of finished requests.")
        self._requests = Counter(
            "redraft_requests_total",
            "Finished requests by RPC method, gRPC status and finish reason.",
            ("model", "method", "code", "finish_reason"),
            registry=registry,
        )

    def observe(self, request: RequestObservation) -> None:
        self._requests.labels(self._model, request.method, request.code, request.finish_reason).inc()
        self._prompt_tokens.inc(request.prompt_tokens)
        self._cached_tokens.inc(request.cached_prompt_tokens)
        self._generation_tokens.inc(request.generation_tokens)
        per_token = None
        if request.decode_seconds is not None and request.generation_tokens > request.num_samples:
            # The samples decode side by side, and the first token of each belongs to the prefill.
            later_tokens_per_sample = request.generation_tokens / request.num_samples - 1
            per_token = request.decode_seconds / later_tokens_per_sample
        for histogram, seconds in (
            (self._duration, request.duration_seconds),
            (self._first, request.time_to_first_token_seconds),
            (self._per_token, per_token),
            (self._queue, request.queue_seconds),
            (self._prefill, request.prefill_seconds),
            (self._decode, request.decode_seconds),
        ):
            if seconds is not None:
                histogram.labels(self._model, request.method).observe(seconds)


class _TrafficMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.records = Counter(
            "redraft_traffic_log_records_total",
            "Records offered to the log, by result.",
            ("result",),
            registry=registry,
        )
        self.dropped = Counter(
            "redraft_traffic_log_dropped_total", "Records lost, by reason.", ("reason",), registry=registry
        )
        for result in ("written", "dropped"):  # there from the start: a rate misses what a new series begins with
            self.records.labels(result)
        for reason in DROP_REASONS:
            self.dropped.labels(reason)
        self.redacted = Counter(
            "redraft_traffic_log_redacted_total",
            "Records withheld for their text, by the pattern that found it.",
            ("pattern",),
            registry=registry,
        )
        self._bytes = Counter("redraft_traffic_log_bytes_total", "Bytes of shards written.", registry=registry)
        self._seconds = Histogram(
            "redraft_traffic_log_flush_seconds",
            "Time to write one shard.",
            buckets=_TTFT_BUCKETS,
            registry=registry,
        )
        self._last = Gauge(
            "redraft_traffic_log_last_flush_timestamp_seconds",
            "Unix time of the last shard.",
            registry=registry,
        )
        self.spool = SpoolMetrics(registry)

    def observe_flush(self, num_bytes: int, seconds: float, unix_s: float) -> None:
        self._bytes.inc(num_bytes)
        self._seconds.observe(seconds)
        self._last.set(unix_s)


class _RpcMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self._handled = Counter(
            "grpc_server_handled_total",
            "RPCs completed, by status code.",
            ("grpc_service", "grpc_method", "grpc_code"),
            registry=registry,
        )
        self._seconds = Histogram(
            "grpc_server_handling_seconds",
            "Time to handle one RPC.",
            ("grpc_service", "grpc_method"),
            buckets=_DURATION_BUCKETS,
            registry=registry,
        )
        self._known: set[tuple[str, str]] = set()

    def observe(self, service: str, method: str, code: str, seconds: float) -> None:
        if (service, method) not in self._known:
            if len(self._known) < _MAX_RPC_METHODS:
                self._known.add((service, method))
            else:
                service = method = "other"
        self._handled.labels(service, method, code).inc()
        self._seconds.labels(service, method).observe(seconds)
