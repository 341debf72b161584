"""Where the events of one request cross from the engine's thread to the event loop.

The engine never waits for a reader. What a slow client has not taken yet is merged: one delta per choice and
message, so that an unread stream costs what its completion costs and no more. A message is closed at
`MESSAGE_TOKENS` tokens, which keeps it below the 4 MiB that gRPC clients take by default.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from redraft_server.engine.api import ChoiceDelta, EngineEvent, FinishReason, RequestFinished, TokenLogprob

MESSAGE_TOKENS = 1024
MESSAGE_CHARS = 512 * 1024


@dataclass(slots=True)
class DeltaBuffer:
    """The deltas of one choice, joined."""

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None

    def add(self, delta: ChoiceDelta) -> None:
        if delta.text:
            self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason
            self.matched_stop = delta.matched_stop

    def join(self) -> ChoiceDelta:
        return ChoiceDelta(
            index=self.index,
            text="".join(self.texts),
            token_ids=tuple(self.token_ids),
            logprobs=tuple(self.logprobs),
            finish_reason=self.finish_reason,
            matched_stop=self.matched_stop,
        )


def join_by_choice(deltas: Iterable[ChoiceDelta]) -> list[ChoiceDelta]:
    """One delta per choice, ordered by index."""
    buffers: dict[int, DeltaBuffer] = {}
    for delta in deltas:
        buffers.setdefault(delta.index, DeltaBuffer(delta.index)).add(delta)
    return [buffers[index].join() for index in sorted(buffers)]


@dataclass(slots=True)
class _Message:
    choices: dict[int, DeltaBuffer] = field(default_factory=dict)
    tokens: int = 0
    chars: int = 0

    @property
    def is_full(self) -> bool:
        return self.tokens >= MESSAGE_TOKENS or self.chars >= MESSAGE_CHARS

    def add(self, delta: ChoiceDelta) -> None:
        self.choices.setdefault(delta.index, DeltaBuffer(delta.index)).add(delta)
        self.tokens += len(delta.token_ids)
        self.chars += len(delta.text)


class MailboxClosed(Exception):
    """There is nothing to take any more."""


class Mailbox:
    """Events of one request. `sink` is for the engine's thread; everything else for the event loop.

    `on_finished` is called on the loop with the request's last event, also when nobody takes it any more.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, on_finished: Callable[[RequestFinished], None]) -> None:
        self._loop = loop
        self._on_finished = on_finished
        self._messages: deque[_Message] = deque()
        self._finished: RequestFinished | None = None
        self._changed = asyncio.Event()
        self._closed = False

    def sink(self, events: list[EngineEvent]) -> None:
        """Hand events over; returns at once."""
        try:
            self._loop.call_soon_threadsafe(self._deliver, events)
        except RuntimeError:
            # The loop is closed: the process is ending and there is nobody left to tell.
            return

    def close(self) -> None:
        """Drop what is there and what still comes: nobody will read it."""
        self._closed = True
        self._messages.clear()
        self._changed.set()

    @property
    def is_finished(self) -> bool:
        return self._finished is not None

    @property
    def unread_finish(self) -> FinishReason | None:
        """How a choice ended whose end was not taken; None if there is none."""
        ends = (buffer.finish_reason for message in self._messages for buffer in message.choices.values())
        return next((end for end in ends if end is not None), None)

    @property
    def pending_messages(self) -> int:
        return len(self._messages)

    async def take(self) -> list[ChoiceDelta] | RequestFinished:
        """The next message's deltas (one per choice, by index), or the last event once all are taken.

        Raises:
            MailboxClosed: after `close`.
        """
        while not self._messages:
            if self._closed:
                raise MailboxClosed
            if self._finished is not None:
                return self._finished
            self._changed.clear()
            await self._changed.wait()
        choices = self._messages.popleft().choices
        return [choices[index].join() for index in sorted(choices)]

    def _deliver(self, events: list[EngineEvent]) -> None:
        for event in events:
            if isinstance(event, RequestFinished):
                self._finished = event
                self._on_finished(event)
            elif not self._closed:
                if not self._messages or self._messages[-1].is_full:
                    self._messages.append(_Message())
                self._messages[-1].add(event)
        self._changed.set()
