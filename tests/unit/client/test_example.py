"""The example that uses plain stubs works."""

import subprocess
import sys
from pathlib import Path

from tests.unit.client.fake_server import FakeServer, stream_responses

EXAMPLE = Path(__file__).parents[3] / "docs/examples/plain_stubs.py"


def test_plain_stubs(fake: FakeServer) -> None:
    fake.answers["StreamGenerate"] = [stream_responses()]
    command = [sys.executable, str(EXAMPLE), fake.address, "hi"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "Hello there\n3 of 8 drafted tokens accepted\n"
