"""What personal data looks like, for `redraft.traffic.redaction`.

The expressions are RE2's: without backreferences and look-around, and in return each search takes time linear in the
text, whatever pattern and text are. (Python's own `re` can be made to run for years by a pattern and a text that look
harmless, with the interpreter lock held.) What an expression cannot say, such as a check digit, a function says.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import re2

PatternName = Literal["email", "phone", "card", "iban", "ipv4", "ipv6", "credential"]
"""The patterns that come with redraft; `credential` is API keys, tokens, private keys and passwords in URLs."""

MAX_PATTERN_CHARS = 1000

_MAX_MEMORY = 8 * 2**20
"""Bytes for one expression and the automata made of it."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """An expression, and perhaps a check of what it found."""

    name: str
    _expression: Any
    _check: Callable[[str], bool] | None = None

    def occurs_in(self, text: bytes) -> bool:
        """Whether it is anywhere in a text (UTF-8, see `normalised`)."""
        if self._check is None:
            return self._expression.search(text) is not None
        return any(self._check(found.group().decode()) for found in self._expression.finditer(text))


def patterns_of(names: Sequence[PatternName], custom: Sequence[str]) -> list[Pattern]:
    """The patterns of two settings; the custom ones are named by their place: `custom_1`, ...

    Raises ValueError for a bad custom pattern, naming its place.
    """
    patterns = [Pattern(name, _compiled(text), check) for name in names for text, check in _KNOWN[name]]
    for place, text in enumerate(custom, start=1):
        try:
            patterns.append(_custom(text, f"custom_{place}"))
        except ValueError as error:
            raise ValueError(f"pattern {place} {error}") from None
    return patterns


def _custom(text: str, name: str) -> Pattern:
    if len(text) > MAX_PATTERN_CHARS:
        raise ValueError(f"has {len(text)} characters, but at most {MAX_PATTERN_CHARS} are allowed")
    try:
        expression = _compiled(text)
    except re2.error as error:
        reason = error.args[0]
        reason = reason.decode("utf-8", "replace") if isinstance(reason, bytes) else reason
        raise ValueError(f"is no RE2 expression ({reason}); there is no look-around and no backreference") from None
    if expression.search(b"") is not None:
        raise ValueError("matches the empty text, and so every record")
    return Pattern(name, expression)


def normalised(text: str) -> bytes:
    """The text as it is searched: in Unicode's form NFKC, every dash a hyphen, without characters of no width."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_TRANSLATION)
    return text.encode("utf-8", "replace")


_TRANSLATION = dict.fromkeys((*range(0x2010, 0x2016), 0x2212), "-") | dict.fromkeys(
    (0xAD, *range(0x200B, 0x2010), 0x2060, 0xFEFF), ""
)


def _compiled(text: str) -> Any:
    options = re2.Options()
    options.max_mem = _MAX_MEMORY
    options.log_errors = False
    return re2.compile(text, options)


def _has_card(text: str) -> bool:
    """Whether whole groups of digits, next to each other, make a payment card's number (ISO/IEC 7812)."""
    return any(
        13 <= len(digits) <= 19 and digits[0] in "23456" and _luhn(digits)
        for digits in _runs(re.split("[ -]", text), 19)
    )


def _has_iban(text: str) -> bool:
    """Whether groups from the first on make an IBAN (ISO 13616): what follows it may look like more of it."""
    groups = text.split(" ")
    candidates = ("".join(groups[:end]) for end in range(1, len(groups) + 1))
    return any(15 <= len(iban) <= 34 and _mod_97(iban) == 1 for iban in candidates)


def _runs(groups: Sequence[str], longest: int) -> Iterator[str]:
    """Neighbouring groups, joined, as long as they have at most `longest` characters."""
    for start in range(len(groups)):
        joined = ""
        for group in groups[start:]:
            joined += group
            if len(joined) > longest:
                break
            yield joined


def _luhn(digits: str) -> bool:
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(int(digit) for digit in digits[-1::-2]) + sum(doubled)) % 10 == 0


def _mod_97(iban: str) -> int:
    return int("".join(str(int(char, 36)) for char in iban[4:] + iban[:4])) % 97


def _is_phone(text: str) -> bool:
    if re.match(r"\d\d[./-]\d\d[./-]\d{4}\b", text) or re.fullmatch(r"\+?\d+\.\d+", text):
        return False  # a date, a number with decimals
    return 9 <= sum(char.isdigit() for char in text) <= 15


def _is_ipv6(text: str) -> bool:
    if sum(bool(group) for group in text.split(":")) < 4:
        return False  # `a::b` is a slice or a name more often
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


_BYTE = r"(?:25[0-5]|2[0-4]\d|1?\d?\d)"

_KNOWN: dict[str, tuple[tuple[str, Callable[[str], bool] | None], ...]] = {
    "email": ((r"[\pL\pN._%+'-]+@(?:[\pL\pN-]+\.)+\pL{2,}", None),),
    "phone": (
        (r"(?:\+|\b00)[1-9](?:[ ()./-]{0,3}\d){8,14}\b", _is_phone),  # international
        (r"(?:\([2-9]\d\d\) ?|\b[2-9]\d\d[ .-])\d{3}[ .-]\d{4}\b", _is_phone),  # North America
        (r"\b0\d{1,4}(?:[ ./-]\d{2,}){1,5}\b", _is_phone),  # national, with the trunk prefix
    ),
    "card": ((r"\b\d(?:[ -]?\d){12,}\b", _has_card),),
    "iban": ((r"(?i)\b[a-z]{2}\d{2}(?: ?[a-z0-9]){11,60}\b", _has_iban),),
    "ipv4": ((rf"\b(?:{_BYTE}\.){{3}}{_BYTE}\b", None),),
    "ipv6": ((r"(?i)(?:\b[0-9a-f]{1,4})?(?::[0-9a-f]{0,4}){3,7}\b", _is_ipv6),),
    "credential": (
        (r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b", None),
        (r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{22}|xox[abeprs]-[\w-]{10}|AIza[\w-]{35}|sk-[\w-]{20})", None),
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----", None),
        (r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.", None),  # a JSON web token
        (r"://[^\s/@:]+:[^\s/@]+@", None),
    ),
}

assert set(_KNOWN) == set(get_args(PatternName))
