"""What the exactness matrix consists of, and how one cell of it is run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from benchmarks.engines import MAX_BATCH_TOKENS, Completed, SharedModel, generate, running_engine
from redraft.models.loader import read_config
from redraft.models.ref import ModelRef
from redraft.models.source import resolve_source
from redraft.models.tokenizer import Tokenizer
from redraft.sampling.params import SamplingParams, StoppingParams
from redraft.speculation.draft_model import DraftModelProposer
from redraft.speculation.ngram import NgramProposer
from redraft.speculation.proposer import Proposer
from redraft_server.engine.engine import Engine
from redraft_training.student.prune import init_draft

CONCURRENCIES = (1, 16)
GREEDY_KS = tuple(range(1, 9))
SEEDED_KS = (1, 3, 8)
NGRAM_MIN, NGRAM_MAX = 1, 4  # one token matched is enough: it drafts more often, and is wrong more often
SWAP_EVERY_STEPS = 3
TEMPERATURE, TOP_P = 0.8, 0.95
_FIRST_SEED = 1000
_GOOD_DRAFT_DROPS = 4


class Part(StrEnum):
    GREEDY = "greedy"
    SEEDED = "seeded"


class ProposerKind(StrEnum):
    NONE = "none"
    NGRAM = "ngram"
    DRAFT_A = "draft_a"  # the draft given
    DRAFT_B = "draft_b"  # one that is accepted about half of the time
    SWAP = "swap"  # another one of the above every few steps


@dataclass(frozen=True, slots=True)
class Case:
    part: Part
    proposer: ProposerKind
    k: int
    concurrency: int

    @property
    def key(self) -> str:
        return f"{self.part}/{self.proposer}/k{self.k}/c{self.concurrency}"


def all_cases() -> Iterator[Case]:
    """The whole matrix. `none` is there once per concurrency, with k = 0."""
    models = (ProposerKind.NGRAM, ProposerKind.DRAFT_A, ProposerKind.DRAFT_B)
    for concurrency in CONCURRENCIES:
        yield Case(Part.GREEDY, ProposerKind.NONE, 0, concurrency)
        for proposer, k in itertools.product(models, GREEDY_KS):
            yield Case(Part.GREEDY, proposer, k, concurrency)
    yield Case(Part.SEEDED, ProposerKind.NONE, 0, max(CONCURRENCIES))  # alone, it is the reference
    for concurrency in CONCURRENCIES:
        for proposer, k in itertools.product((*models, ProposerKind.SWAP), SEEDED_KS):
            yield Case(Part.SEEDED, proposer, k, concurrency)


SEEDED_REFERENCE = Case(Part.SEEDED, ProposerKind.NONE, 0, 1)


def sampling_params(part: Part, index: int) -> SamplingParams:
    """Of the index-th prompt."""
    if part is Part.GREEDY:
        return SamplingParams(temperature=0.0)
    return SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, seed=_FIRST_SEED + index)


def ensure_good_draft(target: ModelRef, directory: Path) -> Path:
    """A draft that is accepted often: the target without a few of its middle layers. Far too slow to be of use."""
    if not directory.exists():
        total = read_config(resolve_source(target)).num_hidden_layers
        first = 2 * total // 5
        dropped = set(range(first, first + 2 * _GOOD_DRAFT_DROPS, 2))
        init_draft(target, directory, layers=[layer for layer in range(total) if layer not in dropped])
    return directory


@dataclass
class Bench:
    """Models that all cases share, one case at a time."""

    tokenizer: Tokenizer
    target: SharedModel
    drafts: dict[ProposerKind, SharedModel]
    new_tokens: int
    _epochs: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def run(
        self, case: Case, prompts: Sequence[tuple[int, ...]], on_done: Callable[[int], None] = lambda count: None
    ) -> list[Completed]:
        """Every prompt with the case's proposer, a fresh engine, and a k that does not adapt. `on_done(n)`: n more
        prompts are done."""
        params = [sampling_params(case.part, index) for index in range(len(prompts))]
        stopping = StoppingParams(max_new_tokens=self.new_tokens)
        first = ProposerKind.DRAFT_A if case.proposer is ProposerKind.SWAP else case.proposer
        proposer, epoch = self._proposer(first)
        completed: list[Completed] = []
        with running_engine(self.target, self.tokenizer, proposer, k=case.k) as engine:
            engine.replace_proposer(proposer, epoch).result()
            swapper = (
                self._swapper(engine, min(case.concurrency, len(prompts)))
                if case.proposer is ProposerKind.SWAP
                else None
            )
            # waves no larger than the engine's batch when alone; else everything at once, so that the batch stays full
            size = 1 if case.concurrency == 1 else len(prompts)
            for start in range(0, len(prompts), size):
                wave = slice(start, start + size)
                completed += generate(engine, prompts[wave], params[wave], stopping, on_events=swapper)
                on_done(len(prompts[wave]))
        return completed

    def _proposer(self, kind: ProposerKind) -> tuple[Proposer | None, int]:
        """A new proposer and a draft epoch of its own: draft KV that another one left is never taken for its own."""
        epoch = next(self._epochs)
        if kind is ProposerKind.NONE:
            return None, epoch
        if kind is ProposerKind.NGRAM:
            return NgramProposer(min_match=NGRAM_MIN, max_match=NGRAM_MAX, length=None), epoch
        draft = self.drafts[kind]
        return DraftModelProposer(
            draft.runner, version=draft.version, epoch=epoch, max_catch_up=MAX_BATCH_TOKENS, length=None
        ), epoch

    def _swapper(self, engine: Engine, width: int) -> Callable[[], None]:
        """To be called once per request and step, `width` requests at work: replaces the proposer every few steps."""
        kinds = itertools.cycle((ProposerKind.NGRAM, ProposerKind.DRAFT_B, ProposerKind.NONE, ProposerKind.DRAFT_A))
        calls = itertools.count(1)

        def on_events() -> None:
            if next(calls) % (SWAP_EVERY_STEPS * width) == 0:
                engine.replace_proposer(*self._proposer(next(kinds)))

        return on_events
