"""The exactness benchmark must not call a real difference a tie, nor overlook one."""

from __future__ import annotations

import torch

from benchmarks.exactness_check import Mismatch, find_mismatch
from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import SamplingRow, probabilities
from redraft.sampling.randomness import as_key_tensor, exponentials, sequence_key

GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=0.8, top_p=0.95, seed=7)
PROMPT = (1, 2)


def _find(ours: list[int], reference: list[int], logits: torch.Tensor, params: SamplingParams) -> Mismatch | None:
    return find_mismatch("p", PROMPT, ours, reference, params, lambda ids: logits)


def test_equal_tokens_are_no_mismatch() -> None:
    assert _find([3, 4], [3, 4], torch.zeros(8), GREEDY) is None


def test_margin_is_taken_at_the_common_prefix() -> None:
    asked: list[list[int]] = []

    def logits_after(ids: object) -> torch.Tensor:
        assert isinstance(ids, list)
        asked.append(ids)
        return torch.tensor([0.0, 1.0, 1.0 + 5e-5, 0.0])

    found = find_mismatch("p", PROMPT, [3, 1, 0], [3, 2, 2], GREEDY, logits_after)
    assert asked == [[1, 2, 3]]
    assert found is not None
    assert (found.position, found.ours, found.reference, found.is_tie) == (1, 1, 2, True)


def test_a_wide_margin_is_not_a_tie() -> None:
    found = _find([1], [2], torch.tensor([0.0, 1.0, 1.001]), GREEDY)
    assert found is not None
    assert not found.is_tie
    assert abs(found.margin - 1e-3) < 1e-6


def test_an_early_end_is_never_a_tie() -> None:
    found = _find([3], [3, 4], torch.zeros(8), GREEDY)
    assert found is not None
    assert (found.position, found.ours, found.reference, found.is_tie) == (1, None, 4, False)


def _race(logits: torch.Tensor) -> list[int]:
    """Tokens in the order in which the seeded race would draw them at the first position."""
    probs = probabilities(logits.unsqueeze(0), [SamplingRow(SEEDED)])[0]
    noise = exponentials(as_key_tensor([sequence_key(7, 0)]), torch.tensor([0]), len(logits))[0]
    return [int(token) for token in (noise / probs).argsort()]


def test_seeded_choice_is_weighed_by_the_race() -> None:
    logits = torch.linspace(0.0, 1.0, 32)
    first, second, *_ = _race(logits)
    clear = _find([second], [first], logits, SEEDED)
    assert clear is not None
    assert clear.margin > 1e-3
    assert not clear.is_tie
    closer = logits.clone()
    closer[second] += clear.margin * 0.8 - 2e-5  # a change of a logit counts 1 / temperature in the race
    near = _find([second], [first], closer, SEEDED)
    assert near is not None
    assert near.is_tie
    assert near.margin < 1e-4


def test_a_token_far_outside_the_nucleus_is_no_tie() -> None:
    logits = torch.full((32,), -20.0)
    logits[:2] = torch.tensor([5.0, 4.0])
    found = _find([9], [_race(logits)[0]], logits, SEEDED)
    assert found is not None
    assert not found.is_tie
