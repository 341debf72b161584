"""Replies: plain data of the engine in, protobuf out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from google.protobuf.duration_pb2 import Duration

from redraft.sampling.params import Coupling
from redraft.v1 import generation_pb2 as pb
from redraft.v1 import model_pb2
from redraft_server.engine.api import (
    ChoiceDelta,
    EngineInfo,
    EngineRequest,
    FinishReason,
    RequestFinished,
    SpeculationStats,
    TokenLogprob,
)

TokenText = Callable[[int], str]

_FINISH_REASONS = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.EOS: pb.FINISH_REASON_EOS,
    FinishReason.STOP_SEQUENCE: pb.FINISH_REASON_STOP_SEQUENCE,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.DEADLINE: pb.FINISH_REASON_DEADLINE,
    FinishReason.SHUTDOWN: pb.FINISH_REASON_SHUTDOWN,
    # FinishReason.ERROR never leaves as a message: the RPC ends with INTERNAL.
}
_COUPLINGS = {Coupling.MAXIMAL: pb.COUPLING_MAXIMAL, Coupling.DRAFTER_INVARIANT: pb.COUPLING_DRAFTER_INVARIANT}


class ReplyBuilder:
    """Builds the messages of one request: knows what the caller asked for and how tokens read."""

    def __init__(
        self, info: EngineInfo, request: EngineRequest, *, wants_token_ids: bool, token_text: TokenText
    ) -> None:
        self._info = info
        self._request = request
        self._wants_token_ids = wants_token_ids
        self._token_text = token_text

    def unary(self, choices: Iterable[ChoiceDelta], finished: RequestFinished) -> pb.GenerateResponse:
        """The whole answer; `choices` has one delta per choice."""
        return pb.GenerateResponse(
            request_id=self._request.request_id,
            choices=[
                pb.Choice(
                    index=choice.index,
                    text=choice.text,
                    token_ids=choice.token_ids if self._wants_token_ids else (),
                    logprobs=self._logprobs(choice.logprobs),
                    finish_reason=_FINISH_REASONS[choice.finish_reason],
                    matched_stop=_matched_stop(choice.matched_stop),
                )
                for choice in choices
            ],
            prompt_logprobs=self._prompt_logprobs(finished),
            completion=self._completion(finished),
        )

    def deltas(self, deltas: Iterable[ChoiceDelta]) -> pb.StreamGenerateResponse:
        """One message of a stream."""
        return pb.StreamGenerateResponse(
            request_id=self._request.request_id,
            deltas=[
                pb.ChoiceDelta(
                    index=delta.index,
                    text=delta.text,
                    token_ids=delta.token_ids if self._wants_token_ids else (),
                    logprobs=self._logprobs(delta.logprobs),
                    finish_reason=_FINISH_REASONS[delta.finish_reason],
                    matched_stop=_matched_stop(delta.matched_stop),
                )
                for delta in deltas
            ],
        )

    def last(self, finished: RequestFinished) -> pb.StreamGenerateResponse:
        """The last message of a stream."""
        return pb.StreamGenerateResponse(
            request_id=self._request.request_id,
            prompt_logprobs=self._prompt_logprobs(finished),
            completion=self._completion(finished),
        )

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> list[pb.TokenLogprob]:
        if self._request.logprobs is None:
            return []
        return [self._logprob(entry) for entry in logprobs]

    def _prompt_logprobs(self, finished: RequestFinished) -> list[pb.TokenLogprob]:
        entries = finished.prompt_logprobs
        if self._request.prompt_logprobs is None or entries is None:
            return []
        prompt = self._request.prompt_token_ids
        return [
            pb.TokenLogprob(token_id=token_id, text=self._token_text(token_id))
            if entry is None
            else self._logprob(entry)
            for token_id, entry in zip(prompt, entries, strict=True)
        ]

    def _logprob(self, entry: TokenLogprob) -> pb.TokenLogprob:
        return pb.TokenLogprob(
            token_id=entry.token_id,
            text=self._token_text(entry.token_id),
            logprob=entry.logprob,
            rank=entry.rank,
            top=[
                pb.TopLogprob(token_id=token_id, text=self._token_text(token_id), logprob=logprob)
                for token_id, logprob in entry.top
            ],
        )

    def _completion(self, finished: RequestFinished) -> pb.Completion:
        sampling = self._request.sampling
        seed = finished.seed if finished.seed is not None else sampling.seed
        return pb.Completion(
            model=self._info.model,
            model_revision=self._info.model_revision,
            usage=pb.Usage(
                prompt_tokens=finished.prompt_tokens,
                completion_tokens=finished.completion_tokens,
                cached_prompt_tokens=finished.cached_prompt_tokens,
            ),
            timings=_timings(finished),
            speculation=_speculation(finished.speculation),
            seed=seed or 0,
            coupling=_COUPLINGS[sampling.effective_coupling],
        )


def model_to_pb(info: EngineInfo, *, has_chat_template: bool) -> model_pb2.Model:
    return model_pb2.Model(
        id=info.model,
        revision=info.model_revision,
        context_length=info.context_length,
        vocab_size=info.vocab_size,
        target_fingerprint=info.target_fingerprint,
        tokenizer_fingerprint=info.tokenizer_fingerprint,
        eos_token_ids=sorted(info.eos_token_ids),
        has_chat_template=has_chat_template,
        quantization=info.dtype,
        speculation=model_pb2.SpeculationConfig(
            proposer=info.proposer,
            max_draft_tokens=0 if info.proposer == "none" else info.num_speculative_tokens,
            draft_version=info.draft_version,
        ),
    )


def _matched_stop(stop: str | int | None) -> pb.MatchedStop | None:
    if stop is None:
        return None
    return pb.MatchedStop(sequence=stop) if isinstance(stop, str) else pb.MatchedStop(token_id=stop)


def _timings(finished: RequestFinished) -> pb.Timings:
    first = finished.time_to_first_token_s
    return pb.Timings(
        queue=_duration(finished.queue_s),
        time_to_first_token=None if first is None else _duration(first),
        prefill=_duration(finished.prefill_s),
        decode=_duration(finished.decode_s),
        total=_duration(finished.total_s),
    )


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(seconds * 1e9))
    return duration


def _speculation(stats: SpeculationStats) -> pb.SpeculationStats:
    return pb.SpeculationStats(
        draft_version=stats.draft_version,
        spec_steps=stats.spec_steps,
        draft_tokens=stats.draft_tokens,
        accepted_tokens=stats.accepted_tokens,
        acceptance_histogram=stats.acceptance_histogram,
        max_draft_tokens=stats.max_draft_tokens,
        expected_acceptance_sum=stats.expected_acceptance_sum,
        expected_acceptance_positions=stats.expected_acceptance_positions,
        verify_steps=stats.verify_steps,
        truncated_tokens=stats.truncated_tokens,
    )
