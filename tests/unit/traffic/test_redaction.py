"""A record whose text matches is not stored, wherever in the record the text hides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from redraft.traffic.patterns import patterns_of
from redraft.traffic.record import StepRecord, TrafficRecord
from redraft.traffic.redaction import WithholdMatching
from redraft.traffic.writer import TrafficWriter
from tests.unit.traffic.fakes import Observer, record


def decode(token_ids: Sequence[int]) -> str:
    return "".join(chr(token) for token in token_ids)


def encode(text: str) -> tuple[int, ...]:
    return tuple(ord(char) for char in text)


def spoken(prompt: str, output: str, *steps: StepRecord, **names: str) -> TrafficRecord:
    return record(prompt_token_ids=encode(prompt), output_token_ids=encode(output), steps=steps, teacher=(), **names)


SCREEN = WithholdMatching(patterns_of(["email"], [r"\b\d{4}-\d{4}\b", "(?i)secret"]), decode)


@pytest.mark.parametrize(
    ("made", "pattern"),
    [
        (spoken("my card is", " not here"), None),
        (spoken("my card is 1234-5678", " ok"), "custom_1"),
        (spoken("repeat it", " 1234-5678 "), "custom_1"),
        (spoken("complete 1234-", "5678"), "custom_1"),  # half in the prompt, half in the output
        (spoken("my card is 1234-5678", "9 or so"), "custom_1"),  # none any more with what follows it
        (spoken("a card 1", "1234-5678"), "custom_1"),
        (spoken("a SECRET", ""), "custom_2"),
        (spoken("bob@example.com is secret", ""), "email"),  # the first in order
        # A rejected draft, shown to nobody; the match begins in the text before it.
        (spoken("card", " is 1234-none", StepRecord(9, encode("5678"), 0, "ngram", "")), "custom_1"),
        # A draft that a stop cut off after it was accepted.
        (spoken("card", " is", StepRecord(3, encode(" 1234-5678"), 10, "ngram", "")), "custom_1"),
        (spoken("card", " is none", StepRecord(3, encode(" 9"), 0, "ngram", "")), None),
        # What the client chose as a name.
        (spoken("", "ok", request_id="bob@example.com/17"), "email"),
        (spoken("", "ok", tenant="secret-project"), "custom_2"),
        (spoken("", "ok", domain="top_secret"), "custom_2"),
    ],
)
def test_matching_records_are_withheld(made: TrafficRecord, pattern: str | None) -> None:
    assert SCREEN(made) == pattern


def test_end_to_end_no_byte_of_a_matching_record_reaches_the_disk(tmp_path: Path) -> None:
    observer = Observer()
    log = TrafficWriter(str(tmp_path), observer, redact=SCREEN)
    log.offer(spoken("my card is 1234-5678", " ok", request_id="withheld"))
    log.offer(spoken("hello", " there", request_id="kept"))
    assert log.close(20)
    assert observer.results == {"redacted": 1, "written": 1}
    assert observer.patterns == {"custom_1": 1}
    assert observer.reasons == {}
    (shard,) = tmp_path.rglob("*.parquet")
    assert b"kept" in shard.read_bytes()
    assert b"withheld" not in shard.read_bytes()


def test_without_a_tokenizer_nothing_is_stored(tmp_path: Path) -> None:
    observer = Observer()
    log = TrafficWriter(str(tmp_path), observer, redact=WithholdMatching(patterns_of(["email"], ())))
    log.offer(spoken("hello", " there"))
    assert log.close(20)
    assert list(tmp_path.rglob("*")) == []
    assert observer.reasons == {"redaction_error": 1}
