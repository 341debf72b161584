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

_LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


def banner_rows(app: App) -> list[tuple[str, str]]:
    """(what, value) in the order shown."""
    config, info = app.config, app.engine.info
    secured = "plain text"
    if config.grpc.tls_cert is not None:
        secured = "TLS" if config.grpc.tls_client_ca is None else "mutual TLS"
    metrics = "off" if app.metrics_address is None else f"http://{app.metrics_address}/metrics"
    return [
        ("gRPC", f"{app.address} ({secured})"),
        ("API keys", "not asked for" if config.auth.keys_file is None else f"needed ({config.auth.keys_file})"),
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
    kept = "until something else deletes them" if log.retention_days is None else f"for {log.retention_days:g} days"
    share = "all" if log.sample_rate == 1.0 else f"{log.sample_rate:.1%} of"
    held_back = [*log.redact, *(["custom patterns"] if log.redact_patterns else [])]
    but = f", but for those with {', '.join(held_back)}" if held_back else ""
    return f"ON: prompts and completions of {share} requests are stored in {log.url} {kept}{but}"


def exposure_notice(config: ServerConfig) -> str | None:
    """What operators should know when more than this machine reaches the API; None if that is in order."""
    if config.grpc.host in _LOOPBACK:
        return None
    if config.auth.keys_file is None and config.grpc.tls_client_ca is None:
        return f"whoever reaches {config.grpc.host} is served: set auth.keys_file, or grpc.tls_client_ca for mutual TLS"
    if config.auth.keys_file is not None and config.grpc.tls_cert is None:
        return "API keys come over the network in clear: set grpc.tls_cert and grpc.tls_key"
    return None


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
