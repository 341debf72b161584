"""The command `redraft` against a scripted server: output, exit codes, one-line errors."""

import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2 as details
from typer.testing import CliRunner

from redraft.v1 import draft_pb2, model_pb2
from redraft.v1 import generation_pb2 as pb
from redraft_client import cli_support
from redraft_client.cli import app
from redraft_client.cli_chat import Conversation
from redraft_client.cli_stats import parse_metrics
from redraft_client.client import Client
from redraft_client.types import GenerateParams
from tests.unit.client.fake_server import Failure, FakeServer, response, stream_responses

METRICS = """\
# HELP redraft_spec_decode_num_drafts_total Verify steps with a draft.
# TYPE redraft_spec_decode_num_drafts_total counter
redraft_spec_decode_num_drafts_total{model="demo",draft_version="v7"} 100
redraft_spec_decode_num_drafts_total{model="demo",draft_version="v8"} 0
# TYPE redraft_spec_decode_num_draft_tokens_total counter
redraft_spec_decode_num_draft_tokens_total{model="demo",draft_version="v7"} 400
redraft_spec_decode_num_draft_tokens_total{model="demo",draft_version="v8"} 0
# TYPE redraft_spec_decode_num_accepted_tokens_total counter
redraft_spec_decode_num_accepted_tokens_total{model="demo",draft_version="v7"} 250
# TYPE redraft_spec_decode_num_accepted_tokens_per_pos_total counter
redraft_spec_decode_num_accepted_tokens_per_pos_total{model="demo",draft_version="v7",position="0"} 90
# TYPE redraft_spec_decode_expected_acceptance_sum_total counter
redraft_spec_decode_expected_acceptance_sum_total{model="demo",draft_version="v7"} 150
# TYPE redraft_spec_decode_expected_acceptance_positions_total counter
redraft_spec_decode_expected_acceptance_positions_total{model="demo",draft_version="v7"} 200
# TYPE redraft_prompt_tokens_total counter
redraft_prompt_tokens_total{model="demo"} 1000
# TYPE redraft_generation_tokens_total counter
redraft_generation_tokens_total{model="demo"} 360
"""


