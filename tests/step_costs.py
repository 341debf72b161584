"""What passes take, given instead of measured."""

from __future__ import annotations

from redraft.speculation.cost import StepCost


def cost(**seconds_by_size: float) -> StepCost:
    """cost(_1=1.0, _8=2.0): a pass over 1 token takes 1 s, one over 8 takes 2 s."""
    result = StepCost()
    for size, seconds in seconds_by_size.items():
        result.observe(int(size[1:]), seconds)
    return result


def flat(seconds: float) -> StepCost:
    """The same for every size, as on a device that waits for memory."""
    return cost(_1=seconds, _512=seconds)


def linear(seconds_per_token: float) -> StepCost:
    return cost(_1=seconds_per_token, _64=64 * seconds_per_token)
