"""Sampling's and capture's passes over the vocabulary, beside torch doing the same."""

from __future__ import annotations

import math
from operator import ne

import pytest
import torch
from torch import Tensor

from redraft.kernels.library import CpuKernels
from redraft.sampling import processors
from redraft.sampling.coupling import DraftedTokens, Layout, accept_maximal, draw, expected_acceptance, keyed_race, race
from redraft.sampling.logprobs import teacher_rows
from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import SamplingRow, peaks, probabilities, sure_peaks
from redraft.sampling.randomness import Purpose, as_key_tensor, exponentials, row_bits, uniforms

WIDTHS = (1, 7, 8, 500, 513, 2000, 49152)
PARAMS = (
    SamplingParams(),
    SamplingParams(temperature=0.7, top_p=0.95),
    SamplingParams(temperature=1e-6),
    SamplingParams(top_k=5),
    SamplingParams(temperature=1.3, top_k=1500, top_p=0.8),
    SamplingParams(min_p=0.2),
    SamplingParams(temperature=30.0, top_p=0.999),
)


def logits_of(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3


def without_kernels(patch: pytest.MonkeyPatch) -> None:
    for module in ("processors", "logprobs", "coupling"):
        patch.setattr(f"redraft.sampling.{module}.kernels_for", lambda _: None)


@pytest.mark.parametrize("width", WIDTHS)
def test_probabilities_are_those_of_torch(kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    logits, rows = logits_of(len(PARAMS), width), [SamplingRow(params) for params in PARAMS]
    found = probabilities(logits, rows)
    without_kernels(monkeypatch)
    expected = probabilities(logits, rows)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=2e-5)
    assert torch.equal(found > 1e-30, expected > 1e-30)
    torch.testing.assert_close(found.double().sum(dim=1), torch.ones(len(PARAMS)).double(), atol=1e-6, rtol=0)


def test_tokens_tied_with_the_last_one_kept_are_kept(kernels: CpuKernels) -> None:
    logits = torch.zeros(2, 300)
    logits[:, 200:] = 1.0
    rows = [SamplingRow(SamplingParams(top_k=3)), SamplingRow(SamplingParams(top_p=0.01))]
    for row in probabilities(logits, rows):
        assert row.nonzero().flatten().tolist() == list(range(200, 300))
        assert float(row[200]) == pytest.approx(0.01)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [3, 1999, 2003])
def test_a_row_that_is_no_distribution_is_nan_and_alone_in_it(kernels: CpuKernels, bad: float, place: int) -> None:
    logits = logits_of(3, 2004)
    logits[1, place] = bad
    found = probabilities(logits, [SamplingRow(SamplingParams(top_p=0.9))] * 3)
    assert bool(found[1].isnan().all())
    assert bool(found[[0, 2]].isfinite().all())


def test_what_is_banned_has_no_probability_at_all(kernels: CpuKernels) -> None:
    row = SamplingRow(SamplingParams(temperature=50.0), banned_ids=(0, 9))
    found = probabilities(torch.zeros(1, 10), [row])[0]
    assert found[[0, 9]].tolist() == [0.0, 0.0]
    everything = SamplingRow(SamplingParams(), banned_ids=tuple(range(10)))
    assert probabilities(torch.zeros(1, 10), [everything])[0].tolist() == pytest.approx([0.1] * 10)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("params", PARAMS)
def test_the_race_has_the_reference_s_winner(kernels: CpuKernels, width: int, params: SamplingParams) -> None:
    probs = probabilities(logits_of(40, width), [SamplingRow(params)] * 40)
    keys, positions = torch.arange(40) * 0x5DEECE66D - 7, torch.arange(40) % 11
    found = keyed_race(probs, keys, positions)
    noise = exponentials(keys, positions, width)
    expected = race(probs, noise)
    times = noise / probs
    # two tokens may arrive within a rounding of each other
    lost = times.gather(1, found.unsqueeze(1)) / times.gather(1, expected.unsqueeze(1))
    assert float(lost.max()) < 1.0 + 1e-6
    assert int((found != expected).sum()) <= 1


