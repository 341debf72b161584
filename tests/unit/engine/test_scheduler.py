"""The scheduler keeps its invariants and its promises of fairness, whatever happens in which order."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.scheduling import Simulation


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests, steps, cancellations and draft swaps in a pool too small for them. `Simulation` checks every
    slot that is counted as computed, the budget and the books after each operation."""

    @initialize(
        num_blocks=st.integers(6, 16),
        max_running=st.integers(1, 5),
        max_batch_tokens=st.integers(2, 12),
        k=st.integers(0, 4),
        prefix_cache=st.booleans(),
    )
    def begin(self, num_blocks: int, max_running: int, max_batch_tokens: int, k: int, prefix_cache: bool) -> None:
        self.sim = Simulation(
            num_blocks=num_blocks,
            max_running=max_running,
            max_batch_tokens=max_batch_tokens,
            k=k,
            prefix_cache=prefix_cache,
        )

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        max_new_tokens=st.integers(1, 12),
        n=st.integers(1, 3),
        tenant=st.sampled_from("ab"),
        speculation=st.booleans(),
        prompt_logprobs=st.sampled_from([None, 0]),
    )
    def add(self, prompt: list[int], max_new_tokens: int, n: int, **options: object) -> None:
        capacity = self.sim.pool.num_blocks * self.sim.pool.block_size
        self.sim.add(prompt, max_new_tokens=min(max_new_tokens, capacity - len(prompt)), n=n, **options)

    @rule(drafted=st.integers(0, 4), accepted=st.integers(0, 4), token=st.integers(0, 1))
    def step(self, drafted: int, accepted: int, token: int) -> None:
        assert bool(self.sim.live()) == bool(self.sim.step(drafted=drafted, accepted=accepted, token=token))

    @precondition(lambda self: self.sim.live())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.sim.cancel(data.draw(st.sampled_from(self.sim.live())))

    @rule()
    def swap(self) -> None:
        self.sim.scheduler.draft_epoch += 1

    def teardown(self) -> None:
        if hasattr(self, "sim"):
            self.sim.run_out()
            for request in self.sim.requests:
                assert request.is_finished


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)


def test_decoding_sequences_are_in_every_step_while_a_long_prompt_is_prefilled() -> None:
    sim = Simulation(num_blocks=200, max_running=4, max_batch_tokens=8, k=0)
    decoding = [sim.add([i, i], max_new_tokens=60) for i in range(3)]
    sim.step()
    prompt = sim.add([7] * 100)
    steps = 0
    while prompt.state.num_output_tokens == 0:
        plan = {s.completion: s.work for s in sim.step()}
        assert all(plan[c].num_tokens == 1 for c in decoding)
        assert plan[prompt].num_tokens == 5
        steps += 1
    assert steps == 20
    sim.run_out()


def test_drafts_leave_room_for_every_other_sequence() -> None:
    """Sixteen tokens for eight sequences that could draft eight each: all of them advance, and so does a prompt."""
    sim = Simulation(num_blocks=200, max_running=9, max_batch_tokens=18, k=8)
    decoding = [sim.add([i, i], max_new_tokens=40) for i in range(8)]
    while any(c.state.num_output_tokens == 0 for c in decoding):
        sim.step()
    prompt = sim.add([7] * 50)
    for _ in range(3):
        before = prompt.state.num_computed
        plan = sim.step(accepted=0)
        assert {s.completion for s in plan} == {*decoding, prompt}
        assert prompt.state.num_computed > before
    sim.run_out()


def test_a_sequence_alone_drafts_as_many_as_it_may() -> None:
    sim = Simulation(num_blocks=100, max_batch_tokens=16, k=5)
    one = sim.add([1, 2, 3], max_new_tokens=9)
    sim.step()
    assert [s.work.max_draft for s in sim.step(accepted=1)] == [5]
    assert one.num_left == 6
    sim.step(accepted=2)
    assert [s.work.max_draft for s in sim.step(accepted=0)] == [2], "never past max_new_tokens"


@pytest.mark.parametrize(("changes", "expected"), [({"max_draft_tokens": 2}, 2), ({"speculation": False}, 0)])
def test_a_request_may_limit_its_drafts(changes: dict[str, object], expected: int) -> None:
    sim = Simulation(num_blocks=100, max_batch_tokens=16, k=5)
    sim.add([1, 2, 3], max_new_tokens=20, **changes)
    sim.step()
    assert [s.work.max_draft for s in sim.step()] == [expected]


def test_drafts_stop_at_the_model_length() -> None:
    sim = Simulation(num_blocks=4, block_size=2, max_batch_tokens=16, k=5)
    sim.add([1, 2, 3], max_new_tokens=5)
    sim.step()
    # token 4 of 8 is being computed: the step may fill positions 4..7, one of them with the emitted token
    assert [s.work.max_draft for s in sim.step()] == [3]
    sim.run_out()


def test_tenants_take_turns() -> None:
    sim = Simulation(num_blocks=100, max_running=1, max_batch_tokens=16, k=0)
    for _ in range(5):
        sim.add([1, 2], max_new_tokens=1, tenant="greedy")
    for tenant in ("b", "c"):
        sim.add([1, 2], max_new_tokens=1, tenant=tenant)
    sim.run_out()
    order = [c.request.spec.tenant for c in sim.finished]
    assert order == ["greedy", "b", "c", "greedy", "greedy", "greedy", "greedy"]


