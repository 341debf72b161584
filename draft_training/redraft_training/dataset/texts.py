"""Prompts and responses from a file of text, as examples without labels: a black box's answers, long reasoning traces.

JSON lines, one example each: `{"prompt": "...", "response": "...", "domain": "..."}`, or with `"messages"` (a chat
whose last message is the assistant's) in place of the first two. `domain` may be missing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from redraft.models.tokenizer import Tokenizer
from redraft.sampling.params import SamplingParams
from redraft_training.dataset.chat import Message, answer_end, chat_prompt
from redraft_training.dataset.errors import NotEnoughData
from redraft_training.dataset.example import Example


@dataclass(frozen=True, slots=True)
class TextReport:
    """Lines of the file, and those not used, by reason: `not_json`, `incomplete` (a key is missing, empty or no text),
    `template` (the chat template refuses it, or it is no valid Unicode), `duplicate`."""

    lines: int
    skipped: Mapping[str, int]


def read_texts(
    path: Path, tokenizer: Tokenizer, params: SamplingParams, *, max_output_tokens: int = 8192, domain: str = "text"
) -> tuple[list[Example], TextReport]:
    """Examples of a file of JSON lines.

    Args:
        params: at which the draft will be asked for such text; the text itself need not have been drawn so.
        max_output_tokens: longer responses are cut; a whole one is followed by the end-of-text token.
        domain: of lines that name none.

    Raises OSError if the file cannot be read, NotEnoughData if no line is of use.
    """
    skipped: Counter[str] = Counter()
    examples: dict[str, Example] = {}
    lines = 0
    end = answer_end(tokenizer)
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                continue
            lines += 1
            try:
                messages, response, own_domain = _parts(line)
                prompt, output = _ids(tokenizer, messages, response)
            except _Unusable as error:
                skipped[str(error)] += 1
                continue
            output = [*output, end] if len(output) < max_output_tokens and end is not None else output
            output = output[:max_output_tokens]
            request_id = _request_id(prompt, output)
            if request_id in examples:
                skipped["duplicate"] += 1
                continue
            examples[request_id] = Example(
                request_id=request_id,
                sample_index=0,
                domain=own_domain or domain,
                created_unix_s=path.stat().st_mtime,
                prompt_token_ids=tuple(prompt),
                output_token_ids=tuple(output),
                params=params,
                labels=(None,) * len(output),
            )
    if not examples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "it is empty"
        raise NotEnoughData(f"{path} has no usable line ({reasons}): it needs `prompt` and `response`, or `messages`")
    return list(examples.values()), TextReport(lines, dict(skipped))


class _Unusable(Exception):
    """The line's reason, one of `TextReport.skipped`."""


def _parts(line: str) -> tuple[Sequence[Message], str, str]:
    """Messages of the prompt, the response, the domain."""
    try:
        parsed = json.loads(line)
    except ValueError:
        raise _Unusable("not_json") from None
    if not isinstance(parsed, dict):
        raise _Unusable("incomplete")
    messages = parsed.get("messages")
    if messages is None:
        messages = [
            {"role": "user", "content": parsed.get("prompt")},
            {"role": "assistant", "content": parsed.get("response")},
        ]
    if not isinstance(messages, list) or len(messages) < 2 or not all(isinstance(m, dict) for m in messages):
        raise _Unusable("incomplete")
    texts = [message.get("content") for message in messages]
    if not all(isinstance(text, str) and text for text in texts) or messages[-1].get("role") != "assistant":
        raise _Unusable("incomplete")
    domain = parsed.get("domain")
    return messages[:-1], str(texts[-1]), domain if isinstance(domain, str) else ""


def _ids(tokenizer: Tokenizer, messages: Sequence[Message], response: str) -> tuple[list[int], list[int]]:
    try:
        return chat_prompt(tokenizer, messages), tokenizer.encode(response, add_special_tokens=False)
    except ValueError:
        raise _Unusable("template") from None


def _request_id(prompt: Sequence[int], output: Sequence[int]) -> str:
    digest = hashlib.blake2b(digest_size=12)
    for part in (prompt, output):
        digest.update(b"%d:" % len(part))
        digest.update(b",".join(b"%d" % token for token in part))
    return f"text-{digest.hexdigest()}"
