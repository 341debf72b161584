"""An engine without models: deterministic tokens from a thread that tests can hold still."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from redraft.errors import ChatTemplateMissing
from redraft_server.engine.api import (
    ChoiceDelta,
    DuplicateRequestId,
    EngineEvent,
    EngineInfo,
    EngineRequest,
    EngineUnavailable,
    FinishReason,
    QueueFull,
    RequestFinished,
    Sink,
    SpeculationStats,
    TokenLogprob,
)

VOCAB_SIZE = 300
EOS_ID = 0
CONTEXT_LENGTH = 4096

INFO = EngineInfo(
    model="fake",
    model_revision="r1",
    vocab_size=VOCAB_SIZE,
    context_length=CONTEXT_LENGTH,
    max_prompt_tokens=CONTEXT_LENGTH - 1,
    max_new_tokens_limit=CONTEXT_LENGTH,
    eos_token_ids=frozenset({EOS_ID}),
    target_fingerprint="ab" * 32,
    tokenizer_fingerprint="sha256:" + "cd" * 32,
    proposer="draft_model",
    num_speculative_tokens=4,
    draft_name="fake-draft",
    draft_version="d1",
    kv_block_size=16,
    kv_num_blocks=256,
    kv_bytes=2**20,
    weight_bytes=2**20,
    dtype="float32",
    device="cpu",
)


class FakeTokenizer:
    """One id per UTF-8 byte."""

    def __init__(self, *, chat_template: bool = True) -> None:
        self._chat_template = chat_template

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        special = "" if skip_special_tokens else "<eos>"
        return "".join(special if i == EOS_ID else bytes([i]).decode(errors="replace") for i in ids if i < 256)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        if not self._chat_template:
            raise ChatTemplateMissing("no template")
        if any(message["role"] not in ("system", "user", "assistant") for message in messages):
            raise ValueError("unknown role")
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return self.encode(text + ("assistant: " if add_generation_prompt else ""))

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special_tokens=False)


def letter(position: int) -> tuple[int, str]:
    """The default completion: a, b, ... z, a, ..."""
    token_id = ord("a") + position % 26
    return token_id, chr(token_id)


@dataclass(slots=True)
class _Live:
    request: EngineRequest
    sink: Sink
    emitted: int = 0
    cancelled: FinishReason | None = None


@dataclass
class FakeEngine:
    """Implements `EngineClient`. One step of its thread gives every live request `tokens_per_step` tokens.

    Steps are taken only while `gate` is set. What the engine did is in `requests`, `ended` and `emitted_chars`;
    `wait_for` blocks the calling thread until a condition on them holds.
    """

    info: EngineInfo = INFO
    tokenizer: FakeTokenizer = field(default_factory=FakeTokenizer)
    emit: Callable[[int], tuple[int, str]] = letter  # position -> (token id, text)
    tokens_per_step: int = 1
    eos_at: int | None = None  # position at which the end token comes
    stop_with: str | None = None  # end at eos_at with this stop sequence instead
    fail_at: int | None = None  # position at which the engine fails
    capacity: int = 64
    retry_after_s: float = 0.2
    queue_delay_s: float = 0.0
    submit_error: Exception | None = None

    def __post_init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.ready = True
        self.requests: list[EngineRequest] = []
        self.ended: dict[str, FinishReason] = {}
        self.emitted_chars = 0
        self.stops = 0
        self._live: dict[str, _Live] = {}
        self._changed = threading.Condition()
        self._draining = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        return self.ready and not self._draining and not self._stopping

    def submit(self, request: EngineRequest, sink: Sink) -> None:
        with self._changed:
            if self.submit_error is not None:
                raise self.submit_error
            if self._draining or self._stopping:
                raise EngineUnavailable("SERVER_DRAINING", "the server is shutting down")
            if request.request_id in self._live:
                raise DuplicateRequestId("duplicate")
            if len(self._live) >= self.capacity:
                raise QueueFull("the queue is full", self.retry_after_s)
            self._live[request.request_id] = _Live(request, sink)
            self.requests.append(request)
            self._changed.notify_all()

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        with self._changed:
            live = self._live.get(request_id)
            if live is not None and live.cancelled is None:
                live.cancelled = reason
            self._changed.notify_all()

    def estimated_queue_delay_s(self) -> float:
        return self.queue_delay_s

    def drain(self) -> None:
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def num_unfinished(self) -> int:
        with self._changed:
            return len(self._live)

    def stop(self, timeout_s: float) -> None:
        with self._changed:
            self.stops += 1
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def wait_for(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, timeout_s), "the engine did not get there"

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._stopping or any(self.gate.is_set() or r.cancelled for r in self._live.values()),
                    timeout=0.01,  # setting the gate does not notify
                )
                for live in list(self._live.values()):
                    if self._stopping:
                        self._finish(live, FinishReason.SHUTDOWN)
                    elif live.cancelled is not None:
                        self._finish(live, live.cancelled)
                    elif live.request.deadline is not None and time.monotonic() >= live.request.deadline:
                        self._finish(live, FinishReason.DEADLINE)
                    elif self.gate.is_set():
                        self._step(live)
                if self._stopping:
                    return
                self._changed.notify_all()

    def _step(self, live: _Live) -> None:
        limit = live.request.stopping.max_new_tokens
        ids: list[int] = []
        texts: list[str] = []
        reason: FinishReason | None = None
        for _ in range(self.tokens_per_step):
            if self.fail_at == live.emitted:
                reason = FinishReason.ERROR
                break
            if self.eos_at == live.emitted:
                reason = FinishReason.EOS if self.stop_with is None else FinishReason.STOP_SEQUENCE
                ids.append(EOS_ID)
                live.emitted += 1
                break
            token_id, text = self.emit(live.emitted)
            ids.append(token_id)
            texts.append(text)
            live.emitted += 1
            if live.emitted == limit:
                reason = FinishReason.LENGTH
                break
        self.emitted_chars += sum(map(len, texts)) * live.request.n
        if reason is not None:
            self._finish(live, reason, ids, texts)
        else:
            live.sink([self._delta(live, index, ids, texts, None) for index in range(live.request.n)])

    def _delta(
        self, live: _Live, index: int, ids: Sequence[int], texts: Sequence[str], reason: FinishReason | None
    ) -> ChoiceDelta:
        count = live.request.logprobs
        stop: str | int | None = None
        if reason is FinishReason.EOS:
            stop = EOS_ID
        elif reason is FinishReason.STOP_SEQUENCE:
            stop = self.stop_with
        return ChoiceDelta(
            index=index,
            text="".join(texts),
            token_ids=tuple(ids),
            logprobs=() if count is None else tuple(_logprob(token_id, count) for token_id in ids),
            finish_reason=reason,
            matched_stop=stop,
        )

    def _finish(self, live: _Live, reason: FinishReason, ids: Sequence[int] = (), texts: Sequence[str] = ()) -> None:
        request = live.request
        prompt = request.prompt_token_ids
        count = request.prompt_logprobs
        events: list[EngineEvent] = [self._delta(live, index, ids, texts, reason) for index in range(request.n)]
        completion_tokens = live.emitted * request.n
        events.append(
            RequestFinished(
                prompt_tokens=len(prompt),
                completion_tokens=completion_tokens,
                cached_prompt_tokens=0,
                seed=request.sampling.seed,
                speculation=SpeculationStats(draft_version="d1", verify_steps=completion_tokens, max_draft_tokens=4),
                queue_s=0.001,
                time_to_first_token_s=0.002 if live.emitted else None,
                prefill_s=0.001,
                decode_s=0.003,
                total_s=0.005,
                prompt_logprobs=None if count is None else (None, *(_logprob(i, count) for i in prompt[1:])),
                error="the model failed on SECRET" if reason is FinishReason.ERROR else None,
            )
        )
        self.ended[request.request_id] = reason
        del self._live[request.request_id]
        live.sink(events)


def _logprob(token_id: int, count: int) -> TokenLogprob:
    top = tuple((ord("a") + place, -0.5 - place) for place in range(count))
    return TokenLogprob(token_id=token_id, logprob=-0.5, rank=1, top=top)
