"""The joint law of three tokens, sampled through the real engine, against the exact one.

Each case draws thousands of completions from a running engine (scheduler, paged KV, prefix cache, batch of 64, n > 1)
whose draft disagrees with its target, and compares the counts of (token 1, token 2, token 3) with the probabilities
computed by enumeration with plain transformers forwards. Four tokens are asked for, so that the second and third are
verified as parts of one proposal. The seeds are fixed, so a p-value changes only with the code; the threshold is
corrected for the number of cases.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import PreTrainedModel

from redraft.sampling.params import Coupling, SamplingParams
from redraft.sampling.processors import SamplingRow, probabilities
from tests.engine_harness import DRAFT_A, TARGET_SEED, EngineSpec, generate, request, running_engine
from tests.fakes import tiny_model

VOCAB = 8
PROMPT = (3, 5, 4, 6, 3, 5, 7)
LENGTH = 3
SAMPLES_PER_REQUEST = 64
NUM_REQUESTS = 64
PARAMETERS = {
    "temperature": {"temperature": 1.0},
    "top_k": {"temperature": 0.8, "top_k": 5},
    "top_p": {"temperature": 1.3, "top_p": 0.85},
    "min_p_penalties": {
        "temperature": 1.6,
        "min_p": 0.08,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.4,
        "frequency_penalty": 0.3,
    },
}
CASES = [
    *itertools.product(PARAMETERS, [Coupling.MAXIMAL], ("draft", "ngram+draft", "draft that stops")),
    # for the other proposers the very same samples are asserted below
    *itertools.product(PARAMETERS, [Coupling.DRAFTER_INVARIANT], ("draft",)),
]
THRESHOLD = 1e-4 / len(CASES)


@torch.inference_mode()
def exact_joint(model: PreTrainedModel, params: SamplingParams) -> dict[tuple[int, ...], float]:
    """Probability of every continuation of PROMPT by LENGTH tokens."""
    law: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(LENGTH):
        contexts = list(law)
        logits = model(input_ids=torch.tensor([[*PROMPT, *context] for context in contexts])).logits[:, -1]
        probs = probabilities(logits, [SamplingRow(params, PROMPT, context) for context in contexts]).double()
        law = {
            (*context, token): law[context] * float(row[token])
            for context, row in zip(contexts, probs, strict=True)
            for token in range(VOCAB)
            if row[token] > 0
        }
    return law


@functools.cache
def sample(proposer: str, name: str, coupling: Coupling) -> tuple[Counter[tuple[int, ...]], int, int]:
    """Counts of the first LENGTH tokens; how many tokens were drafted and accepted."""
    spec = EngineSpec(
        proposer=proposer.removesuffix(" that stops"),
        least_chance=0.25 if proposer.endswith("stops") else None,
        vocab_size=VOCAB,
        num_blocks=512,
        max_running=64,
        max_batch_tokens=512,
        max_catch_up=512,
        max_waiting=128,
    )
    with running_engine(spec) as engine:
        results = generate(
            engine,
            [
                request(
                    PROMPT,
                    SamplingParams(seed=seed, coupling=coupling, **PARAMETERS[name]),  # type: ignore[arg-type]
                    LENGTH + 1,
                    n=SAMPLES_PER_REQUEST,
                )
                for seed in range(NUM_REQUESTS)
            ],
        )
    counts = Counter(
        tuple(result.token_ids(index)[:LENGTH]) for result in results for index in range(SAMPLES_PER_REQUEST)
    )
    finished = [result.finished.speculation for result in results]
    return counts, sum(s.draft_tokens for s in finished), sum(s.accepted_tokens for s in finished)


def p_value(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """Chi-square; outcomes expected fewer than 5 times are counted as one."""
    total = counts.total()
    common = [outcome for outcome, p in law.items() if p * total >= 5]
    observed = np.array([counts[outcome] for outcome in common], dtype=float)
    expected = np.array([law[outcome] * total for outcome in common])
    if expected.sum() < total - 5:
        observed = np.append(observed, total - observed.sum())
        expected = np.append(expected, total - expected.sum())
    assert len(expected) > 20, "too few outcomes for a test of the joint law"
    return float(stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)


@pytest.mark.parametrize(("name", "coupling", "proposer"), CASES)
def test_three_tokens_jointly(name: str, coupling: Coupling, proposer: str) -> None:
    params = PARAMETERS[name]
    law = exact_joint(tiny_model("llama", vocab_size=VOCAB, seed=TARGET_SEED), SamplingParams(**params))  # type: ignore[arg-type]
    assert sum(law.values()) == pytest.approx(1.0, abs=1e-5)
    counts, drafted, accepted = sample(proposer, name, coupling)
    assert counts.total() == NUM_REQUESTS * SAMPLES_PER_REQUEST
    assert 0 < accepted < drafted, "both verdicts must occur"
    impossible = set(counts) - set(law)
    assert not impossible
    p = p_value(counts, law)
    print(f"p = {p:.4f}, acceptance rate {accepted / drafted:.2f}  [{name}, {coupling.value}, {proposer}]")  # noqa: T201
    assert p > THRESHOLD


def test_a_draft_stops_where_it_is_not_sure() -> None:
    """So that the cases above have proposals of every length."""
    _, always, _ = sample("draft", "top_p", Coupling.MAXIMAL)
    _, sometimes, _ = sample("draft that stops", "top_p", Coupling.MAXIMAL)
    assert 0.1 * always < sometimes < 0.9 * always


@pytest.mark.parametrize("name", ["top_p", "min_p_penalties"])
def test_invariant_samples_are_the_same_ones_whoever_drafts(name: str) -> None:
    counts = [sample(proposer, name, Coupling.DRAFTER_INVARIANT)[0] for proposer in ("draft", "ngram+draft")]
    assert counts[0] == counts[1]


def test_the_drafts_law_would_be_noticed() -> None:
    """Power: the same counts are impossible under the law of the draft, and of slightly warmer sampling."""
    counts, _, _ = sample("draft", "temperature", Coupling.MAXIMAL)
    target = tiny_model("llama", vocab_size=VOCAB, seed=TARGET_SEED)
    draft = tiny_model("llama", vocab_size=VOCAB, seed=DRAFT_A)
    assert p_value(counts, exact_joint(draft, SamplingParams())) < 1e-30
    assert p_value(counts, exact_joint(target, SamplingParams(temperature=1.15))) < THRESHOLD
