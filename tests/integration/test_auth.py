"""API keys at the server's edge: who is let in, to what, as whom and how often; and what refusals look like."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from typer.testing import CliRunner

from redraft.telemetry.security_metrics import REFUSAL_REASONS
from redraft.v1 import draft_pb2, generation_pb2, model_pb2, tokenizer_pb2
from redraft_client import errors
from redraft_client.aio import AsyncClient
from redraft_client.cli import app as command
from redraft_server.config import AuthConfig, GrpcConfig
from redraft_server.security.access import AccessControl
from redraft_server.security.keys import parse_keys
from redraft_server.security.reloaded import Reloaded
from tests.edge import Edge, details_of, edge_config, limited, running_edge
from tests.fake_engine import FakeEngine

USER, ADMIN, OTHER = "redraft_user-key", "redraft_admin-key", "redraft_other-key"

SERVICES = [
    service
    for file in (generation_pb2, tokenizer_pb2, model_pb2, draft_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
]
METHODS = [f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods]
ADMIN_METHODS = {f"/redraft.v1.DraftService/{name}" for name in ("ActivateDraft", "RollbackDraft", "SetTrafficSplit")}


@pytest.fixture(autouse=True)
def files_are_looked_at_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redraft_server.security.reloaded.LOOK_INTERVAL_S", 3600.0)


def entry(key: str, **more: str) -> dict[str, str]:
    return {"sha256": hashlib.sha256(key.encode()).hexdigest(), **more}


def keys_text(**limits: int) -> str:
    """Tenant acme (with the limits) has USER and ADMIN, tenant other has OTHER."""
    acme = {"keys": [entry(USER), entry(ADMIN, role="admin")], **limits}
    return yaml.safe_dump({"tenants": {"acme": acme, "other": {"keys": [entry(OTHER)]}}})


def bearer(key: str, **more: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {key}"), *((name.replace("_", "-"), value) for name, value in more.items()))


@asynccontextmanager
async def guarded(
    folder: Path, text: str | None = None, engine: FakeEngine | None = None, **channel_options: Any
) -> AsyncIterator[Edge]:
    path = folder / "keys.yaml"
    path.write_text(text or keys_text())
    config = edge_config(auth=AuthConfig(keys_file=path))
    async with running_edge(engine, config, **channel_options) as edge:
        yield edge


async def call(edge: Edge, method: str, metadata: Any = None, body: bytes = b"") -> grpc.StatusCode:
    """The status of a call with the message's bytes as they are."""
    identity: Any = {"request_serializer": None, "response_deserializer": None}
    if method.endswith("StreamGenerate"):
        stream = edge.channel.unary_stream(method, **identity)(body, metadata=metadata)
        return await stream.code()
    return await edge.channel.unary_unary(method, **identity)(body, metadata=metadata).code()


async def read_out(stream: Any) -> grpc.StatusCode:
    """The status of a stream comes behind its messages."""
    async for _ in stream:
        pass
    code: grpc.StatusCode = await stream.code()
    return code


