"""Expected acceptance of a draft on held-out text, position by position: α = Σ_v min(p_v, q_v).

*Teacher-forced*: the prefix of every position is the text that the target wrote. p and q are both made by
`redraft.sampling.processors.probabilities` with the request's own parameters, so α is exactly the probability that the
server, under maximal coupling, accepts a token drafted there. A greedy request has one-hot p and q, and α is 1 where
the two agree and 0 elsewhere.

What it is not: the acceptance of the d-th token of one proposal. That one sits behind d - 1 *accepted* tokens, and an
accepted prefix follows min(p, q), not p: it is likelier among prefixes on which the draft is good. At temperature 0
there is one accepted prefix, the target's text, and the two are equal; above, realised acceptance at depth is somewhat
higher than teacher-forced α says. `replay` measures it. Under drafter-invariant coupling α is an upper bound.

Output position 0 is not scored: the step that ends the prefill drafts nothing (unless its last chunk is one token).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from redraft.sampling.processors import SamplingRow, probabilities
from redraft_training.dataset.batch import Batch
from redraft_training.evaluate.errors import NothingToScore
from redraft_training.evaluate.progress import batch_progress
from redraft_training.objectives.targets import Targets, Teacher
from redraft_training.student.student import Student, StudentOutput

Floats = npt.NDArray[np.float64]

EXACT_TAIL = 1e-4
"""Captured labels whose missing ids have at most this probability count as exact; no score is off by more."""

_CHUNK_ELEMENTS = 1 << 23  # of one [positions, vocab_size] float32 tensor: 32 MB
GREEDY, SAMPLED = "greedy", "sampled"


@dataclass(frozen=True, slots=True, eq=False)
class ExampleScore:
    """One sequence. `alpha` [output tokens] float64 by output position, NaN where nothing is known."""

    request_id: str
    sample_index: int
    domain: str
    sampling: str  # `greedy` or `sampled`
    alpha: Floats

    @property
    def key(self) -> tuple[str, int]:
        return self.request_id, self.sample_index


@dataclass(frozen=True, slots=True)
class MeanAlpha:
    """α, mean over positions (not over requests: it is positions that the server drafts for)."""

    alpha: float
    num_positions: int
    num_requests: int


@dataclass(frozen=True, slots=True, eq=False)
class DraftScores:
    """One draft on held-out examples. `num_non_finite` counts positions at which its logits overflowed."""

    draft_version: str
    examples: tuple[ExampleScore, ...]
    num_non_finite: int = 0

    @property
    def num_unscored(self) -> int:
        """Positions without an exact teacher prediction."""
        return sum(int(np.isnan(example.alpha[1:]).sum()) for example in self.examples)

    def overall(self) -> MeanAlpha:
        """Raises `NothingToScore` if no position was scored."""
        return mean_alpha(self.examples)

    def by_domain(self) -> dict[str, MeanAlpha]:
        """Sorted by name; a domain without a scored position is left out."""
        return _grouped(self.examples, lambda example: example.domain)

    def by_sampling(self) -> dict[str, MeanAlpha]:
        """`greedy` and `sampled`, as far as there are any."""
        return _grouped(self.examples, lambda example: example.sampling)

    def by_position(self) -> dict[str, MeanAlpha]:
        """By output position in doubling buckets: `1`, `2-3`, `4-7`, ..."""
        result: dict[str, MeanAlpha] = {}
        longest = max((len(example.alpha) for example in self.examples), default=0)
        for first, last in position_buckets(longest):
            parts = [example.alpha[first:last] for example in self.examples]
            values = np.concatenate(parts) if parts else np.empty(0)
            known = ~np.isnan(values)
            if known.any():
                requests = {e.request_id for e, p in zip(self.examples, parts, strict=True) if not np.isnan(p).all()}
                result[bucket_name(first, last)] = MeanAlpha(
                    float(values[known].mean()), int(known.sum()), len(requests)
                )
        return result


def score_drafts(
    students: Mapping[str, Student],
    batches: Iterable[Batch],
    *,
    vocab_size: int,
    captured: Teacher | None = None,
    rerun: Teacher | None = None,
    num_batches: int | None = None,
) -> dict[str, DraftScores]:
    """Score several drafts (by version) on the same batches, so that the teacher is asked once.

    `captured` is used for a batch if its labels are exact at every position to score, otherwise the target is run
    (`rerun`); without `rerun` the positions whose labels are not exact stay unscored. `vocab_size` is that of the
    tokenizer: logits of padding ids beyond it are cut off, as the server does. `num_batches` is for the progress bar.

    Memory: one batch's logits of one draft, and chunks of 32 MB. Batches should be packed without branches.
    Raises ValueError if there is no teacher.
    """
    if captured is None and rerun is None:
        raise ValueError("scoring needs a teacher: captured labels, or the target itself")
    arrays: dict[str, dict[tuple[str, int], ExampleScore]] = {version: {} for version in students}
    non_finite = dict.fromkeys(students, 0)
    with _eval_mode(students.values()), torch.inference_mode(), batch_progress("Scoring", num_batches) as advance:
        for batch in batches:
            wanted = ((batch.depth == 0) & (batch.offset > 0)).nonzero().flatten()
            targets, exact = _targets(batch, captured, rerun, wanted)
            for version, student in students.items():
                alphas, broken = batch_alpha(student(batch), targets, batch.sampling_rows, wanted, vocab_size)
                non_finite[version] += broken
                alphas = torch.where(exact.cpu()[wanted], alphas, torch.nan)
                _store(arrays[version], batch, wanted, alphas)
            advance()
    return {
        version: DraftScores(version, tuple(found.values()), non_finite[version]) for version, found in arrays.items()
    }


def batch_alpha(
    output: StudentOutput, targets: Targets, rows: Sequence[SamplingRow], wanted: Tensor, vocab_size: int
) -> tuple[Tensor, int]:
    """α at the positions `wanted` [m] int64 of a batch -> [m] float64 on the CPU, and at how many q is not finite."""
    parts: list[Tensor] = []
    num_non_finite = 0
    step = max(1, _CHUNK_ELEMENTS // vocab_size)
    for first in range(0, len(wanted), step):
        index = wanted[first : first + step].cpu()
        q = probabilities(_over_vocabulary(output, index, vocab_size), [rows[i] for i in index.tolist()])
        broken = q.isnan().any(dim=1)
        num_non_finite += int(broken.sum())
        q[broken] = 1.0 / vocab_size  # as the proposer does: such a token is drawn uniformly
        p = targets.probs[index.to(targets.probs.device)].to(q.device)
        if targets.ids is None:
            width = min(p.shape[1], vocab_size)
            overlap = torch.minimum(p[:, :width], q[:, :width])
        else:
            ids = targets.ids[index.to(targets.ids.device)].to(q.device)
            overlap = torch.minimum(p, q.gather(1, ids))
        parts.append(overlap.sum(dim=1, dtype=torch.float64).clamp(max=1.0).cpu())
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64), num_non_finite


def mean_alpha(examples: Iterable[ExampleScore]) -> MeanAlpha:
    """Mean over all scored positions. Raises `NothingToScore` if there are none."""
    total, count, requests = 0.0, 0, set()
    for example in examples:
        known = example.alpha[~np.isnan(example.alpha)]
        if len(known):
            total, count = total + float(known.sum()), count + len(known)
            requests.add(example.request_id)
    if not count:
        raise NothingToScore("no position could be scored: there is no held-out traffic with a teacher's predictions")
    return MeanAlpha(total / count, count, len(requests))


def position_buckets(length: int) -> Iterator[tuple[int, int]]:
    """Half-open buckets of output positions up to `length`, each twice as long as the one before.

    >>> list(position_buckets(10))
    [(1, 2), (2, 4), (4, 8), (8, 16)]
    """
    first = 1
    while first < length:
        yield first, 2 * first
        first *= 2


def bucket_name(first: int, last: int) -> str:
    return str(first) if last == first + 1 else f"{first}-{last - 1}"


def _grouped(examples: Sequence[ExampleScore], key: Callable[[ExampleScore], str]) -> dict[str, MeanAlpha]:
    groups: dict[str, list[ExampleScore]] = {}
    for example in examples:
        if not np.isnan(example.alpha).all():
            groups.setdefault(key(example), []).append(example)
    return {name: mean_alpha(groups[name]) for name in sorted(groups)}


def _targets(batch: Batch, captured: Teacher | None, rerun: Teacher | None, wanted: Tensor) -> tuple[Targets, Tensor]:
    """The batch's targets and where they are exact, [n] bool."""
    if captured is not None:
        targets = captured.targets(batch)
        exact = _exact(targets)
        if rerun is None or bool(exact[wanted.to(exact.device)].all()):
            return targets, exact
    assert rerun is not None
    targets = rerun.targets(batch)
    return targets, _exact(targets)


