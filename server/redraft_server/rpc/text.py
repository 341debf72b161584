"""Tokenizing for the RPCs: on the loop while it is short, on one worker thread when it is not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from redraft.errors import ChatTemplateMissing
from redraft_server.rpc.convert import PROMPT_PER_POSITION, ChatPrompt, Prompt, TextPrompt, TokenPrompt
from redraft_server.rpc.status import FieldViolation, failed_precondition, invalid_argument

# Tokenizing this much takes about a millisecond: less than the hand-over to a thread is worth.
INLINE_CHARS = 4096

_T = TypeVar("_T")


class TextTokenizer(Protocol):
    """What the edge needs of `redraft.models.tokenizer.Tokenizer`."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str: ...

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, add_generation_prompt: bool = True
    ) -> list[int]: ...

    def token_text(self, token_id: int) -> str: ...


class TextService:
    """The tokenizer, shared by all RPCs."""

    def __init__(self, tokenizer: TextTokenizer, context_length: int) -> None:
        self._tokenizer = tokenizer
        self._max_chars = PROMPT_PER_POSITION * context_length
        self.has_chat_template = _has_chat_template(tokenizer)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)

    def token_text(self, token_id: int) -> str:
        """Text of one token on its own."""
        return self._tokenizer.token_text(token_id)

    async def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Text of each token on its own."""
        return await self._run(len(token_ids), lambda: [self.token_text(token_id) for token_id in token_ids])

    async def encode(self, prompt: Prompt, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt.

        Raises:
            StatusError: FAILED_PRECONDITION if the model has no chat template, INVALID_ARGUMENT if the template
                does not take these messages or the text is far too long for the context.
        """
        match prompt:
            case TokenPrompt():
                return list(prompt.token_ids)
            case TextPrompt():
                text = prompt.text
                self._require_tokenizable(len(text), prompt.field)
                return await self._run(
                    len(text), lambda: self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
                )
            case ChatPrompt():
                size = sum(len(role) + len(content) for role, content in prompt.messages)
                self._require_tokenizable(size, prompt.field)
                return await self._run(size, lambda: self._apply_template(prompt))

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return await self._run(
            len(token_ids), lambda: self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        )

    def _require_tokenizable(self, size: int, field: str) -> None:
        if size > self._max_chars:
            description = (
                f"has {size} characters; at most {self._max_chars} are tokenized, {PROMPT_PER_POSITION} for each"
            )
            raise invalid_argument([FieldViolation(field, f"{description} position of the context")])

    def _apply_template(self, prompt: ChatPrompt) -> list[int]:
        messages = [{"role": role, "content": content} for role, content in prompt.messages]
        try:
            return self._tokenizer.apply_chat_template(messages, add_generation_prompt=prompt.add_generation_prompt)
        except ChatTemplateMissing:
            raise failed_precondition(
                "CHAT_TEMPLATE", prompt.field, "the model has no chat template; send text or token_ids"
            ) from None
        except ValueError:
            # What the template says about the messages may quote them: it stays here.
            raise invalid_argument(
                [FieldViolation(prompt.field, "the model's chat template does not take these messages")]
            ) from None

    async def _run(self, size: int, work: Callable[[], _T]) -> _T:
        if size <= INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def _has_chat_template(tokenizer: TextTokenizer) -> bool:
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}])
    except ChatTemplateMissing:
        return False
    except ValueError:  # there is one; it only dislikes this message
        return True
    return True
