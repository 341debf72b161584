"""One retraining cycle: traffic -> data set -> distil -> evaluate -> gate -> registry.

Every stage leaves its result in the work directory, so a cycle that was killed goes on where it was and arrives at the
same published version; called again after its end, it begins anew only when there is new traffic. What the registry
holds is the only memory that another machine needs: how far the log was read stands in the manifests.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from redraft.errors import RedraftError
from redraft.files import write_file
from redraft.models.ref import ModelRef
from redraft.registry.errors import CurrentChanged, RegistryError, RegistryUnavailable, WrongTarget
from redraft.registry.manifest import check_target
from redraft.registry.store import DraftRegistry
from redraft_training.cycle_data import Attempts, forget_erased, gather, replay_settings
from redraft_training.cycle_models import Models, directory_ref
from redraft_training.cycle_state import COMPARISON, CYCLE, DECISION, RESULT, TRAINED, Workspace
from redraft_training.dataset.errors import DatasetUnreadable, NotEnoughData
from redraft_training.dataset.read import Dataset
from redraft_training.dataset.replay import Mixture, Replay
from redraft_training.dataset.store import load_dataset, save_dataset
from redraft_training.distill.errors import CheckpointMismatch, TrainingDiverged
from redraft_training.distill.metrics import METRICS_FILE, read_metrics
from redraft_training.distill.provenance import provenance
from redraft_training.distill.trainer import DRAFT
from redraft_training.evaluate.comparison import Comparison
from redraft_training.evaluate.report import Report, write_report
from redraft_training.evaluation_run import compared
from redraft_training.gate import GateDecision, GateInput, decide
from redraft_training.publish import DraftFacts, Publication, build_manifest, publish_draft
from redraft_training.settings import CycleSettings
from redraft_training.training_run import train

_MAX_EVALUATIONS = 3

Say = Callable[[str], None]


class Outcome(StrEnum):
    """How a cycle ended."""

    PUBLISHED = "published"
    REFUSED = "refused"
    NOT_ENOUGH_DATA = "not_enough_data"


@dataclass(frozen=True)
class CycleResult:
    """`version` and what follows are None if there was not enough data.

    Attributes:
        reason: in one line; of a published draft that is not the current one, also why not.
        directory: of the reports.
    """

    outcome: Outcome
    reason: str
    version: str | None = None
    comparison: Comparison | None = None
    directory: Path | None = None


@dataclass(frozen=True, slots=True)
class _Begun:
    """What a cycle was begun with. `created_unix_s` is part of the version; `base_version`: the draft that was current,
    which it trains on; None if there was none."""

    settings: dict[str, Any]
    created_unix_s: float
    base_version: str | None


@dataclass(frozen=True, slots=True)
class _Trained:
    """What the manifest says of the training; see `DistillResult`."""

    steps: int
    tokens: int
    seconds: float
    cpu_seconds: float
    parent_fingerprint: str
    world_size: int
    stopped: str


def run_cycle(settings: CycleSettings, *, say: Say = lambda _: None) -> CycleResult:
    """Run, or finish, one cycle.

    Raises any `RedraftError` (`TrainingDiverged`, `ForeignLog`, `RegistryError`, `WorkDirBusy`, ...) and OSError.
    Nothing is half published then, and calling again goes on from the last stage that was finished.
    """
    settings.require_traffic()
    settings.require_registry()
    workspace = Workspace(settings.work_dir)
    with workspace.locked():
        forget_erased(settings, workspace, say)
        return _Cycle(settings, workspace, say).run()


class _Cycle:
    def __init__(self, settings: CycleSettings, workspace: Workspace, say: Say) -> None:
        self._settings, self._workspace, self._say = settings, workspace, say
        self._registry = DraftRegistry(settings.require_registry())
        self._models = Models(settings)
        self._replay = Replay(workspace.replay, self._models.identity, replay_settings(settings.data))

    def run(self) -> CycleResult:
        if self._workspace.read(RESULT) is not None:
            return self._finished()
        try:
            begun, dataset = self._resumed() or self._begun()
        except NotEnoughData as error:
            return CycleResult(Outcome.NOT_ENOUGH_DATA, str(error))
        try:
            trained = self._trained(begun, dataset)
        except TrainingDiverged:
            self._workspace.fail()  # going on from a checkpoint would only diverge again
            raise
        publication = self._published(begun, dataset, trained)
        reason = publication.reason
        if publication.not_current_because is not None:
            reason = f"not made current ({publication.not_current_because}); {reason}"
        version = publication.manifest.version
        self._workspace.write(RESULT, {"outcome": publication.outcome.value, "reason": reason, "version": version})
        return self._finished()

    # -- beginning and end -----------------------------------------------------------------------------------

    def _resumed(self) -> tuple[_Begun, Dataset] | None:
        """The cycle under way, if it was begun with these settings and has got as far as its data."""
        content = self._workspace.read(CYCLE)
        if content is None or not self._workspace.dataset.is_dir():
            return None
        try:
            begun = _Begun(**content)
            if begun.settings != self._identity():
                self._say("the cycle under way was begun with other settings: starting afresh")
                return None
            dataset = load_dataset(self._workspace.dataset, self._models.identity)
        except (TypeError, DatasetUnreadable) as error:
            self._say(f"the cycle under way cannot be read ({error}): starting afresh")
            return None
        self._say("going on with the cycle under way")
        return begun, dataset

    def _begun(self) -> tuple[_Begun, Dataset]:
        """A new cycle, its data set read and kept: the log will have moved on when it is resumed."""
        now = time.time()
        current = self._registry.current()
        self._say("reading the traffic log")
        mixture = gather(
            self._settings, self._models.identity, self._replay, Attempts.of(self._registry.list()), now=now
        )
        dataset = mixture.dataset
        begun = _Begun(self._identity(), now, None if current is None else current.version)
        self._workspace.begin(asdict(begun))
        memory = Dataset(mixture.training_memory, mixture.held_out_memory, dataset.report)
        save_dataset(self._workspace.memory, memory, self._models.identity)
        save_dataset(self._workspace.dataset, dataset, self._models.identity)
        self._say(f"learning from {len(dataset.training):,} examples, {len(dataset.held_out):,} more are held out")
        return begun, dataset

    def _identity(self) -> dict[str, Any]:
        """Settings that decide the result."""
        values: dict[str, Any] = self._settings.model_dump(mode="json", exclude={"work_dir", "keep_drafts", "distill"})
        del values["data"]["min_new_tokens"]  # decides when, not what
        return {**values, "distill": self._settings.distill.identity()}

    def _finished(self) -> CycleResult:
        """Keep the memory, tidy up. What the registry has is settled before, so this may be interrupted too."""
        workspace = self._workspace
        result = workspace.read(RESULT)
        assert result is not None
        if workspace.memory.is_dir():
            try:
                memory = load_dataset(workspace.memory, self._models.identity)
                self._replay.save(Mixture(memory, memory.training, memory.held_out))
            except DatasetUnreadable as error:
                self._say(f"this cycle's traffic will not be replayed: {error}")
        comparison = self._comparison()
        self._prune()
        workspace.finish()
        return CycleResult(Outcome(result["outcome"]), result["reason"], result["version"], comparison, workspace.last)

    def _prune(self) -> None:
        """Keep the registry bounded. If that fails, the cycle has succeeded all the same: the next one tries again."""
        if self._settings.keep_drafts is None:
            return
        try:
            if deleted := self._registry.prune(self._settings.keep_drafts):
                self._say(f"deleted {len(deleted)} old drafts from the registry")
        except RegistryError as error:
            self._say(f"no old drafts were deleted: {error}")

    # -- stages ----------------------------------------------------------------------------------------------

    def _trained(self, begun: _Begun, dataset: Dataset) -> _Trained:
        kept = self._workspace.read(TRAINED)
        if kept is not None:
            return _Trained(**kept)
        base = self._base(begun, dataset)
        output = self._workspace.distill
        try:
            result = train(self._settings, self._models, dataset, output, base=base)
        except CheckpointMismatch:
            self._say("the checkpoints were made by other code: training anew")
            shutil.rmtree(output)
            result = train(self._settings, self._models, dataset, output, base=base)
        trained = _Trained(**{field.name: getattr(result, field.name) for field in fields(_Trained)})
        self._workspace.write(TRAINED, asdict(trained))
        return trained

    def _base(self, begun: _Begun, dataset: Dataset) -> ModelRef:
        """The draft to train on: the current one, else what the settings say."""
        if begun.base_version is not None:
            return self._fetched(begun.base_version)
        return self._models.born(self._workspace.directory / "base", dataset)

    def _judged(self, begun: _Begun, dataset: Dataset, trained: _Trained) -> tuple[Comparison, GateDecision]:
        """Candidate and serving draft on the held-out traffic, and what the gate says; kept, and read back if there."""
        kept, comparison = self._workspace.read(DECISION), self._comparison()
        if kept is not None and comparison is not None:
            return comparison, GateDecision(kept["publish"], tuple(kept["reasons"]))
        serving = self._serving(begun)
        comparison = compared(
            self._models,
            dataset,
            ("candidate", directory_ref(self._draft)),
            None if serving is None else (serving, self._fetched(serving)),
            confidence=self._settings.gate.confidence,
        )
        decision = decide(
            GateInput.from_comparison(comparison, num_non_finite=comparison.num_non_finite), self._settings.gate
        )
        write_file(self._workspace.directory / COMPARISON, comparison.to_json().encode())
        # into the draft's directory, so that the registry keeps it
        report = Report(
            comparison=comparison,
            published=decision.publish,
            reasons=decision.reasons,
            training=read_metrics(self._workspace.distill / METRICS_FILE),
            provenance=self._provenance(begun, dataset, trained),
        )
        write_report(self._draft, report)
        self._workspace.write(DECISION, {"publish": decision.publish, "reasons": list(decision.reasons)})
        return comparison, decision

    def _published(self, begun: _Begun, dataset: Dataset, trained: _Trained) -> Publication:
        """Gate and publish; compare again if another draft has gone into service meanwhile."""
        for _ in range(_MAX_EVALUATIONS):
            comparison, decision = self._judged(begun, dataset, trained)
            facts = self._facts(begun, dataset, trained, comparison)
            try:
                if decision.publish:
                    self._check_still_serving(begun, comparison, facts)
                return publish_draft(self._draft, self._registry, facts, decision)
            except CurrentChanged:
                self._say("another draft went into service meanwhile: comparing with that one")
                self._workspace.forget(DECISION)
        raise RedraftError("the current draft changes faster than a candidate can be compared with it: run again")

    def _check_still_serving(self, begun: _Begun, comparison: Comparison, facts: DraftFacts) -> None:
        """Raise CurrentChanged before anything is stored, unless it is this very draft that was published."""
        if self._serving(begun) == comparison.serving_version:
            return
        if build_manifest(self._draft, facts).version not in self._registry.versions():
            raise CurrentChanged("another draft is current")

    # -- parts -----------------------------------------------------------------------------------------------

    @property
    def _draft(self) -> Path:
        return self._workspace.distill / DRAFT

    def _serving(self, begun: _Begun) -> str | None:
        """The current version."""
        current = self._registry.current()
        if current is None and begun.base_version is not None:
            raise RegistryUnavailable(
                f"the draft registry {self._registry.url} is empty, and had draft {begun.base_version} when this cycle "
                "began: check that it is mounted, and run again"
            )
        return None if current is None else current.version

    def _fetched(self, version: str) -> ModelRef:
        """A draft of the registry, checked to be of this target."""
        directory = self._workspace.fetched(version)
        if not directory.is_dir():
            identity = self._models.identity
            try:
                check_target(
                    self._registry.get(version).manifest, identity.target_fingerprint, identity.tokenizer_fingerprint
                )
            except WrongTarget as error:
                raise WrongTarget(f"{error}; or give this target a --registry of its own") from None
            self._registry.fetch(version, directory)
        return directory_ref(directory)

    def _comparison(self) -> Comparison | None:
        try:
            return Comparison.from_json((self._workspace.directory / COMPARISON).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None

    def _facts(self, begun: _Begun, dataset: Dataset, trained: _Trained, comparison: Comparison) -> DraftFacts:
        return DraftFacts(
            created_unix_s=begun.created_unix_s,
            target_name=self._models.target_name,
            target_fingerprint=self._models.identity.target_fingerprint,
            tokenizer_fingerprint=self._models.identity.tokenizer_fingerprint,
            num_parameters=self._models.num_parameters(self._draft),
            parent_version=begun.base_version,
            draft_vocab_size=self._models.draft_vocab_size(self._draft),
            evaluation=comparison.to_summary(self._settings.num_speculative_tokens),
            training=self._provenance(begun, dataset, trained),
        )

    def _provenance(self, begun: _Begun, dataset: Dataset, trained: _Trained) -> dict[str, Any]:
        return {
            **provenance(
                settings=self._settings.model_dump(mode="json", exclude={"work_dir"}),
                parent_draft=begun.base_version or self._settings.draft or "pruned from the target",
                parent_fingerprint=trained.parent_fingerprint,
                target_fingerprint=self._models.identity.target_fingerprint,
                data_watermark=asdict(dataset.report.watermark),
                tokens=trained.tokens,
                steps=trained.steps,
                wall_seconds=trained.seconds,
                cpu_seconds=trained.cpu_seconds,
                world_size=trained.world_size,
            ),
            "stopped": trained.stopped,
        }
