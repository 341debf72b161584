"""A real S3 server, and what programs need to find it, through a proxy that can break the connection."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import s3fs

from redraft import object_store
from redraft.traffic.reader import TrafficReader
from scripts.s3_process import REGION, S3Process, environment
from scripts.tcp_proxy import TcpProxy
from tests.ops.charts import require


@dataclass(frozen=True)
class Bucket:
    """An empty bucket of the test's own. `AWS_*` lead through `proxy` to it; `admin` and `read` go straight there."""

    name: str
    server: S3Process
    proxy: TcpProxy
    admin: Any

    def url(self, prefix: str) -> str:
        return f"s3://{self.name}/{prefix}"

    def remove(self) -> None:
        """With all that is in it."""
        self.admin.rm(self.name, recursive=True)

    def remake(self) -> None:
        """Empty."""
        self.admin.mkdir(self.name, region_name=REGION)

    def keys(self, prefix: str) -> list[str]:
        return sorted(path.removeprefix(f"{self.name}/{prefix}/") for path in self.admin.find(f"{self.name}/{prefix}"))

    def logged(self, prefix: str = "traffic") -> list[str]:
        """Request ids in a traffic log, sorted; every file of it must be sound."""
        problems: list[object] = []
        reader = TrafficReader(self.url(prefix))
        found = sorted(record.request_id for record in reader.iter_records(on_problem=problems.append))
        assert problems == []
        return found


@pytest.fixture(scope="session")
def server() -> Iterator[S3Process]:
    with S3Process(require("moto_server").with_name("python")) as server:
        yield server


@pytest.fixture(scope="session")
def proxy(server: S3Process) -> Iterator[TcpProxy]:
    """One for all tests, as clients are slow to make and kept by where they connect."""
    with TcpProxy(server.port) as proxy:
        yield proxy


@pytest.fixture(scope="session")
def admin(server: S3Process) -> Any:
    return server.admin()


@pytest.fixture
def bucket(server: S3Process, proxy: TcpProxy, admin: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setattr(object_store, "FIRST_WAIT_S", 0.001)
    for name, value in environment(proxy.port).items():
        monkeypatch.setenv(name, value)
    name = f"test-{uuid.uuid4().hex}"
    admin.mkdir(name, region_name=REGION)
    yield Bucket(name, server, proxy, admin)
    proxy.up()


@pytest.fixture
def other_environment() -> Iterator[None]:
    """Clients read the environment when they are made: for a test that changes it."""
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()
