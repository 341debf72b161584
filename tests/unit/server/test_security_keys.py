"""The keys file: what it may say, what is refused and how, and that no value of it reaches a message."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from redraft.errors import ConfigError
from redraft_server.security.keys import ApiKey, KeyRing, Limits, parse_keys


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def parsed(**tenants: object) -> KeyRing:
    return parse_keys([yaml.safe_dump({"tenants": tenants}).encode()])


def refusal(content: bytes) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_keys([content])
    return str(caught.value)


def test_a_key_is_found_by_what_the_client_sends() -> None:
    ring = parsed(
        acme={
            "requests_per_minute": 60,
            "keys": [{"sha256": sha256("one")}, {"sha256": sha256("two"), "role": "admin"}],
        },
        beta={"keys": [{"sha256": sha256("three")}]},
    )
    limits = Limits(requests_per_minute=60)
    assert ring.find("one") == ApiKey("acme", "user", limits)
    assert ring.find("two") == ApiKey("acme", "admin", limits)
    assert ring.find("three") == ApiKey("beta", "user", Limits())
    assert ring.tenants == {"acme", "beta"}
    assert len(ring) == 3
    for unknown in ("", "ones", "One", sha256("one"), "ключ"):
        assert ring.find(unknown) is None


def test_a_file_may_be_json() -> None:
    content = json.dumps(
        {"tenants": {"acme": {"keys": [{"sha256": sha256("k"), "expires": "2030-01-02T03:04:05+02:00"}]}}}
    )
    key = parse_keys([content.encode()]).find("k")
    assert key is not None
    assert key.expires == datetime(2030, 1, 2, 1, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize("written", ["2030-01-02", "2030-01-02 00:00:00", "2030-01-02T00:00:00Z"])
def test_a_time_without_zone_is_utc(written: str) -> None:
    text = f"tenants: {{acme: {{keys: [{{sha256: {sha256('k')!r}, expires: {written}}}]}}}}"
    key = parse_keys([text.encode()]).find("k")
    assert key is not None
    assert key.expires == datetime(2030, 1, 2, tzinfo=UTC)


def test_a_tenant_may_have_lost_all_its_keys() -> None:
    assert len(parsed(acme={"keys": []})) == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with `tenants:`"),
        (b"- a", "begins with `tenants:`"),
        (b"tenants:\n  acme: [\n", "not valid YAML or JSON, line 3"),
        (b"\xff\xfe", "not valid YAML or JSON"),
        (b"tenants: {}", "tenants: "),
        (b"keys: []", "tenants: field required"),
        (b"tenants: {a b: {keys: []}}", "tenants.a b.[key]: string should match pattern"),
        (b"tenants: {a: {keys: [], requests_per_minute: 0}}", "tenants.a.requests_per_minute: "),
        (b"tenants: {a: {keys: [], request_per_minute: 5}}", "tenants.a.request_per_minute: extra"),
        (
            b"tenants: {a: {keys: [{sha256: x, role: root}]}}",
            "tenants.a.keys[0].role: input should be 'user' or 'admin'",
        ),
    ],
)
def test_what_is_refused(content: bytes, message: str) -> None:
    said = refusal(content)
    assert said.startswith("auth.keys_file: ")
    assert message in said


def test_a_key_in_place_of_its_hash_is_not_repeated() -> None:
    said = refusal(b"tenants: {acme: {keys: [{sha256: redraft_SECRET}]}}")
    assert said == "auth.keys_file: tenants.acme.keys[0].sha256: must be the key's SHA-256, 64 digits out of 0-9 a-f"
    assert "SECRET" not in refusal(b"tenants: {acme: {keys: [redraft_SECRET]}}")
    assert "SECRET" not in refusal(b"tenants: {acme: {keys: [{sha256: [redraft_SECRET}]}}")


def test_one_key_belongs_to_one_tenant() -> None:
    both = {"keys": [{"sha256": sha256("k")}]}
    with pytest.raises(ConfigError, match=r"tenants\.beta\.keys\[0\]: is a key of acme already"):
        parsed(acme=both, beta=both)


def test_the_documented_file_is_one() -> None:
    page = (Path(__file__).parents[3] / "docs" / "deploy.md").read_text()
    (example,) = re.findall(r"```yaml\n(tenants:.*?)```", page, re.S)
    for number in range(example.count("…")):
        example = example.replace("…", sha256(str(number)), 1)
    ring = parse_keys([example.encode()])
    assert ring.tenants == {"acme", "ops"}
    key = ring.find("1")
    assert key is not None
    assert key.role == "admin"
