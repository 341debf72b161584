"""From emitted token ids to text on the stream: detokenising, stop conditions, and where a completion is cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from redraft.models.tokenizer import IncrementalDetokenizer, Tokenizer
from redraft.sampling.params import StoppingParams
from redraft_server.engine.api import FinishReason


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """What one step added. `num_tokens` of the emitted tokens count; the rest lies behind the end."""

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None


class CompletionOutput:
    """Text of one completion. Holds back what might still turn out to be the start of a stop sequence."""

    def __init__(
        self, tokenizer: Tokenizer, stopping: StoppingParams, *, eos_token_ids: frozenset[int], max_new_tokens: int
    ) -> None:
        self._detokenizer: IncrementalDetokenizer = tokenizer.detokenizer()
        self._stopping = stopping
        self._eos_token_ids = frozenset() if stopping.ignore_eos else eos_token_ids
        self._max_new_tokens = max_new_tokens
        self._held = ""
        self.num_tokens = 0

    def push(self, token_ids: Sequence[int]) -> OutputDelta:
        """Take a step's tokens, one after the other, up to the first that ends the completion."""
        pieces: list[str] = []
        for index, token_id in enumerate(token_ids):
            self.num_tokens += 1
            ended = self._take(token_id, pieces)
            if ended is not None:
                reason, matched = ended
                return OutputDelta("".join(pieces), index + 1, reason, matched)
        return OutputDelta("".join(pieces), len(token_ids))

    def finish(self) -> str:
        """Text still held back when the completion is ended from outside (cancel, deadline, shutdown)."""
        text = self._held + self._detokenizer.flush()
        self._held = ""
        return text

    def _take(self, token_id: int, pieces: list[str]) -> tuple[FinishReason, str | int | None] | None:
        if token_id in self._eos_token_ids:
            pieces.append(self.finish())
            return FinishReason.EOS, None
        if token_id in self._stopping.stop_token_ids:
            if self._stopping.include_stop_sequence:
                self._held += self._detokenizer.push([token_id])
            pieces.append(self.finish())
            return FinishReason.STOP_SEQUENCE, token_id
        seen = len(self._held)
        self._held += self._detokenizer.push([token_id])
        matched = self._cut_at_stop_sequence(pieces, seen)
        if matched is not None:
            return FinishReason.STOP_SEQUENCE, matched
        if self.num_tokens >= self._max_new_tokens:
            self._held += self._detokenizer.flush()
            matched = self._cut_at_stop_sequence(pieces, seen)
            pieces.append(self._held)
            self._held = ""
            return (FinishReason.LENGTH, None) if matched is None else (FinishReason.STOP_SEQUENCE, matched)
        keep = self._possible_stop_length()
        pieces.append(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return None

    def _cut_at_stop_sequence(self, pieces: list[str], seen: int) -> str | None:
        """Release text up to the earliest stop sequence that ends behind the first `seen` characters held (ties: the
        first listed). One that ended earlier was passed over, as it came before min_new_tokens."""
        if self.num_tokens < self._stopping.min_new_tokens:
            return None
        found = [(self._held.find(s, max(0, seen - len(s) + 1)), s) for s in self._stopping.stop_sequences]
        found = [item for item in found if item[0] >= 0]
        if not found:
            return None
        at, stop = min(found, key=lambda item: item[0])
        pieces.append(self._held[: at + len(stop)] if self._stopping.include_stop_sequence else self._held[:at])
        self._held = ""
        return stop

    def _possible_stop_length(self) -> int:
        """Length of the longest end of the held text that starts a stop sequence."""
        longest = 0
        for stop in self._stopping.stop_sequences:
            for size in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:size]):
                    longest = size
                    break
        return longest
