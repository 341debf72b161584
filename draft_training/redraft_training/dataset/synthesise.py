"""The cold start: without traffic, the target writes its own.

Prompts come from the target left alone in an opened *user* turn: an aligned model fills it with what users ask (Xu et
al. 2024, Magpie). A system message names a topic, so that the prompts spread over kinds of traffic; the seed topics are
our own (growing a set from seeds is Wang et al. 2023, Self-Instruct). A model without a chat template is asked to go on
with a line of text instead. What is too short, never ends, repeats itself or resembles an earlier prompt is dropped.
Then the target answers, and its predictions are kept as labels, as if it had been serving.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from redraft.errors import ChatTemplateMissing
from redraft.models.runner import ModelRunner
from redraft.models.tokenizer import Tokenizer
from redraft.sampling.logprobs import TeacherRow
from redraft.sampling.params import SamplingParams
from redraft_training.dataset.chat import chat_prompt, opened_turn
from redraft_training.dataset.example import Example, Label
from redraft_training.dataset.generate import Generated, generate
from redraft_training.dataset.topics import TOPICS

_SHINGLE_WORDS = 3
_PROMPT_PARAMS = SamplingParams(temperature=0.9, top_p=0.95)
_ANSWER_PARAMS = (SamplingParams(temperature=0.0), SamplingParams(temperature=0.7, top_p=0.95))
_ROUND = 64  # prompts asked for at a time


@dataclass(frozen=True, slots=True)
class SynthesisSettings:
    """Attributes:
    num_examples: prompts to accept and answer.
    topics: by domain; None: the built-in ones. The examples' domains are these, behind `synthetic/`.
    prompt_params: how prompts are drawn. Answers are drawn with each of `answer_params` in turn: give those that the
        application will ask with.
    min_prompt_tokens, max_prompt_tokens, max_answer_tokens: limits; an answer that reaches its limit is kept.
    max_similarity: a prompt is a duplicate if it shares this part of its three-word runs with an earlier one (Jaccard).
    attempts: prompts tried for each accepted one, before giving up with fewer.
    label_top_n: logits kept at each position; 0: text only.
    """

    num_examples: int
    topics: Mapping[str, Sequence[str]] | None = None
    prompt_params: SamplingParams = _PROMPT_PARAMS
    answer_params: tuple[SamplingParams, ...] = _ANSWER_PARAMS
    min_prompt_tokens: int = 5
    max_prompt_tokens: int = 128
    max_answer_tokens: int = 256
    max_similarity: float = 0.6
    attempts: int = 4
    label_top_n: int = 32
    max_running: int = 16
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Synthesis:
    """Examples, and how many prompts were tried and why some were dropped (`unfinished`, `too_short`, `not_text`,
    `repetitive`, `duplicate`)."""

    examples: tuple[Example, ...]
    num_tried: int
    dropped: Mapping[str, int]


def synthesise(
    runner: ModelRunner, tokenizer: Tokenizer, settings: SynthesisSettings, *, created_unix_s: float
) -> Synthesis:
    """Let the target write prompts and answer them. The same model, settings and seed give the same text.

    Args:
        runner: of the target. `created_unix_s` dates the examples.
    """
    filter_ = PromptFilter(settings)
    accepted: list[tuple[str, str]] = []
    tried = 0
    topics = _topics(settings)
    with _progress("Writing prompts", settings.num_examples) as show:
        while len(accepted) < settings.num_examples and tried < settings.attempts * settings.num_examples:
            asked = [next(topics) for _ in range(min(_ROUND, settings.attempts * settings.num_examples - tried))]
            openings = [open_user_turn(tokenizer, topic) for _, topic in asked]
            ends = {*tokenizer.eos_token_ids, *(end for _, own in openings for end in own)}
            written = generate(
                runner,
                [prefix for prefix, _ in openings],
                settings.prompt_params,
                max_new_tokens=settings.max_prompt_tokens + 1,
                end_token_ids=sorted(ends),
                seed=settings.seed + tried,
                max_running=settings.max_running,
            )
            tried += len(asked)
            for (domain, _), made in zip(asked, written, strict=True):
                text = filter_.accept(made, tokenizer)
                if text is not None and len(accepted) < settings.num_examples:
                    accepted.append((domain, text))
            show(len(accepted))
    examples = answer(runner, tokenizer, accepted, settings, created_unix_s=created_unix_s)
    return Synthesis(tuple(examples), tried, dict(sorted(filter_.dropped.items())))


def answer(
    runner: ModelRunner,
    tokenizer: Tokenizer,
    prompts: Sequence[tuple[str, str]],
    settings: SynthesisSettings,
    *,
    created_unix_s: float,
) -> list[Example]:
    """Answers of the target to (domain, text) prompts, as examples with labels; also for prompts from elsewhere."""
    ids = [chat_prompt(tokenizer, [{"role": "user", "content": text}]) for _, text in prompts]
    params = [settings.answer_params[i % len(settings.answer_params)] for i in range(len(prompts))]
    with _progress("Answering", len(prompts)) as show:
        answers = generate(
            runner,
            ids,
            params,
            max_new_tokens=settings.max_answer_tokens,
            end_token_ids=sorted(tokenizer.eos_token_ids),
            seed=settings.seed,
            max_running=settings.max_running,
            label_top_n=settings.label_top_n,
            on_done=show,
        )
    return [
        Example(
            request_id=_request_id(settings.seed, index, prompt),
            sample_index=0,
            domain=f"synthetic/{domain}",
            created_unix_s=created_unix_s,
            prompt_token_ids=tuple(prompt),
            output_token_ids=made.token_ids,
            params=own,
            labels=tuple(_label(row) for row in made.labels) or (None,) * len(made.token_ids),
        )
        for index, ((domain, _), prompt, own, made) in enumerate(zip(prompts, ids, params, answers, strict=True))
        if made.token_ids and not made.failed
    ]


def open_user_turn(tokenizer: Tokenizer, topic: str) -> tuple[list[int], frozenset[int]]:
    """Token ids up to where a user's message about `topic` begins, and the ids that end it."""
    for before in ([{"role": "system", "content": f"The user asks about {topic}."}], []):
        try:
            prefix, end = opened_turn(tokenizer, before, "user")
        except ChatTemplateMissing:
            break
        except ValueError:
            continue  # a template that knows no system message
        if prefix:
            return prefix, frozenset(() if end is None else (end,))
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1:]
    return tokenizer.encode(f"A question about {topic}:"), frozenset(newline)


