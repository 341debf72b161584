"""Certificates that cannot be used are refused with a reason, and on a change the ones before them stay."""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from redraft.errors import ConfigError
from redraft_server.security.certificates import Certificates, load_certificates
from redraft_server.security.reloaded import Follower, Reloaded
from tests.certificates import Authority, Pair, TlsFiles

DAY_S = 86_400.0
AUTHORITY = Authority()


class Counted:
    """Reloads by result."""

    def __init__(self) -> None:
        self.results: list[str] = []

    def observe_reload(self, kind: str, result: str) -> None:
        assert kind == "tls"
        self.results.append(result)


@pytest.fixture
def files(tmp_path: Path) -> TlsFiles:
    return TlsFiles(tmp_path, AUTHORITY)


def load(files: TlsFiles, now: float | None = None) -> Reloaded[Certificates]:
    loaded = load_certificates(files.config(mutual=True), time.time if now is None else lambda: now)
    assert loaded is not None
    return loaded


def refusal(files: TlsFiles, now: float | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(files, now)
    return str(caught.value)


def test_no_files_are_no_tls(files: TlsFiles) -> None:
    assert load_certificates(files.config().model_copy(update={"tls_key": None, "tls_cert": None})) is None


def test_when_they_expire(files: TlsFiles) -> None:
    files.put(AUTHORITY.server(days=10.0))
    expiry = load(files).value.expiry
    assert expiry["server"] == pytest.approx(time.time() + 10 * DAY_S, abs=60.0)
    assert expiry["client_ca"] > expiry["server"]


def test_a_private_key_is_not_shown(files: TlsFiles) -> None:
    assert "PRIVATE" not in repr(load(files).value)


def test_an_expired_certificate(files: TlsFiles) -> None:
    said = refusal(files, time.time() + 31 * DAY_S)
    assert said.startswith("grpc.tls_cert: the certificate ")
    assert "expired at " in said


def test_a_certificate_of_the_future_may_be_a_wrong_clock(files: TlsFiles) -> None:
    assert "is this machine's clock right?" in refusal(files, time.time() - 2 * DAY_S)


def test_a_key_of_another_certificate(files: TlsFiles) -> None:
    files.key.write_bytes(AUTHORITY.server().key)
    assert refusal(files) == "grpc.tls_cert, grpc.tls_key: the key is not that of the (first) certificate"


def test_an_encrypted_key(files: TlsFiles) -> None:
    key = load_pem_private_key(files.key.read_bytes(), password=None)
    encryption = BestAvailableEncryption(b"word")
    files.key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    assert refusal(files) == "grpc.tls_key: is no private key in PEM, or it is encrypted"


@pytest.mark.parametrize("name", ["tls_key", "tls_cert", "tls_client_ca"])
@pytest.mark.parametrize("content", [b"", b"-----BEGIN CERTIFICATE-----\nMII", b"\x00\xff"])
def test_a_file_that_is_none(files: TlsFiles, name: str, content: bytes) -> None:
    path = {"tls_key": files.key, "tls_cert": files.cert, "tls_client_ca": files.client_ca}[name]
    path.write_bytes(content)
    assert refusal(files).startswith(f"grpc.{name}: is no ")


def test_a_file_that_is_missing(files: TlsFiles) -> None:
    files.cert.unlink()
    assert refusal(files) == f"grpc.tls_cert: cannot read {files.cert}: No such file or directory"


def test_one_valid_authority_of_several_is_enough(files: TlsFiles) -> None:
    assert load(files).look() is False
    files.client_ca.write_bytes(AUTHORITY.pem + Authority().pem)
    assert load(files).value.client_ca == files.client_ca.read_bytes()


async def test_a_half_written_pair_leaves_the_old_one(files: TlsFiles, caplog: pytest.LogCaptureFixture) -> None:
    loaded, counted, changes = load(files), Counted(), list[Pair]()
    follower = Follower([loaded], counted, lambda: changes.append(Pair(loaded.value.private_key, loaded.value.chain)))
    before, after = loaded.value, AUTHORITY.server()
    caplog.set_level(logging.INFO, "redraft.security")

    files.cert.write_bytes(after.chain)
    await follower.look()
    await follower.look()
    assert loaded.value is before
    assert counted.results == ["failed", "failed"]
    files.key.write_bytes(after.key[: len(after.key) // 2])
    await follower.look()
    assert loaded.value is before

    files.key.write_bytes(after.key)
    await follower.look()
    await follower.look()
    assert changes == [after]
    assert counted.results == ["failed"] * 3 + ["ok"]
    # A problem is told once, not every few seconds
    levels = [record.levelname for record in caplog.records]
    assert levels == ["ERROR", "ERROR", "INFO"]
    assert "the key is not that" in caplog.text
    assert "what was read before stays in use" in caplog.text


async def test_files_that_come_back_are_no_change(files: TlsFiles) -> None:
    loaded, counted = load(files), Counted()
    follower = Follower([loaded], counted)
    content = files.cert.read_bytes()
    files.cert.unlink()
    await follower.look()
    files.cert.write_bytes(content)
    await follower.look()
    files.cert.unlink()
    await follower.look()
    assert counted.results == ["failed", "failed"]


async def test_an_expired_one_does_not_replace_a_valid_one(files: TlsFiles) -> None:
    loaded, counted = load(files), Counted()
    files.put(AUTHORITY.server(days=-0.5))
    await Follower([loaded], counted).look()
    assert counted.results == ["failed"]
    assert loaded.value.expiry["server"] > time.time()


async def test_a_mounted_secret_changes_by_its_link(tmp_path: Path) -> None:
    """As the kubelet does it: the files are links through `..data`, and that is replaced by one rename."""
    for name in ("1", "2"):
        (tmp_path / name).mkdir()
        TlsFiles(tmp_path / name, AUTHORITY)
    (tmp_path / "..data").symlink_to("1")
    mounted = TlsFiles(tmp_path)
    for path in (mounted.key, mounted.cert, mounted.client_ca):
        path.symlink_to(Path("..data", path.name))
    loaded = load(mounted)
    (tmp_path / "..tmp").symlink_to("2")
    (tmp_path / "..tmp").rename(tmp_path / "..data")
    shutil.rmtree(tmp_path / "1")
    assert loaded.look()
    assert loaded.value.chain == (tmp_path / "2" / "tls.crt").read_bytes()
