"""What a worker speaks: JSON, a line each, on its standard input and output. Standard library only.

    -> settings                                      as the program's only argument
    <- {"ready": "<engine and version>"}             once the models are loaded
    -> {"prompts": [[1, 2]], "max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0, "seed": 0}
    <- {"token_ids": [[7, 9]], "seconds": 0.1, "draft_tokens": 12, "accepted_tokens": 5}

A worker ends when its standard input does. What cannot be had or done is one line {"error": "<reason>"}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, TypeVar

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a worker loads.

    Attributes:
        target, draft: what the engine reads: a checkpoint or OpenVINO directory, a GGUF file. draft None: none.
        mode: plain, draft, or ngram (called prompt lookup elsewhere).
        num_draft_tokens: drafted per step, at most.
        ngram_min, ngram_max: lengths of the n-grams that are looked up.
        streams: most prompts of one request; they run together.
        context: most tokens of a prompt and its completion.
        options: whatever else this engine wants to know.
    """

    target: str
    draft: str | None
    mode: str
    threads: int
    num_draft_tokens: int
    ngram_min: int
    ngram_max: int
    streams: int
    context: int
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Request:
    """Prompts to continue together, each up to an end-of-text token or `max_new_tokens`. Temperature 0 is greedy."""

    prompts: list[list[int]]
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


@dataclass(frozen=True, slots=True)
class Generated:
    """New tokens of each prompt, and what speculation did; None where the engine does not say."""

    token_ids: list[list[int]]
    draft_tokens: int | None = None
    accepted_tokens: int | None = None


class PeerEngine(Protocol):
    """An engine with its models loaded."""

    @property
    def version(self) -> str:
        """Engine and version."""

    def generate(self, request: Request) -> Generated:
        """Run all prompts together, nothing kept from earlier requests."""

    def close(self) -> None:
        """End what it has started: whoever asks may be gone without a word."""


def run(load: Callable[[S], PeerEngine], settings: Callable[..., S]) -> None:
    """The program of a worker: load from its settings, then answer requests until standard input ends."""
    # engines print what they like: the protocol gets a descriptor of its own, standard output becomes standard error
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)

        def answer(content: dict[str, Any]) -> None:
            answers.write(json.dumps(content) + "\n")
            answers.flush()

        engine: PeerEngine | None = None
        try:
            engine = load(settings(**json.loads(sys.argv[1])))
            answer({"ready": engine.version})
            for line in sys.stdin:
                request = Request(**json.loads(line))
                started = time.perf_counter()
                generated = engine.generate(request)
                answer({"seconds": time.perf_counter() - started, **asdict(generated)})
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"})
            raise
        finally:
            if engine is not None:
                engine.close()


def cut_at_end(tokens: Sequence[int], end_ids: frozenset[int]) -> list[int]:
    """The tokens up to the first end-of-text token, that one included: what follows is padding."""
    stop = next((index + 1 for index, token in enumerate(tokens) if token in end_ids), len(tokens))
    return list(tokens[:stop])
