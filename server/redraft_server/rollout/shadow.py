"""How well would this draft have done? Its α at positions that the target verifies anyway, while it serves nobody."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from redraft.models.runner import Chunk, ModelRunner
from redraft.sampling.processors import SamplingRow, probabilities
from redraft.sampling.randomness import mix64
from redraft.speculation.draft_model import DraftModelProposer
from redraft.speculation.state import SequenceState
from redraft.speculation.step import Verified

logger = logging.getLogger(__name__)

TIME_SHARE = 0.1
"""Of the engine's time that may go into scoring."""
MAX_SEQUENCES = 4
MAX_TOKENS = 32
"""In one pass of the candidate: as much as a draft pass costs anyway, for reading its weights once."""
_FORGET_AFTER = 16  # steps without a sign of life


@dataclass(frozen=True, slots=True)
class ShadowScore:
    """Sums over positions. `paired_*`: over those at which the draft in service was tested too."""

    expected_sum: float = 0.0
    num_positions: int = 0
    paired_sum: float = 0.0
    paired_active_sum: float = 0.0
    num_paired: int = 0

    @property
    def expected_acceptance(self) -> float | None:
        return self.expected_sum / self.num_positions if self.num_positions else None

    @property
    def difference(self) -> float | None:
        """Candidate's α minus that of the draft in service, over the same positions."""
        return (self.paired_sum - self.paired_active_sum) / self.num_paired if self.num_paired else None


@dataclass(slots=True)
class _Followed:
    state: SequenceState
    num_admissions: int
    num_computed: int = 0  # positions with the candidate's KV
    last_seen: int = 0


class ShadowScorer:
    """A `StepObserver` that runs a candidate over what live sequences emit.

    It follows a few sequences: the candidate's KV is filled in slices, at the sequences' own block ids, and once it
    has caught up, its q is compared with the p that verification used. One pass of at most `MAX_TOKENS` tokens at a
    time, and no pass before the engine has spent `1 / time_share` times as long on its own work as on the last.

    Args:
        runner: the candidate's; nobody else uses it meanwhile.
        share: of the requests that may be followed, 0 to 1.
    """

    def __init__(self, runner: ModelRunner, share: float, *, time_share: float = TIME_SHARE) -> None:
        self._runner = runner
        self._share = share
        self._time_share = time_share
        self._followed: dict[int, _Followed] = {}
        self._steps = 0
        self._rest_until = 0.0
        self._lock = threading.Lock()
        self._score = ShadowScore()
        self._broken = False

    @property
    def score(self) -> ShadowScore:
        """So far. Any thread."""
        with self._lock:
            return self._score

    def observe(self, verified: Sequence[Verified]) -> None:
        """On the engine's thread. An error ends the scoring, never a request."""
        if self._broken:
            return
        try:
            self._observe(verified)
        except Exception:
            self._broken = True
            logger.exception("shadow scoring failed and has ended")

    @property
    def is_broken(self) -> bool:
        return self._broken

    def _observe(self, verified: Sequence[Verified]) -> None:
        self._steps += 1
        mine = [v for v in verified if self._follows(v.state)]
        for key in [key for key, f in self._followed.items() if self._steps - f.last_seen > _FORGET_AFTER]:
            del self._followed[key]
        started = time.perf_counter()
        if not mine or started < self._rest_until:
            return
        turn = self._steps % len(mine)
        self._run(mine[turn:] + mine[:turn])
        finished = time.perf_counter()
        self._rest_until = finished + (finished - started) / self._time_share

    def _follows(self, state: SequenceState) -> bool:
        """Whether this sequence is one of ours, from now on if there is room."""
        followed = self._followed.get(id(state))
        if followed is None:
            # another hash than the router's, or only one draft's sequences would be followed
            chosen = mix64(state.route ^ 0x5AD0) / 2.0**64 < self._share
            if not chosen or len(self._followed) >= MAX_SEQUENCES:
                return False
            followed = self._followed[id(state)] = _Followed(state, state.num_admissions)
        if followed.num_admissions != state.num_admissions:  # preempted in between: other blocks
            followed.num_computed, followed.num_admissions = 0, state.num_admissions
        followed.last_seen = self._steps
        return True

    def _run(self, mine: Sequence[Verified]) -> None:
        """One pass: whoever can be scored with it is, of the others it fills KV."""
        budget = MAX_TOKENS
        chunks: list[Chunk] = []
        scored: list[tuple[Verified, int]] = []  # and of how many of its last tokens
        for v in mine:
            followed = self._followed[id(v.state)]
            start, end = followed.num_computed, len(v.state.token_ids) - 1  # the newest token is nobody's context yet
            length = min(end - start, budget)
            if length <= 0:
                continue
            rows = min(len(v.probs), length) if start + length == end else 0
            chunks.append(Chunk(v.state.token_ids[start : start + length], start, v.state.block_ids, rows))
            if rows:
                scored.append((v, rows))
            followed.num_computed += length
            budget -= length
        if chunks:
            logits = self._runner.forward(chunks)
            if scored:
                self._add(scored, logits)

    def _add(self, scored: Sequence[tuple[Verified, int]], logits: torch.Tensor) -> None:
        """logits: [sum of the rows, vocab_size], in the order of `scored`."""
        sampling: list[SamplingRow] = []
        for v, rows in scored:
            end = len(v.state.token_ids)
            sampling += [v.state.sampling_row_of(index) for index in range(end - rows, end)]
        q = probabilities(logits, sampling).nan_to_num_(nan=0.0)
        p = torch.cat([v.probs[len(v.probs) - rows :] for v, rows in scored]).to(q.device)
        alphas = torch.minimum(p, q).sum(dim=1).tolist()
        paired_sum = active_sum = 0.0
        num_paired = first = 0
        for v, rows in scored:
            skipped = len(v.probs) - rows
            if v.proposal.proposer == DraftModelProposer.name:
                active = v.expected_acceptance[skipped:]
                paired_sum += sum(alphas[first : first + len(active)])
                active_sum += sum(active)
                num_paired += len(active)
            first += rows
        with self._lock:
            old = self._score
            self._score = ShadowScore(
                old.expected_sum + sum(alphas),
                old.num_positions + len(alphas),
                old.paired_sum + paired_sum,
                old.paired_active_sum + active_sum,
                old.num_paired + num_paired,
            )
