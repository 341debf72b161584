"""`probabilities` against a reference that does one row at a time, in float64, with a full sort."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from redraft.sampling import processors
from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import SamplingRow, probabilities


@pytest.fixture(scope="module", autouse=True, params=["kernels", "torch"])
def _both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Everything here holds with the compiled kernels, if there are any, and without."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "torch":
            patch.setattr(processors, "kernels_for", lambda _: None)
        yield


KNIFE_EDGE = 1e-5  # float32 and float64 may disagree on which side of a cut-off a token lies


def reference(logits: list[float], row: SamplingRow) -> tuple[list[float], float]:
    """The documented order of operations, and how close the nearest cut-off decision was."""
    params = row.params
    scores = list(logits)
    for token in set(row.prompt_ids) | set(row.output_ids):
        penalty = params.repetition_penalty
        scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
    for token, count in Counter(row.output_ids).items():
        scores[token] -= params.presence_penalty + params.frequency_penalty * count
    for token, bias in params.logit_bias:
        scores[token] += bias
    for token in row.banned_ids:
        scores[token] = -math.inf
    best = max(scores)
    if params.temperature == 0.0:
        return [float(token == scores.index(best)) for token in range(len(scores))], 1.0
    weights = [math.exp((score - best) / params.temperature) for score in scores]
    probs = [weight / sum(weights) for weight in weights]

    ranked = sorted(probs, reverse=True)
    head = ranked[: params.top_k] if params.top_k else ranked
    floor = head[-1]
    margin = 1.0
    if params.top_p < 1.0:
        mass = 0.0
        for p in head:
            mass += p / sum(head)
            margin = min(margin, abs(mass - params.top_p))
            if mass >= params.top_p:
                floor = p
                break
    threshold = params.min_p * ranked[0]
    margin = min([margin, *(abs(p / threshold - 1) for p in probs if threshold > 0 and p > 0)])
    kept = [p if p >= max(floor, threshold) else 0.0 for p in probs]
    return [p / sum(kept) for p in kept], margin


eighths = st.integers(-80, 80).map(lambda n: n / 8)  # exact in binary, so ties are ties in both


@st.composite
def sampling_rows(draw: st.DrawFn, vocab_size: int) -> SamplingRow:
    ids = st.integers(0, vocab_size - 1)
    params = SamplingParams(
        temperature=draw(st.sampled_from([0.0, 1e-38, 1e-6, 0.1, 0.7, 1.0, 1.5, 100.0])),
        top_k=draw(st.sampled_from([0, 0, 1, 2, 3, vocab_size, vocab_size + 7])),
        top_p=draw(st.sampled_from([1.0, 1.0, 1e-9, 0.1, 0.37, 0.61, 0.95, 0.9999])),
        min_p=draw(st.sampled_from([0.0, 0.0, 0.013, 0.3, 0.97, 1.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 0.5, 1.25, 100.0])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, -2.0, 0.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.25, -1.0])),
        logit_bias=tuple(draw(st.lists(st.tuples(ids, st.sampled_from([-100.0, -1.0, 0.5, 100.0])), max_size=3))),
    )
    return SamplingRow(
        params,
        prompt_ids=draw(st.lists(ids, max_size=4)),
        output_ids=draw(st.lists(ids, max_size=6)),
        banned_ids=tuple(draw(st.sets(ids, max_size=vocab_size - 1))),
    )


@given(data=st.data(), vocab_size=st.integers(2, 12), num_rows=st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_agrees_with_the_reference(data: st.DataObject, vocab_size: int, num_rows: int) -> None:
    """Batches of rows of any kind, greedy and sampled mixed, and every row as it would be alone."""
    logits = [data.draw(st.lists(eighths, min_size=vocab_size, max_size=vocab_size)) for _ in range(num_rows)]
    rows = [data.draw(sampling_rows(vocab_size)) for _ in range(num_rows)]
    given_logits = torch.tensor(logits)
    before = given_logits.clone()
    result = probabilities(given_logits, rows)
    assert torch.equal(given_logits, before)
    for index, row in enumerate(rows):
        expected, margin = reference(logits[index], row)
        assume(margin > KNIFE_EDGE)
        np.testing.assert_allclose(result[index].numpy(), expected, atol=2e-6)
        assert torch.equal(result[index], probabilities(given_logits[index : index + 1], [row])[0])


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.995])
@pytest.mark.parametrize("spread", [0.01, 1.0])
def test_nuclei_larger_than_the_first_candidates(top_p: float, spread: float) -> None:
    """A nearly flat row of 2000: the nucleus ends far beyond the candidates looked at first."""
    logits = torch.randn(3, 2000, generator=torch.Generator().manual_seed(1)) * spread
    row = SamplingRow(SamplingParams(top_p=top_p))
    result = probabilities(logits, [row] * 3)
    for index in range(3):
        expected, margin = reference(logits[index].tolist(), row)
        assert margin > 1e-7, "choose another seed"
        np.testing.assert_allclose(result[index].numpy(), expected, atol=1e-7)
    if spread < 1:
        assert int((result > 0).sum(dim=1).min()) > 1024 or top_p == 0.3


NEIGHBOURS = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_p=0.95),
    SamplingParams(top_k=1500),
    SamplingParams(top_k=40, top_p=0.9, min_p=0.05),
    SamplingParams(min_p=0.1),
    SamplingParams(top_p=0.999999),
    SamplingParams(temperature=3.0, top_p=0.99, repetition_penalty=1.3, presence_penalty=1.0),
]


@pytest.mark.parametrize("vocab_size", [2000, 49152])
def test_a_row_does_not_depend_on_its_neighbours(vocab_size: int) -> None:
    """Bit for bit, also where a neighbour makes the batch look at more candidates than the row alone would."""
    logits = torch.randn(len(NEIGHBOURS), vocab_size, generator=torch.Generator().manual_seed(2)) * 2
    rows = [SamplingRow(params, prompt_ids=(1, 2), output_ids=(3, 3)) for params in NEIGHBOURS]
    together = probabilities(logits, rows)
    for index, row in enumerate(rows):
        assert torch.equal(together[index], probabilities(logits[index : index + 1], [row])[0]), row.params


def test_the_nucleus_of_a_row_ignores_a_neighbours_wide_top_k() -> None:
    """The mass of a whole row counts as 1 however many columns are ranked, not as the sum it has in float32."""
    logits = torch.randn(64, 2000, generator=torch.Generator().manual_seed(3)) * 0.5
    wide = SamplingRow(SamplingParams(top_k=2000))
    probs = torch.softmax(logits, dim=1)
    for index in range(64):
        mass = probs[index].sort(descending=True).values.double().cumsum(0)
        # whether 4 tokens suffice differs between a mass of 1 and one of mass[-1]
        between = float(mass[3]) * (1 + 1 / float(mass[-1])) / 2
        row = SamplingRow(SamplingParams(top_p=between))
        alone = probabilities(logits[index : index + 1], [row])[0]
        beside = probabilities(logits[[index, 0]], [row, wide])[0]
        assert torch.equal(alone, beside)


def test_ties_at_a_cut_off_are_all_kept() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.5), SamplingParams(min_p=0.3)):
        result = probabilities(logits, [SamplingRow(params)])[0]
        assert (result > 0).tolist() == [True, True, True, True, False], params


def test_greedy_takes_the_first_of_equals_and_is_one_hot() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0], [5.0, -1.0, 5.0]])
    row = SamplingRow(SamplingParams(temperature=0.0, top_k=2, top_p=0.5))
    assert probabilities(logits, [row, row]).tolist() == [[0, 1, 0], [1, 0, 0]]
    banned = SamplingRow(SamplingParams(temperature=0.0), banned_ids=(1,))
    assert probabilities(logits[:1], [banned]).tolist() == [[0, 0, 1]]


def test_padding_ids_stay_impossible() -> None:
    """-inf logits (ids a model does not have) survive penalties, bias and any temperature."""
    logits = torch.tensor([[1.0, -torch.inf, 0.0, -torch.inf]])
    for temperature in (0.0, 1e-6, 1.0, 100.0):
        params = SamplingParams(
            temperature=temperature, repetition_penalty=2.0, presence_penalty=-2.0, logit_bias=((1, 100.0),), top_p=0.99
        )
        result = probabilities(logits, [SamplingRow(params, prompt_ids=(1,), output_ids=(3,))])[0]
        assert result[1] == result[3] == 0.0
        assert float(result.sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("temperature", [0.0, 0.5, 100.0])
def test_all_but_one_banned(temperature: float) -> None:
    row = SamplingRow(SamplingParams(temperature=temperature, logit_bias=((2, -100.0),)), banned_ids=(0, 1, 3))
    assert probabilities(torch.tensor([[9.0, 50.0, -4.0, 1.0]]), [row]).tolist() == [[0, 0, 1, 0]]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_banning_everything_leaves_a_distribution(top_p: float) -> None:
    """Possible with a tiny vocabulary and as many stop token ids: the request goes on rather than harming its batch."""
    logits = torch.tensor([[9.0, 50.0, -4.0, 1.0]])
    row = SamplingRow(SamplingParams(top_p=top_p), banned_ids=(0, 1, 2, 3))
    assert probabilities(logits, [row]).tolist() == [[0.25] * 4]
    greedy = SamplingRow(SamplingParams(temperature=0.0), banned_ids=(0, 1, 2, 3))
    assert probabilities(logits, [greedy]).tolist() == [[1, 0, 0, 0]]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=2)])
@pytest.mark.parametrize("bad", [[1.0, math.nan, 0.0], [math.inf, 0.0, 0.0], [-math.inf] * 3])
def test_a_broken_row_is_nan_and_harms_no_other(params: SamplingParams, bad: list[float]) -> None:
    good = [0.5, 1.0, -1.0]
    row = SamplingRow(params)
    result = probabilities(torch.tensor([good, bad, good]), [row] * 3)
    assert bool(result[1].isnan().all())
    assert torch.equal(result[[0, 2]], probabilities(torch.tensor([good, good]), [row] * 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_float_dtype_gives_float32_rows(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]], dtype=dtype)
    row = SamplingRow(SamplingParams(presence_penalty=1.0), output_ids=(2,))
    result = probabilities(logits, [row])
    assert result.dtype is torch.float32
    torch.testing.assert_close(result, torch.softmax(torch.tensor([[1.0, 2.0, 2.0]]), dim=1))
    assert logits.tolist() == [[1.0, 2.0, 3.0]]
