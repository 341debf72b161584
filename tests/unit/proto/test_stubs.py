"""The committed stubs match the proto files, the proto files are lint clean, and the layout is stable."""

import subprocess
import sys
from pathlib import Path

import pytest
from google.protobuf.descriptor import Descriptor

from redraft.v1 import draft_pb2, generation_pb2, model_pb2, tokenizer_pb2

ROOT = Path(__file__).parents[3]
BUF = Path(sys.executable).with_name("buf")


def test_committed_stubs_are_what_the_script_generates(tmp_path: Path) -> None:
    script = [str(ROOT / "scripts/proto.sh"), str(tmp_path)]
    subprocess.run(script, check=True, env={"PYTHON": sys.executable, "PATH": "/usr/bin:/bin"}, capture_output=True)
    generated = {path.name: path.read_text() for path in (tmp_path / "redraft/v1").iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / "core/redraft/v1").glob("*_pb2*")}
    assert generated == committed, "run `make proto`"


def test_proto_files_pass_buf_lint_and_format() -> None:
    for command in (["lint"], ["format", "--diff", "--exit-code"]):
        result = subprocess.run([BUF, *command], cwd=ROOT / "proto", capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


def test_every_sampling_option_tells_unset_from_zero() -> None:
    """Greedy is temperature 0, which must not look like "not set"."""
    request = generation_pb2.SamplingParams(temperature=0.0, seed=0)
    again = generation_pb2.SamplingParams.FromString(request.SerializeToString())
    assert again.HasField("temperature")
    assert again.HasField("seed")
    assert not again.HasField("top_p")


@pytest.mark.parametrize("module", [draft_pb2, generation_pb2, model_pb2, tokenizer_pb2])
def test_no_response_carries_an_error(module: object) -> None:
    """Errors are gRPC statuses, never part of a message."""
    messages: list[Descriptor] = list(module.DESCRIPTOR.message_types_by_name.values())  # type: ignore[attr-defined]
    assert messages
    for message in messages:
        assert not [field.name for field in message.fields if "error" in field.name]
