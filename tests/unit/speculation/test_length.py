"""The length controller chooses by predicted goodput: all times are given, none is measured."""

from __future__ import annotations

import pytest

from redraft.sampling.params import SamplingParams
from redraft.speculation.cost import StepCost
from redraft.speculation.length import Acceptance, LengthController, expected_tokens
from redraft.speculation.state import SequenceState
from tests.step_costs import cost, flat, linear

MAX_K = 8


def sequence(acceptance: float | None, weight: float = 1000.0) -> SequenceState:
    state = SequenceState([1], 1, SamplingParams(), key=0)
    if acceptance is not None:
        state.acceptance["draft"] = Acceptance(acceptance * weight, weight)
    return state


def choose(acceptance: float, target: StepCost, draft: StepCost | None, limit: int = MAX_K, batch: int = 1) -> int:
    controller = LengthController("draft", target, draft)
    (k,) = set(controller.choose([sequence(acceptance)] * batch, [limit] * batch))
    return k


def best_k(acceptance: float, target: float, draft: float) -> int:
    """By the formula of Leviathan et al., for a target whose cost does not depend on k."""
    return max(range(MAX_K + 1), key=lambda k: expected_tokens(acceptance, k) / (target + k * draft))


def test_expected_tokens() -> None:
    assert expected_tokens(0.0, 5) == 1.0
    assert expected_tokens(0.5, 2) == pytest.approx(1.75)
    assert expected_tokens(0.999, 3) == pytest.approx(1 + 0.999 + 0.999**2 + 0.999**3)


