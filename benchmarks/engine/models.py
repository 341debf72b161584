"""Target and draft, loaded once and shared by all experiments."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass

from benchmarks.engines import MAX_BATCH_TOKENS, SharedModel, running_engine
from redraft.models.ref import ModelRef
from redraft.models.rounding import WeightFormat
from redraft.models.tokenizer import Tokenizer, load_tokenizer
from redraft.speculation.cost import StepCost
from redraft.speculation.draft_model import DraftModelProposer
from redraft.speculation.fallback import FallbackProposer
from redraft.speculation.length import LengthController
from redraft.speculation.ngram import NgramProposer
from redraft.speculation.proposer import Proposer
from redraft.telemetry.metrics import ServerMetrics
from redraft.traffic.writer import TrafficWriter
from redraft_server.config import SpeculationConfig
from redraft_server.engine.engine import Engine

PLAIN, DRAFT, NGRAM, BOTH = "plain", "draft", "ngram", "ngram+draft"
_DEFAULTS = SpeculationConfig()


@dataclass(frozen=True)
class Models:
    """What every engine here is made of."""

    tokenizer: Tokenizer
    target: SharedModel
    draft: SharedModel

    @classmethod
    def load(cls, target: str, draft: str, weights: WeightFormat = WeightFormat.FULL) -> Models:
        """Raises ModelError, or TokenizerMismatch if the two do not fit together."""
        tokenizer = load_tokenizer(ModelRef.parse(target))
        loaded = SharedModel.load(target, tokenizer, weights)
        return cls(tokenizer, loaded, SharedModel.load_draft(draft, loaded, tokenizer))

    def engine(
        self,
        mode: str,
        *,
        max_running: int,
        metrics: ServerMetrics | None = None,
        writer: TrafficWriter | None = None,
    ) -> AbstractContextManager[Engine]:
        """A running engine: mode plain, draft, ngram or ngram+draft, all but the first with adaptive lengths.

        No prefix cache: prompts come again, and engines share their KV slots. Only one may be at work.
        """
        cost = self.target.step_cost()
        return running_engine(
            self.target,
            self.tokenizer,
            self._proposer(mode, cost),
            k=0 if mode == PLAIN else _DEFAULTS.num_speculative_tokens,
            target_cost=cost,
            prefix_cache=False,
            max_running=max_running,
            metrics=metrics,
            writer=writer,
        )

    def _proposer(self, mode: str, cost: StepCost) -> Proposer | None:
        if mode == BOTH:
            return FallbackProposer([p for one in (NGRAM, DRAFT) if (p := self._proposer(one, cost)) is not None])
        if mode == DRAFT:
            length = LengthController(DraftModelProposer.name, cost, self.draft.step_cost())
            return DraftModelProposer(
                self.draft.runner, version=self.draft.version, max_catch_up=MAX_BATCH_TOKENS, length=length
            )
        if mode == NGRAM:
            length = LengthController(NgramProposer.name, cost, None)
            return NgramProposer(
                min_match=_DEFAULTS.ngram_min,
                max_match=_DEFAULTS.ngram_max,
                length=length,
            )
        return None
