"""What the server says of itself once it serves."""

from __future__ import annotations

import sys
from importlib import metadata
from typing import TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

from redraft_server.app import App
from redraft_server.config import ServerConfig
from redraft_server.engine.api import EngineInfo


def banner_rows(app: App) -> list[tuple[str, str]]:
    """(what, value) in the order shown."""
    config, info = app.config, app.engine.info
    secured = "plain text"
    if config.grpc.tls_cert is not None:
        secured = "TLS" if config.grpc.tls_client_ca is None else "mutual TLS"
    metrics = "off" if app.metrics_address is None else f"http://{app.metrics_address}/metrics"
    return [
        ("gRPC", f"{app.address} ({secured})"),
        ("metrics", metrics),
        ("model", f"{info.model} @ {info.model_revision[:12] or 'unknown'}, {_memory(info.weight_bytes)} of weights"),
        ("runs in", f"{info.dtype} on {info.device}, context of {info.context_length} tokens"),
        ("draft", _draft(info)),
        ("proposer", _proposer(config, info)),
        ("KV cache", f"{info.kv_num_blocks * info.kv_block_size} tokens, {_memory(info.kv_bytes)}"),
        ("traffic log", traffic_log_notice(config) or "off"),
    ]


def traffic_log_notice(config: ServerConfig) -> str | None:
    """What operators and users should know when traffic is recorded; None if it is not."""
    log = config.traffic_log
    if log.url is None:
        return None
    kept = "for ever" if log.retention_days is None else f"for {log.retention_days:g} days"
    share = "all" if log.sample_rate == 1.0 else f"{log.sample_rate:.1%} of"
    return f"ON: prompts and completions of {share} requests are stored in {log.url} {kept}"


def show_banner(app: App, stream: TextIO = sys.stdout) -> None:
    """Write the banner; with colours only to a terminal."""
    title = f"redraft {metadata.version('redraft')} is serving"
    rows = banner_rows(app)
    if not stream.isatty():
        stream.write("".join([f"{title}\n", *(f"  {what:<12} {value}\n" for what, value in rows)]))
        stream.flush()
        return
    table = Table(show_header=False, box=None, padding=(0, 1))
    for what, value in rows:
        loud = what == "traffic log" and value != "off"
        table.add_row(Text(what, style="dim"), Text(value, style="bold red" if loud else ""))
    console = Console(file=stream)
    console.print(Text(title, style="bold green"))
    console.print(table)


def _draft(info: EngineInfo) -> str:
    return "none" if info.draft_name is None else f"{info.draft_name} @ {info.draft_version}"


def _proposer(config: ServerConfig, info: EngineInfo) -> str:
    if info.proposer == "none" or info.num_speculative_tokens == 0:
        return "none (plain decoding)"
    adaptive = ", adaptive" if config.speculation.adaptive else ""
    return f"{info.proposer}, up to {info.num_speculative_tokens} tokens{adaptive}"


def _memory(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
