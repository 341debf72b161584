"""A record whose text matches is dropped, wherever in the record the text hides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from redraft.traffic.record import StepRecord, TrafficRecord
from redraft.traffic.redaction import DropMatching
from redraft.traffic.writer import TrafficWriter
from tests.unit.traffic.fakes import Observer, record


def decode(token_ids: Sequence[int]) -> str:
    return "".join(chr(token) for token in token_ids)


def encode(text: str) -> tuple[int, ...]:
    return tuple(ord(char) for char in text)


def spoken(prompt: str, output: str, *steps: StepRecord) -> TrafficRecord:
    return record(prompt_token_ids=encode(prompt), output_token_ids=encode(output), steps=steps, teacher=())


DROP_NUMBERS = DropMatching([r"\b\d{4}-\d{4}\b", "(?i)secret"], decode)


@pytest.mark.parametrize(
    ("made", "is_kept"),
    [
        (spoken("my card is", " not here"), True),
        (spoken("my card is 1234-5678", " ok"), False),
        (spoken("repeat it", " 1234-5678 "), False),
        (spoken("complete 1234-", "5678"), False),  # half in the prompt, half in the output
        (spoken("a SECRET", ""), False),
        # A rejected draft, shown to nobody; the match begins in the text before it.
        (spoken("card", " is 1234-none", StepRecord(9, encode("5678"), 0, "ngram", "")), False),
        # A draft that a stop cut off after it was accepted.
        (spoken("card", " is", StepRecord(3, encode(" 1234-5678"), 10, "ngram", "")), False),
        (spoken("card", " is none", StepRecord(3, encode(" 9"), 0, "ngram", "")), True),
    ],
)
def test_matching_records_are_dropped(made: TrafficRecord, is_kept: bool) -> None:
    assert DROP_NUMBERS(made) is (made if is_kept else None)


def test_end_to_end_no_byte_of_a_matching_record_reaches_the_disk(tmp_path: Path) -> None:
    observer = Observer()
    log = TrafficWriter(str(tmp_path), observer, redact=DROP_NUMBERS)
    log.offer(spoken("my card is 1234-5678", " ok"))
    log.offer(spoken("hello", " there"))
    assert log.close(20)
    assert observer.results == {"dropped": 1, "written": 1}
    assert observer.reasons == {"redacted": 1}


def test_a_bad_pattern_is_an_error_at_start_up() -> None:
    with pytest.raises(re.error):
        DropMatching(["("], decode)