def test_a_draft_is_dropped_before_a_sequence_is_preempted() -> None:
    sim = Simulation(num_blocks=5, block_size=2, max_batch_tokens=16, k=4)
    old, young = sim.add([1, 2, 3], max_new_tokens=4), sim.add([4, 5, 6], max_new_tokens=4)
    sim.step()
    plan = {s.completion: s.work for s in sim.step(accepted=0)}
    # one free block: the first may draft into it, the second has its own last position only
    assert plan[young].max_draft == 0
    assert old in plan
    assert sim.scheduler.num_preemptions == 0
    sim.run_out()


def test_the_youngest_is_preempted_and_goes_on_where_it_was() -> None:
    sim = Simulation(num_blocks=6, block_size=2, max_batch_tokens=16, k=0)
    old, young = sim.add([1, 2, 3, 4], max_new_tokens=8), sim.add([5, 6, 7], max_new_tokens=8)
    while sim.scheduler.num_preemptions == 0:
        sim.step()
    assert young in sim.scheduler.waiting
    kept = list(young.state.token_ids)
    assert len(kept) > 3
    while young in sim.scheduler.waiting:
        plan = sim.step()
        assert old in {s.completion for s in plan} or old in sim.finished
    assert young.state.token_ids[: len(kept)] == kept
    sim.run_out()
    assert young.state.num_output_tokens == 8


def test_preempted_completions_return_before_new_ones_and_in_their_order() -> None:
    sim = Simulation(num_blocks=8, block_size=2, max_batch_tokens=16, k=0)
    _, *others = (sim.add([i, 2, 3], max_new_tokens=12) for i in range(3))
    while sim.scheduler.num_preemptions < 2:
        sim.step()
    newcomer = sim.add([9], max_new_tokens=1)
    assert [*sim.scheduler.waiting] == [*others, newcomer]
    sim.run_out()


def test_a_preempted_sequence_finds_most_of_its_blocks_again() -> None:
    sim = Simulation(num_blocks=10, block_size=2, max_batch_tokens=32, k=0)
    sim.add([1, 1], max_new_tokens=10)
    victim = sim.add([5, 6, 7, 8, 5, 6, 7, 8], max_new_tokens=9)
    while sim.scheduler.num_preemptions == 0:
        sim.step()
    while victim in sim.scheduler.waiting:
        sim.step()
    assert victim.state.num_registered_blocks > 0


def test_siblings_share_the_prompt_blocks() -> None:
    sim = Simulation(num_blocks=20, block_size=2, max_batch_tokens=16, k=0)
    first = sim.add([1, 2, 3, 4, 5], max_new_tokens=4, n=3)
    sim.step()
    sim.step()
    tables = [c.state.block_ids[:2] for c in first.request.completions]
    assert tables[0] == tables[1] == tables[2]
    sim.run_out()


def test_prompt_logprobs_need_the_whole_prompt_computed() -> None:
    sim = Simulation(num_blocks=20, block_size=2, max_batch_tokens=16, k=0)
    sim.add([1, 2, 3, 4, 5], max_new_tokens=1)
    sim.run_out()
    again = sim.add([1, 2, 3, 4, 5], max_new_tokens=1, prompt_logprobs=0)
    assert [s.work.num_tokens for s in sim.step()] == [5]
    assert again.request.cached_prompt_tokens == 0
    hit = sim.add([1, 2, 3, 4, 5], max_new_tokens=1)
    assert [s.work.num_tokens for s in sim.step()] == [1]
    assert hit.request.cached_prompt_tokens == 4


def test_draft_kv_of_a_hit_counts_only_up_to_the_first_gap_and_only_of_this_draft() -> None:
    sim = Simulation(num_blocks=20, block_size=2, max_batch_tokens=16, k=3)
    sim.add([1, 2, 3, 4, 5], max_new_tokens=6)
    sim.run_out()
    hit = sim.add([1, 2, 3, 4, 5], max_new_tokens=6)
    sim.scheduler.schedule()
    assert (hit.state.num_computed, hit.state.num_draft_computed) == (4, 4)
    sim.cancel(hit)
    sim.scheduler.draft_epoch += 1
    miss = sim.add([1, 2, 3, 4, 5], max_new_tokens=6)
    sim.scheduler.schedule()
    assert (miss.state.num_computed, miss.state.num_draft_computed) == (4, 0)
    assert miss.state.draft_rebuild_end == 4  # the new draft reads what the target found in the cache in slices
    sim.cancel(miss)


def test_draft_kv_filled_by_a_sibling_after_the_hit_counts_too() -> None:
    sim = Simulation(num_blocks=40, block_size=2, max_batch_tokens=32, k=3)
    first = sim.add([1, 2, 3, 4, 5, 6, 7, 8], max_new_tokens=9, n=3)
    sim.step()
    sim.step()  # the first drafts; the others compute the end of the prompt
    sim.scheduler.schedule()
    for sibling in first.request.completions[1:]:
        assert sibling.state.num_output_tokens == 1
        assert sibling.state.num_draft_computed == 6
    sim.run_out()


def test_after_a_swap_the_running_sequence_marks_its_blocks_for_the_new_draft() -> None:
    sim = Simulation(num_blocks=20, block_size=2, max_batch_tokens=16, k=3)
    sim.add([1, 2, 3, 4, 5], max_new_tokens=9)
    sim.step()
    sim.step(accepted=0)
    sim.scheduler.draft_epoch += 1
    sim.run_out()
    hit = sim.add([1, 2, 3, 4, 5], max_new_tokens=6)
    sim.scheduler.schedule()
    assert hit.state.num_draft_computed == 4
    sim.cancel(hit)
