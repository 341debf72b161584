"""The Envoy configuration of the docs, as it stands: calls take turns, a draining server is left, browsers get in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from redraft_client.aio import AsyncClient
from scripts.server_process import ServerProcess, free_ports
from tests.ops.charts import ROOT, require
from tests.ops.test_grpc_tools import REQUEST, buf_program, output_of, text_of
from tests.replica_load import BETWEEN, answers_of, load_while_it_leaves, replica_flags

EXAMPLE = ROOT / "docs" / "examples" / "envoy.yaml"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServerProcess]]:
    require("envoy")
    flags = replica_flags(tmp_path_factory.mktemp("envoy"))
    with (
        ServerProcess(flags, start_timeout_s=600.0, stop_timeout_s=400.0) as one,
        ServerProcess(flags, start_timeout_s=600.0, stop_timeout_s=400.0) as other,
    ):
        yield [one, other]


@dataclass(frozen=True)
class Envoy:
    address: str
    admin: str

    async def healthy(self, count: int) -> None:
        """Wait until so many servers pass their health checks."""
        async with asyncio.timeout(120):
            while await asyncio.to_thread(self._num_healthy) != count:
                await asyncio.sleep(0.1)  # polling another process, which has no other way to tell

    def _num_healthy(self) -> int:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{self.admin}/clusters?format=json") as reply:
            (cluster,) = json.load(reply)["cluster_statuses"]
            return sum(host["health_status"] == {"eds_health_status": "HEALTHY"} for host in cluster["host_statuses"])
        return -1  # not listening yet


@contextlib.contextmanager
def envoy_before(servers: list[ServerProcess], folder: Path) -> Iterator[Envoy]:
    """The example, with nothing but its ports changed."""
    port, admin_port = free_ports(2)
    config: dict[str, Any] = yaml.safe_load(EXAMPLE.read_text())
    config["admin"]["address"]["socket_address"]["port_value"] = admin_port
    resources = config["static_resources"]
    resources["listeners"][0]["address"]["socket_address"]["port_value"] = port
    endpoints = resources["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"]
    for endpoint, server in zip(endpoints, servers, strict=True):
        endpoint["endpoint"]["address"]["socket_address"]["port_value"] = int(server.address.rpartition(":")[2])
    file, log = folder / "envoy.yaml", folder / "envoy.log"
    file.write_text(yaml.safe_dump(config))
    command = [str(require("envoy")), "--config-path", str(file), "--disable-hot-restart", "--concurrency", "1"]
    with log.open("w") as output:
        process = subprocess.Popen([*command, "--log-level", "warn"], stdout=output, stderr=output)
    try:
        yield Envoy(f"127.0.0.1:{port}", f"127.0.0.1:{admin_port}")
    finally:
        process.terminate()
        process.wait(30)


async def test_a_browsers_protocol_gets_the_same_text(servers: list[ServerProcess], tmp_path: Path) -> None:
    """gRPC-Web over HTTP/1.1, unary and streamed; and a refusal comes through with its status."""
    with envoy_before(servers, tmp_path) as envoy:
        await envoy.healthy(2)
        async with AsyncClient(servers[0].address, timeout=300.0) as client:
            expected = (await client.generate("ab", seed=1, max_new_tokens=5)).choices[0].text
        schema = ["--schema", str(ROOT / "proto"), "--protocol", "grpcweb", "--data", REQUEST]
        service = f"http://{envoy.address}/redraft.v1.GenerationService"
        reply = json.loads(await output_of(buf_program(), "curl", *schema, f"{service}/Generate"))
        assert text_of(reply) == expected
        streamed = await output_of(buf_program(), "curl", *schema, f"{service}/StreamGenerate")
        assert '"completion"' in streamed
        refused = json.dumps({"generation": {"text": "ab", "sampling": {"temperature": -1}}})
        with pytest.raises(AssertionError, match=r"invalid_argument[\s\S]*temperature"):
            await output_of(buf_program(), "curl", *schema[:-1], refused, f"{service}/Generate")


async def test_calls_take_turns_and_no_client_notices_a_server_that_leaves(
    servers: list[ServerProcess], tmp_path: Path
) -> None:
    """The last test: one server is gone after it."""
    before = [answers_of(server) for server in servers]
    with envoy_before(servers, tmp_path) as envoy:
        await envoy.healthy(2)
        async with AsyncClient(envoy.address, timeout=300.0) as client:
            answered = await load_while_it_leaves(client, servers[0])
    served = [answers_of(server) - count for server, count in zip(servers, before, strict=True)]
    assert min(served) >= BETWEEN // 4, "both took part"
    assert sum(served) >= answered
