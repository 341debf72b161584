"""What happens to a step's outputs: text, events for the stream, counters, and the end of a completion."""

from __future__ import annotations

import logging
from collections.abc import Callable

from redraft.speculation.step import StepOutput
from redraft_server.engine.api import ChoiceDelta, EngineEvent, FinishReason, RequestFinished
from redraft_server.engine.observe import DraftMonitor
from redraft_server.engine.recorder import Recorder
from redraft_server.engine.request import Completion, Request, VerifiedStep
from redraft_server.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Delivery:
    """Turns step outputs into events and ends completions. Engine thread only."""

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        clock: Callable[[], float],
        recorder: Recorder | None,
        on_finished: Callable[[Request], None],
        monitor: DraftMonitor | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._recorder = recorder
        self._on_finished = on_finished
        self._monitor = monitor
        self._pending: dict[Request, list[EngineEvent]] = {}

    def deliver(self, completion: Completion, output: StepOutput, prompt_start: int, now: float) -> None:
        """Apply one sequence's step, which ended at `now`. `prompt_start`: its num_computed before the step."""
        request = completion.request
        if completion.finish_reason is not None:
            return  # its request was ended by a sibling in the same step
        if output.failed:
            self.abort(request, FinishReason.ERROR, "the model's logits are not finite")
            return
        for offset, score in enumerate(output.prompt_logprobs):
            request.prompt_logprobs[prompt_start + 1 + offset] = score
        if not output.emitted:
            return
        if request.first_token is None:
            request.first_token = now
        completion.counters.observe(output)
        self._keep_for_record(completion, output)
        delta = completion.output.push(output.emitted)
        completion.num_final_tokens += delta.num_tokens
        completion.counters.truncated_tokens += len(output.emitted) - delta.num_tokens
        self._emit(
            request,
            ChoiceDelta(
                completion.index,
                delta.text,
                output.emitted[: delta.num_tokens],
                output.logprobs[: delta.num_tokens],
                delta.finish_reason,
                delta.matched_stop,
            ),
        )
        if delta.finish_reason is not None:
            self._end(completion, delta.finish_reason)

    def abort(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End whatever of the request is still going, with the text held back so far."""
        request.error = error
        for completion in [c for c in request.completions if c.finish_reason is None]:
            self._emit(request, ChoiceDelta(completion.index, completion.output.finish(), finish_reason=reason))
            self._end(completion, reason)

    def flush(self) -> None:
        """Hand every request the events gathered since the last call, in one piece."""
        pending, self._pending = self._pending, {}
        for request, events in pending.items():
            try:
                request.sink(events)
            except Exception:
                # Its reader is gone or broken, and only its own: nobody else's stream may end for it.
                logger.exception("a request's sink failed", extra={"request_id": request.spec.request_id})
                request.sink = _discard
                self.abort(request, FinishReason.CANCELLED)

    def _emit(self, request: Request, event: EngineEvent) -> None:
        self._pending.setdefault(request, []).append(event)

    def _keep_for_record(self, completion: Completion, output: StepOutput) -> None:
        if self._recorder is None or not completion.request.spec.log_traffic:
            return
        start = completion.state.num_output_tokens - len(output.emitted)
        completion.steps.append(VerifiedStep(start, output.proposal, output.num_accepted, output.teacher))

    def _end(self, completion: Completion, reason: FinishReason) -> None:
        completion.finish_reason = reason
        self._scheduler.remove(completion)
        request = completion.request
        now = self._clock()
        if self._recorder is not None:
            self._recorder.record(completion, now)
        part = completion.counters.model_part
        if self._monitor is not None and part is not None:
            self._monitor.observe_completion(part.version, part.expected_sum, part.expected_positions)
        completion.steps.clear()
        if request.is_finished:
            self._emit(request, self._summary(request, now))
            self._on_finished(request)

    def _summary(self, request: Request, now: float) -> RequestFinished:
        spec = request.spec
        scheduled = request.first_scheduled if request.first_scheduled is not None else now
        first_token = request.first_token if request.first_token is not None else now
        limit = self._scheduler.limits.num_speculative_tokens
        if spec.max_draft_tokens is not None:
            limit = min(limit, spec.max_draft_tokens)
        return RequestFinished(
            prompt_tokens=len(spec.prompt_token_ids),
            completion_tokens=sum(c.num_final_tokens for c in request.completions),
            cached_prompt_tokens=request.cached_prompt_tokens,
            seed=request.seed,
            speculation=request.speculation_stats(limit if spec.speculation else 0),
            queue_s=scheduled - request.arrived,
            time_to_first_token_s=None if request.first_token is None else request.first_token - request.arrived,
            prefill_s=first_token - scheduled,
            decode_s=now - first_token,
            total_s=now - request.arrived,
            prompt_logprobs=None if spec.prompt_logprobs is None else tuple(request.prompt_logprobs),
            error=request.error,
        )


def _discard(events: list[EngineEvent]) -> None:
    """The sink of a request whose own has failed."""
