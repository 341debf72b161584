"""Where a completion is cut and what text leaves it, however its tokens were split into steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redraft.models.tokenizer import Tokenizer
from redraft.sampling.params import StoppingParams
from redraft_server.engine.api import FinishReason
from redraft_server.engine.output import CompletionOutput
from tests.fakes import EOS_ID, tiny_tokenizer

TOKENIZER = Tokenizer(tiny_tokenizer(400))  # all bytes, and merges "aa", "ab", ..
STOP_ID = TOKENIZER.encode("z")[0]
Result = tuple[str, int, FinishReason | None, str | int | None]


def ids(*texts: str) -> list[int]:
    """One id for each text (a character, or a merge)."""
    found = [TOKENIZER.encode(text) for text in texts]
    assert all(len(one) == 1 for one in found), "not single tokens"
    return [one[0] for one in found]


def run(runs: Sequence[Sequence[int]], limit: int = 100, finish: bool = False, **stopping: Any) -> Result:
    """Push the runs until one ends it -> text, tokens that count, reason, matched stop."""
    params = StoppingParams(max_new_tokens=100, **stopping)
    output = CompletionOutput(TOKENIZER, params, eos_token_ids=frozenset({EOS_ID}), max_new_tokens=limit)
    text, count = "", 0
    for tokens in runs:
        delta = output.push(tokens)
        text += delta.text
        count += delta.num_tokens
        if delta.finish_reason is not None:
            assert output.finish() == "", "nothing may be held back behind the end"
            assert output.num_tokens == count
            return text, count, delta.finish_reason, delta.matched_stop
        assert delta.num_tokens == len(tokens)
    return text + (output.finish() if finish else ""), count, None, None


def reference(tokens: Sequence[int], params: StoppingParams, limit: int) -> Result:
    """Decode everything again after each token, and search it."""
    for count, token in enumerate(tokens, 1):
        before, text = TOKENIZER.decode(tokens[: count - 1]), TOKENIZER.decode(tokens[:count])
        if token == EOS_ID and not params.ignore_eos:
            return before, count, FinishReason.EOS, None
        if token in params.stop_token_ids:
            return text if params.include_stop_sequence else before, count, FinishReason.STOP_SEQUENCE, token
        found = [
            (at, index, stop)
            for index, stop in enumerate(params.stop_sequences)
            for at in range(len(text))
            if text.startswith(stop, at) and at + len(stop) > len(before)
        ]
        if found and count >= params.min_new_tokens:
            at, _, stop = min(found)
            end = at + len(stop) if params.include_stop_sequence else at
            return text[:end], count, FinishReason.STOP_SEQUENCE, stop
        if count == limit:
            return text, count, FinishReason.LENGTH, None
    return TOKENIZER.decode(tokens), len(tokens), None, None


def split(tokens: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    edges = [0, *sorted(set(cuts) & set(range(1, len(tokens)))), len(tokens)]
    return [tokens[a:b] for a, b in pairwise(edges)]


LETTERS = st.sampled_from([*ids("a", "b", "c", "aa", "ab", "bc"), STOP_ID, EOS_ID])
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3).map(tuple)


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.lists(LETTERS, min_size=1, max_size=14),
    cuts=st.lists(st.integers(1, 13)),
    stops=STOPS,
    include=st.booleans(),
    ignore_eos=st.booleans(),
    stop_ids=st.sampled_from([frozenset(), frozenset({STOP_ID})]),
    min_new=st.integers(0, 5),
    limit=st.integers(5, 16),
)
def test_every_split_into_runs_gives_what_a_full_search_gives(
    tokens: list[int],
    cuts: list[int],
    stops: tuple[str, ...],
    include: bool,
    ignore_eos: bool,
    stop_ids: frozenset[int],
    min_new: int,
    limit: int,
) -> None:
    options: dict[str, Any] = {
        "stop_sequences": stops,
        "include_stop_sequence": include,
        "ignore_eos": ignore_eos,
        "stop_token_ids": stop_ids,
        "min_new_tokens": min_new,
    }
    expected = reference(tokens, StoppingParams(max_new_tokens=100, **options), limit)
    assert run(split(tokens, cuts), limit, finish=True, **options) == expected


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.sampled_from("aé€𝄞b"), min_size=1, max_size=8),
    cuts=st.lists(st.integers(1, 30)),
    stops=st.lists(st.text(st.sampled_from("aé€𝄞b"), min_size=1, max_size=2), max_size=2).map(tuple),
)
def test_characters_of_several_tokens_are_never_split_nor_missed(
    text: str, cuts: list[int], stops: tuple[str, ...]
) -> None:
    tokens = TOKENIZER.encode(text)
    got, _, reason, matched = run(split(tokens, cuts), stop_sequences=stops, finish=True)
    hits = [(text.find(stop) + len(stop), stop) for stop in stops if stop in text]
    if not hits:
        assert (got, reason) == (text, None)
        return
    assert reason is FinishReason.STOP_SEQUENCE
    assert matched in stops
    assert "\ufffd" not in got
    end = min(hits)[0]  # the stop that is complete first
    assert got in {text[: end - len(stop)] for at, stop in hits if at == end}


def test_nothing_is_emitted_that_may_still_become_a_stop() -> None:
    output = CompletionOutput(
        TOKENIZER, StoppingParams(stop_sequences=("abc",)), eos_token_ids=frozenset(), max_new_tokens=50
    )
    texts = [output.push(ids(letter)).text for letter in "xabab"]
    assert texts == ["x", "", "", "ab", ""]
    assert output.push(ids("a")).text == "aba"[:2]
    assert output.finish() == "a"
    assert output.finish() == ""


def test_overlapping_stops_end_at_the_one_completed_first() -> None:
    for stops in (("ab", "abc"), ("abc", "ab")):
        assert run([ids("x", "a", "b", "c")], stop_sequences=stops) == ("x", 3, FinishReason.STOP_SEQUENCE, "ab")


@pytest.mark.parametrize(("stops", "matched"), [(("ab", "abc"), "ab"), (("abc", "ab"), "abc")])
def test_stops_completed_by_one_token_end_at_the_first_listed(stops: tuple[str, ...], matched: str) -> None:
    result = run([ids("a", "bc")], stop_sequences=stops, include_stop_sequence=True)
    assert result == (matched, 2, FinishReason.STOP_SEQUENCE, matched)


def test_text_behind_the_stop_in_the_same_token_is_dropped() -> None:
    assert run([ids("x", "ab")], stop_sequences=("a",)) == ("x", 2, FinishReason.STOP_SEQUENCE, "a")


def test_a_stop_passed_over_before_min_new_tokens_does_not_count_later() -> None:
    """Also when another stop, longer, has kept its text held back."""
    for stops in (("ab",), ("ab", "abxyz")):
        result = run([ids("a"), ids("b"), ids("c")], limit=3, stop_sequences=stops, min_new_tokens=3)
        assert result == ("abc", 3, FinishReason.LENGTH, None)


def test_a_stop_that_ends_with_the_last_token_wins_over_length() -> None:
    assert run([ids("a", "b")], limit=2, stop_sequences=("ab",)) == ("", 2, FinishReason.STOP_SEQUENCE, "ab")
    assert run([ids("a", "b")], limit=2, stop_sequences=("abc",)) == ("ab", 2, FinishReason.LENGTH, None)


def test_end_of_text_releases_what_was_held_back() -> None:
    tokens = [*ids("a", "b"), EOS_ID, *ids("c")]
    assert run([tokens], stop_sequences=("abc",)) == ("ab", 3, FinishReason.EOS, None)
    assert run([tokens], stop_sequences=("abc",), ignore_eos=True) == ("", 4, FinishReason.STOP_SEQUENCE, "abc")


@pytest.mark.parametrize(("include", "text"), [(False, "a"), (True, "az")])
def test_a_stop_token_id_is_named_and_included_on_demand(include: bool, text: str) -> None:
    result = run([[*ids("a"), STOP_ID, *ids("b")]], stop_token_ids=frozenset({STOP_ID}), include_stop_sequence=include)
    assert result == (text, 2, FinishReason.STOP_SEQUENCE, STOP_ID)


def test_an_unfinished_character_at_the_end_becomes_a_replacement() -> None:
    tokens = TOKENIZER.encode("a€")
    assert run([tokens[:-1]], limit=len(tokens) - 1) == ("a\ufffd", len(tokens) - 1, FinishReason.LENGTH, None)
