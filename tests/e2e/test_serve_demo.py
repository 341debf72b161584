"""The server as users run it: a process of its own on the demo target, talked to through the public client and CLI."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from urllib.request import urlopen

import pytest
import torch
from transformers import PreTrainedModel

from redraft.models.tokenizer import Tokenizer, load_tokenizer
from redraft_client.client import Client
from redraft_client.types import FinishReason, GenerationResult, Message
from scripts.server_process import ServerProcess
from tests.demo_models import DEMO, greedy, next_token_logits

pytestmark = pytest.mark.model

PROMPT = "The three primary colours are"
QUESTION = [Message("user", "What is the capital of France?")]
ANSWER = "The capital of France is Paris."
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def client(server: ServerProcess) -> Iterator[Client]:
    with Client(server.address) as connected:
        yield connected


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO)


@pytest.fixture(scope="module")
def prompt_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    return tuple(tokenizer.encode(PROMPT))


@pytest.fixture(scope="module")
def expected(reference: PreTrainedModel, prompt_ids: tuple[int, ...]) -> tuple[int, ...]:
    return greedy(reference, prompt_ids, NEW_TOKENS)


def assert_identity(result: GenerationResult) -> None:
    stats = result.speculation
    emitted = stats.accepted_tokens + stats.verify_steps - stats.truncated_tokens
    assert result.usage.completion_tokens == emitted


def test_text_ids_unary_and_stream_all_give_transformers_greedy_text(
    client: Client, tokenizer: Tokenizer, prompt_ids: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    from_text = client.generate(PROMPT, temperature=0.0, max_new_tokens=NEW_TOKENS, token_ids=True)
    from_ids = client.generate(prompt_ids, temperature=0.0, max_new_tokens=NEW_TOKENS, token_ids=True)
    with client.stream(PROMPT, temperature=0.0, max_new_tokens=NEW_TOKENS, token_ids=True) as stream:
        pieces = [chunk.text for chunk in stream]
    for result in (from_text, from_ids, stream.result):
        assert result.choices[0].token_ids == expected
        assert result.text == tokenizer.decode(list(expected))
        assert result.usage.prompt_tokens == len(prompt_ids)
        assert_identity(result)
    assert "".join(pieces) == from_text.text
    assert len([piece for piece in pieces if piece]) > 1


def test_chat(client: Client) -> None:
    result = client.generate(QUESTION, temperature=0.0, max_new_tokens=20)
    assert (result.text, result.choices[0].finish_reason) == (ANSWER, FinishReason.EOS)


def test_a_stop_string_ends_the_text_before_it(client: Client) -> None:
    result = client.generate(QUESTION, temperature=0.0, max_new_tokens=20, stop_sequences=["is Par"])
    choice = result.choices[0]
    assert (choice.text, choice.finish_reason) == ("The capital of France ", FinishReason.STOP_SEQUENCE)
    assert choice.matched_stop == "is Par"
    assert_identity(result)


def test_logprobs_are_those_of_the_target(
    client: Client, reference: PreTrainedModel, prompt_ids: tuple[int, ...]
) -> None:
    result = client.generate(
        PROMPT, temperature=0.7, seed=3, max_new_tokens=8, logprobs=3, prompt_logprobs=2, token_ids=True
    )
    emitted = result.choices[0].token_ids
    everything = (*prompt_ids, *emitted)
    exact = torch.log_softmax(next_token_logits(reference, everything), dim=1)
    own = exact[torch.arange(len(everything) - 1), torch.tensor(everything[1:])].tolist()

    scores = result.choices[0].logprobs
    assert [score.token_id for score in scores] == list(emitted)
    assert [score.logprob for score in scores] == pytest.approx(own[len(prompt_ids) - 1 :], abs=1e-3)
    for score, row in zip(scores, exact[len(prompt_ids) - 1 :], strict=False):
        best = row.topk(3)
        assert [top.token_id for top in score.top] == best.indices.tolist()
        assert [top.logprob for top in score.top] == pytest.approx(best.values.tolist(), abs=1e-3)

    assert [score.token_id for score in result.prompt_logprobs] == list(prompt_ids)
    assert result.prompt_logprobs[0].logprob is None
    assert [s.logprob for s in result.prompt_logprobs[1:]] == pytest.approx(own[: len(prompt_ids) - 1], abs=1e-3)


def test_a_seed_gives_the_same_text_with_and_without_speculation(client: Client) -> None:
    texts = {
        client.generate(QUESTION, temperature=0.8, top_p=0.95, seed=11, max_new_tokens=24, **options).text
        for options in ({}, {"speculation": False}, {"max_draft_tokens": 1})
    }
    assert len(texts) == 1


def test_tokenizer_service(client: Client, tokenizer: Tokenizer, prompt_ids: tuple[int, ...]) -> None:
    assert client.tokenize(PROMPT).token_ids == prompt_ids
    assert client.detokenize(prompt_ids) == PROMPT
    assert client.count_tokens(PROMPT).token_count == len(prompt_ids)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": QUESTION[0].content}])
    assert client.tokenize(QUESTION).token_ids == tuple(chat)


def test_model_service(client: Client) -> None:
    (model,) = client.list_models()
    assert model == client.get_model() == client.get_model(model.id)
    assert (model.id, model.vocab_size) == ("SmolLM2-135M-Instruct", 49152)
    assert (model.context_length, model.eos_token_ids) == (4096, (2,))
    assert (model.proposer, model.max_draft_tokens) == ("ngram+draft_model", 8)
    assert model.has_chat_template
    assert model.draft_version
    assert client.is_serving("redraft.v1.GenerationService")


def test_metrics_and_probes(client: Client, server: ServerProcess) -> None:
    assert client.generate(QUESTION, max_new_tokens=4).usage.completion_tokens <= 4
    for path in ("livez", "readyz"):
        with urlopen(f"http://{server.metrics_address}/{path}", timeout=10) as reply:
            assert reply.status == 200
    with urlopen(f"http://{server.metrics_address}/metrics", timeout=10) as reply:
        page = reply.read().decode()
    for name in (
        "redraft_requests_total{",
        "redraft_spec_decode_num_draft_tokens_total{",
        "grpc_server_handled_total{",
    ):
        assert f"\n{name}" in page
    assert 'model="SmolLM2-135M-Instruct"' in page


def test_command_line(server: ServerProcess) -> None:
    command = [sys.executable, "-m", "redraft_client.cli", "generate", QUESTION[0].content, "--temperature", "0"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "20", "--address", server.address],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "NO_COLOR": "1"},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, ANSWER + "\n", "")
