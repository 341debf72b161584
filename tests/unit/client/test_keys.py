"""API keys in the client: where they come from, and that they are never shown; `redraft keys`."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

import grpc
import pytest
import yaml
from typer.testing import CliRunner

from redraft_client.channel import Tls, call_metadata
from redraft_client.cli import app
from redraft_client.errors import InvalidArgumentError
from tests.unit.client.fake_server import Failure, FakeServer


@pytest.mark.parametrize(
    ("given", "variable", "sent"),
    [(None, None, None), ("a", None, "Bearer a"), (None, "b", "Bearer b"), ("a", "b", "Bearer a"), ("", "b", None)],
)
def test_where_the_key_comes_from(
    given: str | None, variable: str | None, sent: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REDRAFT_API_KEY", raising=False)
    if variable is not None:
        monkeypatch.setenv("REDRAFT_API_KEY", variable)
    assert dict(call_metadata(given)).get("authorization") == sent


@pytest.mark.parametrize("key", ["SECRET\n", "SECRET key", "SECRÉT", "SECRET\x00"])
def test_a_key_that_cannot_be_sent_is_not_quoted(key: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        call_metadata(key)
    assert "SECR" not in repr(caught.value)


def test_private_keys_are_not_shown() -> None:
    assert "SECRET" not in repr(Tls(certificate_chain=b"chain", private_key=b"SECRET"))


@pytest.mark.parametrize(
    ("key", "code", "exit_code"),
    [
        ("redraft_SECRET", grpc.StatusCode.UNAUTHENTICATED, 5),
        ("redraft_SECRET", grpc.StatusCode.PERMISSION_DENIED, 5),
        ("redraft_SECRET", grpc.StatusCode.INTERNAL, 1),
        ("redraft_SECRET\n", grpc.StatusCode.OK, 2),
    ],
)
def test_the_command_never_shows_the_key(fake: FakeServer, key: str, code: grpc.StatusCode, exit_code: int) -> None:
    fake.answers["ListModels"] = [Failure(code, "refused")]
    done = CliRunner().invoke(app, ["models", "-a", fake.address], env={"REDRAFT_API_KEY": key})
    assert done.exit_code == exit_code
    assert done.stderr.startswith("error: ")
    assert "SECRET" not in done.output


def made(*arguments: str) -> tuple[str, dict[str, object]]:
    """A new key, and its entry in the keys file."""
    done = CliRunner().invoke(app, ["keys", "new", *arguments])
    assert done.exit_code == 0
    key = done.stderr.split()[-1]
    assert key not in done.stdout
    (tenant,) = yaml.safe_load(done.stdout)["tenants"].values()
    (entry,) = tenant["keys"]
    assert entry["sha256"] == hashlib.sha256(key.encode()).hexdigest()
    return key, entry


def test_new_keys() -> None:
    (first, entry), (second, admin) = (
        made("--tenant", "acme"),
        made("--tenant", "1e5", "--role", "admin", "--days", "30"),
    )
    assert first != second
    assert min(len(first), len(second)) >= len("redraft_") + 43  # 256 bits in base64
    assert (entry["role"], admin["role"]) == ("user", "admin")
    assert "expires" not in entry
    left = datetime.fromisoformat(str(admin["expires"])) - datetime.now(UTC)
    assert timedelta(days=30) - timedelta(minutes=5) < left < timedelta(days=30) + timedelta(minutes=5)


@pytest.mark.parametrize("arguments", [["--tenant", "a b"], ["--tenant", ""], ["--tenant", "a", "--role", "root"], []])
def test_keys_that_no_server_would_take(arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["keys", "new", *arguments]).exit_code == 2
