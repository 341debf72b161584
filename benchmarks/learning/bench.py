"""What the experiments share: one target, a way to train from given examples, and a way to judge."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
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
from redraft_training.evaluate.replay import ReplaySettings, replay
from redraft_training.evaluate.scores import score_drafts
from redraft_training.settings import CycleSettings, load_settings
from redraft_training.training_run import ROW_TOKENS, train

FOLDER = Path("build", "learning")
RESULTS = Path("benchmarks", "results", "learning.json")
K = 4
_HELD_OUT_SHARE = 0.04  # only for the trainer's own choice of the best checkpoint


@dataclass(frozen=True, slots=True)
class Judged:
    """A draft on one domain's evaluation prompts. α at both kinds of sampling; the rest at temperature 0, k = 4."""

    alpha_greedy: float
    alpha_sampled: float
    acceptance_rate: float
    mean_acceptance_length: float


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
        self.results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}

    def known(self, key: str) -> Any:
        """The result of an experiment that was done before, or None."""
        return self.results.get(key)

    def keep(self, key: str, result: Any) -> None:
        """Store a result; written at once."""
        self.results[key] = result
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        write_file(RESULTS, (json.dumps(self.results, indent=1, sort_keys=True) + "\n").encode())
        print(key, json.dumps(result), flush=True)  # noqa: T201 - hours of work should show signs of life

    @cached_property
    def _target(self) -> tuple[Any, ModelRunner]:
        loaded = self.models.target()
        return loaded, self.models.runner(loaded)

    def train(self, name: str, examples: Sequence[Example], overrides: Sequence[str], base: ModelRef | None) -> Trained:
        """Distil from `base` (None: a pruned draft) with these overrides of the settings."""
        settings = load_settings(None, ["student.layers=[0,10,20,29]", *overrides])
        models = Models(settings)
        started = time.process_time()
        result = train(settings, models, split(examples, _HELD_OUT_SHARE), FOLDER / "runs" / name, base=base)
        return Trained(directory_ref(result.draft), result.tokens, time.process_time() - started)

    def judge(self, draft: ModelRef, examples: Sequence[Example], *, num_replayed: int = 24) -> Judged:
        """Score on evaluation examples; replay the greedy ones through the server's own step."""
        plan = BatchPlan(examples, PackSettings(ROW_TOKENS, 2048, branches=False))
        scores = score_drafts(
            {"draft": self.models.scored(draft)},
            plan.batches(0),
            vocab_size=self.models.identity.vocab_size,
            captured=self.models.captured(),
        )["draft"].by_sampling()
        greedy = [example for example in examples if example.params.is_greedy][:num_replayed]
        target, runner = self._target
        proposer = DraftModelProposer(self.models.draft_runner(draft, target), version="draft")
        settings = ReplaySettings(
            num_speculative_tokens=K, max_requests=num_replayed, end_token_ids=self.models.tokenizer.eos_token_ids
        )
        result = replay(greedy, runner, proposer, settings)
        return Judged(
            round(scores["greedy"].alpha, 4),
            round(scores["sampled"].alpha, 4),
            round(result.acceptance_rate, 4),
            round(result.mean_acceptance_length, 4),
        )
