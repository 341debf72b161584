"""The whole server is lossless: the joint distribution of three tokens, sampled through gRPC, is the target's.

The expected distribution never touches the server's code path: plain transformers forwards over every context, then
the one function from logits to probabilities. Seeds are fixed, so a run gives the same p-values every time.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import SamplingRow, probabilities
from redraft_client.types import Coupling, GenerateParams, GenerationResult
from tests.engine_harness import TARGET_SEED, EngineSpec
from tests.fakes import tiny_model
from tests.served_engine import Served, served_engine

VOCAB_SIZE = 8
PROMPT = (3, 5, 4, 3, 5, 6, 3, 5)  # repeats itself, so that n-gram lookup proposes from the first token on
NUM_TOKENS = 4
NUM_DRAFTED = 2  # with the bonus token: all of window 1 in one step
NUM_REQUESTS, SAMPLES = 200, 16
WINDOWS = (0, 1)  # first token of the three: the first of all is drawn without a draft, the second never is
CONCURRENCY = 8
MIN_EXPECTED = 5.0  # per cell of the chi-square; rarer outcomes share cells


@dataclass(frozen=True)
class Case:
    params: GenerateParams
    proposer: str = "draft"


CASES = {
    "temperature": Case({"temperature": 1.0}),
    "top-k": Case({"temperature": 0.7, "top_k": 5}),
    "top-p": Case({"temperature": 1.3, "top_p": 0.8}),
    "min-p": Case({"temperature": 1.6, "min_p": 0.1}),
    "penalties": Case(
        {
            "temperature": 0.9,
            "top_p": 0.95,
            "repetition_penalty": 1.4,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.3,
            "logit_bias": {4: 1.0, 7: -1.5},
        }
    ),
    "ngram-then-draft": Case({"temperature": 1.2, "top_k": 6, "top_p": 0.9}, proposer="ngram+draft"),
}
TESTS = len(CASES) * len(Coupling.__members__) * len(WINDOWS)
THRESHOLD = 1e-4 / TESTS


def exact_joint(params: GenerateParams) -> np.ndarray:
    """Probability of every path of the first four tokens, [VOCAB_SIZE] * 4."""
    fields = {**params, "logit_bias": tuple(sorted((params.get("logit_bias") or {}).items()))}
    sampling = SamplingParams(**fields)  # type: ignore[arg-type]
    model = tiny_model("llama", vocab_size=VOCAB_SIZE, seed=TARGET_SEED)
    length = max(WINDOWS) + 3
    joint = np.ones(())
    for depth in range(length):
        contexts = list(itertools.product(range(VOCAB_SIZE), repeat=depth))
        with torch.inference_mode():
            logits = model(torch.tensor([[*PROMPT, *context] for context in contexts])).logits[:, -1]
        rows = [SamplingRow(sampling, prompt_ids=PROMPT, output_ids=context) for context in contexts]
        step = probabilities(logits, rows).double().numpy()
        joint = joint[..., None] * step.reshape((VOCAB_SIZE,) * (depth + 1))
    normalised: np.ndarray = joint / joint.sum()
    return normalised


async def sample(served: Served, params: GenerateParams, coupling: Coupling) -> list[GenerationResult]:
    gate = asyncio.Semaphore(CONCURRENCY)

    async def one(seed: int) -> GenerationResult:
        asked: GenerateParams = {
            **params,
            "seed": seed,
            "coupling": coupling,
            "n": SAMPLES,
            "max_new_tokens": NUM_TOKENS,
            "ignore_eos": True,
            "token_ids": True,
        }
        async with gate:
            return await served.client.generate(PROMPT, **asked)

    return await asyncio.gather(*(one(seed) for seed in range(NUM_REQUESTS)))


def p_value(expected: np.ndarray, outcomes: Counter[tuple[int, ...]]) -> tuple[float, int]:
    """Chi-square of outcomes against expected probabilities -> (p-value, cells). Impossible outcomes fail at once."""
    total = outcomes.total()
    for outcome in outcomes:
        assert expected[outcome] > 0, f"{outcome} has probability 0 under the target"
    cells: list[tuple[float, int]] = []  # (expected, observed), pooled from the rarest up
    pooled = (0.0, 0)
    for index in sorted(np.ndindex(expected.shape), key=lambda i: float(expected[i])):
        pooled = (pooled[0] + float(expected[index]) * total, pooled[1] + outcomes[index])
        if pooled[0] >= MIN_EXPECTED:
            cells.append(pooled)
            pooled = (0.0, 0)
    last = cells.pop()
    cells.append((last[0] + pooled[0], last[1] + pooled[1]))
    wanted, seen = np.array(cells).T
    return float(chisquare(seen, wanted * (seen.sum() / wanted.sum())).pvalue), len(cells)


@pytest.mark.parametrize("coupling", [Coupling.MAXIMAL, Coupling.DRAFTER_INVARIANT], ids=str)
@pytest.mark.parametrize("name", CASES)
async def test_joint_of_three_tokens(
    name: str, coupling: Coupling, record_property: Callable[[str, object], None]
) -> None:
    case = CASES[name]
    spec = EngineSpec(
        case.proposer,
        k=NUM_DRAFTED,
        vocab_size=VOCAB_SIZE,
        max_running=128,
        max_batch_tokens=1024,
        max_catch_up=1024,
        num_blocks=1024,
    )
    async with served_engine(spec) as served:
        results = await sample(served, case.params, coupling)
    drafted = sum(result.speculation.draft_tokens for result in results)
    accepted = sum(result.speculation.accepted_tokens for result in results)
    assert drafted > NUM_REQUESTS * SAMPLES, "hardly anything was drafted, so nothing was tested"
    assert 0 < accepted < drafted, "both outcomes of a verification must occur"
    joint = exact_joint(case.params)
    for first in WINDOWS:
        others = tuple(axis for axis in range(joint.ndim) if not first <= axis < first + 3)
        expected = joint.sum(axis=others)
        outcomes = Counter(choice.token_ids[first : first + 3] for r in results for choice in r.choices)
        assert outcomes.total() == NUM_REQUESTS * SAMPLES
        value, cells = p_value(expected, outcomes)
        record_property(f"p_value_window_{first}", value)
        print(  # noqa: T201 - the p-values are what this test reports
            f"{name} {coupling} tokens {first}-{first + 2}: p = {value:.4f} over {cells} cells, "
            f"{outcomes.total()} samples, {accepted / drafted:.2f} of {drafted} drafted tokens accepted"
        )
        assert value > THRESHOLD


def test_the_test_notices_a_small_error() -> None:
    """Power: a server that were wrong for one completion in twenty would be seen."""
    expected = exact_joint(CASES["temperature"].params).sum(axis=3)
    rng = np.random.default_rng(0)
    wrong = 0.95 * expected.ravel() + 0.05 / expected.size
    draws = rng.choice(expected.size, size=NUM_REQUESTS * SAMPLES, p=wrong / wrong.sum())
    outcomes = Counter(tuple(int(i) for i in np.unravel_index(draw, expected.shape)) for draw in draws)
    assert p_value(expected, outcomes)[0] < THRESHOLD
