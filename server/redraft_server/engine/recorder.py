"""A finished completion as a traffic record."""

from __future__ import annotations

import logging
import time
from typing import Protocol

from redraft.traffic.record import SamplingRecord, StepRecord, TeacherPosition, Timings, TrafficRecord
from redraft.traffic.writer import TrafficObserver
from redraft_server.engine.api import EngineInfo
from redraft_server.engine.request import Completion, VerifiedStep

logger = logging.getLogger(__name__)


class RecordSink(Protocol):
    """Where records go; `TrafficWriter` is one. Never blocks, never raises."""

    def offer(self, record: TrafficRecord) -> bool: ...


class Recorder:
    """Builds the record of a completion and offers it to the traffic log.

    Args:
        sink: takes the records.
        info: names the model that the records are of.
        observer: counts records that could not, or must not, be made.
    """

    def __init__(self, sink: RecordSink, info: EngineInfo, observer: TrafficObserver | None = None) -> None:
        self._sink = sink
        self._info = info
        self._observer = observer

    def record(self, completion: Completion, now: float) -> None:
        """Offer the record, unless the request opted out or nothing was generated. Never raises."""
        if completion.num_final_tokens == 0:
            return
        if not completion.request.spec.log_traffic:
            self._count("excluded")
            return
        try:
            self._sink.offer(self._build(completion, now))
        except Exception:
            # A request must get its end, whatever is wrong with its record.
            logger.exception("traffic record not made", extra={"request_id": completion.request.spec.request_id})
            self._count("dropped")
            if self._observer is not None:
                self._observer.observe_traffic_dropped("invalid_record", 1)

    def _count(self, result: str) -> None:
        if self._observer is not None:
            self._observer.observe_traffic_records(result, 1)

    def _build(self, completion: Completion, now: float) -> TrafficRecord:
        request = completion.request
        assert request.first_token is not None
        assert request.first_scheduled is not None
        end = completion.state.num_prompt_tokens + completion.num_final_tokens
        outputs = tuple(completion.state.token_ids[completion.state.num_prompt_tokens : end])
        drafted = [step for step in completion.steps if step.proposal.token_ids]
        return TrafficRecord(
            request_id=request.spec.request_id,
            sample_index=completion.index,
            created_unix_s=time.time(),
            tenant=request.spec.tenant,
            domain=request.spec.domain,
            model=self._info.model,
            target_fingerprint=self._info.target_fingerprint,
            tokenizer_fingerprint=self._info.tokenizer_fingerprint,
            draft_version=completion.counters.draft_version,
            prompt_token_ids=request.spec.prompt_token_ids,
            output_token_ids=outputs,
            finish_reason=completion.finish_reason.value if completion.finish_reason else "",
            sampling=_sampling_record(completion),
            timings=Timings(
                queue_s=request.first_scheduled - request.arrived,
                ttft_s=request.first_token - request.arrived,
                decode_s=now - request.first_token,
            ),
            steps=tuple(_step_record(step) for step in drafted),
            teacher=tuple(position for step in completion.steps for position in _teacher_positions(step, len(outputs))),
            cached_prompt_tokens=request.cached_prompt_tokens,
        )


def _sampling_record(completion: Completion) -> SamplingRecord:
    params = completion.request.spec.sampling
    seed = params.seed
    if seed is not None and seed >= 1 << 63:
        seed -= 1 << 64  # the column is a signed 64-bit integer
    return SamplingRecord(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        seed=seed,
        coupling=params.effective_coupling.value,
        logit_bias=params.logit_bias,
    )


def _step_record(step: VerifiedStep) -> StepRecord:
    return StepRecord(
        start=step.start,
        drafted_token_ids=step.proposal.token_ids,
        num_accepted=step.num_accepted,
        proposer=step.proposal.proposer,
        draft_version=step.proposal.draft_version,
    )


def _teacher_positions(step: VerifiedStep, num_output_tokens: int) -> list[TeacherPosition]:
    record = _step_record(step)
    return [
        TeacherPosition(
            output_index=step.start + offset,
            context_drafted=record.context_of(offset, num_output_tokens),
            ids=row.ids,
            logits=row.logits,
            logsumexp=row.logsumexp,
            sampling_logsumexp=row.sampling_logsumexp,
        )
        for offset, row in enumerate(step.teacher)
    ]
