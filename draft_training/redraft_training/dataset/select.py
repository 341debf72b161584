"""Which traffic is learnt from, which is held out, and a traffic record as an example.

All pure functions of the record: the same record gets the same answer in every run, on every machine.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from dataclasses import dataclass, field
from enum import StrEnum

from redraft.sampling.params import Coupling, SamplingParams
from redraft.traffic.record import SamplingRecord, TeacherPosition, TrafficRecord
from redraft_training.dataset.example import Branch, Example, Label

_DRAFT_MODEL = "draft_model"  # StepRecord.proposer of a draft model's steps


class Skip(StrEnum):
    """Why a record is not used."""

    OTHER_TARGET = "other_target"
    OTHER_TOKENIZER = "other_tokenizer"
    EXCLUDED = "excluded"  # its request id or tenant is on the exclusion list
    NOT_SELECTED = "not_selected"  # another domain or tenant than asked for
    FUTURE = "future"  # a server's clock is ahead: it is used once that time has come
    EMPTY = "empty"  # no output, or no prompt to predict it from
    INVALID = "invalid"  # parameters that no request can have, or ids beyond the vocabulary
    DUPLICATE = "duplicate"  # same request id and sample index as one before
    OVER_LIMIT = "over_limit"  # older than what fits the size limit


@dataclass(frozen=True, slots=True)
class TargetIdentity:
    """What traffic must be of: logits mean nothing for another target, ids nothing for another vocabulary."""

    target_fingerprint: str
    tokenizer_fingerprint: str
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Selection:
    """What of the log is wanted.

    Attributes:
        since, until: `since <= created_unix_s < until`; None: no bound.
        domains, tenants: empty: all. A record's domain is its own, else its tenant.
        exclude_request_ids, exclude_tenants: people who took back their consent after the fact. (A request that opted
            out when it was made never reached the log.)
        held_out_share: share of requests that are never trained on, by a hash of the request id.
        max_tokens: the newest examples up to so many tokens are used. Bounds memory: about 0.5 KB for every label.
    """

    since: float | None = None
    until: float | None = None
    domains: frozenset[str] = field(default_factory=frozenset)
    tenants: frozenset[str] = field(default_factory=frozenset)
    exclude_request_ids: frozenset[str] = field(default_factory=frozenset)
    exclude_tenants: frozenset[str] = field(default_factory=frozenset)
    held_out_share: float = 0.1
    max_tokens: int = 2_000_000

    def __post_init__(self) -> None:
        if not 0.0 <= self.held_out_share < 1.0:
            raise ValueError("held_out_share must be at least 0 and below 1")
        if self.max_tokens < 1:
            raise ValueError("max_tokens must be positive")


def is_held_out(request_id: str, share: float) -> bool:
    """Whether a request belongs to the held-out traffic, for ever: all its samples and retries share the answer.

    A larger share holds out the same requests and more.
    """
    digest = hashlib.blake2b(request_id.encode("utf-8", "surrogatepass"), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "big") < share * 2**64


def domain_of(record: TrafficRecord) -> str:
    return record.domain or record.tenant


def reason_to_skip(record: TrafficRecord, identity: TargetIdentity, selection: Selection) -> Skip | None:
    """Why the record is of no use, or None. Knows nothing of the records before it."""
    if record.tokenizer_fingerprint != identity.tokenizer_fingerprint:
        return Skip.OTHER_TOKENIZER
    if record.target_fingerprint != identity.target_fingerprint:
        return Skip.OTHER_TARGET
    if record.request_id in selection.exclude_request_ids or record.tenant in selection.exclude_tenants:
        return Skip.EXCLUDED
    if selection.domains and domain_of(record) not in selection.domains:
        return Skip.NOT_SELECTED
    if selection.tenants and record.tenant not in selection.tenants:
        return Skip.NOT_SELECTED
    if not record.output_token_ids or not record.prompt_token_ids:
        return Skip.EMPTY
    if not _ids_are_known(record, identity.vocab_size):
        return Skip.INVALID
    return None


def to_example(record: TrafficRecord) -> Example:
    """A record as training sees it. See `Example` for a worked example.

    Labels on the path are those of all steps, with a draft or without. Branches are the rejected tokens of the draft
    model: where a look-up in the text was wrong, no draft will ever be. Predictions of what comes behind the end of the
    output (a stop cut accepted tokens off) are left out: no draft is ever asked there.

    A ban of end-of-text before `min_new_tokens` is not part of the record, so at those few positions a captured label
    gives end-of-text its unbanned probability.

    Raises InvalidParameter for sampling parameters that no request can have.
    """
    params = sampling_params(record.sampling)
    captured = {(position.output_index, position.context_drafted): position for position in record.teacher}
    num_output = len(record.output_token_ids)
    branches = []
    for step in record.steps:
        start = step.start + step.num_accepted
        rejected = step.drafted_token_ids[step.num_accepted :]
        if step.proposer == _DRAFT_MODEL and rejected and start < num_output:
            labels = (captured.get((start + n, rejected[:n])) for n in range(1, len(rejected) + 1))
            branches.append(Branch(start, rejected, tuple(_label(position, params) for position in labels)))
    return Example(
        request_id=record.request_id,
        sample_index=record.sample_index,
        domain=domain_of(record),
        created_unix_s=record.created_unix_s,
        prompt_token_ids=record.prompt_token_ids,
        output_token_ids=record.output_token_ids,
        params=params,
        labels=tuple(_label(captured.get((index, ())), params) for index in range(num_output)),
        branches=tuple(branches),
        tenant=record.tenant,
    )


def sampling_params(sampling: SamplingRecord) -> SamplingParams:
    """The parameters of a request as it made them. Raises InvalidParameter."""
    return SamplingParams(
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        logit_bias=sampling.logit_bias,
        seed=None if sampling.seed is None else sampling.seed % 2**64,
        coupling=Coupling(sampling.coupling),
    )


def _label(position: TeacherPosition | None, params: SamplingParams) -> Label | None:
    if position is None or not position.ids or not math.isfinite(position.logsumexp):
        return None
    normaliser = position.sampling_logsumexp
    if normaliser is None and not params.is_greedy:
        if params.temperature != 1.0 or params.has_penalties or params.logit_bias:
            return None  # a shard of before the column existed: the kept ids have no known probability
        normaliser = position.logsumexp
    return Label(array("i", position.ids), array("f", position.logits), position.logsumexp, normaliser)


def _ids_are_known(record: TrafficRecord, vocab_size: int) -> bool:
    parts = [record.prompt_token_ids, record.output_token_ids]
    parts += [step.drafted_token_ids for step in record.steps]
    parts += [position.ids for position in record.teacher]
    return all(min(part) >= 0 and max(part) < vocab_size for part in parts if part)
