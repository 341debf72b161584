"""What may be kept of a record, decided on the writer's thread before anything reaches the store."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from redraft.traffic.patterns import Pattern, normalised
from redraft.traffic.record import TrafficRecord

Decode = Callable[[Sequence[int]], str]
"""Token ids to text, special tokens included."""


class Redactor(Protocol):
    """Says why a record must not be stored: the name of a pattern; None to store it.

    Fails closed: a redactor that raises has the record dropped.
    """

    def __call__(self, record: TrafficRecord, /) -> str | None: ...


class WithholdMatching:
    """Withholds every record whose text matches one of the patterns.

    Whole records, because part of one cannot be taken out: the ids after a hole were chosen by the target
    given the ids in it, so a shortened or masked prefix would pair the teacher's logits with a text they do
    not belong to. And what surrounds a name or number often tells it anyway.

    Searched are the prompt, the output, the output with the end of the prompt before it (a match may span both,
    and one at the end of the prompt may be none any more with what the target wrote right behind it), every
    draft that is not all in the output together with the text before it (rejected tokens were shown to nobody,
    but they would be in the log), and the names that the client chose: request id, tenant, domain. Decoding and
    searching take time linear in the record's length and do not hold the interpreter lock.

    `decode` may be given later, as a server knows its patterns before its tokenizer; until then every call
    raises RuntimeError.
    """

    def __init__(self, patterns: Sequence[Pattern], decode: Decode | None = None) -> None:
        self._patterns = tuple(patterns)
        self.decode = decode

    def __call__(self, record: TrafficRecord, /) -> str | None:
        texts = [normalised(text) for text in self._texts(record)]
        for pattern in self._patterns:
            if any(pattern.occurs_in(text) for text in texts):
                return pattern.name
        return None

    def _texts(self, record: TrafficRecord) -> Iterator[str]:
        if self.decode is None:
            raise RuntimeError("no tokenizer yet")
        yield from (record.request_id, record.tenant, record.domain)
        for token_ids in _sequences(record):
            yield self.decode(token_ids)


_CONTEXT_TOKENS = 64
"""Text searched before an output or a rejected draft, as a match may begin there: enough for names and numbers."""


def _sequences(record: TrafficRecord) -> Iterator[tuple[int, ...]]:
    prompt, output = record.prompt_token_ids, record.output_token_ids
    yield from (prompt, output, (*prompt[-_CONTEXT_TOKENS:], *output))
    text = (*prompt, *output)
    for step in record.steps:
        start = len(prompt) + step.start
        if text[start : start + len(step.drafted_token_ids)] != step.drafted_token_ids:
            yield (*text[max(0, start - _CONTEXT_TOKENS) : start], *step.drafted_token_ids)
