"""The whole way of a label: served by the engine, logged, read, packed; then it must say what the target says again."""

from __future__ import annotations

import pytest
import torch

from redraft.models.tokenizer import Tokenizer
from redraft.sampling.params import Coupling, SamplingParams
from redraft.traffic.writer import TrafficWriter
from redraft_training.dataset.captured import KeptRows, request_probabilities
from redraft_training.dataset.packing import PackSettings, pack
from redraft_training.dataset.read import Dataset, read_dataset
from redraft_training.dataset.select import Selection, TargetIdentity
from redraft_training.dataset.teachers import CapturedTeacher, RerunTeacher
from tests.engine_harness import TARGET_SEED, EngineSpec, generate, request, running_engine
from tests.fakes import tiny_model, tiny_tokenizer
from tests.unit.traffic.fakes import Observer

VOCAB = 64
TOP_N = 24
PARAMS = {
    "greedy": SamplingParams(temperature=0.0),
    "greedy_penalty": SamplingParams(temperature=0.0, repetition_penalty=1.3),
    "sampled": SamplingParams(temperature=0.7, top_p=0.9, coupling=Coupling.MAXIMAL),
    "seeded": SamplingParams(temperature=0.9, top_k=8, seed=5),
    "full": SamplingParams(temperature=1.0, coupling=Coupling.MAXIMAL),
    "penalties": SamplingParams(temperature=0.8, presence_penalty=0.6, frequency_penalty=0.2, logit_bias=((9, 1.0),)),
}


def identity() -> TargetIdentity:
    return TargetIdentity("target", Tokenizer(tiny_tokenizer(VOCAB)).fingerprint, VOCAB)


@pytest.fixture(scope="module", name="served")
def _served(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Every kind of request, two prompts each, one of them with a tenant and a domain, one opted out."""
    root = tmp_path_factory.mktemp("log")
    writer = TrafficWriter(str(root), observer=Observer())
    with running_engine(EngineSpec(k=3, teacher_top_n=TOP_N), sink=writer) as engine:
        requests = [
            request(prompt, params, 14, domain=name, tenant="acme")
            for name, params in PARAMS.items()
            for prompt in ([5, 6, 7] * 3, [10, 11, 12, 13, 14])
        ]
        requests.append(request([5, 6], PARAMS["full"], 8, domain="secret", log_traffic=False))
        generate(engine, requests)
    writer.close()
    return read_dataset(str(root), identity(), Selection(held_out_share=0.0))


def test_everything_served_is_there_but_the_opt_out(served: Dataset) -> None:
    assert {example.domain for example in served.training} == set(PARAMS)
    assert served.report.records == 2 * len(PARAMS)
    assert served.report.skipped == {}
    for example in served.training:
        assert all(label is not None for label in example.labels)
        assert all(label is not None for branch in example.branches for label in branch.labels)
        assert example.params.seed == PARAMS[example.domain].seed
    assert sum(len(example.branches) for example in served.training) > 20


def test_captured_labels_are_what_the_target_says_again(served: Dataset) -> None:
    """Path and branches, packed together, at each request's own parameters."""
    rerun = RerunTeacher(tiny_model("llama", vocab_size=VOCAB, seed=TARGET_SEED), vocab_size=VOCAB)
    captured = CapturedTeacher(VOCAB)
    compared = off_path = 0
    for batch in pack(served.training, PackSettings(row_tokens=128, batch_tokens=512)):
        truth, found = rerun.targets(batch).probs, captured.targets(batch)
        assert found.ids is not None
        assert found.tail is not None
        assert bool(found.known.all())
        labels = [label for label in batch.labels if label is not None]
        kept = KeptRows.of(labels)
        known = request_probabilities(labels, kept, batch.sampling_rows, batch.next_ids.numpy(), VOCAB)
        is_exact = torch.from_numpy(known.exact)
        difference = (found.probs - truth.gather(1, found.ids)).abs().amax(1)
        outside = (found.tail - truth.scatter(1, found.ids, 0.0).sum(1)).abs()
        assert float(difference[is_exact].max()) < 1e-4
        assert float(outside[is_exact].max()) < 1e-4
        assert float(difference.max()) < 1e-2  # a nucleus that reaches beyond what was kept
        # a served token has a probability: the path is the one that was walked
        emitted = batch.next_ids >= 0
        assert bool((truth[emitted].gather(1, batch.next_ids[emitted, None]) > 0).all())
        compared += int(is_exact.sum())
        off_path += int((batch.depth > 0).sum())
    assert compared > 0.75 * sum(share.positions for share in served.report.training.values())
    assert off_path > 20


def test_raw_predictions_agree_too(served: Dataset) -> None:
    rerun = RerunTeacher(tiny_model("llama", vocab_size=VOCAB, seed=TARGET_SEED), vocab_size=VOCAB)
    for batch in pack(served.training, PackSettings(row_tokens=128, batch_tokens=512)):
        truth = rerun.targets(batch, temperature=1.0).probs
        found = CapturedTeacher(VOCAB).targets(batch, temperature=1.0)
        assert found.ids is not None
        torch.testing.assert_close(found.probs, truth.gather(1, found.ids), atol=1e-4, rtol=0)
