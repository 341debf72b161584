"""What the experiments share: one target, a way to train from given examples, and a way to judge."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from redraft.files import write_file
from redraft.models.ref import ModelRef
from redraft.models.runner import ModelRunner
from redraft.speculation.draft_model import DraftModelProposer
from redraft_training.cycle_models import Models, directory_ref
from redraft_training.dataset.example import Example
from redraft_training.dataset.packing import BatchPlan, PackSettings
from redraft_training.dataset.read import split
from redraft_training.evaluate.prediction import predict
from redraft_training.evaluate.replay import ReplayResult, ReplaySettings, replay
from redraft_training.evaluate.scores import score_drafts
from redraft_training.settings import CycleSettings, load_settings
from redraft_training.training_run import ROW_TOKENS, train

FOLDER = Path("build", "learning")
RESULTS = Path("benchmarks", "results", "learning.json")
K = 4
_HELD_OUT_SHARE = 0.04  # only for the trainer's own choice of the best checkpoint


@dataclass(frozen=True, slots=True)
class Judged:
    """A draft on one domain's evaluation prompts, k = 4, both kinds of sampling. Greedy figures are what the server
    does, token for token; the sampled ones stand on teacher-forced α (`redraft_training.evaluate.prediction`)."""

    alpha_greedy: float
    alpha_sampled: float
    acceptance_rate: float
    acceptance_rate_sampled: float
    mean_acceptance_length: float
    mean_acceptance_length_sampled: float


@dataclass(frozen=True, slots=True)
class Trained:
    """A draft, and what it took."""

    draft: ModelRef
    tokens: int
    cpu_seconds: float


class Bench:
    """Holds the target in memory, and the results on disk: what was measured once is not measured again."""

    def __init__(self, overrides: Sequence[str] = ()) -> None:
        self.settings: CycleSettings = load_settings(None, list(overrides))
        self.models = Models(self.settings)
        self.results: dict[str, Any] = _stored()

    def known(self, key: str) -> Any:
        """The result of an experiment that was done before, or None."""
        return self.results.get(key)

    def keep(self, key: str, result: Any) -> None:
        """Store a result; written at once, beside what another run has stored meanwhile."""
        self.results = {**_stored(), key: result}
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        write_file(RESULTS, (json.dumps(self.results, indent=1, sort_keys=True) + "\n").encode())
        print(key, json.dumps(result), flush=True)  # noqa: T201 - hours of work should show signs of life

    @cached_property
    def _target(self) -> tuple[Any, ModelRunner]:
        loaded = self.models.target()
        return loaded, self.models.runner(loaded)

    def train(self, name: str, examples: Sequence[Example], overrides: Sequence[str], base: ModelRef | None) -> Trained:
        """Distil from `base` (None: a pruned draft) with these overrides of the settings."""
        settings = load_settings(None, list(overrides))
        models = Models(settings)
        started = time.process_time()
        result = train(settings, models, split(examples, _HELD_OUT_SHARE), FOLDER / "runs" / name, base=base)
        return Trained(directory_ref(result.draft), result.tokens, time.process_time() - started)

    def judge(self, draft: ModelRef, examples: Sequence[Example]) -> Judged:
        """Score on evaluation examples."""
        plan = BatchPlan(examples, PackSettings(ROW_TOKENS, 2048, branches=False))
        scores = score_drafts(
            {"draft": self.models.scored(draft)},
            plan.batches(0),
            vocab_size=self.models.identity.vocab_size,
            captured=self.models.captured(),
        )["draft"]
        greedy, sampled = (
            replace(scores, examples=tuple(own for own in scores.examples if own.sampling == kind))
            for kind in ("greedy", "sampled")
        )
        predicted = [predict(part, K) for part in (greedy, sampled)]
        figures = (
            *(part.overall().alpha for part in (greedy, sampled)),
            *(part.acceptance_rate for part in predicted),
            *(part.mean_acceptance_length for part in predicted),
        )
        return Judged(*(round(figure, 4) for figure in figures))

    def replayed(self, draft: ModelRef, examples: Sequence[Example], *, num_replayed: int = 16) -> ReplayResult:
        """The greedy ones of the examples, through the server's own step."""
        greedy = [example for example in examples if example.params.is_greedy][:num_replayed]
        target, runner = self._target
        proposer = DraftModelProposer(self.models.draft_runner(draft, target), version="draft")
        settings = ReplaySettings(
            num_speculative_tokens=K, max_requests=num_replayed, end_token_ids=self.models.tokenizer.eos_token_ids
        )
        return replay(greedy, runner, proposer, settings)


def _stored() -> dict[str, Any]:
    stored: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    return stored
