"""`redraft stats`: acceptance by draft version, read from the server's metrics endpoint."""

import http.client
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import typer
from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from redraft_client.cli_support import EXIT_SERVER_ERROR, EXIT_UNAVAILABLE, EXIT_USAGE, fail, out_console

DEFAULT_METRICS_ADDRESS = "127.0.0.1:9090"
_MAX_BYTES = 16 * 1024 * 1024
_PREFIX = "redraft_spec_decode_"


def stats_command(
    metrics_address: Annotated[
        str,
        typer.Option(envvar="REDRAFT_METRICS_ADDRESS", help="host:port or URL of the server's metrics"),
    ] = DEFAULT_METRICS_ADDRESS,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds to wait for the server")] = 10.0,
) -> None:
    """Show acceptance rate, mean acceptance length and tokens by draft version, since the server started."""
    try:
        snapshot = parse_metrics(_fetch(_url(metrics_address), timeout))
    except ValueError as error:
        fail(f"{metrics_address} does not answer with Prometheus metrics: {error}", EXIT_SERVER_ERROR)
    table = Table("model", "draft version", "drafted", "accepted", "rate", "expected", "mean length")
    for row in snapshot.drafts:
        table.add_row(
            row.model,
            row.draft_version or "-",
            f"{row.draft_tokens:.0f}",
            f"{row.accepted_tokens:.0f}",
            _share(row.accepted_tokens, row.draft_tokens),
            _share(row.expected_sum, row.expected_positions),
            f"{1 + row.accepted_tokens / row.drafts:.2f}" if row.drafts else "-",
        )
    console = out_console()
    console.print(table)
    console.print(f"prompt tokens {snapshot.prompt_tokens:.0f}, generated tokens {snapshot.generation_tokens:.0f}")


@dataclass(frozen=True, slots=True)
class DraftCounters:
    """Counters of one draft version of one model since the server started."""

    model: str
    draft_version: str
    drafts: float
    draft_tokens: float
    accepted_tokens: float
    expected_sum: float
    expected_positions: float


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What `stats` shows; `drafts` ordered by model and version."""

    drafts: tuple[DraftCounters, ...]
    prompt_tokens: float
    generation_tokens: float


def parse_metrics(text: str) -> Snapshot:
    """Reads the Prometheus text format. Raises ValueError if it is none, or has none of our counters."""
    by_draft: dict[tuple[str, str], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    totals: dict[str, float] = defaultdict(float)
    seen = False
    for family in text_string_to_metric_families(text):
        seen = seen or family.name.startswith("redraft_")
        for sample in family.samples:
            if sample.name.startswith(_PREFIX) and "draft_version" in sample.labels:
                key = (sample.labels.get("model", ""), sample.labels["draft_version"])
                by_draft[key][sample.name.removeprefix(_PREFIX)] += sample.value
            totals[sample.name] += sample.value
    if not seen:
        raise ValueError("no metric of redraft in it")
    return Snapshot(
        drafts=tuple(_counters(*key, values) for key, values in sorted(by_draft.items())),
        prompt_tokens=totals["redraft_prompt_tokens_total"],
        generation_tokens=totals["redraft_generation_tokens_total"],
    )


def _counters(model: str, draft_version: str, values: Mapping[str, float]) -> DraftCounters:
    return DraftCounters(
        model=model,
        draft_version=draft_version,
        drafts=values.get("num_drafts_total", 0.0),
        draft_tokens=values.get("num_draft_tokens_total", 0.0),
        accepted_tokens=values.get("num_accepted_tokens_total", 0.0),
        expected_sum=values.get("expected_acceptance_sum_total", 0.0),
        expected_positions=values.get("expected_acceptance_positions_total", 0.0),
    )


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _url(address: str) -> str:
    """host:port to the URL of its metrics; http(s) URLs stay as they are; other schemes are refused."""
    if "://" not in address:
        return f"http://{address}/metrics"
    if not address.startswith(("http://", "https://")):
        fail(f"{address!r} is neither host:port nor an http URL", EXIT_USAGE)
    return address


def _fetch(url: str, timeout: float) -> str:
    try:
        with urllib.request.urlopen(url, timeout=timeout) as response:
            body: bytes = response.read(_MAX_BYTES + 1)
    except urllib.error.HTTPError as error:
        error.close()
        fail(f"{url} answers {error.code}", EXIT_SERVER_ERROR)
    except (OSError, http.client.HTTPException) as error:
        fail(f"no metrics from {url} ({error}); set --metrics-address", EXIT_UNAVAILABLE)
    if len(body) > _MAX_BYTES:
        fail(f"{url} answers with more than {_MAX_BYTES >> 20} MiB", EXIT_SERVER_ERROR)
    return body.decode("utf-8")
