"""A real engine on tiny models, and the plumbing to talk to it without gRPC."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from prometheus_client import CollectorRegistry
from transformers import PreTrainedModel

from redraft.models.block_pool import BlockPool
from redraft.models.buckets import BucketLimits
from redraft.models.runner import ModelRunner
from redraft.models.tokenizer import Tokenizer
from redraft.sampling.params import SamplingParams, StoppingParams
from redraft.speculation.cost import StepCost
from redraft.speculation.draft_model import DraftModelProposer
from redraft.speculation.fallback import FallbackProposer
from redraft.speculation.length import LengthController
from redraft.speculation.ngram import NgramProposer
from redraft.speculation.proposer import Proposer
from redraft.speculation.state import SequenceState
from redraft.telemetry.metrics import ServerMetrics
from redraft_server.engine.api import (
    ChoiceDelta,
    EngineEvent,
    EngineInfo,
    EngineRequest,
    FinishReason,
    RequestFinished,
)
from redraft_server.engine.engine import Engine, EngineParts
from redraft_server.engine.recorder import Recorder, RecordSink
from redraft_server.engine.scheduler import SchedulerLimits
from tests.fakes import EOS_ID, runner_ahead, tiny_model, tiny_tokenizer

TARGET_SEED, DRAFT_A, DRAFT_B = 0, 11, 12
WAIT_S = 60.0
_request_numbers = itertools.count()

torch.set_num_threads(1)  # on tiny models several threads only wait for each other


@dataclass(frozen=True)
class EngineSpec:
    """What to build. `proposer`: none, ngram, draft, self (the target drafts for itself), ngram+draft."""

    proposer: str = "draft"
    k: int = 3
    arch: str = "llama"
    vocab_size: int = 64
    draft_seed: int = DRAFT_A
    num_blocks: int = 128
    block_size: int = 4
    max_running: int = 16
    max_batch_tokens: int = 64
    max_catch_up: int = 16  # small, so that prompts are caught up with in pieces
    max_waiting: int = 256
    prefix_cache: bool = True
    adaptive: bool = False
    least_chance: float | None = None  # that a drafted token must have to be accepted, see FixedPrice
    teacher_top_n: int = 0
    runs_ahead: bool = False  # as on a GPU: passes in buckets, one look at the device per step


@dataclass
class Collected:
    """Everything a sink received."""

    events: list[EngineEvent] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, events: list[EngineEvent]) -> None:
        self.events.extend(events)
        if any(isinstance(event, RequestFinished) for event in events):
            self.done.set()

    def wait(self) -> Collected:
        assert self.done.wait(WAIT_S), "the request did not finish"
        return self

    def deltas(self, index: int = 0) -> list[ChoiceDelta]:
        return [e for e in self.events if isinstance(e, ChoiceDelta) and e.index == index]

    def token_ids(self, index: int = 0) -> list[int]:
        return [token for delta in self.deltas(index) for token in delta.token_ids]

    def text(self, index: int = 0) -> str:
        return "".join(delta.text for delta in self.deltas(index))

    def finish_reason(self, index: int = 0) -> FinishReason | None:
        return self.deltas(index)[-1].finish_reason

    @property
    def finished(self) -> RequestFinished:
        return next(e for e in self.events if isinstance(e, RequestFinished))


class Acting(Collected):
    """A sink that does something, on the engine's thread, when its n-th delivery comes."""

    def __init__(self, action: Callable[[], object], at: int = 1) -> None:
        super().__init__()
        self.action, self.at, self.deliveries = action, at, 0

    def __call__(self, events: list[EngineEvent]) -> None:
        super().__call__(events)
        self.deliveries += 1
        if self.deliveries == self.at:
            self.action()


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def make_runner(model: PreTrainedModel, spec: EngineSpec) -> ModelRunner:
    sizes = {"num_blocks": spec.num_blocks, "block_size": spec.block_size, "vocab_size": spec.vocab_size}
    if spec.runs_ahead:
        return runner_ahead(model, BucketLimits(max_sequences=8, max_rows=1 + spec.k), **sizes)
    return ModelRunner(model, **sizes)


class FixedPrice(LengthController):
    """Drafts as long as all of it is accepted with a given chance, as far as the draft's own distribution tells."""

    def __init__(self, least_chance: float) -> None:
        super().__init__("draft_model", StepCost(), None)
        self._least_chance = least_chance

    def allow(self, states: Sequence[SequenceState], limits: Sequence[int], missing: Sequence[int]) -> list[int]:
        return list(limits)

    @property
    def token_price(self) -> float:
        return self._least_chance


def make_proposer(spec: EngineSpec, target_cost: StepCost, epoch: int = 0) -> Proposer | None:
    def length(name: str, cost: StepCost | None) -> LengthController | None:
        return LengthController(name, target_cost, cost) if spec.adaptive else None

    def draft() -> Proposer:
        seed = TARGET_SEED if spec.proposer == "self" else spec.draft_seed
        runner = make_runner(tiny_model(spec.arch, vocab_size=spec.vocab_size, seed=seed), spec)
        version = f"draft-{seed}"
        return DraftModelProposer(
            runner,
            version=version,
            epoch=epoch,
            max_catch_up=spec.max_catch_up,
            length=length("draft_model", StepCost()) if spec.least_chance is None else FixedPrice(spec.least_chance),
        )

    def ngram() -> Proposer:
        return NgramProposer(min_match=1, max_match=3, length=length("ngram", None))

    match spec.proposer:
        case "none":
            return None
        case "ngram":
            return ngram()
        case "draft" | "self":
            return draft()
        case "ngram+draft":
            return FallbackProposer([ngram(), draft()])
    raise ValueError(spec.proposer)