class PromptFilter:
    """Which prompts are good for something; remembers those it let pass."""

    def __init__(self, settings: SynthesisSettings) -> None:
        self._settings = settings
        self._accepted: list[frozenset[str]] = []
        self._with_shingle: dict[str, list[int]] = {}
        self.dropped: Counter[str] = Counter()

    def accept(self, made: Generated, tokenizer: Tokenizer) -> str | None:
        """The prompt's text, or None, with the reason counted in `dropped`."""
        text = tokenizer.decode(made.token_ids, skip_special_tokens=True).strip()
        reason = self._reason(made, text)
        if reason is not None:
            self.dropped[reason] += 1
            return None
        shingles = _shingles(text)
        for shingle in shingles:
            self._with_shingle.setdefault(shingle, []).append(len(self._accepted))
        self._accepted.append(shingles)
        return text

    def _reason(self, made: Generated, text: str) -> str | None:
        if made.failed or not made.ended:
            return "unfinished"
        if len(made.token_ids) - 1 < self._settings.min_prompt_tokens or not text:
            return "too_short"
        if "\ufffd" in text or not any(letter.isalpha() for letter in text):
            return "not_text"
        words = text.lower().split()
        if len(words) >= 2 * _SHINGLE_WORDS and len(_shingles(text)) < (len(words) - _SHINGLE_WORDS + 1) / 2:
            return "repetitive"
        return "duplicate" if self._resembles_an_earlier(_shingles(text)) else None

    def _resembles_an_earlier(self, shingles: frozenset[str]) -> bool:
        shared = Counter(index for shingle in shingles for index in self._with_shingle.get(shingle, ()))
        return any(
            common >= self._settings.max_similarity * (len(shingles) + len(self._accepted[index]) - common)
            for index, common in shared.items()
        )


def _shingles(text: str) -> frozenset[str]:
    """All runs of three words, lower case; of a shorter text the text itself."""
    words = text.lower().split()
    runs = range(max(len(words) - _SHINGLE_WORDS, 0) + 1)
    return frozenset(" ".join(words[start : start + _SHINGLE_WORDS]) for start in runs)


def _topics(settings: SynthesisSettings) -> Iterator[tuple[str, str]]:
    """(domain, topic) for ever: domains in turn, the topics of each in a random order of their own."""
    topics = TOPICS if settings.topics is None else settings.topics
    orders = {
        domain: random.Random(f"{settings.seed}/{domain}").sample(list(own), len(own)) for domain, own in topics.items()
    }
    for turn in count():
        for domain in sorted(orders):
            yield domain, orders[domain][turn % len(orders[domain])]


def _request_id(seed: int, index: int, prompt: Sequence[int]) -> str:
    digest = hashlib.blake2b(array("q", [seed, index, *prompt]).tobytes(), digest_size=12)
    return f"synthetic-{digest.hexdigest()}"


def _label(row: TeacherRow) -> Label:
    return Label(array("i", row.ids), array("f", row.logits), row.logsumexp, row.sampling_logsumexp)


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; nothing where that is not a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.update(task, completed=done)
