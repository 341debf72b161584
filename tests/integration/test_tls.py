"""TLS and mutual TLS on real connections, and certificates that change under load."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from typer.testing import CliRunner

from redraft.errors import ConfigError
from redraft_client.aio import AsyncClient
from redraft_client.channel import Tls
from redraft_client.cli import app as command
from redraft_client.cli_support import EXIT_UNAVAILABLE
from redraft_client.errors import UnavailableError
from redraft_server.app import build, running_server
from redraft_server.config import ModelConfig
from tests.certificates import HOST, Authority, Pair, TlsFiles
from tests.edge import edge_config, running_edge
from tests.engine_harness import EngineSpec
from tests.fake_engine import FakeEngine
from tests.served_engine import Served, served_engine

AUTHORITY = Authority()
STREAMS = 16
ROTATIONS = 6
TOKENS = 12


@pytest.fixture(autouse=True)
def files_are_looked_at_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redraft_server.security.reloaded.LOOK_INTERVAL_S", 3600.0)


def target(address: str) -> str:
    return f"{HOST}:{address.rpartition(':')[2]}"


def tls(client: Pair | None = None, authority: Authority = AUTHORITY) -> Tls:
    if client is None:
        return Tls(authority.pem)
    return Tls(authority.pem, client.chain, client.key)


async def presented(address: str, folder: Path, client: Pair) -> int:
    """The serial number of the certificate that the server shows to one who connects now."""
    path = folder / "client.pem"
    path.write_bytes(client.key + client.chain)
    context = ssl.create_default_context(cadata=AUTHORITY.pem.decode())
    context.load_cert_chain(path)
    context.set_alpn_protocols(["h2"])
    host, port = target(address).split(":")
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    shown = writer.get_extra_info("ssl_object").getpeercert()
    writer.transport.abort()
    return int(shown["serialNumber"], 16)


def serial(pair: Pair) -> int:
    return x509.load_pem_x509_certificates(pair.chain)[0].serial_number


async def test_mutual_tls_serves_only_clients_with_a_certificate(tmp_path: Path) -> None:
    files = TlsFiles(tmp_path, AUTHORITY)
    async with running_edge(config=edge_config(grpc=files.config(mutual=True))) as edge:
        address = target(edge.app.address)
        async with AsyncClient(address, tls=tls(AUTHORITY.client())) as client:
            assert (await client.generate("hi", max_new_tokens=2)).text == "ab"
        stranger = Authority()
        for wrong in (None, tls(), tls(stranger.client()), tls(AUTHORITY.client(), stranger)):
            async with AsyncClient(address, tls=wrong) as client:
                with pytest.raises(UnavailableError):
                    await client.generate("hi", max_new_tokens=2)
        assert len(edge.engine.requests) == 1
        expiry = edge.metric("redraft_tls_certificate_expiry_timestamp_seconds", certificate="server")
        assert expiry == x509.load_pem_x509_certificates(files.cert.read_bytes())[0].not_valid_after_utc.timestamp()


async def test_tls_alone_asks_no_certificate_of_clients(tmp_path: Path) -> None:
    files = TlsFiles(tmp_path, AUTHORITY)
    async with running_server(edge_config(grpc=files.config()), FakeEngine()) as address:
        async with AsyncClient(target(address), tls=tls()) as client:
            assert (await client.generate("hi", max_new_tokens=2)).text == "ab"
        async with AsyncClient(target(address), tls=tls(authority=Authority())) as client:
            with pytest.raises(UnavailableError):
                await client.generate("hi")


async def test_the_command_connects_by_another_name(tmp_path: Path) -> None:
    """As through a port-forward: the address is none of the certificate's names."""
    files = TlsFiles(tmp_path, AUTHORITY)
    async with running_server(edge_config(grpc=files.config()), FakeEngine()) as address:
        arguments = ["generate", "hi", "-a", address, "--tls-ca", str(files.client_ca), "--max-new-tokens", "2"]
        refused = await asyncio.to_thread(CliRunner().invoke, command, arguments)
        assert refused.exit_code == EXIT_UNAVAILABLE
        named = [*arguments, "--tls-server-name", HOST]
        assert (await asyncio.to_thread(CliRunner().invoke, command, named)).output == "ab\n"


