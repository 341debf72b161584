"""The waiting queue: fair between tenants, first come first served within one, preempted before all."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from redraft_server.engine.admission import WaitingQueue
from redraft_server.engine.request import Completion
from tests.scheduling import make_request


def completion(tenant: str = "") -> Completion:
    return make_request([1], tenant=tenant).completions[0]


def drained(queue: WaitingQueue) -> list[Completion]:
    order = []
    while len(queue):
        head = queue.peek()
        order.append(queue.pop())
        assert order[-1] is head
    assert queue.peek() is None
    return order


def test_first_come_first_served_within_a_tenant() -> None:
    queue, items = WaitingQueue(), [completion() for _ in range(5)]
    for item in items:
        queue.push(item)
    assert drained(queue) == items


@given(st.lists(st.sampled_from("abc"), max_size=20))
def test_a_tenant_waits_for_at_most_one_request_of_each_other(tenants: list[str]) -> None:
    queue = WaitingQueue()
    for tenant in tenants:
        queue.push(completion(tenant))
    served = [c.request.spec.tenant for c in drained(queue)]
    assert Counter(served) == Counter(tenants)
    for index, tenant in enumerate(served):
        if tenant in served[:index]:
            last = max(i for i in range(index) if served[i] == tenant)
            between = Counter(served[last + 1 : index])
            assert all(count == 1 for count in between.values())
            assert set(between) == {other for other in set(tenants) - {tenant} if other in served[last:]}


def test_a_late_tenant_is_served_next_but_one() -> None:
    queue = WaitingQueue()
    for _ in range(10):
        queue.push(completion("many"))
    queue.pop()
    late = completion("one")
    queue.push(late)
    queue.pop()
    assert queue.pop() is late


def test_the_front_is_served_before_every_tenant() -> None:
    queue, resumed, other = WaitingQueue(), completion("a"), completion("b")
    queue.push(other)
    queue.push_front(resumed)
    assert queue.peek() is resumed
    assert drained(queue) == [resumed, other]


def test_removal_takes_out_just_that_one_wherever_it_stands() -> None:
    queue = WaitingQueue()
    front, *waiting = [completion("a") for _ in range(4)]
    queue.push_front(front)
    for item in waiting:
        queue.push(item)
    queue.remove(waiting[1])
    queue.remove(front)
    assert [*queue] == [waiting[0], waiting[2]]
    queue.remove(waiting[0])
    queue.remove(waiting[2])
    assert len(queue) == 0
    assert queue.peek() is None
