"""What may be kept of a record, decided on the writer's thread before anything reaches the store."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from redraft.traffic.record import TrafficRecord


class Redactor(Protocol):
    """Returns the record to keep (changed or not), or None to drop it.

    Fails closed: a redactor that raises has the record dropped.
    """

    def __call__(self, record: TrafficRecord, /) -> TrafficRecord | None: ...


class DropMatching:
    """Drops every record whose text matches one of the patterns.

    Whole records, because part of one cannot be taken out: the ids after a hole were chosen by the target
    given the ids in it, so a shortened or masked prefix would pair the teacher's logits with a text they do
    not belong to. And what surrounds a name or number often tells it anyway.

    Searched are the prompt with the output (a match may span both), and every draft that is not all in the
    output together with the text before it: rejected tokens were shown to nobody, but they would be in the
    log. `decode` turns token ids into text and is called on the writer's thread. Raises re.error for a bad
    pattern.
    """

    def __init__(self, patterns: Iterable[str], decode: Callable[[Sequence[int]], str]) -> None:
        self._patterns = [re.compile(pattern) for pattern in patterns]
        self._decode = decode

    def __call__(self, record: TrafficRecord, /) -> TrafficRecord | None:
        for token_ids in _texts(record):
            text = self._decode(token_ids)
            if any(pattern.search(text) for pattern in self._patterns):
                return None
        return record


_CONTEXT_TOKENS = 64
"""Text searched before a rejected draft, as a match may begin there: enough for names and numbers."""


def _texts(record: TrafficRecord) -> Iterator[tuple[int, ...]]:
    text = (*record.prompt_token_ids, *record.output_token_ids)
    yield text
    for step in record.steps:
        start = len(record.prompt_token_ids) + step.start
        if text[start : start + len(step.drafted_token_ids)] != step.drafted_token_ids:
            yield (*text[max(0, start - _CONTEXT_TOKENS) : start], *step.drafted_token_ids)
