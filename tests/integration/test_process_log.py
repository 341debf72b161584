"""A server as a process, with JSON logs and a collector: all that it prints is log lines, and its spans arrive."""

from __future__ import annotations

import json
from pathlib import Path

from redraft_client.client import Client
from scripts.server_process import ServerProcess
from tests.fakes import save_tiny
from tests.unit.telemetry.test_otel import receiver

WORD = "Zanzibar7"


def test_all_output_is_json_and_the_spans_arrive(tmp_path: Path) -> None:
    target = save_tiny(tmp_path / "target", vocab_size=300)
    with receiver() as (url, received):
        flags = ["--model.target", str(target), "--engine.kv_cache_tokens", "512", "--tracing.endpoint", url]
        flags += ["--logging.format", "json", "--logging.level", "debug"]
        with ServerProcess(flags, environment={"OMP_NUM_THREADS": "1"}, start_timeout_s=400) as server:
            with Client(server.address) as client:
                request_id = client.generate(WORD, max_new_tokens=4, ignore_eos=True).request_id
            assert server.terminate() == 0
            output = server.output()
    lines = [json.loads(line) for line in output.splitlines()]
    assert {"serving", "draining"} <= {line["message"] for line in lines}
    (rpc,) = [line for line in lines if line["message"] == "rpc"]
    assert rpc["request_id"] == request_id
    scopes = [scope for request in received for part in request.resource_spans for scope in part.scope_spans]
    spans = {span.name: span for scope in scopes for span in scope.spans}
    assert spans.keys() == {"redraft.v1.GenerationService/Generate", "queue", "prefill", "decode"}
    assert {span.trace_id.hex() for span in spans.values()} == {rpc["trace_id"]}
    assert WORD not in output
    assert all(WORD.encode() not in request.SerializeToString() for request in received)
