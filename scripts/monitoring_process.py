"""Prometheus and Alertmanager processes on free loopback ports, for the operations story and the tests of the alerts.

Both are the real programs, from `make tools`.
"""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import yaml

from scripts.server_process import free_ports

_START_TIMEOUT_S, _STOP_TIMEOUT_S, _HTTP_TIMEOUT_S = 60.0, 20.0, 30.0
_LOOPBACK = "127.0.0.1"


class QueryFailed(Exception):
    """Prometheus refused a query; the message is its own."""


@dataclass(frozen=True, slots=True)
class Series:
    """One series of an answer: points of (Unix seconds, value), oldest first; an instant query's has one."""

    labels: Mapping[str, str]
    points: Sequence[tuple[float, float]]

    @property
    def finite(self) -> list[tuple[float, float]]:
        """The points that a graph shows: a ratio of two rates is NaN while nothing happens."""
        return [(at, value) for at, value in self.points if math.isfinite(value)]


class _Process:
    """A program with an HTTP interface. Starts on enter and waits until it says it is ready; ends on exit."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.address = f"{_LOOPBACK}:{free_ports(1)[0]}"
        self._command = [*command, f"--web.listen-address={self.address}", "--log.level=warn"]
        self._folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, cwd=self._folder, stdout=self._output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def get(self, path: str, **parameters: Any) -> Any:
        """The JSON answer. Raises `QueryFailed` where the program gives a reason, OSError if it cannot be reached."""
        url = f"http://{self.address}{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=_HTTP_TIMEOUT_S) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                raise QueryFailed(error.read().decode(errors="replace")) from None

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"{self._command[0]} ended with {self._process.returncode}:\n{self._last_output()}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{self.address}/-/ready", timeout=1.0):
                return
            time.sleep(0.05)  # it has no other way to say that it listens
        raise RuntimeError(f"{self._command[0]} was not ready after {_START_TIMEOUT_S:g} s:\n{self._last_output()}")

    def _last_output(self) -> str:
        self._output.seek(0)
        return self._output.read().decode(errors="replace")[-4000:]


@dataclass(frozen=True, slots=True)
class Scraped:
    """A target, with the labels that the operator's service discovery would add."""

    address: str
    labels: Mapping[str, str]


class Prometheus(_Process):
    """Scrapes `targets` and itself, and evaluates `rules` (the content of a rule file).

    Args:
        program: the executable.
        folder: for its configuration and its data.
        alertmanager: address that firing alerts go to.
        scrape_s, evaluation_s: intervals.
    """

    def __init__(
        self,
        program: Path,
        folder: Path,
        targets: Sequence[Scraped],
        *,
        rules: Mapping[str, Any],
        alertmanager: str,
        scrape_s: float,
        evaluation_s: float,
    ) -> None:
        super().__init__([str(program.resolve()), "--config.file=prometheus.yaml", "--storage.tsdb.path=data"], folder)
        config = {
            "global": {
                "scrape_interval": duration(scrape_s),
                "scrape_timeout": duration(scrape_s),
                "evaluation_interval": duration(evaluation_s),
            },
            "rule_files": ["rules.yaml"],
            "scrape_configs": [
                {
                    "job_name": "redraft",
                    "static_configs": [{"targets": [one.address], "labels": dict(one.labels)} for one in targets],
                },
                {"job_name": "prometheus", "static_configs": [{"targets": [self.address]}]},
            ],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]},
        }
        (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
        (folder / "rules.yaml").write_text(yaml.safe_dump(rules, sort_keys=False))

    def query(self, expression: str) -> list[Series]:
        """An instant vector, now. Raises `QueryFailed`."""
        result = self.get("/api/v1/query", query=expression)["data"]["result"]
        return [_series(one["metric"], [one["value"]]) for one in result]

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[Series]:
        """A graph, as a dashboard's panel asks for it; times in Unix seconds. Raises `QueryFailed`."""
        result = self.get("/api/v1/query_range", query=expression, start=start, end=end, step=step)["data"]["result"]
        return [_series(one["metric"], one["values"]) for one in result]

    def rule_problems(self) -> dict[str, str]:
        """Rules whose last evaluation failed, and why."""
        groups = self.get("/api/v1/rules")["data"]["groups"]
        return {rule["name"]: rule["lastError"] for group in groups for rule in group["rules"] if "lastError" in rule}


class Alertmanager(_Process):
    """Sends what fires and what is resolved to a webhook, at once and each alert by itself."""

    def __init__(self, program: Path, folder: Path, webhook: str) -> None:
        config = {
            "route": {
                "receiver": "webhook",
                "group_by": ["..."],
                "group_wait": "0s",
                "group_interval": "1s",
                "repeat_interval": "1h",
            },
            "receivers": [{"name": "webhook", "webhook_configs": [{"url": webhook, "send_resolved": True}]}],
        }
        flags = ["--config.file=alertmanager.yaml", "--storage.path=data", "--cluster.listen-address="]
        super().__init__([*_with_templates(folder), str(program.resolve()), *flags], folder)
        (folder / "alertmanager.yaml").write_text(yaml.safe_dump(config))

    def alerts(self) -> list[dict[str, Any]]:
        """What fires now."""
        return list(self.get("/api/v2/alerts", active="true"))


def _with_templates(folder: Path) -> list[str]:
    """Debian's build wants its templates of mails in /usr/share, where nothing was installed. A webhook uses none of
    them, so the program gets a /usr/share of its own with empty ones, and nobody else sees it."""
    share = folder.resolve() / "share"
    for name in ("default.tmpl", "email.tmpl"):
        path = share / "prometheus" / "alertmanager" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    mount_and_run = 'mount --bind "$0" /usr/share && exec "$@"'
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount_and_run, str(share)]


@dataclass(frozen=True, slots=True)
class Notification:
    """An alert as the webhook got it. `status` is firing or resolved."""

    received_unix_s: float
    status: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]


class Webhook:
    """What a pager would be: takes Alertmanager's notifications. Listens from construction to `close`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._received: list[Notification] = []
        self._server = ThreadingHTTPServer((_LOOPBACK, 0), _WebhookHandler)
        self._server.daemon_threads = True
        self._server.notify = self._add  # type: ignore[attr-defined]
        self.url = f"http://{_LOOPBACK}:{self._server.server_address[1]}/"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def received(self) -> list[Notification]:
        """All so far, in order."""
        with self._changed:
            return list(self._received)

    def wait_for(self, alert: str, status: str, timeout_s: float) -> Notification:
        """The first notification of an alert with this status, now or later. Raises TimeoutError."""

        def first() -> Notification | None:
            wanted = (one for one in self._received if one.labels["alertname"] == alert and one.status == status)
            return next(wanted, None)

        with self._changed:
            found = self._changed.wait_for(first, timeout_s)
        if found is None:
            raise TimeoutError(f"{alert} was not {status} within {timeout_s:g} s")
        return found

    def _add(self, body: Mapping[str, Any]) -> None:
        now = time.time()
        alerts = [Notification(now, one["status"], one["labels"], one["annotations"]) for one in body["alerts"]]
        with self._changed:
            self._received += alerts
            self._changed.notify_all()


class _WebhookHandler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        cast(Any, self.server).notify(body)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Not worth a line each."""


def duration(seconds: float) -> str:
    """Prometheus's spelling, to the millisecond."""
    return f"{round(seconds * 1000)}ms"


def _series(labels: Mapping[str, str], points: Sequence[Sequence[Any]]) -> Series:
    return Series(labels, tuple((float(at), float(value)) for at, value in points))