async def refusal(awaitable: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value


def refused(edge: Edge) -> Mapping[str, float]:
    """How often, by reason."""
    counts = {name: edge.metric("redraft_access_refusals_total", reason=name) for name in REFUSAL_REASONS}
    return {name: count for name, count in counts.items() if count}


@pytest.mark.parametrize("method", METHODS)
async def test_every_call_needs_a_key_and_its_role(tmp_path: Path, method: str) -> None:
    """The body is nonsense: whoever is let in is told so, the others are told nothing about it."""
    nonsense, let_in = b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT
    async with guarded(tmp_path) as edge:
        assert await call(edge, method, body=nonsense) is grpc.StatusCode.UNAUTHENTICATED
        assert await call(edge, method, bearer("redraft_wrong"), nonsense) is grpc.StatusCode.UNAUTHENTICATED
        as_user = await call(edge, method, bearer(USER), nonsense)
        assert as_user is (grpc.StatusCode.PERMISSION_DENIED if method in ADMIN_METHODS else let_in)
        assert await call(edge, method, bearer(ADMIN), nonsense) is let_in


async def test_without_a_keys_file_nothing_changes() -> None:
    async with running_edge() as edge:
        await edge.assert_serves()
        await edge.generate(limited(1), metadata=bearer("anything", x_redraft_tenant="mine"))
        assert edge.engine.requests[-1].tenant == "mine"
        assert refused(edge) == {}


@pytest.mark.parametrize(
    ("metadata", "reason", "says"),
    [
        ((), "missing_key", "send the metadata `authorization: Bearer KEY`"),
        ((("authorization", "Basic abc"),), "missing_key", "authorization: Bearer KEY"),
        ((("authorization", "Bearer "),), "missing_key", "authorization: Bearer KEY"),
        ((("authorization", USER),), "missing_key", "authorization: Bearer KEY"),
        ((*bearer(USER), *bearer(USER)), "missing_key", "several"),
        (bearer(USER + "x"), "unknown_key", "does not know"),
        (bearer(USER, x_redraft_tenant="other"), "tenant", "acme"),
    ],
)
async def test_refusals_say_what_to_do_and_are_counted(
    tmp_path: Path, metadata: Any, reason: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with guarded(tmp_path) as edge:
        error = await refusal(edge.generate(limited(1), metadata=metadata))
        assert says in str(error.details())
        assert details_of(error)["ErrorInfo"].reason == reason.upper()
        assert refused(edge) == {reason: 1}
        assert edge.engine.requests == []
        await edge.app._rpcs.wait_idle()
        labels = {"grpc_service": "redraft.v1.GenerationService", "grpc_method": "Generate"}
        assert edge.metric("grpc_server_handled_total", **labels, grpc_code=error.code().name) == 1
    (line,) = [vars(record) for record in caplog.records if record.getMessage() == "rpc"]
    assert (line["code"], line["reason"]) == (error.code().name, reason.upper())
    for text in (str(error.details()), *(str(vars(record)) for record in caplog.records)):
        assert USER not in text


async def test_the_scheme_is_in_any_case(tmp_path: Path) -> None:
    async with guarded(tmp_path) as edge:
        await edge.generate(limited(1), metadata=(("authorization", f"bEARER {USER}"),))


async def test_the_tenant_is_the_keys(tmp_path: Path) -> None:
    async with guarded(tmp_path) as edge:
        await edge.generate(limited(1), metadata=bearer(USER))
        await edge.generate(limited(1), metadata=bearer(OTHER))
        await edge.generate(limited(1), metadata=bearer(USER, x_redraft_tenant="acme"))
        assert [request.tenant for request in edge.engine.requests] == ["acme", "other", "acme"]


def test_an_expired_key() -> None:
    """On a clock of the test's own."""
    text = yaml.safe_dump({"tenants": {"acme": {"keys": [entry(USER, expires="2030-01-01T00:00:00Z")]}}})
    now = 1893456000.0 - 1.0  # a second before
    keys = Reloaded("keys", [], lambda contents: parse_keys([text.encode()]))
    reasons: list[str] = []

    class Metrics:
        def observe_refusal(self, reason: str) -> None:
            reasons.append(reason)

    access = AccessControl(keys, Metrics(), now=lambda: now)
    assert access.identify(METHODS[0], bearer(USER)).tenant == "acme"
    now += 1.0
    with pytest.raises(Exception, match="expired at 2030-01-01 00:00 UTC"):
        access.identify(METHODS[0], bearer(USER))
    assert reasons == ["expired_key"]


async def test_health_is_open_and_reflection_is_not(tmp_path: Path) -> None:
    async with guarded(tmp_path) as edge:
        health: Any = health_pb2_grpc.HealthStub(edge.channel)
        status = (await health.Check(health_pb2.HealthCheckRequest())).status
        assert status == health_pb2.HealthCheckResponse.SERVING
        reflection: Any = reflection_pb2_grpc.ServerReflectionStub(edge.channel)
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        assert await reflection.ServerReflectionInfo(iter([question])).code() is grpc.StatusCode.UNAUTHENTICATED
        answered = reflection.ServerReflectionInfo(iter([question]), metadata=bearer(USER))
        assert (await answered.read()).list_services_response.service
        assert await call(edge, "/redraft.v1.GenerationService/None") is grpc.StatusCode.UNIMPLEMENTED


async def test_a_large_message_without_a_key_is_not_even_read(tmp_path: Path) -> None:
    """Its size would be refused with another status: the server answers before it has seen that."""
    path = tmp_path / "keys.yaml"
    path.write_text(keys_text())
    config = edge_config(auth=AuthConfig(keys_file=path), grpc=GrpcConfig(port=0, max_message_bytes=1024))
    async with running_edge(config=config) as edge:
        too_large = b"x" * 2**20
        assert await call(edge, METHODS[0], body=too_large) is grpc.StatusCode.UNAUTHENTICATED
        assert await call(edge, METHODS[0], bearer(USER), too_large) is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("limit", ["requests_per_minute", "tokens_per_minute", "concurrent_requests"])
async def test_a_tenant_at_its_limit_is_told_when_to_retry(tmp_path: Path, limit: str) -> None:
    """With a lag of the machine a minute could pass, and a request would come back: hence the large distance."""
    async with guarded(tmp_path, keys_text(**{limit: 1}), **{"grpc.enable_retries": 0}) as edge:
        edge.engine.gate.clear()
        first = edge.stream(limited(50), metadata=bearer(USER))
        await first.initial_metadata()
        if limit == "tokens_per_minute":
            edge.engine.gate.set()
            await read_out(first)
        error = await refusal(edge.generate(limited(1), metadata=bearer(ADMIN)))  # another key of the same tenant
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        details = details_of(error)
        assert details["ErrorInfo"].reason == limit.upper()
        assert details["QuotaFailure"].violations[0].subject == limit
        delay = details["RetryInfo"].retry_delay
        assert delay.seconds > 0 or delay.nanos > 0
        assert int(dict(error.trailing_metadata() or ())["grpc-retry-pushback-ms"]) > 0
        assert refused(edge) == {limit: 1}
        assert "acme" in str(error.details())
        edge.engine.gate.set()
        await edge.generate(limited(1), metadata=bearer(OTHER))
        assert await read_out(first) is grpc.StatusCode.OK
        if limit == "concurrent_requests":
            await edge.generate(limited(1), metadata=bearer(USER))


async def test_a_cancelled_request_gives_its_place_back_and_pays(tmp_path: Path) -> None:
    text = keys_text(concurrent_requests=1, tokens_per_minute=1)
    async with guarded(tmp_path, text, **{"grpc.enable_retries": 0}) as edge:
        edge.engine.gate.clear()
        first = edge.stream(limited(50), metadata=bearer(USER))
        await first.initial_metadata()
        first.cancel()
        await edge.app._rpcs.wait_idle()
        edge.engine.wait_for(lambda: len(edge.engine.ended) == 1)
        error = await refusal(edge.generate(limited(1), metadata=bearer(USER)))
        assert details_of(error)["ErrorInfo"].reason == "TOKENS_PER_MINUTE"  # its prompt; the place is free


async def test_keys_change_while_the_server_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with guarded(tmp_path) as edge:
        path, look = tmp_path / "keys.yaml", edge.app._follower.look
        edge.engine.gate.clear()
        running = edge.stream(limited(5), metadata=bearer(USER))
        await running.initial_metadata()

        path.write_text(yaml.safe_dump({"tenants": {"acme": {"keys": [entry("redraft_next")]}}}))
        await look()
        assert await call(edge, METHODS[0], bearer(USER)) is grpc.StatusCode.UNAUTHENTICATED
        edge.engine.gate.set()
        assert await read_out(running) is grpc.StatusCode.OK  # what was let in goes on
        await edge.generate(limited(1), metadata=bearer("redraft_next"))

        for broken in ("", "tenants: [", "tenants: {acme: {keys: [{sha256: redraft_secret}]}}"):
            path.write_text(broken)
            await look()
            await edge.generate(limited(1), metadata=bearer("redraft_next"))
        path.unlink()
        await look()
        await edge.generate(limited(1), metadata=bearer("redraft_next"))
        assert edge.metric("redraft_credential_reloads_total", kind="keys", result="ok") == 1
        assert edge.metric("redraft_credential_reloads_total", kind="keys", result="failed") == 4
        assert "redraft_secret" not in caplog.text
        assert sum(record.levelname == "ERROR" for record in caplog.records) == 4


async def test_the_follower_looks_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redraft_server.security.reloaded.LOOK_INTERVAL_S", 0.01)
    async with guarded(tmp_path) as edge:
        (tmp_path / "keys.yaml").write_text(yaml.safe_dump({"tenants": {"new": {"keys": [entry("redraft_next")]}}}))
        while await call(edge, METHODS[0], bearer("redraft_next")) is grpc.StatusCode.UNAUTHENTICATED:
            pass
        assert edge.metric("redraft_credential_reloads_total", kind="keys", result="ok") == 1


async def test_a_key_of_the_command_opens_the_server(tmp_path: Path) -> None:
    made = CliRunner().invoke(command, ["keys", "new", "--tenant", "7", "--role", "admin", "--days", "30"])
    key = made.stderr.split()[-1]
    assert key not in made.stdout
    async with guarded(tmp_path, made.stdout) as edge:
        async with AsyncClient(edge.app.address, api_key=key) as client:
            assert (await client.generate("hi", max_new_tokens=2)).text == "ab"
            with pytest.raises(errors.UnimplementedError):  # let in; this server only has no registry
                await client.rollback_draft()
        assert edge.engine.requests[0].tenant == "7"
        async with AsyncClient(edge.app.address, api_key="") as client:
            with pytest.raises(errors.UnauthenticatedError, match="authorization: Bearer KEY"):
                await client.generate("hi")
