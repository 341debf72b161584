"""Limits per tenant on a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redraft_server.security.errors import AccessRefused
from redraft_server.security.keys import ApiKey, Limits
from redraft_server.security.limits import Admission, TenantLimits


class Tenants:
    """`TenantLimits`, with a clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0
        self.limits = TenantLimits(lambda: self.now)

    def call(self, tenant: str = "acme", *, generates: bool = True, **limits: int) -> Admission:
        return self.limits.admit(ApiKey(tenant, "user", Limits(**limits)), generates=generates)

    def refusal(self, tenant: str = "acme", **limits: int) -> tuple[str, float]:
        with pytest.raises(AccessRefused) as caught:
            self.call(tenant, **limits)
        assert caught.value.retry_after_s is not None
        return caught.value.reason, caught.value.retry_after_s


def test_requests_come_back_evenly() -> None:
    tenants = Tenants()
    for _ in range(6):
        tenants.call(requests_per_minute=6)
    assert tenants.refusal(requests_per_minute=6) == ("requests_per_minute", pytest.approx(10.0))
    tenants.now += 9.0
    assert tenants.refusal(requests_per_minute=6) == ("requests_per_minute", pytest.approx(1.0))
    tenants.now += 1.0
    tenants.call(requests_per_minute=6)
    assert tenants.refusal(requests_per_minute=6)[0] == "requests_per_minute"


def test_a_long_silence_saves_up_no_more_than_a_minute() -> None:
    tenants = Tenants()
    tenants.call(requests_per_minute=3)
    tenants.now += 86_400.0
    for _ in range(3):
        tenants.call(requests_per_minute=3)
    assert tenants.refusal(requests_per_minute=3)[0] == "requests_per_minute"


def test_calls_at_once() -> None:
    tenants = Tenants()
    first, _ = tenants.call(concurrent_requests=2), tenants.call(concurrent_requests=2)
    assert tenants.refusal(concurrent_requests=2) == ("concurrent_requests", 1.0)
    first.end()
    tenants.call(concurrent_requests=2)


def test_a_refused_call_uses_nothing() -> None:
    tenants = Tenants()
    limits = {"requests_per_minute": 2, "concurrent_requests": 1}
    running = tenants.call(**limits)
    for _ in range(5):
        assert tenants.refusal(**limits)[0] == "concurrent_requests"
    running.end()
    tenants.call(**limits).end()
    assert tenants.refusal(**limits)[0] == "requests_per_minute"


def test_tokens_are_paid_afterwards() -> None:
    tenants = Tenants()
    first, second = tenants.call(tokens_per_minute=600), tenants.call(tokens_per_minute=600)
    first.end()
    first.pay(700)
    assert tenants.refusal(tokens_per_minute=600) == ("tokens_per_minute", pytest.approx(10.1))
    second.pay(500)
    assert tenants.refusal(tokens_per_minute=600) == ("tokens_per_minute", pytest.approx(60.1))
    tenants.call(tokens_per_minute=600, generates=False)
    tenants.now += 60.2
    tenants.call(tokens_per_minute=600)


def test_tenants_do_not_share() -> None:
    tenants = Tenants()
    tenants.call(requests_per_minute=1)
    assert tenants.refusal(requests_per_minute=1)[0] == "requests_per_minute"
    tenants.call("beta", requests_per_minute=1)


def test_a_limit_that_changes_holds_at_once() -> None:
    tenants = Tenants()
    for _ in range(4):
        tenants.call(requests_per_minute=10)
    tenants.call(requests_per_minute=2)
    tenants.call(requests_per_minute=2)
    assert tenants.refusal(requests_per_minute=2)[0] == "requests_per_minute"
    tenants.call()  # without a limit
    tenants.call(requests_per_minute=2)  # which begins anew


def test_what_is_held_is_bounded_by_the_tenants_there_are() -> None:
    tenants = Tenants()
    running = [tenants.call(f"t{number}", requests_per_minute=1) for number in range(100)]
    tenants.limits.forget_all_but({"t1", "never seen"})
    assert len(tenants.limits._uses) == 1
    assert tenants.refusal("t1", requests_per_minute=1)[0] == "requests_per_minute"
    for admission in running:  # those of the tenants that are gone end as well
        admission.pay(10)
        admission.end()


@given(st.lists(st.tuples(st.floats(0.0, 5.0), st.integers(0, 300)), max_size=60))
def test_over_time_nobody_gets_more_than_its_limit(calls: list[tuple[float, int]]) -> None:
    """When a call is let in, what was used before it is at most a full allowance and what came back since."""
    tenants = Tenants()
    used = 0
    for wait_s, tokens in calls:
        tenants.now += wait_s
        try:
            admission = tenants.call(tokens_per_minute=600)
        except AccessRefused:
            continue
        assert used <= 600 + (tenants.now - 100.0) * 10.0
        admission.pay(tokens)
        used += tokens
