"""A sequence in the middle of its decoding, as proposers and the verifier see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from redraft.models.block_pool import ROOT_HASH
from redraft.sampling.params import Coupling, SamplingParams
from redraft.sampling.processors import SamplingRow

if TYPE_CHECKING:
    from redraft.speculation.length import Acceptance


@dataclass(slots=True)
class SequenceState:
    """Tokens, sampling parameters and how far each model's KV reaches.

    Invariants between steps: 0 <= num_draft_computed <= len(token_ids), 0 <= num_computed < len(token_ids) (the last
    token is always still to be computed), and `block_ids` covers num_computed positions at least.
    """

    token_ids: list[int]
    num_prompt_tokens: int
    params: SamplingParams
    key: int  # randomness, unsigned 64 bit
    min_new_tokens: int = 0
    end_token_ids: tuple[int, ...] = ()  # banned before min_new_tokens
    num_computed: int = 0  # target KV
    num_draft_computed: int = 0  # draft KV, of the draft whose epoch is draft_epoch
    draft_epoch: int = -1
    draft_version: str = ""  # of the draft that serves this sequence, once one has been chosen
    route: int = 0  # unsigned 64 bit: what a draft is chosen by when several serve; the same for a request's samples
    draft_rebuild_end: int = 0  # positions below it lack only draft KV, after a change of draft
    num_draft_marked_blocks: int = 0  # leading blocks known to the pool as filled by that draft
    block_ids: list[int] = field(default_factory=list)
    num_admissions: int = 0  # times it was given blocks; KV written before the last one is gone
    num_registered_blocks: int = 0  # leading blocks in the prefix cache
    prefix_hash: bytes = ROOT_HASH  # of those blocks
    coupling: Coupling = Coupling.MAXIMAL
    acceptance: dict[str, Acceptance] = field(default_factory=dict)  # by proposer

    def __post_init__(self) -> None:
        self.coupling = self.params.effective_coupling

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_pending(self) -> int:
        """Tokens whose target KV is missing; 1 in steady decoding."""
        return len(self.token_ids) - self.num_computed

    def sampling_row_of(self, index: int) -> SamplingRow:
        """How the output token at `index` of `token_ids` was to be drawn."""
        banned = self.end_token_ids if index - self.num_prompt_tokens < self.min_new_tokens else ()
        if not self.params.has_penalties:
            return SamplingRow(self.params, banned_ids=banned)
        outputs = self.token_ids[self.num_prompt_tokens : index]
        return SamplingRow(
            self.params, prompt_ids=self.token_ids[: self.num_prompt_tokens], output_ids=outputs, banned_ids=banned
        )

    def sampling_row(self, drafted: Sequence[int] = ()) -> SamplingRow:
        """How the token after `token_ids + drafted` is to be drawn."""
        banned = self.end_token_ids if self.num_output_tokens + len(drafted) < self.min_new_tokens else ()
        if not self.params.has_penalties:
            return SamplingRow(self.params, banned_ids=banned)
        return SamplingRow(
            self.params,
            prompt_ids=self.token_ids[: self.num_prompt_tokens],
            output_ids=[*self.token_ids[self.num_prompt_tokens :], *drafted],
            banned_ids=banned,
        )