@pytest.mark.parametrize("fault", ["missing", "expired", "of another key"])
async def test_a_server_does_not_start_with_wrong_certificates(tmp_path: Path, fault: str) -> None:
    files = TlsFiles(tmp_path, AUTHORITY)
    if fault == "missing":
        files.key.unlink()
    elif fault == "expired":
        files.put(AUTHORITY.server(since_days=-2.0, days=-1.0))
    else:
        files.key.write_bytes(AUTHORITY.server().key)
    with pytest.raises(ConfigError, match=r"^grpc\.tls_(cert|key)"):
        async with running_server(edge_config(grpc=files.config()), FakeEngine()):
            pass
    with pytest.raises(ConfigError, match=r"^grpc\.tls_(cert|key)"):  # before it looks at models, which takes minutes
        build(edge_config(grpc=files.config(), model=ModelConfig(target=str(tmp_path / "no model"))))


async def test_the_authority_of_clients_changes_too(tmp_path: Path) -> None:
    files, next_authority = TlsFiles(tmp_path, AUTHORITY), Authority()
    of_next = Tls(AUTHORITY.pem, (pair := next_authority.client()).chain, pair.key)
    async with running_edge(config=edge_config(grpc=files.config(mutual=True))) as edge:
        address = target(edge.app.address)
        async with AsyncClient(address, tls=of_next) as client:
            with pytest.raises(UnavailableError):
                await client.generate("hi")
        files.client_ca.write_bytes(AUTHORITY.pem + next_authority.pem)
        await edge.app._follower.look()
        for accepted in (of_next, tls(AUTHORITY.client())):
            async with AsyncClient(address, tls=accepted) as client:
                await client.generate("hi", max_new_tokens=1)


@asynccontextmanager
async def fresh_client(served: Served, client: Pair) -> AsyncIterator[AsyncClient]:
    """On a connection of its own, and without retries, which would hide a failure."""
    options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.secure_channel(target(served.address), AUTHORITY.channel(client), options) as channel:
        yield AsyncClient(channel=channel)


class Load:
    """Streams one after the other, each on a new connection, in `STREAMS` tasks, until told to stop."""

    def __init__(self, served: Served, client: Pair) -> None:
        self.done = 0
        self._served, self._client = served, client
        self._stopping = False
        self._progress = asyncio.Condition()

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(STREAMS):
                tasks.create_task(self._stream())

    async def wait_for_more(self, count: int) -> None:
        async with self._progress:
            wanted = self.done + count
            await self._progress.wait_for(lambda: self.done >= wanted)

    def stop(self) -> None:
        self._stopping = True

    async def _stream(self) -> None:
        while not self._stopping:
            async with fresh_client(self._served, self._client) as client:
                async with client.stream([1, 2, 3], max_new_tokens=TOKENS, ignore_eos=True) as stream:
                    async for _ in stream:
                        pass
                assert stream.result.usage.completion_tokens == TOKENS
            async with self._progress:
                self.done += 1
                self._progress.notify_all()


async def test_certificates_change_under_load_and_no_call_fails(tmp_path: Path) -> None:
    files, client = TlsFiles(tmp_path, AUTHORITY), AUTHORITY.client()
    async with served_engine(EngineSpec(), files.config(mutual=True)) as served:
        look = served.app._follower.look
        async with fresh_client(served, client) as old, asyncio.TaskGroup() as tasks:
            long = old.stream([1, 2, 3], max_new_tokens=200, ignore_eos=True)
            await anext(long)
            load = Load(served, client)
            tasks.create_task(load.run())
            for _ in range(ROTATIONS):
                await load.wait_for_more(4)
                pair = AUTHORITY.server()
                files.cert.write_bytes(pair.chain)
                await look()  # half of the pair: the old one stays
                await load.wait_for_more(4)
                files.key.write_bytes(pair.key)
                await look()
                assert await presented(served.address, tmp_path, client) == serial(pair)
            await load.wait_for_more(STREAMS)
            load.stop()
            async for _ in long:  # on a connection from before all changes
                pass
            assert long.result.usage.completion_tokens == 200
        for result in ("ok", "failed"):
            labels = {"kind": "tls", "result": result}
            assert served.registry.get_sample_value("redraft_credential_reloads_total", labels) == ROTATIONS
        ok = {"model": "tiny", "method": "StreamGenerate", "code": "OK", "finish_reason": "length"}
        assert served.registry.get_sample_value("redraft_requests_total", ok) == load.done + 1
        assert served.metric("redraft_requests_total") == load.done + 1
