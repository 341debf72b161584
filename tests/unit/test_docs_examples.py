"""The numbers of docs/lossless.md, computed by the code they describe."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from redraft.sampling.coupling import (
    DraftedTokens,
    Layout,
    Verdict,
    accept_choice,
    accept_maximal,
    expected_acceptance,
    race,
)
from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import SamplingRow, probabilities
from redraft.sampling.randomness import as_key_tensor, exponentials, sequence_key

A, B, C = 0, 1, 2
P = torch.tensor([0.5, 0.3, 0.2])
Q = torch.tensor([0.1, 0.8, 0.1])


def verify(drafted: int, accept: float, recover: float, p: Tensor = P, q: Tensor = Q) -> Verdict:
    """One drafted token under rejection sampling; a bonus token would be drawn from p as well."""
    layout = Layout.of([1])
    tokens = DraftedTokens(torch.tensor([drafted]), torch.tensor([0]), q.unsqueeze(0))
    return accept_maximal(p.repeat(2, 1), tokens, layout, torch.tensor([accept]), torch.full((2,), recover))


def first_token(drafted: int, accept: float, recover: float, p: Tensor = P, q: Tensor = Q) -> int:
    verdict = verify(drafted, accept, recover, p, q)
    return drafted if verdict.num_accepted[0] else verdict.final_token[0]


def midpoints(count: int) -> list[float]:
    return [(index + 0.5) / count for index in range(count)]


def test_expected_acceptance() -> None:
    tokens = DraftedTokens(torch.tensor([B]), torch.tensor([0]), Q.unsqueeze(0))
    assert expected_acceptance(P.repeat(2, 1), tokens, Layout.of([1])).item() == pytest.approx(0.5)


@pytest.mark.parametrize(("drafted", "threshold"), [(A, 1.0), (B, 0.375), (C, 1.0)])
def test_maximal_accepts_with_the_ratio(drafted: int, threshold: float) -> None:
    assert verify(drafted, threshold - 1e-4, 0.5).num_accepted[0] == 1
    if threshold < 1.0:
        assert verify(drafted, threshold + 1e-4, 0.5).num_accepted[0] == 0


def test_maximal_recovers_from_the_residual() -> None:
    assert first_token(B, accept=0.4, recover=0.75) == A
    assert first_token(B, accept=0.4, recover=0.85) == C


def test_maximal_emits_the_target() -> None:
    # 0.375 and 0.8 are multiples of the grids, so the sums are exact
    emitted = torch.zeros(3)
    for drafted in (A, B, C):
        for accept in midpoints(8):
            for recover in midpoints(10):
                emitted[first_token(drafted, accept, recover)] += Q[drafted] / 80
    assert emitted.tolist() == pytest.approx(P.tolist(), abs=1e-6)


def noise(position: int) -> Tensor:
    return exponentials(as_key_tensor([sequence_key(7, 0)]), torch.tensor([position]), 3)


@pytest.mark.parametrize(
    ("position", "expected", "drafted", "emitted", "accepted"),
    [(0, [0.302, 0.567, 2.099], B, A, 0), (1, [0.561, 0.191, 1.730], B, B, 1)],
)
def test_race_with_seed_7(position: int, expected: list[float], drafted: int, emitted: int, accepted: int) -> None:
    row = noise(position)
    assert row[0].tolist() == pytest.approx(expected, abs=5e-4)
    assert int(race(Q.unsqueeze(0), row)) == drafted
    for proposal in (A, B, C):  # the emitted token is the same whatever was drafted
        verdict = accept_choice(race(P.repeat(2, 1), row.repeat(2, 1)).tolist(), [[proposal]])
        assert verdict.num_accepted[0] == (proposal == emitted)
        assert emitted == (proposal if verdict.num_accepted[0] else verdict.final_token[0])
    assert accepted == (drafted == emitted)


def test_race_accepts_a_little_less() -> None:
    rows = 200_000
    shared = exponentials(as_key_tensor([sequence_key(7, 0)]).expand(rows), torch.arange(rows), 3)
    target, draft = race(P.expand(rows, 3), shared), race(Q.expand(rows, 3), shared)
    assert (target.bincount() / rows).tolist() == pytest.approx(P.tolist(), abs=0.005)
    pairs = zip(P.tolist(), Q.tolist(), strict=True)
    formula = sum(1 / sum(max(pu / pv, qu / qv) for pu, qu in zip(P, Q, strict=True)) for pv, qv in pairs)
    assert float(formula) == pytest.approx(0.487, abs=5e-4)
    assert (target == draft).float().mean().item() == pytest.approx(float(formula), abs=0.005)


@pytest.mark.parametrize(("keep_unlikely", "probability_of_a"), [(True, 0.6), (False, 0.84)])
def test_dropping_a_token_after_looking_at_it_is_biased(keep_unlikely: bool, probability_of_a: float) -> None:
    p = q = torch.tensor([0.6, 0.4])
    emitted = torch.zeros(2)
    for drafted in (A, B):
        if keep_unlikely or q[drafted] >= 0.5:
            for accept in midpoints(10):
                emitted[first_token(drafted, accept, 0.5, p, q)] += q[drafted] / 10
        else:  # nothing left to verify: the step is plain decoding
            nothing = DraftedTokens(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64), p[:0])
            for recover in midpoints(10):
                verdict = accept_maximal(
                    p.unsqueeze(0), nothing, Layout.of([0]), torch.empty(0), torch.tensor([recover])
                )
                emitted[verdict.final_token[0]] += q[drafted] / 10
    assert emitted[A].item() == pytest.approx(probability_of_a, abs=1e-6)


def test_temperature_zero_is_a_one_hot_row() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert probabilities(logits, [SamplingRow(SamplingParams(temperature=0.0))]).tolist() == [[0.0, 1.0, 0.0]]
