"""One served sequence as training sees it. Plain values only, as in the traffic record that it comes from.

A *position* predicts one token. On the path it predicts output token i; off the path (after a rejected draft token) it
predicts what the target would have said had the rejected tokens been the text: those positions hang off the text as
branches.

Worked example: output `[7, 8, 9, 3]`, a verify step at 2 drafted `[9, 4, 5]` of which one was accepted. `labels` are
the teacher's predictions of outputs 0..3; the rejected rest is
`Branch(start=3, token_ids=(4, 5), labels=(after 4, after 5))`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from redraft.sampling.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Label:
    """The target's captured prediction at one position: its largest raw logits, best first, and two normalisers.

    `logsumexp` normalises the raw logits at temperature 1; `sampling_logsumexp` those after the request's penalties,
    bias, bans and temperature, before truncation (None at temperature 0).

    What was read from a log holds its numbers in `array.array`, which takes a quarter of a tuple's memory: half a
    kilobyte a label instead of two.
    """

    ids: Sequence[int]
    logits: Sequence[float]
    logsumexp: float
    sampling_logsumexp: float | None


@dataclass(frozen=True, slots=True)
class Branch:
    """Rejected draft tokens, as text that follows the first `start` output tokens. `labels[i]` predicts what comes
    after `token_ids[i]`; None where nothing was captured."""

    start: int
    token_ids: tuple[int, ...]
    labels: tuple[Label | None, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A sequence, its sampling parameters, and the teacher's labels as far as they were captured.

    `labels[i]` predicts `output_token_ids[i]`; its length is that of the output.
    """

    request_id: str
    sample_index: int
    domain: str  # the record's domain, else its tenant
    created_unix_s: float
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    params: SamplingParams
    labels: tuple[Label | None, ...]
    branches: tuple[Branch, ...] = ()
    tenant: str = ""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """The text: prompt and output."""
        return (*self.prompt_token_ids, *self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens to run through a model: prompt, output and branches."""
        branch_tokens = sum(len(branch.token_ids) for branch in self.branches)
        return len(self.prompt_token_ids) + len(self.output_token_ids) + branch_tokens
