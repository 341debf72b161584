"""The engine: one thread that schedules, steps and delivers; every other thread only talks to it through a queue."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

from redraft.models.block_pool import BlockPool
from redraft.models.runner import ModelRunner
from redraft.models.tokenizer import Tokenizer
from redraft.speculation.cost import StepCost
from redraft.speculation.draft_model import DraftModelProposer
from redraft.speculation.proposer import Proposer
from redraft.speculation.router import DraftRouter
from redraft.speculation.step import StepObserver, StepResult, begin_step
from redraft.telemetry.metrics import ServerMetrics
from redraft.telemetry.observations import StepObservation
from redraft_server.engine.api import (
    DuplicateRequestId,
    EngineInfo,
    EngineRequest,
    EngineUnavailable,
    FinishReason,
    QueueFull,
    RequestTooLarge,
    Sink,
)
from redraft_server.engine.delivery import Delivery
from redraft_server.engine.observe import DraftMonitor, step_observation
from redraft_server.engine.output import CompletionOutput
from redraft_server.engine.recorder import Recorder
from redraft_server.engine.request import Completion, Request
from redraft_server.engine.scheduler import Scheduled, Scheduler, SchedulerLimits

logger = logging.getLogger(__name__)

T = TypeVar("T")
_MAX_CONSECUTIVE_FAULTS = 3


@dataclass(frozen=True, slots=True)
class EngineParts:
    """What an engine is made of; `build_engine` makes them from a configuration, tests by hand."""

    target: ModelRunner
    tokenizer: Tokenizer
    proposer: Proposer | None
    pool: BlockPool
    limits: SchedulerLimits
    info: EngineInfo
    max_waiting: int
    target_cost: StepCost
    metrics: ServerMetrics | None = None
    recorder: Recorder | None = None
    router: DraftRouter | None = None  # the part of `proposer` that knows of draft versions
    monitor: DraftMonitor | None = None
    clock: Callable[[], float] = time.monotonic


class Engine:
    """Implements `EngineClient`. Call `start` once; `stop` ends everything that is left."""

    def __init__(self, parts: EngineParts) -> None:
        self._parts = parts
        self._clock = parts.clock
        self.scheduler = Scheduler(parts.pool, parts.limits)
        self._proposer = parts.proposer
        if parts.router is not None:
            self.scheduler.epoch_of = parts.router.epoch_of
        self._observer: StepObserver | None = None
        self._info = parts.info
        self._delivery = Delivery(
            self.scheduler,
            clock=parts.clock,
            recorder=parts.recorder,
            on_finished=self._forget,
            monitor=parts.monitor,
        )
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._live: dict[str, Request] = {}  # guarded by _lock: read on submit, changed on both sides
        self._unavailable: tuple[str, str] | None = None  # reason and message of EngineUnavailable
        self._stopping = False  # guarded by _lock
        self._faults = 0
        self._untold: StepObservation | None = None  # the last step's, for metrics and monitor
        self._service_seconds: float | None = None  # moving average of a request's time from first step to end
        self._thread = threading.Thread(target=self._run, name="redraft-engine", daemon=True)

    # -- any thread ------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def tokenizer(self) -> Tokenizer:
        return self._parts.tokenizer

    @property
    def is_ready(self) -> bool:
        return self._thread.is_alive() and self._unavailable is None

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        """Admit a request; its events go to `sink` on the engine thread.

        Raises:
            AdmissionError: nothing was started; the subclass says why.
        """
        self._check_size(request)
        entry = Request(request, sink, self._clock())
        with self._lock:
            if self._unavailable is not None:
                raise EngineUnavailable(*self._unavailable)
            if request.request_id in self._live:
                raise DuplicateRequestId(f"a request with id {request.request_id!r} is in progress")
            if len(self._live) >= self._parts.max_waiting + self._parts.limits.max_running:
                wait = max(0.1, self.estimated_queue_delay_s() / 4)
                raise QueueFull(f"{len(self._live)} requests in progress or waiting", retry_after_s=wait)
            self._live[request.request_id] = entry
            self._commands.put(lambda: self._begin(entry))  # under the lock: before any cancel of this id

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        self._commands.put(lambda: self._cancel(request_id, reason))

    def estimated_queue_delay_s(self) -> float:
        ahead = len(self._live) - self._parts.limits.max_running
        if ahead < 0 or self._service_seconds is None:
            return 0.0
        return self._service_seconds * (ahead + 1) / self._parts.limits.max_running

    def num_unfinished(self) -> int:
        return len(self._live)

    def drain(self) -> None:
        with self._lock:
            self._unavailable = ("SERVER_DRAINING", "the server is shutting down")

    def stop(self, timeout_s: float) -> None:
        self.drain()
        self._commands.put(self._stop)
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def between_steps(self, action: Callable[[], T]) -> Future[T]:
        """Run `action` on the engine thread while no step is under way.

        The future fails with EngineUnavailable if the engine has stopped.
        """
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)

        with self._lock:
            if self._stopping:
                future.set_exception(EngineUnavailable("SERVER_DRAINING", "the engine has stopped"))
            else:
                self._commands.put(run)
        return future

    def replace_proposer(self, proposer: Proposer | None, draft_epoch: int) -> Future[None]:
        """Put another proposer into service at the next step boundary; running sequences go on with it.

        Draft KV of another epoch counts as missing and is rebuilt before the next proposal.
        """

        def swap() -> None:
            self._proposer = proposer
            self.scheduler.draft_epoch = draft_epoch

        return self.between_steps(swap)

    def set_drafts(
        self, drafts: Mapping[str, DraftModelProposer], shares: Mapping[str, float], active: str | None
    ) -> Future[None]:
        """Change which versions draft, and for which share of new requests, at the next step boundary.

        See `DraftRouter.set`. `active` is the version that `info` names from then on.
        """
        router = self._parts.router
        assert router is not None, "built without draft models"

        def change() -> None:
            router.set(drafts, shares)
            self._info = replace(self._info, draft_version=active or "", draft_name=active)

        return self.between_steps(change)

    def set_observer(self, observer: StepObserver | None) -> Future[None]:
        """Let `observer` look at every step's verified positions from now on, in place of the one before."""

        def change() -> None:
            self._observer = observer

        return self.between_steps(change)

    def draft_users(self) -> Future[frozenset[str]]:
        """Draft versions that a request in progress belongs to."""

        def collect() -> frozenset[str]:
            live = (completion for request in self._live_requests() for completion in request.completions)
            return frozenset(c.state.draft_version for c in live if c.finish_reason is None)

        return self.between_steps(collect)

    # -- engine thread ---------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_commands()
                self._expire()
                self._step(self.scheduler.schedule())  # no name here: it would keep the last batch alive while idle
                if not (self._parts.target.runs_ahead and self.scheduler.running):
                    self._tell()
        except Exception:
            # Outside a step nothing says whose fault it is: end every request rather than leave it without a reply.
            logger.exception("engine loop failed")
            self._die("the engine failed; restart the server")
            self._commands.put(self._stop)
            self._take_commands()

    def _take_commands(self) -> None:
        idle = not self.scheduler.running and not len(self.scheduler.waiting)
        try:
            command = self._commands.get(block=idle)
            while True:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _step(self, scheduled: list[Scheduled]) -> None:
        """One step. What everybody is to hear of the one before they hear while a GPU is at this one's work."""
        if not scheduled:
            return
        prompt_starts = [s.work.state.num_computed for s in scheduled]
        now = self._clock()
        for s in scheduled:
            if s.completion.request.first_scheduled is None:
                s.completion.request.first_scheduled = now
        try:
            work = [s.work for s in scheduled]
            under_way = begin_step(work, self._parts.target, self._proposer, self._observer)
            if self._parts.target.runs_ahead:
                self._tell()
            self._deliver(scheduled, under_way.finish(), prompt_starts)
        except Exception:
            self._fault(scheduled)
        else:
            self._faults = 0

    def _deliver(self, scheduled: list[Scheduled], result: StepResult, prompt_starts: list[int]) -> None:
        if result.only_decodes:  # a prompt's tokens cost less, they need no logits
            self._parts.target_cost.observe(result.num_target_tokens, result.verify_seconds)
        now = self._clock()
        gaps: list[float] = []
        for s, output, start in zip(scheduled, result.outputs, prompt_starts, strict=True):
            if s.completion.finish_reason is not None:
                continue  # its request has ended meanwhile, and its blocks are somebody else's
            self.scheduler.settle(s.completion)
            is_first = s.completion.request.first_token is None
            self._delivery.deliver(s.completion, output, start, now)
            if not output.emitted:
                continue
            if is_first:
                self._begin_siblings(s.completion)
            if (gap := s.completion.note_delivery(now)) is not None:
                gaps.append(gap)
        self._untold = step_observation(scheduled, result, gaps)

    def _tell(self) -> None:
        """Hand out the events of what has happened, and count it."""
        self._delivery.flush()
        observation, self._untold = self._untold, None
        if observation is not None and self._parts.metrics is not None:
            self._parts.metrics.observe_step(observation)
        if observation is not None and self._parts.monitor is not None:
            self._parts.monitor.observe_step(observation.sequences)
        self._report_load()

    def _fault(self, scheduled: list[Scheduled]) -> None:
        """A bug or an exhausted device: the step's requests end, the engine goes on; three in a row end it."""
        ids = sorted({s.completion.request.spec.request_id for s in scheduled})
        logger.exception("engine step failed", extra={"num_sequences": len(scheduled), "request_ids": ids})
        self._faults += 1
        for request in {s.completion.request for s in scheduled}:
            self._delivery.abort(request, FinishReason.ERROR, "the engine failed in a step")
        if self._faults >= _MAX_CONSECUTIVE_FAULTS:
            self._die("the engine failed repeatedly; restart the server")

    def _die(self, message: str) -> None:
        with self._lock:
            self._unavailable = ("ENGINE_DEAD", message)
        self._abort_all(FinishReason.ERROR, "the engine failed")

    def _check_size(self, request: EngineRequest) -> None:
        limits, pool = self._parts.limits, self._parts.pool
        capacity = min(limits.max_model_len, pool.num_blocks * pool.block_size)
        if len(request.prompt_token_ids) >= capacity:
            raise RequestTooLarge("prompt", f"the prompt has {len(request.prompt_token_ids)} tokens of {capacity}")
        if request.n > limits.max_running:
            raise RequestTooLarge("n", f"n is {request.n}, the server runs {limits.max_running} sequences at once")

    def _begin(self, request: Request) -> None:
        if request.completions:
            return  # `_abort_all` came first
        spec = request.spec
        if spec.prompt_logprobs is not None:
            request.prompt_logprobs = [None] * len(spec.prompt_token_ids)
        room = self._parts.limits.max_model_len - len(spec.prompt_token_ids)
        pool_room = self._parts.pool.num_blocks * self._parts.pool.block_size - len(spec.prompt_token_ids)
        max_new_tokens = min(spec.stopping.max_new_tokens, room, pool_room)
        eos = self._parts.info.eos_token_ids
        ends = (frozenset() if spec.stopping.ignore_eos else eos) | spec.stopping.stop_token_ids
        for index in range(spec.n):
            output = CompletionOutput(
                self._parts.tokenizer, spec.stopping, eos_token_ids=eos, max_new_tokens=max_new_tokens
            )
            state = request.new_state(index, tuple(sorted(ends)))
            request.completions.append(Completion(request, index, state, output, max_new_tokens))
        self.scheduler.add(request.completions[0])

    def _begin_siblings(self, completion: Completion) -> None:
        """The other n - 1 completions start once the first has put the prompt into the prefix cache."""
        for sibling in completion.request.completions[:0:-1]:
            if sibling.finish_reason is None:
                self.scheduler.waiting.push_front(sibling)

    def _cancel(self, request_id: str, reason: FinishReason) -> None:
        request = self._live.get(request_id)
        if request is not None:
            self._delivery.abort(request, reason)

    def _expire(self) -> None:
        now = self._clock()
        for request in self._live_requests():
            if request.spec.deadline is not None and request.spec.deadline <= now:
                self._delivery.abort(request, FinishReason.DEADLINE)

    def _live_requests(self) -> list[Request]:
        with self._lock:
            return list(self._live.values())

    def _abort_all(self, reason: FinishReason, error: str | None = None) -> None:
        for request in self._live_requests():
            if not request.completions:
                self._begin(request)  # its command is still queued: it must get its events all the same
            self._delivery.abort(request, reason, error)
        self._delivery.flush()

    def _stop(self) -> None:
        self._abort_all(FinishReason.SHUTDOWN)
        with self._lock:
            self._stopping = True

    def _forget(self, request: Request) -> None:
        with self._lock:
            self._live.pop(request.spec.request_id, None)
        if request.first_scheduled is not None:
            served = self._clock() - request.first_scheduled
            old = self._service_seconds
            self._service_seconds = served if old is None else old + 0.1 * (served - old)

    def _report_load(self) -> None:
        if self._parts.metrics is None:
            return
        if self.scheduler.num_preemptions:
            self._parts.metrics.observe_preemptions(self.scheduler.num_preemptions)
            self.scheduler.num_preemptions = 0
        pool = self._parts.pool
        running, waiting = len(self.scheduler.running), len(self.scheduler.waiting)
        self._parts.metrics.set_load(running, waiting, pool.num_free, pool.num_blocks)
