"""What each pattern finds, and what looks like it and is not; a bad pattern is refused, and none can be made slow."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redraft.traffic.patterns import PatternName, normalised, patterns_of

NAMES: tuple[PatternName, ...] = get_args(PatternName)
(CARD,) = patterns_of(["card"], ())


def found(text: str) -> set[str]:
    """Names of the patterns that find something."""
    return {pattern.name for pattern in patterns_of(NAMES, ()) if pattern.occurs_in(normalised(text))}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("email", "write to bob.smith+x@mail.example.com."),
        ("email", "an: jürgen@müller.de"),
        ("email", "bob\u200b@exam\u00adple.com"),  # characters of no width
        ("phone", "call +41 44 668 18 00 now"),
        ("phone", "+1 (555) 123-4567"),
        ("phone", "0041446681800"),
        ("phone", "tel. 044 668 18 00"),
        ("phone", "06.12.34.56.78"),
        ("phone", "(212) 555-0123"),
        ("phone", "212\u2013555\u20130123"),  # en dashes
        ("phone", "+41\u00a044\u00a0668\u00a018\u00a000"),  # spaces that do not break
        ("card", "4111 1111 1111 1111"),
        ("card", "4111-1111-1111-1111"),
        ("card", "378282246310005"),
        ("card", "order 12 4111 1111 1111 1111 7"),  # between other numbers
        ("card", "\uff14" + "\uff11" * 3 + (" " + "\uff11" * 4) * 3),  # full-width digits
        ("iban", "DE89 3704 0044 0532 0130 00"),
        ("iban", "gb82west12345698765432"),
        ("iban", "DE89 3704 0044 0532 0130 00 BIC COBADEFFXXX"),  # what follows looks like more of it
        ("ipv4", "from 192.168.0.17:8080"),
        ("ipv6", "2001:db8:85a3::8a2e:370:7334"),
        ("credential", "key AKIAIOSFODNN7EXAMPLE"),
        ("credential", "ghp_" + "a" * 36),
        ("credential", "sk-proj-abcdefghijklmnopqrstuvw"),
        ("credential", "-----BEGIN OPENSSH PRIVATE KEY-----"),
        ("credential", "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc"),
        ("credential", "postgres://admin:hunter2@db/x"),
    ],
)
def test_what_is_found(name: str, text: str) -> None:
    assert name in found(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "two words",
        "@bob at x @ w.T, a@b",
        "on 01-12-2024 or 01/12/2024 10:30",
        "10 000 000 people, $1,234.56, +5.123456789",
        "pi is 3.14159265358979",
        "unix time 1700000000000",
        "4111 1111 1111 1112",  # wrong check digit
        "std::vector<int> x[a::b]",
        "12:30:45, aa:bb:cc:dd:ee:ff",
        "version 1.2.3, 999.1.1.1",
        "123e4567-e89b-12d3-a456-426614174000",
        "https://example.com:8080/a@b, sk-short",
    ],
)
def test_what_is_left_alone(text: str) -> None:
    assert found(text) == set()


def test_an_iban_with_a_wrong_check_is_none() -> None:
    assert "iban" not in found("DE89 3704 0044 0532 0130 01")


@given(st.from_regex(r"[2-6][0-9]{11,17}", fullmatch=True))
def test_one_check_digit_in_ten_makes_a_card(digits: str) -> None:
    assert sum(CARD.occurs_in((digits + last).encode()) for last in "0123456789") == 1


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("(", "pattern 2 is no RE2 expression"),
        (r"(?<=a)b", "no look-around"),
        (r"(a)\1", "no backreference"),
        (r"(?:\pL{100}){100}", "repetition"),
        ("x" * 1001, "at most 1000"),
        ("a*", "matches the empty text"),
    ],
)
def test_a_bad_pattern_is_refused(pattern: str, why: str) -> None:
    with pytest.raises(ValueError, match="pattern 2") as refusal:
        patterns_of((), ["fine", pattern])
    assert why in str(refusal.value)


def test_custom_patterns_are_named_by_their_place() -> None:
    first, second = patterns_of((), ["alpha", "(?i)beta"])
    assert (first.name, second.name) == ("custom_1", "custom_2")
    assert (first.occurs_in(b"a BETA"), second.occurs_in(b"a BETA")) == (False, True)


@given(st.text(max_size=200))
def test_any_text_can_be_searched(text: str) -> None:
    found(text)


def test_no_pattern_is_slow_on_any_text() -> None:
    """With a backtracking engine this test would not end within the age of the universe."""
    (pattern,) = patterns_of((), [r"^(a|a|aa)+$"])
    assert not pattern.occurs_in(b"a" * 200_000 + b"!")
