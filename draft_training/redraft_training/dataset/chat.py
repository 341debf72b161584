"""Prompts in a model's own chat template, and where a turn begins and ends in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from redraft.errors import ChatTemplateMissing
from redraft.models.tokenizer import Tokenizer

Message = Mapping[str, str]


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation with the assistant's turn opened; without a template, of the texts, one a line.

    Raises ValueError if the template refuses the messages.
    """
    try:
        return tokenizer.apply_chat_template(messages)
    except ChatTemplateMissing:
        return tokenizer.encode("\n".join(message["content"] for message in messages))


def opened_turn(tokenizer: Tokenizer, before: Sequence[Message], role: str) -> tuple[list[int], int | None]:
    """Token ids up to where a message of `role` begins, and the special token that ends it (None: there is none).

    A template is not asked for an open turn, which most can give for the assistant only: two different messages are
    rendered, and what both begin with is the opening.

    Raises ChatTemplateMissing, or ValueError if the template refuses the messages.
    """
    first, second = (
        tokenizer.apply_chat_template([*before, {"role": role, "content": text}], add_generation_prompt=False)
        for text in ("What is it?", "Do that now")
    )
    start = _common_prefix(first, second)
    num_behind = _common_prefix(first[:start:-1], second[:start:-1])
    behind = first[len(first) - num_behind :]
    return first[:start], next((token for token in behind if token in tokenizer.special_token_ids), None)


def answer_end(tokenizer: Tokenizer) -> int | None:
    """The token behind a complete answer: that of the chat template, else an end-of-text token."""
    try:
        _, end = opened_turn(tokenizer, [{"role": "user", "content": "Hello"}], "assistant")
    except (ChatTemplateMissing, ValueError):
        end = None
    return end if end is not None else min(tokenizer.eos_token_ids, default=None)


def _common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
