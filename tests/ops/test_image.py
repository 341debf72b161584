"""The image: the Dockerfile is clean and keeps what it promises, and its entrypoint passes on signals and statuses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.charts import ROOT, require

ENTRYPOINT = ROOT / "scripts" / "image_entrypoint.py"
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_hadolint_is_content() -> None:
    done = subprocess.run(
        [str(require("hadolint")), "--no-color", "--failure-threshold", "style", str(ROOT / "Dockerfile")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_exception_for_hadolint_has_its_reason() -> None:
    ignored = re.findall(r"# hadolint ignore=(\w+)", DOCKERFILE)
    assert set(ignored) <= {"DL3006", "DL3008", "DL3013"}, "base image by argument, apt and pip pinned elsewhere"


def test_final_stage_is_what_the_chart_expects(default_values: dict[str, dict[str, int]]) -> None:
    final = DOCKERFILE.split("\nFROM ")[-1]
    user = default_values["podSecurityContext"]["runAsUser"]
    assert f"USER {user}:{user}" in final
    assert 'ENTRYPOINT ["image-entrypoint"]' in final
    assert "EXPOSE 50051 9090" in final
    assert "apt-get" not in final
    assert all(f"org.opencontainers.image.{name}=" in final for name in ("title", "version", "revision", "licenses"))


def test_context_has_sources_and_nothing_else() -> None:
    """Everything that the build copies is let in, by name; all else (models, drafts, .git) stays out."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    let_in = {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in let_in)
    wheel = re.findall(r'^  "([\w/]+)",$', (ROOT / "pyproject.toml").read_text().split("packages = [")[1], re.M)
    assert {name.split("/")[0] for name in wheel} <= let_in
    assert {"constraints.txt", "hatch_build.py", "pyproject.toml", "LICENSE", "README.md"} <= let_in


def programs(folder: Path, body: str, interpreter: str = "/bin/sh") -> dict[str, str]:
    """An environment where each program of ours is a script with this body."""
    for name in ("redraft-server", "redraft-train", "redraft"):
        path = folder / name
        path.write_text(f"#!{interpreter}\n{body}\n")
        path.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("command", "program"), [("server", "redraft-server"), ("train", "redraft-train"), ("client", "redraft")]
)
def test_subcommands(tmp_path: Path, command: str, program: str) -> None:
    env = programs(tmp_path, 'echo "$(basename "$0")|$#|$1|$2"; exit 7')
    done = subprocess.run(
        [str(ENTRYPOINT), command, "run", "a b"], env=env, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.returncode) == (f"{program}|2|run|a b\n", 7)


@pytest.mark.parametrize("arguments", [[], ["serve"], ["sh"]])
def test_other_subcommands_are_refused(tmp_path: Path, arguments: list[str]) -> None:
    done = subprocess.run([str(ENTRYPOINT), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "server" in done.stderr


@pytest.mark.parametrize(("status", "expected"), [(0, 0), (1, 1), (2, 2), (3, 0), (4, 0), (34, 34)])
def test_codes_that_count_as_done(tmp_path: Path, status: int, expected: int) -> None:
    env = programs(tmp_path, f"exit {status}") | {"REDRAFT_DONE_CODES": "3 4"}
    assert (
        subprocess.run([str(ENTRYPOINT), "train", "run"], env=env, capture_output=True, check=False).returncode
        == expected
    )


def test_statuses_are_kept_without_that(tmp_path: Path) -> None:
    env = programs(tmp_path, "exit 3")
    assert subprocess.run([str(ENTRYPOINT), "train", "run"], env=env, capture_output=True, check=False).returncode == 3


@pytest.mark.parametrize("command", ["server", "train"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sigterm_reaches_the_program_and_its_end_is_awaited(
    tmp_path: Path, command: str, number: signal.Signals
) -> None:
    """It drains, and then its own status is the container's."""
    body = """import signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
print("up", flush=True)
signal.sigwait([signal.SIGTERM])
print("drained", flush=True)
sys.exit(5)"""
    env = programs(tmp_path, body, sys.executable)
    with subprocess.Popen([str(ENTRYPOINT), command], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.communicate(timeout=60)[0] == "drained\n"
        assert process.returncode == 5


def test_a_program_that_a_signal_ends_has_the_status_of_a_shell(tmp_path: Path) -> None:
    env = programs(tmp_path, "kill -KILL $$")
    assert subprocess.run([str(ENTRYPOINT), "train"], env=env, check=False).returncode == 128 + signal.SIGKILL