def engine_info(spec: EngineSpec, tokenizer: Tokenizer) -> EngineInfo:
    context = min(512, spec.num_blocks * spec.block_size)
    return EngineInfo(
        model="tiny",
        model_revision="",
        vocab_size=spec.vocab_size,
        context_length=context,
        max_prompt_tokens=context - 1,
        max_new_tokens_limit=256,
        eos_token_ids=frozenset({EOS_ID}),
        target_fingerprint="target",
        tokenizer_fingerprint=tokenizer.fingerprint,
        proposer=spec.proposer,
        num_speculative_tokens=spec.k,
        draft_name=None,
        draft_version="",
        kv_block_size=spec.block_size,
        kv_num_blocks=spec.num_blocks,
        kv_bytes=0,
        weight_bytes=0,
        dtype="float32",
        device="cpu",
    )


@contextmanager
def running_engine(
    spec: EngineSpec = EngineSpec(),
    *,
    sink: RecordSink | None = None,
    registry: CollectorRegistry | None = None,
    start: bool = True,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Engine]:
    """An engine that is stopped at the end; afterwards all its blocks must be free."""
    tokenizer = Tokenizer(tiny_tokenizer(spec.vocab_size))
    info = engine_info(spec, tokenizer)
    target_cost = StepCost()
    metrics = None if registry is None else ServerMetrics(registry, "tiny", max_draft_tokens=max(spec.k, 1))
    engine = Engine(
        EngineParts(
            target=make_runner(tiny_model(spec.arch, vocab_size=spec.vocab_size, seed=TARGET_SEED), spec),
            tokenizer=tokenizer,
            proposer=make_proposer(spec, target_cost),
            pool=BlockPool(spec.num_blocks, spec.block_size, prefix_cache=spec.prefix_cache),
            limits=SchedulerLimits(
                max_running=spec.max_running,
                max_batch_tokens=spec.max_batch_tokens,
                max_model_len=info.context_length,
                num_speculative_tokens=spec.k,
                teacher_top_n=spec.teacher_top_n,
            ),
            info=info,
            max_waiting=spec.max_waiting,
            target_cost=target_cost,
            metrics=metrics,
            recorder=None if sink is None else Recorder(sink, info, metrics),
            clock=clock,
        )
    )
    if start:
        engine.start()
    try:
        yield engine
    finally:
        engine.stop(WAIT_S)
        engine.scheduler.check_integrity()
        assert engine.scheduler.pool.num_free == spec.num_blocks


def request(
    prompt: Sequence[int], params: SamplingParams, max_new_tokens: int = 24, **changes: object
) -> EngineRequest:
    """A request with an id of its own that ignores end-of-text, unless told otherwise."""
    base = EngineRequest(
        request_id=f"r{next(_request_numbers)}",
        prompt_token_ids=tuple(prompt),
        sampling=params,
        stopping=StoppingParams(max_new_tokens=max_new_tokens, ignore_eos=True),
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def generate(engine: Engine, requests: Sequence[EngineRequest]) -> list[Collected]:
    """Submit all at once and wait for all."""
    collected = [Collected() for _ in requests]
    for one, sink in zip(requests, collected, strict=True):
        engine.submit(one, sink)
    return [sink.wait() for sink in collected]


@contextmanager
def held(engine: Engine) -> Iterator[None]:
    """The engine stands between two steps, so that what is submitted meanwhile waits."""
    entered, go = threading.Event(), threading.Event()

    def stand() -> None:
        entered.set()
        assert go.wait(WAIT_S)

    future = engine.between_steps(stand)
    assert entered.wait(WAIT_S)
    try:
        yield
    finally:
        go.set()
        future.result(WAIT_S)


def submit(engine: Engine, one: EngineRequest, sink: Collected | None = None) -> Collected:
    sink = sink or Collected()
    engine.submit(one, sink)
    return sink


def check_identities(collected: Collected, n: int = 1) -> None:
    finished = collected.finished
    stats = finished.speculation
    assert collected.events[-1] is finished
    assert sum(isinstance(e, RequestFinished) for e in collected.events) == 1
    assert finished.completion_tokens == sum(len(collected.token_ids(i)) for i in range(n))
    assert finished.completion_tokens == stats.accepted_tokens + stats.verify_steps - stats.truncated_tokens
    assert sum(stats.acceptance_histogram) == stats.spec_steps
    assert sum(j * count for j, count in enumerate(stats.acceptance_histogram)) == stats.accepted_tokens
    assert stats.spec_steps <= stats.verify_steps
    assert stats.accepted_tokens <= stats.draft_tokens
    assert stats.expected_acceptance_positions <= stats.draft_tokens
    for index in range(n):
        assert [d.finish_reason for d in collected.deltas(index)[:-1]] == [None] * (len(collected.deltas(index)) - 1)
        assert collected.finish_reason(index) is not None
