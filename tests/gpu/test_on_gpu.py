"""What can only be seen where there is a GPU: captured graphs, steps that never wait, text that is plain text.

Everywhere else the same code is tested on a CPU, without the capture (`test_buckets.py`, `test_ahead.py`).
"""

from __future__ import annotations

import pytest
import torch

from redraft.models.buckets import BucketLimits
from redraft.models.runner import ModelRunner
from redraft.sampling.params import Coupling, SamplingParams
from redraft.speculation.draft_model import DraftModelProposer
from redraft.speculation.proposer import Proposer
from redraft.speculation.state import SequenceState
from redraft.speculation.step import Work, begin_step
from tests.fakes import tiny_model
from tests.reference_decoding import BLOCK_SIZE, NUM_BLOCKS, make_states, step
from tests.unit.models.test_buckets import ARCHES, LIMITS, conversation

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

VOCAB, NUM_TOKENS, HEAD_DIM = 64, 24, 16  # FlexAttention's kernels take no smaller head
PROMPTS = [[3, 4, 5, 6, 7, 8, 9], [5], [10, 11, 12, 10, 11, 12, 10], [4, 9] * 10]
PARAMS = [
    SamplingParams(temperature=0.0),
    SamplingParams(seed=1, temperature=0.9, top_p=0.95),
    SamplingParams(temperature=1.1, top_k=20),
    SamplingParams(seed=3, temperature=0.8, coupling=Coupling.MAXIMAL),
]


def make(device: str, arch: str = "llama", seed: int = 0, buckets: BucketLimits | None = None) -> ModelRunner:
    model = torch.nn.Module.to(tiny_model(arch, vocab_size=VOCAB, seed=seed, head_dim=HEAD_DIM), device)
    runner = ModelRunner(model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, vocab_size=VOCAB, buckets=buckets)
    for capture in runner.captures():
        capture()
    return runner


@pytest.mark.parametrize("arch", ARCHES)
def test_a_captured_graph_gives_the_logits_of_the_pass_itself(arch: str) -> None:
    plain, graphs = make("cuda", arch), make("cuda", arch, buckets=LIMITS)
    for chunks in conversation():
        torch.testing.assert_close(graphs.forward(chunks), plain.forward(chunks), rtol=1e-3, atol=1e-3)


def decoded(device: str) -> list[SequenceState]:
    buckets = BucketLimits(8, 4) if device == "cuda" else None
    states = make_states(PROMPTS, PARAMS)
    target, draft = make(device, buckets=buckets), make(device, seed=11, buckets=buckets)
    proposer = DraftModelProposer(draft, version="d")
    while any(state.num_output_tokens < NUM_TOKENS for state in states):
        step(states, target, proposer, 3, teacher_top_n=4)
    return states


def test_text_is_that_of_the_host() -> None:
    ours, theirs = decoded("cuda"), decoded("cpu")
    assert [state.token_ids for state in ours] == [state.token_ids for state in theirs]


@pytest.mark.parametrize("speculates", [False, True])
def test_a_step_waits_for_the_device_only_at_its_end(speculates: bool) -> None:
    buckets = BucketLimits(8, 4)
    states = make_states(PROMPTS, PARAMS)
    target = make("cuda", buckets=buckets)
    proposer: Proposer | None = None
    if speculates:
        proposer = DraftModelProposer(make("cuda", seed=11, buckets=buckets), version="d")
    step(states, target, proposer, 3)  # prompts
    step(states, target, proposer, 3)  # the draft catches up
    torch.cuda.set_sync_debug_mode("error")
    try:
        under_way = begin_step([Work(state, 1, 3, teacher_top_n=4) for state in states], target, proposer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(output.emitted for output in under_way.finish().outputs)
