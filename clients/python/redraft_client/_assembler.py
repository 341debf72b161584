"""Joins the chunks of a stream into the result that Generate would have returned."""

from dataclasses import dataclass, field

from redraft_client.errors import ProtocolError
from redraft_client.types import (
    Choice,
    ChoiceDelta,
    Completion,
    FinishReason,
    GenerationResult,
    StreamChunk,
    TokenLogprob,
)


@dataclass(slots=True)
class _OpenChoice:
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    matched_stop: str | int | None = None


class StreamAssembler:
    """Fed each chunk in order; `result()` after the last. Also enforces the rules of the stream."""

    def __init__(self) -> None:
        self._request_id = ""
        self._choices: dict[int, _OpenChoice] = {}
        self._prompt_logprobs: tuple[TokenLogprob, ...] = ()
        self._completion: Completion | None = None

    @property
    def finished(self) -> bool:
        """Whether the last message (the one with `completion`) has been seen."""
        return self._completion is not None

    def add(self, chunk: StreamChunk) -> None:
        """Raises ProtocolError if the chunk follows the last message or a choice's last delta."""
        if self._completion is not None:
            raise ProtocolError("the server sent a message after the last one")
        self._request_id = chunk.request_id or self._request_id
        self._prompt_logprobs = self._prompt_logprobs or chunk.prompt_logprobs
        for delta in chunk.deltas:
            self._add_delta(delta)
        self._completion = chunk.completion

    def _add_delta(self, delta: ChoiceDelta) -> None:
        choice = self._choices.setdefault(delta.index, _OpenChoice())
        if choice.finish_reason is not None:
            raise ProtocolError(f"the server continued choice {delta.index} after its finish reason")
        choice.texts.append(delta.text)
        choice.token_ids.extend(delta.token_ids)
        choice.logprobs.extend(delta.logprobs)
        choice.finish_reason = delta.finish_reason
        choice.matched_stop = delta.matched_stop

    def result(self) -> GenerationResult:
        """The whole generation. Raises ProtocolError if the stream ended too early."""
        if self._completion is None:
            raise ProtocolError("the stream ended without its last message")
        return GenerationResult(
            request_id=self._request_id,
            choices=tuple(_close(index, choice) for index, choice in sorted(self._choices.items())),
            completion=self._completion,
            prompt_logprobs=self._prompt_logprobs,
        )


def _close(index: int, choice: _OpenChoice) -> Choice:
    if choice.finish_reason is None:
        raise ProtocolError(f"the stream ended without a finish reason for choice {index}")
    return Choice(
        index=index,
        text="".join(choice.texts),
        finish_reason=choice.finish_reason,
        matched_stop=choice.matched_stop,
        token_ids=tuple(choice.token_ids),
        logprobs=tuple(choice.logprobs),
    )
