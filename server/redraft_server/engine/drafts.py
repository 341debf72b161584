"""Loading drafts for one engine, at its start and while it serves."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from redraft.errors import UnsupportedModel
from redraft.models.buckets import BucketLimits
from redraft.models.cache import Progress, stderr_progress
from redraft.models.draft import load_draft
from redraft.models.loader import LoadedModel
from redraft.models.ref import ModelRef
from redraft.models.runner import ModelRunner
from redraft.models.tokenizer import Tokenizer
from redraft.registry.manifest import DraftManifest
from redraft.speculation.cost import StepCost, measure_cost
from redraft.speculation.draft_model import DraftModelProposer
from redraft.speculation.length import LengthController

# While a draft is read, its thread and the engine's take turns this often (seconds; Python's own 5 ms would make a
# step wait at each of its hundreds of operations).
_SWITCH_INTERVAL_S = 5e-5
_REBUILD_SIZES = (8, 16, 32, 64, 128, 256, 512)
_REBUILD_SHARE = 0.5  # of a step without it


@dataclass(frozen=True, slots=True)
class ResidentDraft:
    """A draft in memory. `manifest` is None for one that no registry knows."""

    version: str
    name: str
    proposer: DraftModelProposer
    manifest: DraftManifest | None = None

    @property
    def model(self) -> PreTrainedModel:
        return self.proposer.runner.model

    @property
    def promised(self) -> float | None:
        """Expected acceptance on held-out traffic, measured before it was published."""
        if self.manifest is None or self.manifest.evaluation is None:
            return None
        return self.manifest.evaluation.expected_acceptance


RunPass = Callable[[Callable[[], float]], float]
"""Runs a short piece of model work where it does no harm, and returns its result."""


@dataclass(frozen=True, slots=True)
class RunnerSizes:
    """What every runner of an engine must agree on."""

    num_blocks: int
    block_size: int
    vocab_size: int
    buckets: BucketLimits | None = None

    def runner(self, loaded: LoadedModel, output_ids: torch.Tensor | None = None) -> ModelRunner:
        return ModelRunner(
            loaded.model,
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            vocab_size=self.vocab_size,
            output_ids=output_ids,
            buckets=self.buckets,
        )


class DraftHost:
    """Makes proposers out of draft checkpoints, each with KV of its own for the engine's blocks.

    Args:
        target, tokenizer: what the drafts are for.
        sizes: of the engine's runners.
        target_cost: measured cost of the target's passes.
        adaptive: choose the draft's length by measured cost.
        max_catch_up: tokens that a draft may catch up with in a step.
        context_length: positions that a draft must be able to see; None: any.
    """

    def __init__(
        self,
        target: LoadedModel,
        tokenizer: Tokenizer,
        sizes: RunnerSizes,
        target_cost: StepCost,
        *,
        adaptive: bool,
        max_catch_up: int,
        context_length: int | None = None,
        cache_dir: Path | None = None,
    ) -> None:
        self.target_fingerprint = target.weights_fingerprint
        self.tokenizer_fingerprint = tokenizer.fingerprint
        self._target = target
        self._tokenizer = tokenizer
        self._sizes = sizes
        self._target_cost = target_cost
        self._adaptive = adaptive
        self._max_catch_up = max_catch_up
        self.context_length = context_length
        self._cache_dir = cache_dir
        self._next_epoch = 1

    def load(
        self,
        ref: ModelRef,
        manifest: DraftManifest | None = None,
        *,
        run: RunPass = lambda timed_pass: timed_pass(),
        progress: Progress = stderr_progress,
    ) -> ResidentDraft:
        """A draft that is ready to serve: checked, packed, its weights touched and its cost measured.

        Call it from one thread at a time. Everything but the passes given to `run` happens on the calling thread, and
        may take seconds. Without a manifest it is named after its weights; with one its vocabulary is taken to be the
        one that the manifest names, which the caller has compared.

        Raises `ModelError` if the checkpoint cannot be used, or not with this target.
        """
        with _taking_turns():
            draft = load_draft(
                ref,
                self._target,
                tokenizer=self._tokenizer,
                tokenizer_checked=manifest is not None,
                cache_dir=self._cache_dir,
                progress=progress,
            )
            context = getattr(draft.loaded.config, "max_position_embeddings", None)
            if self.context_length is not None and context is not None and context < self.context_length:
                raise UnsupportedModel(
                    f"draft {draft.loaded.name} sees {context} positions, requests may have {self.context_length}: "
                    "lower engine.max_model_len, or distil a draft with a longer context"
                )
            runner = self._sizes.runner(draft.loaded, draft.output_ids)
        draft_cost = measure_cost(runner, run)
        self._next_epoch += 1
        version = draft.version if manifest is None else manifest.version
        proposer = DraftModelProposer(
            runner,
            version=version,
            epoch=self._next_epoch,
            max_catch_up=self._max_catch_up,
            max_rebuild=self._affordable(draft_cost),
            length=LengthController(DraftModelProposer.name, self._target_cost, draft_cost) if self._adaptive else None,
        )
        return ResidentDraft(version, draft.loaded.name if manifest is None else version, proposer, manifest)

    def _affordable(self, draft_cost: StepCost) -> int:
        """Tokens of draft KV that can be rebuilt beside a step without anybody noticing."""
        limit = _REBUILD_SHARE * self._target_cost.estimate(1)
        sizes = [size for size in _REBUILD_SIZES if draft_cost.estimate(size) <= limit]
        return min(max(sizes, default=_REBUILD_SIZES[0]), self._max_catch_up)


@contextmanager
def _taking_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
