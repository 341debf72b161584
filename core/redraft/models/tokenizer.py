"""Text to token ids and back: the tokenizer, its fingerprint, and streaming detokenisation."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from redraft.errors import ChatTemplateMissing, ModelError, TokenizerMismatch
from redraft.models.cache import Progress, stderr_progress
from redraft.models.loader import read_config
from redraft.models.ref import ModelRef
from redraft.models.source import CheckpointSource, resolve_source

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE_MARK = "\u2581"  # how sentencepiece writes a space
_REPLACEMENT = "\ufffd"  # what bytes that are not UTF-8, or not yet, decode to


class Tokenizer:
    """A fast tokenizer of one model. Immutable after construction; safe to share between threads."""

    def __init__(self, fast: PreTrainedTokenizerFast, *, eos_token_ids: Iterable[int] = ()) -> None:
        """Wrap `fast`. `eos_token_ids`: those of the model's generation config; the tokenizer's is added."""
        self._fast = fast
        # A copy of our own: truncation and padding are state of the backend, and would be lost text
        self._backend = tokenizers.Tokenizer.from_str(fast.backend_tokenizer.to_str())
        self._backend.no_truncation()
        self._backend.no_padding()
        own = () if fast.eos_token_id is None else (int(fast.eos_token_id),)
        self.eos_token_ids: frozenset[int] = frozenset({*eos_token_ids, *own})
        """Ids that end a generation, unless the request ignores them."""
        added = self._backend.get_added_tokens_decoder()
        self.special_token_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        """Ids that decode to no text when special tokens are skipped."""
        self._added: dict[int, str] = {i: token.content for i, token in added.items()}

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included. A model's logits may be padded beyond it."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`.

        `add_special_tokens` adds what the model expects around a plain text (a BOS, for example). The text of
        a special token is read as that token. Raises `ValueError` if `text` is not valid Unicode.
        """
        try:
            # the batch call lets go of the GIL: a long text must not stop every other thread
            return list(self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids)
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError("the text is not valid Unicode (a lone surrogate)") from error

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. Ids beyond the vocabulary give no text."""
        return str(self._backend.decode(ids, skip_special_tokens=skip_special_tokens))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, rendered by the model's own template.

        Each message has `role` and `content`. `add_generation_prompt` opens the assistant's next turn.
        Raises `ChatTemplateMissing` if the model has no template, `ValueError` if `messages` is empty or the
        template refuses it (with the template's reason).
        """
        if not self._fast.chat_template:
            raise ChatTemplateMissing("the model has no chat template: send a text or token ids instead")
        if not messages:
            raise ValueError("the chat has no messages")
        try:
            text = self._fast.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (TemplateError, TypeError, AttributeError, KeyError) as error:
            raise ValueError(f"the chat template refused the messages: {error}") from error
        return self.encode(str(text), add_special_tokens=False)

    def token_text(self, token_id: int) -> str:
        """Text of one id alone, also of a special token; U+FFFD for part of a character; may be empty."""
        return self.decode([self._checked(token_id)], skip_special_tokens=False)

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that one id stands for, also where they are only part of a character."""
        token = self._backend.id_to_token(self._checked(token_id))
        if token is None:
            return b""
        if token_id in self._added:
            return token.encode()
        if self._byte_level:
            return b"".join(_BYTE_OF_SYMBOL.get(symbol, symbol.encode()) for symbol in token)
        byte = _BYTE_TOKEN.fullmatch(token)
        if byte:
            return bytes.fromhex(byte[1])
        return token.replace(_SPACE_MARK, " ").encode()

    @cached_property
    def fingerprint(self) -> str:
        """`sha256:<hex>` over vocabulary, merge rules and added tokens; the same in every process.

        Equal fingerprints mean that an id stands for the same piece of text, which is what target and draft
        must agree on.
        """
        model = json.loads(self._backend.to_str())["model"]
        content = {
            "type": model.get("type"),
            "merges": model.get("merges"),
            "vocab": self._tokens_by_id,
            "added": sorted((i, t, i in self.special_token_ids) for i, t in self._added.items()),
        }
        return "sha256:" + hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def detokenizer(
        self, *, prefix_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> IncrementalDetokenizer:
        """A new streaming detokenizer for one sequence: see `IncrementalDetokenizer`."""
        return IncrementalDetokenizer(self, prefix_ids=prefix_ids, skip_special_tokens=skip_special_tokens)

    @cached_property
    def _tokens_by_id(self) -> list[tuple[int, str]]:
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        return sorted((token_id, token) for token, token_id in vocabulary.items())

    @cached_property
    def _byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self._backend.to_str())["decoder"])

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < 2**32:
            raise ValueError(f"{token_id} is not a token id")
        return token_id


class IncrementalDetokenizer:
    """Turns one sequence's ids into text as they arrive, never splitting a character.

    All that `push` and `flush` return, joined, is the text of all ids, decoded at once. Text is held back
    while it ends in an unfinished character. `prefix_ids` is the end of what came before (the prompt): its
    text is not repeated, but decides whether the first word gets its leading space.

    Why not `tokenizers.decoders.DecodeStream`: it cannot be flushed, and it raises on, or keeps forever,
    bytes that never become UTF-8, which a random model writes sooner or later.

    >>> stream = tokenizer.detokenizer()                          # "€" is the bytes E2 82 AC, a token each
    >>> stream.push([0xE2]), stream.push([0x82]), stream.push([0xAC, ord("!")])
    ('', '', '€!')
    """

    # A run of byte tokens is decoded as one, so the context must be longer than a few such characters.
    _MAX_PREFIX = 64
    # An unfinished character has at most 3 tokens; more undecodable ones than this are not UTF-8 at all.
    _MAX_PENDING = 16

    def __init__(
        self, tokenizer: Tokenizer, *, prefix_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset[int]()
        self._context, self._pending = self._split_prefix(self._visible(prefix_ids)[-self._MAX_PREFIX :])
        self._context_text = self._decode(self._context)

    def push(self, ids: Sequence[int]) -> str:
        """Add ids; return the text that is now complete (often one word, sometimes "")."""
        self._pending += self._visible(ids)
        for cut in self._cuts(self._pending):
            text = self._delta(self._pending[:cut])
            if text and not text.endswith(_REPLACEMENT):
                self._advance(cut)
                return text
        if len(self._pending) > self._MAX_PENDING:
            return self._release_undecodable()
        return ""

    def flush(self) -> str:
        """Return what is still held back, an unfinished character as U+FFFD. The sequence has ended."""
        text = self._delta(self._pending)
        self._advance(len(self._pending))
        return text

    def _release_undecodable(self) -> str:
        """Let go of all but the last few pending ids, at a cut that does not change the text."""
        text = self._delta(self._pending)
        for cut in self._cuts(self._pending[:-3]):
            head, tail = self._pending[:cut], self._pending[cut:]
            released = self._delta(head)
            if released + self._decode(head + tail)[len(self._decode(head)) :] == text:
                self._advance(cut)
                return released
        return ""

    def _split_prefix(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """Context and pending ids: a character that the prefix leaves unfinished is part of our text."""
        ends = (cut for cut in self._cuts(ids) if not self._decode(ids[:cut]).endswith(_REPLACEMENT))
        end = next(ends, len(ids))
        # Taking only the last ids may have halved a character at the start, too
        starts = (n for n in range(min(4, end)) if not self._decode(ids[n:end]).startswith(_REPLACEMENT))
        return ids[next(starts, 0) : end], ids[end:]

    @staticmethod
    def _cuts(ids: list[int]) -> range:
        """Where to cut so that at most 3 ids, as many as an unfinished character has, stay behind."""
        return range(len(ids), max(len(ids) - 4, -1), -1)

    def _delta(self, ids: list[int]) -> str:
        return self._decode(self._context + ids)[len(self._context_text) :] if ids else ""

    def _advance(self, count: int) -> None:
        if count:
            self._context = self._pending[:count]
            self._context_text = self._decode(self._context)
            self._pending = self._pending[count:]

    def _visible(self, ids: Sequence[int]) -> list[int]:
        """`ids` without those that have no text: special ones, and ids past the vocabulary."""
        size = self._tokenizer.vocab_size
        return [token_id for token_id in ids if token_id < size and token_id not in self._skipped]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


def load_tokenizer(ref: ModelRef, *, cache_dir: Path | None = None, progress: Progress = stderr_progress) -> Tokenizer:
    """The tokenizer of the model that `ref` names, with the model's own end-of-sequence ids.

    Raises as `resolve_source` does, and `ModelError` if there is no fast tokenizer.
    """
    source = resolve_source(ref, cache_dir=cache_dir, progress=progress)
    auto: Any = AutoTokenizer
    try:
        fast = auto.from_pretrained(source.directory, trust_remote_code=False)
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise ModelError(f"cannot load the tokenizer of {source.name}: it is missing or damaged") from error
    if not isinstance(fast, PreTrainedTokenizerFast):
        raise ModelError(f"{source.name} has no fast tokenizer (tokenizer.json)")
    return Tokenizer(fast, eos_token_ids=_model_eos_ids(source))


def check_compatible(target: Tokenizer, draft: Tokenizer) -> None:
    """Raise `TokenizerMismatch`, naming the first difference, unless an id means the same to both."""
    if target.fingerprint == draft.fingerprint:
        return
    problem = "target and draft must share one tokenizer: "
    if target.vocab_size != draft.vocab_size:
        sizes = f"the target has {target.vocab_size} tokens, the draft {draft.vocab_size}"
        raise TokenizerMismatch(problem + sizes)
    for ours, theirs in zip(target._tokens_by_id, draft._tokens_by_id, strict=False):
        if ours != theirs:
            differs = f"token {min(ours[0], theirs[0])} is {ours[1]!r} in the target, {theirs[1]!r} in the draft"
            raise TokenizerMismatch(problem + differs)
    raise TokenizerMismatch(problem + "the vocabularies agree, but merge rules or special tokens do not")


def _model_eos_ids(source: CheckpointSource) -> frozenset[int]:
    """End-of-sequence ids of generation_config.json, or else of config.json."""
    if (source.directory / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(source.directory).eos_token_id
    else:
        ids = getattr(read_config(source), "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset({ids} if isinstance(ids, int) else ids)


def _bytes_of_symbols() -> dict[str, bytes]:
    """The alphabet of byte-level BPE: the printable bytes are themselves, the others come after U+0100."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {chr(byte): bytes([byte]) for byte in printable}
    return symbols | {chr(256 + n): bytes([byte]) for n, byte in enumerate(others)}


_BYTE_OF_SYMBOL = _bytes_of_symbols()