class Outcome:
    def __init__(self, result: Any) -> None:
        self.code: int = result.exit_code
        self.out: str = result.stdout
        self.err: str = result.stderr


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are not wrapped, and settings of the machine do not reach the tests."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("TERM", "dumb")
    for name in ("REDRAFT_ADDRESS", "REDRAFT_API_KEY", "REDRAFT_METRICS_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def redraft(*args: str, **env: str) -> Outcome:
    return Outcome(CliRunner().invoke(app, list(args), env=env))


def test_generate_streams_a_chat_answer(fake: FakeServer) -> None:
    fake.answers["StreamGenerate"] = [stream_responses()]
    outcome = redraft(
        "generate", "hi", "-a", fake.address, "--max-new-tokens", "9", "--temperature", "0", "--top-p", "0.5",
        "--top-k", "3", "--seed", "7", "--stop", "a", "--stop", "b", "--draft-tokens", "2",
    )  # fmt: skip
    assert (outcome.code, outcome.out, outcome.err) == (0, "Hello there\n", "")
    assert fake.last_request.generation == pb.Generation(
        chat=pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")]),
        sampling=pb.SamplingParams(temperature=0.0, top_p=0.5, top_k=3, seed=7),
        stopping=pb.StoppingParams(max_new_tokens=9, stop_sequences=["a", "b"]),
        speculation=pb.SpeculationOptions(max_draft_tokens=2),
    )


def test_generate_raw_without_speculation_or_stream(fake: FakeServer) -> None:
    fake.answers["Generate"] = [response()]
    outcome = redraft("generate", "hi", "--raw", "--no-speculation", "--no-stream", REDRAFT_ADDRESS=fake.address)
    assert (outcome.code, outcome.out) == (0, "Hello there\n")
    assert fake.last_request.generation == pb.Generation(text="hi", speculation=pb.SpeculationOptions(enabled=False))


def test_generate_json(fake: FakeServer) -> None:
    fake.answers["Generate"] = [response()]
    document = json.loads(redraft("generate", "hi", "--json", "-a", fake.address).out)
    assert document["choices"][0]["text"] == "Hello there"
    assert document["choices"][0]["finish_reason"] == "stop_sequence"
    assert document["completion"]["speculation"]["acceptance_rate"] == 3 / 8


def test_the_api_key_comes_from_the_environment_only(fake: FakeServer) -> None:
    fake.answers["ListModels"] = [model_pb2.ListModelsResponse()]
    redraft("models", "-a", fake.address, REDRAFT_API_KEY="k")
    redraft("models", "-a", fake.address)
    assert [metadata.get("authorization") for metadata in fake.metadata] == ["Bearer k", None]
    assert redraft("models", "--api-key", "k").code == cli_support.EXIT_USAGE


@pytest.mark.parametrize(
    ("code", "exit_code", "advice"),
    [
        (grpc.StatusCode.INTERNAL, 1, "log"),
        (grpc.StatusCode.INVALID_ARGUMENT, 2, ""),
        (grpc.StatusCode.NOT_FOUND, 2, "redraft models"),
        (grpc.StatusCode.UNIMPLEMENTED, 2, "feature"),
        (grpc.StatusCode.UNAVAILABLE, 3, "REDRAFT_ADDRESS"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 3, "later"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, 4, "--timeout"),
        (grpc.StatusCode.UNAUTHENTICATED, 5, "REDRAFT_API_KEY"),
    ],
)
def test_errors_are_one_line_with_an_exit_code(
    fake: FakeServer, code: grpc.StatusCode, exit_code: int, advice: str
) -> None:
    fake.answers["StreamGenerate"] = [Failure(code, "two\nlines", trailers=(("grpc-retry-pushback-ms", "-1"),))]
    outcome = redraft("generate", "hi", "-a", fake.address)
    assert outcome.code == exit_code
    assert outcome.err.startswith("error: two lines")
    assert outcome.err.count("\n") == 1
    assert advice in outcome.err


def test_the_field_at_fault_is_named(fake: FakeServer) -> None:
    violation = details.BadRequest.FieldViolation(field="generation.sampling.top_p", description="must be > 0")
    failure = Failure(grpc.StatusCode.INVALID_ARGUMENT, "bad", (details.BadRequest(field_violations=[violation]),))
    fake.answers["StreamGenerate"] = [failure]
    outcome = redraft("generate", "hi", "--top-p", "0", "-a", fake.address)
    assert outcome.err == "error: bad; generation.sampling.top_p: must be > 0\n"


@pytest.mark.parametrize(
    "args",
    [
        ("generate",),
        ("generate", "hi", "--max-new-tokens", "0"),
        ("generate", "hi", "--seed", str(2**64)),
        ("generate", "hi", "--tls-ca", "/no/such/file"),
        ("generate", "hi", "--tls-cert", __file__),
        ("drafts", "split", "v7"),
        ("stats", "--metrics-address", "file:///etc/hostname"),
        ("nonsense",),
    ],
)
def test_wrong_usage(args: tuple[str, ...]) -> None:
    outcome = redraft(*args)
    assert outcome.code == cli_support.EXIT_USAGE
    assert outcome.err
    assert "Traceback" not in outcome.err


def test_models(fake: FakeServer) -> None:
    speculation = model_pb2.SpeculationConfig(proposer="ngram", max_draft_tokens=4, draft_version="v7")
    model = model_pb2.Model(id="demo[x]", context_length=8192, quantization="float32", speculation=speculation)
    fake.answers["ListModels"] = [model_pb2.ListModelsResponse(models=[model])]
    out = redraft("models", "-a", fake.address).out
    for text in ("demo[x]", "8192", "float32", "ngram", "v7"):
        assert text in out


def test_drafts(fake: FakeServer) -> None:
    new = draft_pb2.Draft(version="v8", state=draft_pb2.DRAFT_STATE_ACTIVE, expected_acceptance=0.625, share=0.95)
    old = draft_pb2.Draft(version="v7", state=draft_pb2.DRAFT_STATE_REFUSED, refusal_reason="below baseline")
    fake.answers |= {
        "ListDrafts": [draft_pb2.ListDraftsResponse(drafts=[new, old])],
        "GetDraft": [draft_pb2.GetDraftResponse(draft=old)],
        "ActivateDraft": [draft_pb2.ActivateDraftResponse(active=new, previous=old)],
        "RollbackDraft": [draft_pb2.RollbackDraftResponse(active=old)],
        "SetTrafficSplit": [draft_pb2.SetTrafficSplitResponse(drafts=[new])],
    }
    listed = redraft("drafts", "list", "-a", fake.address).out
    assert all(text in listed for text in ("v8", "active", "62.5%", "95.0%", "v7", "refused"))
    assert "below baseline" in redraft("drafts", "show", "v7", "-a", fake.address).out
    swap = redraft("drafts", "activate", "v8", "--if-active", "v7", "-a", fake.address)
    assert swap.out == "active: v8 (before: v7)\n"
    assert fake.last_request.expected_active_version == "v7"
    assert redraft("drafts", "rollback", "-a", fake.address).out == "active: v7 (before: none)\n"
    assert redraft("drafts", "split", "v8=0.95", "a=b=0.05", "-a", fake.address).code == 0
    assert {s.version: s.share for s in fake.last_request.shares} == {"v8": 0.95, "a=b": 0.05}


def test_chat_keeps_the_history(fake: FakeServer) -> None:
    fake.answers["StreamGenerate"] = [stream_responses()]
    lines = "one\n\n/stats\ntwo\n/reset\nthree\n/what\n/quit\n"
    arguments = ["chat", "--system", "be brief", "--max-new-tokens", "5", "-a", fake.address]
    result = CliRunner().invoke(app, arguments, input=lines)
    assert result.exit_code == 0, result.stderr
    sent = [[m.content for m in request.generation.chat.messages] for _, request in fake.requests]
    assert sent == [["be brief", "one"], ["be brief", "one", "Hello there", "two"], ["be brief", "three"]]
    assert "acceptance rate 37.5%, mean acceptance length 2.50" in result.stdout


def test_chat_goes_on_after_an_error_and_forgets_the_failed_turn(fake: FakeServer) -> None:
    fake.answers["StreamGenerate"] = [Failure(grpc.StatusCode.INVALID_ARGUMENT, "too long"), stream_responses()]
    lines = iter(["one", "two", "/quit"])
    with Client(fake.address) as client:
        Conversation(client, None, GenerateParams()).run(lambda: next(lines))
    assert [m.content for m in fake.last_request.generation.chat.messages] == ["two"]


def test_chat_stops_an_answer_at_interrupt(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.answers["StreamGenerate"] = [stream_responses()]

    def interrupt_once(text: str) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr("redraft_client.cli_chat.write", interrupt_once)
    lines = iter(["one", "two", "/quit"])
    with Client(fake.address) as client:
        Conversation(client, None, GenerateParams()).run(lambda: next(lines))
    assert "(stopped)" in capsys.readouterr().out
    assert [m.content for m in fake.last_request.generation.chat.messages] == ["two"]


def test_text_of_a_model_cannot_steer_the_terminal() -> None:
    assert cli_support.safe_text("a\x1b[31mb\r\x07\x9b1m\n\tü") == "a[31mb1m\n\tü"


@contextmanager
def metrics_server(status: int, body: str) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_stats() -> None:
    with metrics_server(200, METRICS) as address:
        outcome = redraft("stats", "--metrics-address", address)
    assert outcome.code == 0, outcome.err
    old, new = (line for line in outcome.out.splitlines() if "demo" in line)
    assert all(text in old for text in ("v7", "400", "250", "62.5%", "75.0%", "3.50"))
    assert "%" not in new  # nothing drafted: no rate
    assert "prompt tokens 1000, generated tokens 360" in outcome.out


def test_stats_counts_each_metric_once() -> None:
    (old, _) = parse_metrics(METRICS).drafts
    assert (old.drafts, old.draft_tokens, old.accepted_tokens) == (100.0, 400.0, 250.0)


@pytest.mark.parametrize(("status", "body"), [(200, "up 1\n"), (200, "<html>"), (500, "")])
def test_stats_of_something_else(status: int, body: str) -> None:
    with metrics_server(status, body) as address:
        outcome = redraft("stats", "--metrics-address", address)
    assert outcome.code == cli_support.EXIT_SERVER_ERROR
    assert outcome.err.count("\n") == 1


def test_stats_of_nobody() -> None:
    assert redraft("stats", "--metrics-address", "127.0.0.1:1").code == cli_support.EXIT_UNAVAILABLE
