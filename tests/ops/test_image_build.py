"""The image, really built and really run: non-root, on a read-only root, with SIGTERM to process 1. Minutes: slow."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from redraft.models.demo_draft import DEMO_DRAFT_FILE
from redraft_client.client import Client
from redraft_client.errors import DeadlineExceededError, UnavailableError
from scripts.build_image import CannotBuild, Image, build
from scripts.server_process import free_ports
from tests.fakes import save_tiny

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

USER = "10001"
MODEL = "/tmp/tiny"  # on a read-only root, a place to mount it is to be had there


@pytest.fixture(scope="module")
def image() -> Image:
    try:
        return build()
    except CannotBuild as error:
        pytest.skip(f"NOT TESTED, the image is not built: {error}")


def container(image: Image, arguments: list[str], binds: list[tuple[Path, str]], info_fd: int | None) -> list[str]:
    """The command that runs it as a kubelet would: own processes, the image's user, environment and entrypoint."""
    user, group = image.config["User"].split(":")
    command = ["bwrap", "--die-with-parent", "--unshare-pid", "--as-pid-1", "--ro-bind", str(image.root), "/"]
    command += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--tmpfs", "/tmp"]
    command += ["--chdir", image.config["WorkingDir"], "--clearenv"]
    for name, value in (entry.split("=", 1) for entry in image.config["Env"]):
        command += ["--setenv", name, value]
    for source, target in binds:
        command += ["--ro-bind", str(source), target]
    if info_fd is not None:
        command += ["--info-fd", str(info_fd)]
    drop = ["--clear-groups", "--inh-caps=-all", "--bounding-set=-all", "--no-new-privs"]
    return [*command, "setpriv", f"--reuid={user}", f"--regid={group}", *drop, *image.config["Entrypoint"], *arguments]


def run(image: Image, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        container(image, list(arguments), [], None), capture_output=True, text=True, check=False, timeout=600
    )


@contextlib.contextmanager
def running(image: Image, arguments: list[str], model: Path, log: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The container and the process id, outside, of its process 1."""
    read_end, write_end = os.pipe()
    command = container(image, arguments, [(model, MODEL)], write_end)
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, text=True, pass_fds=[write_end])
    os.close(write_end)
    try:
        with os.fdopen(read_end) as info:
            yield process, json.load(info)["child-pid"]
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("command", "says"), [("server", "redraft-server"), ("train", "redraft-train"), ("client", "redraft")]
)
def test_each_program_gives_help(image: Image, command: str, says: str) -> None:
    done = run(image, command, "--help")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"usage:.*{says}", done.stdout, re.I), done.stdout


def test_it_holds_no_models_and_no_tests(image: Image) -> None:
    """Of weights there are those that the package itself has: a few layers, of no use without the demo target."""
    found = [path.name for path in image.root.rglob("*") if path.suffix in (".safetensors", ".gguf", ".onnx")]
    assert found == [DEMO_DRAFT_FILE.name]
    assert not list(image.root.glob("opt/redraft/lib/python*/site-packages/tests"))
    assert not (image.root / "src").exists()
    assert not (image.root / "usr/bin/gcc").exists()
    assert not (image.root / "run/secrets").exists()


def test_labels_tell_where_it_comes_from(image: Image) -> None:
    labels = image.config["Labels"]
    assert re.fullmatch("[0-9a-f]{40}", labels["org.opencontainers.image.revision"])


def test_it_generates_and_drains(image: Image, tmp_path: Path) -> None:
    """As its own user, on a read-only root; SIGTERM to process 1 reaches the server, which drains and ends with 0."""
    tmp_path.chmod(0o755)
    model, log = save_tiny(tmp_path / "tiny"), tmp_path / "log"
    for file in model.iterdir():
        file.chmod(0o644)  # weights are written for their owner alone
    port, metrics_port = free_ports(2)
    ports = ["--grpc.port", str(port), "--metrics.port", str(metrics_port)]
    arguments = ["server", "--model.target", MODEL, "--engine.kv_cache_tokens", "1024", *ports]
    with running(image, arguments, model, log) as (process, first_pid), Client(f"127.0.0.1:{port}") as client:
        wait_until_serving(client, process, log)
        status = Path(f"/proc/{first_pid}/status").read_text()
        assert re.search(rf"^Uid:\t{USER}\t{USER}\t{USER}\t{USER}$", status, re.M), status
        assert re.search(r"^CapEff:\t0+$", status, re.M), status
        root = next(
            line for line in Path(f"/proc/{first_pid}/mounts").read_text().splitlines() if line.split()[1] == "/"
        )
        assert "ro" in root.split()[3].split(",")
        reply = client.generate("hello", max_new_tokens=5, ignore_eos=True, seed=1)
        assert reply.usage.completion_tokens == 5
        asked = run(image, "client", "generate", "hello", "--address", f"127.0.0.1:{port}", "--max-new-tokens", "3")
        assert asked.returncode == 0, asked.stderr
        os.kill(first_pid, signal.SIGTERM)
        assert process.wait(timeout=300) == 0, log.read_text()
    assert "draining" in log.read_text()
    assert "Traceback" not in log.read_text()


def wait_until_serving(client: Client, process: subprocess.Popen[str], log: Path) -> None:
    """Asking the process, which has no other way to tell; the test's own timeout bounds it."""
    while True:
        assert process.poll() is None, log.read_text()
        with contextlib.suppress(UnavailableError, DeadlineExceededError):  # not listening yet
            if client.is_serving("redraft.v1.GenerationService", timeout=5.0):
                return
