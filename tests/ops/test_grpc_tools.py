"""Tools that know nothing of us find their way by reflection: grpcurl and buf curl list, describe and generate."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.engine_harness import EngineSpec
from tests.ops.charts import ROOT, require
from tests.served_engine import served_engine

SERVICES = {f"redraft.v1.{name}Service" for name in ("Generation", "Tokenizer", "Model", "Draft")}
REQUEST = json.dumps({"generation": {"text": "ab", "sampling": {"seed": 1}, "stopping": {"maxNewTokens": 5}}})


async def output_of(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, error = await process.communicate()
    assert process.returncode == 0, error.decode()
    return out.decode()


def buf_program() -> str:
    """`buf`, which the development dependencies bring; without it the test is skipped."""
    buf = shutil.which("buf", path=str(Path(sys.executable).parent)) or shutil.which("buf", path=ROOT / ".venv" / "bin")
    if buf is None:
        pytest.skip("NOT TESTED, no buf: `make install` brings it")
    return buf


async def test_grpcurl() -> None:
    grpcurl = str(require("grpcurl"))
    async with served_engine(EngineSpec()) as served:
        call = [grpcurl, "-plaintext"]
        listed = await output_of(*call, served.address, "list")
        assert set(listed.split()) >= SERVICES | {"grpc.health.v1.Health"}
        described = await output_of(*call, served.address, "describe", "redraft.v1.SamplingParams")
        assert "optional float temperature = 1;" in described
        method = "redraft.v1.GenerationService/Generate"
        reply = json.loads(await output_of(*call, "-d", REQUEST, served.address, method))
        assert (await served.client.generate("ab", seed=1, max_new_tokens=5)).choices[0].text == text_of(reply)
        streamed = await output_of(*call, "-d", REQUEST, served.address, "redraft.v1.GenerationService/StreamGenerate")
        assert '"completion"' in streamed
        healthy = await output_of(*call, served.address, "grpc.health.v1.Health/Check")
        assert json.loads(healthy) == {"status": "SERVING"}


async def test_buf_curl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    buf = buf_program()
    monkeypatch.setenv("HOME", str(tmp_path))
    async with served_engine(EngineSpec()) as served:
        call = [buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
        listed = await output_of(*call, "--list-methods", f"http://{served.address}")
        assert {line.split("/")[0] for line in listed.split()} >= SERVICES
        url = f"http://{served.address}/redraft.v1.GenerationService/Generate"
        reply = json.loads(await output_of(*call, "--data", REQUEST, url))
        assert (await served.client.generate("ab", seed=1, max_new_tokens=5)).choices[0].text == text_of(reply)


def text_of(reply: dict[str, list[dict[str, str]]]) -> str:
    """JSON leaves out an empty text."""
    return reply["choices"][0].get("text", "")