@pytest.mark.parametrize("acceptance", [0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("draft", [0.02, 0.1, 0.3])
def test_close_to_the_optimum(acceptance: float, draft: float) -> None:
    """Goodput within the hysteresis of the best k's."""
    chosen = choose(acceptance, flat(1.0), flat(draft))
    goodput = [expected_tokens(acceptance, k) / (1.0 + k * draft) for k in range(MAX_K + 1)]
    assert goodput[chosen] >= goodput[best_k(acceptance, 1.0, draft)] / 1.021


def test_nothing_when_the_draft_is_dear_or_wrong() -> None:
    assert choose(0.6, flat(1.0), flat(1.0)) == 0
    assert choose(0.05, flat(1.0), flat(0.2)) == 0
    assert choose(0.3, linear(1.0), flat(0.05)) == 0, "every verified token costs as much as a plain one"


def test_everything_when_it_is_cheap_and_right() -> None:
    assert choose(0.95, flat(1.0), flat(0.001)) == MAX_K
    assert choose(0.95, flat(1.0), None) == MAX_K
    assert choose(0.95, flat(1.0), flat(0.001), limit=3) == 3


def test_more_acceptance_never_means_fewer_tokens() -> None:
    for draft in (0.05, 0.1, 0.3):
        chosen = [choose(a / 20, flat(1.0), flat(draft)) for a in range(20)]
        assert chosen == sorted(chosen)
        assert chosen[0] == 0
        assert chosen[-1] > 1


def test_a_dearer_draft_never_means_more_tokens() -> None:
    chosen = [choose(0.7, flat(1.0), flat(c / 20)) for c in range(1, 30)]
    assert chosen == sorted(chosen, reverse=True)


def test_nothing_measured_yet_means_try() -> None:
    assert choose(0.5, StepCost(), StepCost()) > 0


def test_every_sequence_keeps_its_own_limit() -> None:
    controller = LengthController("draft", flat(1.0), flat(0.001))
    assert controller.choose([sequence(0.95)] * 4, [5, 0, 2, 8]) == [5, 0, 2, 8]


def test_a_poor_sequence_in_a_good_batch_is_trimmed() -> None:
    """Verification costs per token: the sequence whose tokens are rarely accepted drafts fewer of them."""
    controller = LengthController("draft", cost(_1=1.0, _64=4.0), flat(0.001))
    good, poor = controller.choose([sequence(0.98), sequence(0.3)], [MAX_K, MAX_K])
    assert good > poor >= 1


def test_what_was_chosen_for_one_sequence_is_not_trimmed() -> None:
    """The first token verified beside the pending one may cost more than the later ones; k was chosen knowing that."""
    target = cost(_1=1.0, _2=1.3, _3=1.3, _4=1.3, _5=1.3, _9=1.4)
    for rate in (0.5, 0.6, 0.7, 0.8):
        goodputs = [expected_tokens(rate, k) / (target.estimate(1 + k) + k * 0.03) for k in range(5)]
        chosen = choose(rate, target, flat(0.03), limit=4)
        assert goodputs[chosen] >= max(goodputs) / 1.021


def test_a_draft_that_stops_by_itself_has_its_limit_where_drafting_pays() -> None:
    paying = LengthController("draft", flat(1.0), flat(0.05))
    assert paying.allow([sequence(0.6)] * 3, [8, 0, 3], [1, 1, 1]) == [8, 0, 3]
    losing = LengthController("draft", flat(1.0), flat(1.0))
    assert losing.allow([sequence(0.6)], [8], [1]) == [0]


def test_prices_are_the_tokens_that_the_time_is_worth() -> None:
    """A token more is verified in 0.1 s and drafted in 0.2 s, while the batch emits its goodput."""
    batch, acceptance = 2, 0.9
    controller = LengthController("draft", cost(_1=1.0, _64=1.0 + 63 * 0.1), cost(_1=0.2, _2=0.3))
    (k,) = set(controller.choose([sequence(acceptance)] * batch, [8] * batch))
    tokens = batch * expected_tokens(acceptance, k)
    goodput = tokens / (1.0 + 0.1 * (batch * (k + 1) - 1) + k * 0.3)
    assert controller.token_price == pytest.approx(0.1 * goodput, rel=1e-2)
    assert controller.pass_price(2) == pytest.approx(0.15 * goodput, rel=1e-2)
    assert controller.pass_price(1) == pytest.approx(0.2 * goodput, rel=1e-2)


def test_what_lies_around_the_passes_counts_once_for_any_k() -> None:
    """A draft that pays by its passes alone does not where every proposal takes half of a target's pass beside them."""
    chosen = []
    for around in (0.0, 0.5):
        controller = LengthController("draft", flat(1.0), flat(0.05))
        for _ in range(20):
            controller.observe_proposal(1, 4, 4 * 0.05 + around)
        chosen += controller.choose([sequence(0.35)], [4])
    assert chosen[0] > 0
    assert chosen[1] == 0


def test_hysteresis_keeps_k_in_both_directions() -> None:
    """Goodput at k = 2 and 3 differ by 1%: whichever is in use stays in use; 5% move it."""
    acceptance = 0.6
    tokens = [expected_tokens(acceptance, k) for k in range(4)]
    for better, others in ((2, 3), (3, 2)):
        for advantage, stays in ((1.01, True), (1.05, False)):
            controller = LengthController("draft", StepCost(), None)
            seconds = {0: 1.8, 1: 1.9, better: tokens[better], others: tokens[others] * advantage}
            for k, s in seconds.items():
                controller.target_cost.observe(1 + k, s)
            controller._last_k = others
            chosen = controller.choose([sequence(acceptance)], [3])
            assert chosen == [others if stays else better], (better, advantage)


def test_idle_probes_come_ever_later_until_drafting_pays_again() -> None:
    """A token accepted is no news: under load, a good draft does not pay either."""
    controller = LengthController("draft", flat(1.0), flat(1.0))
    state = sequence(0.2)

    def steps_to_probe() -> int:
        for count in range(1, 2000):
            chosen = controller.choose([state], [4])
            if chosen != [0]:
                assert chosen == [1]
                return count
        raise AssertionError("never probed")

    waits = [steps_to_probe() for _ in range(7)]
    assert waits == [32, 64, 128, 256, 512, 512, 512]
    controller.observe(state, 1, 1)
    assert steps_to_probe() == 512
    controller.draft_cost = flat(0.001)
    assert controller.choose([sequence(0.9)], [4]) > [1]
    controller.draft_cost = flat(1.0)
    assert steps_to_probe() == 32


def test_a_probe_has_no_price() -> None:
    """Else how sure the draft is, by what became of it before, could rule out every probe."""
    controller = LengthController("draft", linear(1.0), flat(1.0))
    state = sequence(0.2)
    while controller.allow([state], [4], [1]) == [0]:
        assert controller.token_price > 0.5
    assert controller.token_price == 0.0
    assert controller.allow([state], [4], [1]) == [0]
    assert controller.token_price > 0.5


def test_a_decision_not_to_draft_stands_for_eight_steps_of_the_same_sequences() -> None:
    controller = LengthController("draft", linear(1.0), flat(1.0))
    state, other = sequence(0.9), sequence(0.9)
    assert controller.allow([state], [4], [1]) == [0]
    controller.target_cost, controller.draft_cost = flat(1.0), flat(0.01)  # now it would pay
    assert [controller.allow([state], [4], [1]) for _ in range(8)] == [[0]] * 7 + [[4]]

    controller.target_cost, controller.draft_cost = linear(1.0), flat(1.0)
    assert controller.allow([state], [4], [1]) == [0]
    controller.target_cost, controller.draft_cost = flat(1.0), flat(0.01)
    assert controller.allow([other], [4], [1]) == [4]
    assert controller.allow([state], [4], [1]) == [4]


def test_a_probe_waits_until_idle_steps_have_earned_what_the_draft_must_read() -> None:
    """500 tokens at 0.01 s: 1 % of 500 steps of a second."""
    controller = LengthController("draft", flat(1.0), flat(1.0))
    controller.observe_reading(512, 5.12)
    state = sequence(0.2)

    def steps_to_probe(num_missing: int) -> int:
        return next(n for n in range(1, 2000) if controller.allow([state], [4], [num_missing]) != [0])

    assert steps_to_probe(500) == 500
    assert steps_to_probe(500) == 500
    controller.observe(state, 1, 1)
    assert steps_to_probe(500) == 500, "time in which it drafted was not idle"
    assert steps_to_probe(1) == 256


def test_drafts_that_are_compared_are_measured_in_every_sequence_though_that_does_not_pay() -> None:
    controller = LengthController("draft", linear(1.0), flat(1.0))
    controller.confidence.see(0.1, greedy=True)  # it is never sure
    old, new = sequence(0.2), sequence(0.2)

    def allowed(output_tokens: int) -> list[int]:
        old.token_ids[1:] = [3] * output_tokens
        return controller.allow([old, new], [4, 4], [500, 500])

    assert allowed(0) == [0, 0]
    controller.is_on_trial = True
    assert allowed(0) == allowed(1) == [1, 1], "until both have been read and verified"
    assert controller.token_price == 0.0
    controller.observe(old, 0, 1)
    assert allowed(2) == [0, 1]
    controller.observe(new, 0, 1)
    assert allowed(8) == [0, 0]
    assert allowed(9) == [1, 0]
    controller.is_on_trial = False
    assert allowed(9) == [0, 0]


def test_a_prompt_is_read_where_drafting_saves_more_on_what_is_ahead() -> None:
    """Drafting saves about half of a second per token. Of what was read at 0.01 s a token, 2,000 pay once about 40
    tokens are ahead: that is expected of an answer that has 24."""
    controller = LengthController("draft", flat(1.0), flat(0.05))
    controller.observe_reading(100, 1.0)
    allowed = {}
    for num_missing in (2, 300, 2000):
        for num_output in (0, 20, 40):
            state = sequence(0.6)
            state.token_ids.extend([3] * num_output)
            allowed[num_missing, num_output] = controller.allow([state], [8], [num_missing]) == [8]
    assert allowed == {
        (2, 0): True,
        (2, 20): True,
        (2, 40): True,
        (300, 0): True,
        (300, 20): True,
        (300, 40): True,
        (2000, 0): False,
        (2000, 20): False,
        (2000, 40): True,
    }
    controller.is_on_trial = True
    assert controller.allow([sequence(0.6)], [8], [2000]) == [8]


def test_who_is_not_worth_reading_does_not_hold_up_the_others() -> None:
    controller = LengthController("draft", flat(1.0), flat(0.05))
    controller.observe_reading(100, 1.0)
    assert controller.allow([sequence(0.6)] * 3, [8, 4, 8], [1, 5000, 2]) == [8, 0, 8]


def test_a_draft_that_always_stops_at_once_is_probed() -> None:
    """Drafting pays by the rate, but nothing is drafted for lack of sureness, so neither would ever change."""
    controller = LengthController("draft", cost(_1=1.0, _64=4.0), flat(0.01))
    state = sequence(0.8)
    for _ in range(2):
        assert [controller.allow([state], [4], [1]) for _ in range(32)] == [[4]] * 31 + [[1]]
        assert controller.token_price == 0.0
    for _ in range(100):
        controller.observe(state, 1, 2)
        assert controller.allow([state], [4], [1]) == [4]
        assert controller.token_price > 0.0


def test_tokens_that_are_dropped_count_as_what_they_would_have_become() -> None:
    """Half of all tokens are accepted, and the draft knows which: drafting those alone does not make it perfect."""
    controller = LengthController("draft", flat(1.0), flat(0.01))
    state = sequence(None)
    for _ in range(200):
        controller.observe(state, 1, 1)
        controller.observe_dropped(state, 0.0, 1.0, is_first=True)
    assert controller.rate(state) == pytest.approx(0.5, abs=0.05)
    for _ in range(200):  # the second token, where the first will be accepted half of the time
        controller.observe_dropped(state, 0.2, 0.5, is_first=False)
        controller.observe(state, 0, 1)
    assert controller.rate(state) == pytest.approx(0.1 / 1.5, abs=0.05)


def test_a_pass_pays_if_some_of_its_tokens_do() -> None:
    """Of eight sequences, where a verified token costs nearly as much as one of plain decoding: a token drafted for
    each loses, and for those alone where it is almost certain it wins."""
    batch, target = 8, cost(_8=8.0, _64=64.0 * 0.8)
    for certain, is_on in ((0.5, True), (0.0, False)):
        controller = LengthController("draft", target, flat(0.05))
        for index in range(400):
            sureness = 0.99 if index < 400 * certain else 0.1
            controller.confidence.see(sureness, greedy=True)
            controller.confidence.observe([sureness], int(sureness > 0.5), greedy=True)
        states = [sequence(0.5)] * batch
        assert controller.choose(states, [4] * batch) == [0] * batch
        assert (controller.allow(states, [4] * batch, [1] * batch) == [4] * batch) is is_on


def test_steps_in_which_nobody_may_draft_change_nothing() -> None:
    """A batch in prefill is no sign that drafting does not pay."""
    controller = LengthController("draft", flat(1.0), flat(0.001))
    assert controller.choose([sequence(0.95)], [MAX_K]) == [MAX_K]
    for _ in range(100):
        assert controller.choose([sequence(0.95)] * 2, [0, 0]) == [0, 0]
    assert controller._last_k == MAX_K
    assert controller._idle_steps == 0


def test_acceptance_forgets() -> None:
    """After a change of topic the rate follows within tens of steps."""
    acceptance = Acceptance()
    for _ in range(100):
        acceptance.observe(4, 4)
    assert acceptance.rate(0.5) > 0.9
    for _ in range(40):
        acceptance.observe(0, 4)
    assert acceptance.rate(0.5) < 0.2


def test_only_reached_positions_count_as_tested() -> None:
    acceptance = Acceptance()
    acceptance.observe(1, 5)  # the second was rejected, the rest never looked at
    assert (acceptance.accepted, acceptance.tested) == (1, 2)
    acceptance = Acceptance()
    acceptance.observe(5, 5)
    assert (acceptance.accepted, acceptance.tested) == (5, 5)


def test_a_young_sequence_goes_by_the_others() -> None:
    controller = LengthController("draft", flat(1.0), flat(0.2))
    for _ in range(200):
        controller.observe(sequence(None), 4, 4)
    assert controller.choose([sequence(None)], [MAX_K])[0] > 4
    for _ in range(200):
        controller.observe(sequence(None), 0, 4)
    assert controller.choose([sequence(None)], [MAX_K]) == [0]


def test_acceptance_is_kept_by_proposer_name() -> None:
    state = sequence(None)
    LengthController("draft", StepCost(), None).observe(state, 1, 2)
    LengthController("ngram", StepCost(), None).observe(state, 0, 2)
    assert state.acceptance["draft"].accepted == 1
    assert state.acceptance["ngram"].accepted == 0
