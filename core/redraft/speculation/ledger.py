"""Whether drafting pays, by its account: what it has taken beside what its accepted tokens have saved."""

from __future__ import annotations

_PATIENCE = 8.0  # plain steps that drafting may lose while it promises to pay
_TRIAL_PRICE = 0.6  # plain steps that a trial is taken to cost at least
_BUDGET = 0.02  # of the time of plain decoding, for trials


class Ledger:
    """Closes drafting that promises to pay and does not, and tries it now and then where it promises nothing.

    Predicted goodput can be wrong in ways that no prediction shows; losses show here. The account is a one-sided
    cumulative sum (CUSUM; Page 1954): gains are no cushion for later losses. What was lost is earned back before the
    next trial, so a draft that is no good costs about `_BUDGET` of the time, however wrong the prediction. A trial is
    one step: many short ones see more requests than few long ones, and a canary counts requests.
    """

    def __init__(self) -> None:
        self._loss = 0.0  # seconds
        self._closed = 0.0  # seconds of plain decoding still to come, whatever is promised
        self._wait = 0.0  # the same while nothing is promised

    def charge(self, seconds: float) -> None:
        """Time that a plain step would not have taken."""
        self._loss += seconds

    def credit(self, seconds: float) -> None:
        """Time that plain steps would have taken for what was accepted."""
        self._loss = max(0.0, self._loss - seconds)

    def is_open(self, plain_seconds: float, *, is_promising: bool) -> bool:
        """Whether to draft in this step; asked once a step.

        Args:
            plain_seconds: of a step without drafting; 0: not known yet.
            is_promising: whether drafting is predicted to pay.
        """
        if self._closed > 0.0:
            self._closed -= plain_seconds
            if self._closed > 0.0:
                return False
        elif is_promising:
            if self._loss <= _PATIENCE * plain_seconds or plain_seconds == 0.0:
                return True
            self._closed = self._settle(plain_seconds)
            return False
        elif self._wait <= 0.0:
            self._wait = self._settle(plain_seconds)
            return False
        else:
            self._wait -= plain_seconds
            if self._wait > 0.0:
                return False
        self._wait = 0.0
        return True

    def skip(self, plain_seconds: float, most: int) -> int:
        """Steps that need not ask, at most so many, since they would be refused; they count as if they had."""
        left = self._closed or self._wait
        steps = 0 if plain_seconds <= 0.0 else max(0, min(most, int(left / plain_seconds) - 1))
        if self._closed > 0.0:
            self._closed -= steps * plain_seconds
        else:
            self._wait -= steps * plain_seconds
        return steps

    def _settle(self, plain_seconds: float) -> float:
        """Write off what was lost; the time that pays for it."""
        loss, self._loss = max(self._loss, _TRIAL_PRICE * plain_seconds), 0.0
        return loss / _BUDGET
