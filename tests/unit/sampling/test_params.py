"""Every parameter has a range, and a value outside of it is refused with the field's name."""

from __future__ import annotations

import math
from typing import Any

import pytest

from redraft.sampling.params import Coupling, InvalidParameter, SamplingParams, StoppingParams

REFUSED_SAMPLING: list[tuple[str, Any]] = [
    *((name, math.nan) for name in ("temperature", "top_p", "min_p", "repetition_penalty")),
    *((name, math.inf) for name in ("temperature", "presence_penalty", "frequency_penalty")),
    ("temperature", -0.01),
    ("temperature", 100.1),
    ("top_k", -1),
    ("top_p", 0.0),
    ("top_p", 1.01),
    ("top_p", -0.5),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("repetition_penalty", 101.0),
    ("presence_penalty", 2.1),
    ("presence_penalty", -2.1),
    ("frequency_penalty", 2.1),
    ("frequency_penalty", math.nan),
    ("logit_bias", ((-1, 1.0),)),
    ("logit_bias", tuple((token, 0.0) for token in range(1025))),
    ("seed", -1),
    ("seed", 2**64),
]

ACCEPTED_SAMPLING: list[tuple[str, Any]] = [
    ("temperature", 0.0),
    ("temperature", 100.0),
    ("top_k", 0),
    ("top_k", 10**9),
    ("top_p", 1.0),
    ("top_p", 1e-12),
    ("min_p", 0.0),
    ("min_p", 1.0),
    ("repetition_penalty", 100.0),
    ("repetition_penalty", 1e-3),
    ("presence_penalty", -2.0),
    ("frequency_penalty", 2.0),
    ("logit_bias", ((0, 100.0), (5, -100.0))),
    ("seed", 0),
    ("seed", 2**64 - 1),
]

REFUSED_STOPPING: list[tuple[str, str, dict[str, Any]]] = [
    ("max_new_tokens", "max_new_tokens", {"max_new_tokens": 0}),
    ("max_new_tokens", "max_new_tokens", {"max_new_tokens": -5}),
    ("min_new_tokens", "min_new_tokens", {"min_new_tokens": -1}),
    ("min above max", "min_new_tokens", {"min_new_tokens": 11, "max_new_tokens": 10}),
    ("too many strings", "stop_sequences", {"stop_sequences": ("x",) * 17}),
    ("empty string", "stop_sequences[1]", {"stop_sequences": ("x", "")}),
    ("long string", "stop_sequences[0]", {"stop_sequences": ("x" * 257,)}),
    ("too many ids", "stop_token_ids", {"stop_token_ids": frozenset(range(257))}),
]


@pytest.mark.parametrize(("name", "value"), REFUSED_SAMPLING)
def test_sampling_values_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidParameter) as caught:
        SamplingParams(**{name: value})
    assert caught.value.field == f"sampling.{name}"
    assert str(caught.value) == f"{caught.value.field}: {caught.value.description}"


@pytest.mark.parametrize("bias", [100.5, -101.0, math.nan, math.inf])
def test_a_bad_bias_is_named_by_its_token(bias: float) -> None:
    with pytest.raises(InvalidParameter) as caught:
        SamplingParams(logit_bias=((3, 1.0), (42, bias)))
    assert caught.value.field == "sampling.logit_bias[42]"


@pytest.mark.parametrize(("name", "value"), ACCEPTED_SAMPLING)
def test_sampling_values_accepted(name: str, value: Any) -> None:
    assert getattr(SamplingParams(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("field", "changes"), [case[1:] for case in REFUSED_STOPPING], ids=[c[0] for c in REFUSED_STOPPING]
)
def test_stopping_values_refused(field: str, changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidParameter) as caught:
        StoppingParams(**changes)
    assert caught.value.field == f"stopping.{field}"


def test_stopping_values_accepted() -> None:
    StoppingParams(
        max_new_tokens=1,
        min_new_tokens=1,
        stop_sequences=("x" * 256,) * 16,
        stop_token_ids=frozenset(range(256)),
    )


@pytest.mark.parametrize(
    ("params", "coupling"),
    [
        (SamplingParams(), Coupling.MAXIMAL),
        (SamplingParams(seed=0), Coupling.DRAFTER_INVARIANT),
        (SamplingParams(seed=1, coupling=Coupling.MAXIMAL), Coupling.MAXIMAL),
        (SamplingParams(coupling=Coupling.DRAFTER_INVARIANT), Coupling.DRAFTER_INVARIANT),
    ],
)
def test_a_seed_chooses_the_coupling_unless_one_is_given(params: SamplingParams, coupling: Coupling) -> None:
    assert params.effective_coupling is coupling


@pytest.mark.parametrize("name", ["repetition_penalty", "presence_penalty", "frequency_penalty"])
def test_has_penalties_sees_each_of_them(name: str) -> None:
    changes: dict[str, Any] = {name: 0.5}
    assert SamplingParams(**changes).has_penalties
    assert not SamplingParams().has_penalties


def test_greedy_is_temperature_zero_alone() -> None:
    assert SamplingParams(temperature=0.0).is_greedy
    assert not SamplingParams(temperature=1e-30).is_greedy
    assert not SamplingParams(top_k=1).is_greedy
