"""A target in two processes on CPUs, behind the real engine: the tokens of one process, and an end when one dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from redraft.errors import UnsupportedModel
from redraft.models.parallel import check_shardable, local_kv_heads, num_shards
from redraft.models.parallel_group import FollowerSpec, decode_chunks, encode_chunks
from redraft.models.runner import Chunk
from redraft_server.config import ModelConfig, ServerConfig
from tests.fakes import save_tiny, tiny_model

LEADER = """
import json, os, signal, sys, threading
import torch
from prometheus_client import CollectorRegistry
from redraft.models.runner import Chunk
from redraft.sampling.params import SamplingParams
from redraft.telemetry.metrics import ServerMetrics
from redraft_server.config import ServerConfig
from redraft_server.engine.build import build_engine
from redraft_server.rollout.start import configured_draft
from tests.engine_harness import generate, request, submit

def build(processes):
    settings = json.loads(sys.argv[1])
    settings["model"]["tensor_parallel"] = processes
    config = ServerConfig.model_validate(settings)
    metrics = ServerMetrics(CollectorRegistry(), "tiny")
    return build_engine(config, metrics, first_draft=lambda host: configured_draft(config, host)).engine

def tokens(engine):
    long = [3 + i % 60 for i in range(90)]
    prompts = [[5, 6, 7], long, long[:70]]
    chosen = [SamplingParams(temperature=0.0), SamplingParams(temperature=0.9, top_p=0.9, seed=7)]
    requests = [request(prompt, params, 12, n=2) for prompt in prompts for params in chosen]
    done = generate(engine, requests)
    drafted = sum(one.finished.speculation.draft_tokens for one in done)
    return [[one.token_ids(i) for i in range(r.n)] for one, r in zip(done, requests)], drafted

def logits(engine):
    chunks = [Chunk([5, 6, 7, 8], 0, [3, 1], 4), Chunk([9] * 5, 0, [2, 0], 1)]
    return engine.between_steps(lambda: engine._parts.target.forward(chunks)).result(60)

if __name__ == "__main__":
    torch.set_num_threads(1)
    one, two = build(1), build(2)
    found = {"difference": (logits(one) - logits(two)).abs().max().item()}
    found["alone"], _ = tokens(one)
    found["shared"], found["drafted"] = tokens(two)
    found["info"] = [[e.info.weight_bytes, e.info.target_fingerprint] for e in (one, two)]
    runner = two._parts.target
    found["kv_heads"] = runner.cache.keys.shape[1]
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    (follower,) = runner._group._followers
    os.kill(follower.pid, signal.SIGKILL)
    lost = submit(two, request([5, 6], SamplingParams(), 8)).wait()
    found["told to end"], found["after"] = ended.wait(60), lost.finish_reason().value
    one.stop(10)
    two.stop(10)
    print(json.dumps(found))
"""


def test_two_processes_are_as_good_as_one(tmp_path: Path) -> None:
    """The head is tied to the embedding: both are split, and stay one."""
    target, draft = save_tiny(tmp_path / "target", tied=True), save_tiny(tmp_path / "draft", seed=11)
    settings = {
        "model": {"target": str(target), "draft": str(draft)},
        "engine": {"kv_cache_tokens": 4096, "kv_block_size": 4, "max_batch_tokens": 48},
        "speculation": {"num_speculative_tokens": 3, "adaptive": False},
    }
    script = tmp_path / "leader.py"
    script.write_text(LEADER)
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        timeout=500,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["difference"] < 1e-4  # sums in another order
    assert found["shared"] == found["alone"]
    assert found["drafted"] > 0
    assert found["kv_heads"] == 1  # of two
    (whole, fingerprint), (shard, same) = found["info"]
    assert fingerprint == same
    assert shard < whole
    assert found["told to end"]
    assert found["after"] == "error"
    assert "a process of the tensor-parallel target is lost" in done.stderr


chunk = st.builds(
    Chunk,
    token_ids=st.lists(st.integers(0, 2**40), max_size=6),
    start=st.integers(0, 2**40),
    block_ids=st.lists(st.integers(0, 2**40), max_size=4),
    num_logits=st.integers(0, 6),
)


@given(st.lists(chunk, max_size=5))
def test_chunks_arrive_as_they_were(chunks: list[Chunk]) -> None:
    assert decode_chunks(encode_chunks(chunks)) == chunks


def test_a_specification_arrives_as_it_was() -> None:
    spec = FollowerSpec("demo", None, "/cache", 8, 16, 1, 2, "/run/meeting")
    assert FollowerSpec.from_json(spec.to_json()) == spec


def test_heads_must_be_dealt_out_evenly() -> None:
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2)
    check_shardable(config, 2, "tiny")
    with pytest.raises(UnsupportedModel, match=r"4 attention heads and 2 key/value heads.*4 processes"):
        check_shardable(config, 4, "tiny")


def test_a_model_without_a_plan_is_refused(tmp_path: Path) -> None:
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2)
    config.base_model_tp_plan = None
    with pytest.raises(UnsupportedModel, match="no tensor-parallel plan"):
        check_shardable(config, 2, "tiny")


def test_a_whole_model_is_one_shard() -> None:
    model = tiny_model("llama")
    assert (num_shards(model), local_kv_heads(model, 2)) == (1, 2)


def test_the_gpus_are_taken_in_order() -> None:
    with pytest.raises(ValueError, match=r"leave model\.device at auto"):
        ServerConfig(model=ModelConfig(tensor_parallel=2, device="cuda:1"))
