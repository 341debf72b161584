"""redraft's engine in this process, assembled from runners that several engines share one after the other."""

from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from redraft.models.block_pool import BlockPool
from redraft.models.draft import load_draft
from redraft.models.loader import LoadedModel, load_model
from redraft.models.ref import ModelRef
from redraft.models.rounding import WeightFormat
from redraft.models.runner import ModelRunner
from redraft.models.tokenizer import Tokenizer, check_compatible, load_tokenizer
from redraft.sampling.params import SamplingParams, StoppingParams
from redraft.speculation.cost import StepCost, measure_cost
from redraft.speculation.proposer import Proposer
from redraft.telemetry.metrics import ServerMetrics
from redraft.traffic.writer import TrafficWriter
from redraft_server.config import TrafficLogConfig
from redraft_server.engine.api import (
    ChoiceDelta,
    EngineEvent,
    EngineInfo,
    EngineRequest,
    FinishReason,
    RequestFinished,
    SpeculationStats,
)
from redraft_server.engine.engine import Engine, EngineParts
from redraft_server.engine.recorder import Recorder
from redraft_server.engine.scheduler import SchedulerLimits

KV_TOKENS, BLOCK_SIZE = 16384, 16  # as the server's defaults
MAX_RUNNING, MAX_BATCH_TOKENS = 16, 512
_STOP_TIMEOUT_S = 60.0

_request_numbers = itertools.count(1)


@dataclass(frozen=True)
class SharedModel:
    """A model of which every engine uses the one copy, and what its passes cost."""

    runner: ModelRunner
    loaded: LoadedModel
    _cost: StepCost

    @classmethod
    def load(cls, name: str, tokenizer: Tokenizer, weights: WeightFormat = WeightFormat.FULL) -> SharedModel:
        """Raises ModelError, or TokenizerMismatch if the model is not of this tokenizer."""
        ref = ModelRef.parse(name)
        check_compatible(tokenizer, load_tokenizer(ref))
        return cls._of(load_model(ref, weights=weights), tokenizer, None)

    @classmethod
    def load_draft(cls, name: str, target: SharedModel, tokenizer: Tokenizer) -> SharedModel:
        """As a server loads a draft: sharing with its target, head and numbers as small as its checkpoint says.

        Raises what `redraft.models.draft.load_draft` does.
        """
        draft = load_draft(ModelRef.parse(name), target.loaded, tokenizer=tokenizer)
        return cls._of(draft.loaded, tokenizer, draft.output_ids)

    @classmethod
    def _of(cls, loaded: LoadedModel, tokenizer: Tokenizer, output_ids: Tensor | None) -> SharedModel:
        runner = ModelRunner(
            loaded.model,
            num_blocks=KV_TOKENS // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            vocab_size=tokenizer.vocab_size,
            output_ids=output_ids,
        )
        return cls(runner, loaded, measure_cost(runner))

    @property
    def version(self) -> str:
        return self.loaded.draft_version

    def step_cost(self) -> StepCost:
        """A profile of one's own, to go on from: what one engine learns does not reach the next."""
        return copy.deepcopy(self._cost)


@dataclass(frozen=True, slots=True)
class Completed:
    """What came back for one request."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    speculation: SpeculationStats


@dataclass(slots=True)
class _Collector:
    """A sink that keeps everything and says when it is over."""

    on_events: Callable[[], None] | None = None
    deltas: list[ChoiceDelta] = field(default_factory=list)
    finished: RequestFinished | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, events: list[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, ChoiceDelta):
                self.deltas.append(event)
            else:
                self.finished = event
        if self.on_events is not None:
            self.on_events()
        if self.finished is not None:
            self.done.set()

    def wait(self) -> Completed:
        self.done.wait()
        assert self.finished is not None
        reason = self.deltas[-1].finish_reason
        if reason not in (FinishReason.EOS, FinishReason.LENGTH):
            raise RuntimeError(f"a request ended with {reason}: {self.finished.error}")
        return Completed(
            tuple(token for delta in self.deltas for token in delta.token_ids),
            "".join(delta.text for delta in self.deltas),
            reason,
            self.finished.speculation,
        )


@contextmanager
def running_engine(
    target: SharedModel,
    tokenizer: Tokenizer,
    proposer: Proposer | None,
    *,
    k: int,
    target_cost: StepCost | None = None,
    prefix_cache: bool = True,
    max_running: int = MAX_RUNNING,
    metrics: ServerMetrics | None = None,
    writer: TrafficWriter | None = None,
) -> Iterator[Engine]:
    """An engine on the shared target, stopped at the end. With a writer it captures as a server does by default.

    Engines on one target may live side by side only without prefix cache and with one of them at work: they write to
    the same KV slots.
    """
    num_blocks = KV_TOKENS // BLOCK_SIZE
    info = _info(target, tokenizer, proposer, k)
    engine = Engine(
        EngineParts(
            target=target.runner,
            tokenizer=tokenizer,
            proposer=proposer,
            pool=BlockPool(num_blocks, BLOCK_SIZE, prefix_cache=prefix_cache),
            limits=SchedulerLimits(
                max_running=max_running,
                max_batch_tokens=MAX_BATCH_TOKENS,
                max_model_len=context_length(target),
                num_speculative_tokens=k,
                teacher_top_n=0 if writer is None else TrafficLogConfig().teacher_top_n,
            ),
            info=info,
            max_waiting=1024,
            target_cost=target_cost or target.step_cost(),
            metrics=metrics,
            recorder=None if writer is None else Recorder(writer, info, metrics),
        )
    )
    engine.start()
    try:
        yield engine
    finally:
        engine.stop(_STOP_TIMEOUT_S)


def generate(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    sampling: Sequence[SamplingParams],
    stopping: StoppingParams,
    *,
    max_draft_tokens: int | None = None,
    on_events: Callable[[], None] | None = None,
) -> list[Completed]:
    """Submit all requests at once and wait for all. `on_events` runs on the engine thread, per request and step.

    Raises:
        RuntimeError: a request ended otherwise than by end-of-text or length.
    """
    collectors = [_Collector(on_events) for _ in prompts]
    for prompt, params, collector in zip(prompts, sampling, collectors, strict=True):
        request = EngineRequest(
            f"bench-{next(_request_numbers)}", prompt, params, stopping, max_draft_tokens=max_draft_tokens
        )
        engine.submit(request, collector)
    return [collector.wait() for collector in collectors]


def context_length(target: SharedModel) -> int:
    return min(int(target.loaded.config.max_position_embeddings), KV_TOKENS)


def _info(target: SharedModel, tokenizer: Tokenizer, proposer: Proposer | None, k: int) -> EngineInfo:
    context = context_length(target)
    return EngineInfo(
        model=target.loaded.name,
        model_revision=target.loaded.revision or "",
        vocab_size=tokenizer.vocab_size,
        context_length=context,
        max_prompt_tokens=context - 1,
        max_new_tokens_limit=context,
        eos_token_ids=tokenizer.eos_token_ids,
        target_fingerprint=target.loaded.weights_fingerprint,
        tokenizer_fingerprint=tokenizer.fingerprint,
        proposer="none" if proposer is None else proposer.name,
        num_speculative_tokens=k,
        draft_name=None,
        draft_version="",
        kv_block_size=BLOCK_SIZE,
        kv_num_blocks=KV_TOKENS // BLOCK_SIZE,
        kv_bytes=0,
        weight_bytes=0,
        dtype="float32",
        device="cpu",
    )