@pytest.mark.parametrize("width", WIDTHS)
def test_draws_are_those_of_torch(kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    probs = probabilities(logits_of(60, width), [SamplingRow(PARAMS[i % len(PARAMS)]) for i in range(60)])
    probs[::2] *= 0.3  # a residual is not normalised
    chances = torch.rand(60, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    chances[:2] = torch.tensor([1e-300, 1.0 - 2.0**-53])
    found = draw(probs, chances)
    without_kernels(monkeypatch)
    expected = draw(probs, chances)
    assert int((found != expected).sum()) <= 1  # a sum in another order may end a rounding away
    assert bool((probs.gather(1, found.unsqueeze(1)) > 0).all())


def test_a_draw_never_takes_what_has_no_weight(kernels: CpuKernels) -> None:
    weights = torch.zeros(3, 1500)
    weights[0, 700], weights[1, [3, 1400]] = 0.2, torch.tensor([1e-30, 1.0])
    almost = 1.0 - 2.0**-53
    assert draw(weights, torch.tensor([almost, 0.5, 0.5])).tolist()[:2] == [700, 1400]
    assert draw(weights[:2], torch.tensor([1e-300, 1e-300])).tolist() == [700, 3]
    assert draw(torch.full((1, 9), torch.nan), torch.tensor([0.5])).tolist() == [0]


@pytest.mark.parametrize("width", WIDTHS)
def test_peaks_are_those_of_torch(kernels: CpuKernels, width: int) -> None:
    scores = logits_of(20, width)
    scores[3, -1] = torch.nan
    scores[4] = 1.5
    scores[5] = -torch.inf
    values, ids = peaks(scores)
    assert math.isnan(values[3])
    whole = [i for i in range(20) if i != 3]
    assert [values[i] for i in whole] == scores[whole].amax(dim=1).tolist()
    assert [ids[i] for i in whole] == scores[whole].argmax(dim=1).tolist()
    assert ids[4:6] == [0, 0]


@pytest.mark.parametrize("width", WIDTHS)
def test_expected_acceptance_is_that_of_torch(kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    p, q = (probabilities(logits_of(7, width, seed), [SamplingRow(PARAMS[1])] * 7) for seed in (1, 2))
    q[3] = p[5]
    tokens = torch.tensor([0, width - 1, 0, 0, 0])
    drafted = DraftedTokens(tokens, torch.tensor([4, -1, 0, 3, 1]), q)
    layout = Layout.of([2, 0, 3])
    found = expected_acceptance(p, drafted, layout)
    without_kernels(monkeypatch)
    torch.testing.assert_close(found, expected_acceptance(p, drafted, layout))
    assert float(found[3]) == pytest.approx(1.0 if width == 1 else float(torch.minimum(p[5], q[3]).sum()))


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_speculative_sampling_is_that_of_torch(
    kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    """Sequences with every kind of draft: of a model, certain, equal to p, none; all of them many times."""
    repeats = 40
    params = [SamplingRow(PARAMS[i % len(PARAMS)]) for i in range(8 * repeats)]
    p, q = (probabilities(logits_of(8 * repeats, width, seed), params) for seed in (1, 2))
    q[3] = p[5]
    generator = torch.Generator().manual_seed(9)
    tokens, rows = torch.randint(0, width, (5 * repeats,), generator=generator), torch.arange(5 * repeats)
    rows[1::5] = -1
    drafted = DraftedTokens(tokens, rows, q)
    layout = Layout.of([2, 0, 3] * repeats)
    accept, recover = (
        torch.rand(size, generator=generator, dtype=torch.float64) for size in (5 * repeats, layout.num_rows)
    )
    found = accept_maximal(p, drafted, layout, accept, recover)
    without_kernels(monkeypatch)
    expected = accept_maximal(p, drafted, layout, accept, recover)
    assert found.num_accepted == expected.num_accepted
    assert sum(map(ne, found.final_token, expected.final_token)) <= 2  # a sum in another order


def test_a_residual_of_nothing_leaves_the_target_s_own_distribution(kernels: CpuKernels) -> None:
    p = torch.tensor([[0.0, 0.25, 0.75], [1.0, 0.0, 0.0], [0.2, 0.5, 0.3]])
    at = torch.tensor([0, 1, 2])
    certain = torch.tensor([-2, -1, -1])
    chances = torch.tensor([0.5, 0.5, 0.9], dtype=torch.float64)
    assert kernels.recover(p, at, p, certain, torch.tensor([0, 0, 2]), chances).tolist() == [2, 0, 1]
    assert kernels.recover(p, at, p, at, at, chances).tolist() == [2, 0, 2]


def test_a_race_without_runners_ends(kernels: CpuKernels) -> None:
    probs = torch.full((2, 100), torch.nan)
    assert keyed_race(probs, torch.tensor([1, 2]), torch.tensor([0, 0])).tolist() == [0, 0]


@pytest.mark.parametrize("width", WIDTHS)
def test_teacher_rows_are_those_of_torch(kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    params = (*PARAMS, SamplingParams(temperature=0.0), SamplingParams(temperature=0.5, presence_penalty=1.5))
    rows = [SamplingRow(each, output_ids=(0,)) for each in params]
    logits = logits_of(len(rows), width)
    found = teacher_rows(logits, 32, rows)
    without_kernels(monkeypatch)
    for own, expected in zip(found, teacher_rows(logits, 32, rows), strict=True):
        assert (own.ids, own.logits) == (expected.ids, expected.logits)
        assert own.logsumexp == pytest.approx(expected.logsumexp, rel=1e-6)
        if expected.sampling_logsumexp is None:
            assert own.sampling_logsumexp is None
        else:
            assert own.sampling_logsumexp == pytest.approx(expected.sampling_logsumexp, rel=1e-6)


def test_equal_logits_are_kept_in_the_order_of_their_ids(kernels: CpuKernels) -> None:
    logits = torch.zeros(1, 1000)
    logits[0, [7, 501, 999]] = 1.0
    (row,) = teacher_rows(logits, 6, [SamplingRow(SamplingParams())])
    assert row.ids == (7, 501, 999, 0, 1, 2)


def test_gradients_and_other_types_go_to_torch(kernels: CpuKernels) -> None:
    logits = logits_of(2, 50).requires_grad_()
    row = SamplingRow(SamplingParams(top_p=0.9))
    probabilities(logits, [row] * 2).square().sum().backward()
    assert logits.grad is not None
    assert processors.kernels_for(logits.detach().bfloat16()) is None


def test_random_bits_are_those_of_torch(kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = as_key_tensor([0, 1, 2**63, 2**64 - 1, 0x123456789ABCDEF])
    positions = torch.tensor([0, 7, 2**31, 1, 5])
    found = [(row_bits(keys, positions, purpose), uniforms(keys, positions, purpose)) for purpose in Purpose]
    monkeypatch.setattr("redraft.sampling.randomness.library", lambda: None)
    for (bits, numbers), purpose in zip(found, Purpose, strict=True):
        assert torch.equal(bits, row_bits(keys, positions, purpose))
        assert torch.equal(numbers, uniforms(keys, positions, purpose))


@pytest.mark.parametrize("width", WIDTHS)
def test_sure_peaks_are_those_of_torch(kernels: CpuKernels, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    scores = logits_of(6, width)
    scores[2, width // 2] = torch.nan
    shares, ids = sure_peaks(scores)
    without_kernels(monkeypatch)
    expected_shares, expected_ids = sure_peaks(scores)
    assert math.isnan(shares[2])
    assert math.isnan(expected_shares[2])
    whole = [0, 1, 3, 4, 5]
    assert [ids[i] for i in whole] == [expected_ids[i] for i in whole]
    assert [shares[i] for i in whole] == pytest.approx([expected_shares[i] for i in whole], rel=1e-5)
