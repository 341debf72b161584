"""The chain over step starts, against an enumeration of every way a text can be decoded."""

from __future__ import annotations

import numpy as np
import pytest

from redraft_training.evaluate.errors import NothingToScore
from redraft_training.evaluate.prediction import predict
from redraft_training.evaluate.scores import Floats
from tests.unit.training.evaluate_examples import draft_scores, scored

NAN = float("nan")


def enumerated(alpha: list[float], k: int, position: int = 1) -> tuple[float, float, float]:
    """(decode steps, accepted, drafted) expected from `position` on, by recursion over what the step there accepts."""
    if position >= len(alpha):
        return 0.0, 0.0, 0.0
    limit = min(k, len(alpha) - position - 1)
    steps, accepted, drafted, reached = 1.0, 0.0, float(limit), 1.0
    for count in range(limit + 1):
        stop = 1.0 - alpha[position + count] if count < limit else 1.0
        rest = enumerated(alpha, k, position + count + 1)
        weight = reached * stop
        steps += weight * rest[0]
        accepted += weight * (count + rest[1])
        drafted += weight * rest[2]
        reached *= alpha[position + count] if count < limit else 0.0
    return steps, accepted, drafted


@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_equals_the_enumeration(k: int) -> None:
    texts = [[NAN, 0.3, 0.9, 1.0, 0.0, 0.5, 0.7], [NAN, 1.0, 1.0, 1.0], [NAN, 0.2]]
    found = predict(draft_scores("d", *(scored(str(i), text) for i, text in enumerate(texts))), k)
    steps, accepted, drafted = np.sum([enumerated(text, k) for text in texts], axis=0)
    assert found.decode_steps == pytest.approx(steps)
    assert sum(found.accepted) == pytest.approx(accepted)
    assert found.drafted == pytest.approx(drafted)
    assert found.verify_steps == pytest.approx(steps + len(texts))
    assert found.num_output_tokens == sum(map(len, texts))
    # every token is either accepted or the last of its step
    assert found.num_output_tokens == pytest.approx(sum(found.accepted) + found.verify_steps)
    assert sum(j * count for j, count in enumerate(found.histogram)) == pytest.approx(sum(found.accepted))
    assert found.mean_acceptance_length == pytest.approx(found.num_output_tokens / found.verify_steps)


def test_a_certain_text_is_walked_step_by_step() -> None:
    """Greedy: at k = 3, the steps start at 1 (accepts 2), 4 (rejected at once), 5 (2, no room for more)."""
    found = predict(draft_scores("d", scored("a", [NAN, 1, 1, 0, 0, 1, 1, 1])), 3)
    assert found.decode_steps == 3
    assert found.drafted == 3 + 3 + 2
    assert found.histogram == (1.0, 0.0, 2.0, 0.0)
    assert found.tested == (3.0, 2.0, 1.0)
    assert found.accepted == (2.0, 2.0, 0.0)
    assert found.acceptance_by_depth == (pytest.approx(2 / 3), 1.0, 0.0)
    assert found.acceptance_rate == 0.5


@pytest.mark.parametrize("k", [1, 4])
def test_constant_acceptance_gives_the_geometric_mean_length(k: int) -> None:
    """(1 - a^(k+1)) / (1 - a), but for the text's end."""
    alpha: Floats = np.full(4000, 0.7)
    alpha[0] = np.nan
    found = predict(draft_scores("d", scored("a", alpha.tolist())), k)
    assert found.tokens_per_decode_step == pytest.approx((1 - 0.7 ** (k + 1)) / 0.3, rel=2e-3)


def test_a_gap_cuts_the_text() -> None:
    whole = predict(draft_scores("d", scored("a", [NAN, 1.0, 1.0, NAN, 1.0, 0.0])), 4)
    parts = predict(draft_scores("d", scored("a", [NAN, 1.0, 1.0]), scored("b", [NAN, 1.0, 0.0])), 4)
    assert whole.decode_steps == parts.decode_steps
    assert whole.accepted == parts.accepted
    assert whole.verify_steps == parts.verify_steps - 1, "one prefill instead of two"


def test_nothing_scored() -> None:
    with pytest.raises(NothingToScore):
        predict(draft_scores("d", scored("a", [NAN, NAN])), 2)
    with pytest.raises(ValueError, match="at least 1"):
        predict(draft_scores("d", scored("a", [NAN, 1.0])), 0)