def _exact(targets: Targets) -> Tensor:
    if targets.ids is None or targets.tail is None:
        return targets.known
    return targets.known & (targets.tail <= EXACT_TAIL)


def _over_vocabulary(output: StudentOutput, index: Tensor, vocab_size: int) -> Tensor:
    """Logits of some positions over the target's ids, [len(index), vocab_size]; -inf where the draft has no output."""
    logits = output.logits[index.to(output.logits.device)].float()
    if output.vocab_ids is not None:
        full = logits.new_full((len(index), vocab_size), -torch.inf)
        return full.index_copy_(1, output.vocab_ids.to(logits.device), logits)
    missing = vocab_size - logits.shape[1]
    return torch.nn.functional.pad(logits, (0, missing), value=-torch.inf) if missing > 0 else logits[:, :vocab_size]


def _store(found: dict[tuple[str, int], ExampleScore], batch: Batch, wanted: Tensor, alphas: Tensor) -> None:
    """Write a batch's values into its examples' arrays (an example may be spread over several batches)."""
    own: list[ExampleScore] = []
    for example in batch.examples:
        key = (example.request_id, example.sample_index)
        if key not in found:
            sampling = GREEDY if example.params.is_greedy else SAMPLED
            found[key] = ExampleScore(*key, example.domain, sampling, np.full(len(example.output_token_ids), np.nan))
        own.append(found[key])
    owners, offsets = batch.owner[wanted].tolist(), batch.offset[wanted].tolist()
    for owner, offset, alpha in zip(owners, offsets, alphas.tolist(), strict=True):
        own[owner].alpha[offset] = alpha


@contextmanager
def _eval_mode(students: Iterable[Student]) -> Iterator[None]:
    """Dropout off for as long as it takes."""
    training = [student.model for student in students if student.model.training]
    for model in training:
        torch.nn.Module.train(model, False)
    try:
        yield
    finally:
        for model in training:
            torch.nn.Module.train(model, True)
