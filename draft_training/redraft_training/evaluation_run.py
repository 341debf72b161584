"""Judging a draft by hand: the parts of a cycle behind `redraft-train evaluate` and `publish`."""

from __future__ import annotations

from pathlib import Path

from redraft.errors import ConfigError
from redraft.files import write_file
from redraft.models.loader import unregistered_version, weights_fingerprint
from redraft.models.ref import ModelRef
from redraft.models.source import resolve_source
from redraft.models.tokenizer import check_compatible, load_tokenizer
from redraft.registry.errors import CurrentChanged
from redraft.registry.manifest import check_target
from redraft.registry.store import DraftRegistry
from redraft.speculation.draft_model import DraftModelProposer
from redraft_training.cycle_data import read_traffic
from redraft_training.cycle_models import Models, directory_ref
from redraft_training.dataset.packing import BatchPlan, PackSettings
from redraft_training.dataset.read import Dataset
from redraft_training.dataset.select import TargetIdentity
from redraft_training.evaluate.comparison import Comparison, compare
from redraft_training.evaluate.replay import ReplayResult, ReplaySettings, replay
from redraft_training.evaluate.report import Report, write_report
from redraft_training.evaluate.scores import score_drafts
from redraft_training.evaluate.speedup import CostProfile, measure_profile
from redraft_training.gate import GateInput, decide
from redraft_training.publish import DraftFacts, Publication, publish_draft
from redraft_training.settings import CycleSettings
from redraft_training.student.checkpoint import read_provenance
from redraft_training.training_run import ROW_TOKENS

_BATCH_TOKENS = 2048
_REPLAY_BATCH = 8


def compared(
    models: Models,
    dataset: Dataset,
    candidate: tuple[str, ModelRef],
    serving: tuple[str, ModelRef] | None,
    *,
    confidence: float = 0.95,
    profile: CostProfile | None = None,
) -> Comparison:
    """Two drafts, each (version, where it is), on the held-out part.

    Raises `NothingToScore` if no held-out position has an exact label and the target is not run again for them.
    """
    drafts = [candidate] if serving is None else [candidate, serving]
    students = {version: models.scored(ref) for version, ref in drafts}
    plan = BatchPlan(dataset.held_out, PackSettings(ROW_TOKENS, _BATCH_TOKENS, branches=False))
    scores = score_drafts(
        students,
        plan.batches(0),
        vocab_size=models.identity.vocab_size,
        captured=models.captured(),
        rerun=models.judge(),
        num_batches=plan.num_batches(0),
    )
    return compare(
        scores[candidate[0]],
        None if serving is None else scores[serving[0]],
        confidence=confidence,
        profile=profile,
    )


def judge(
    settings: CycleSettings,
    models: Models,
    draft: ModelRef,
    against: tuple[str, ModelRef] | None,
    output: Path,
    *,
    num_replayed: int = 0,
) -> Comparison:
    """Compare on the held-out traffic, write `comparison.json` and the report to `output`.

    `against` is (version, where it is). `num_replayed` held-out prompts are also decoded again with either draft:
    realised acceptance, and a cost profile.
    """
    dataset = read_traffic(settings, models.identity)
    dataset.require(held_out=1)
    profile: CostProfile | None = None
    replayed: list[ReplayResult] = []
    if num_replayed:
        drafts = [draft] if against is None else [draft, against[1]]
        profile, replayed = _replayed(settings, models, dataset, drafts, num_replayed)
    comparison = compared(
        models,
        dataset,
        (draft_name(draft), draft),
        against,
        confidence=settings.gate.confidence,
        profile=profile,
    )
    output.mkdir(parents=True, exist_ok=True)
    write_file(output / "comparison.json", comparison.to_json().encode())
    report = Report(
        comparison=comparison,
        replay_new=replayed[0] if replayed else None,
        replay_old=replayed[1] if len(replayed) > 1 else None,
    )
    write_report(output, report)
    return comparison


def draft_name(draft: ModelRef) -> str:
    """`d-<hex>` of what a draft computes: its name while no registry has named it."""
    return unregistered_version(weights_fingerprint(resolve_source(draft).directory))


def current_draft(registry: DraftRegistry, identity: TargetIdentity, directory: Path) -> tuple[str, ModelRef] | None:
    """The draft in service, fetched below `directory`; None if there is none. Raises RegistryError."""
    current = registry.current()
    if current is None:
        return None
    check_target(registry.get(current.version).manifest, identity.target_fingerprint, identity.tokenizer_fingerprint)
    return current.version, directory_ref(registry.fetch(current.version, directory / current.version))


def _replayed(
    settings: CycleSettings, models: Models, dataset: Dataset, drafts: list[ModelRef], count: int
) -> tuple[CostProfile, list[ReplayResult]]:
    """Replay with every draft; the cost profile is the first one's."""
    target = models.target()
    runner = models.runner(target)
    profile: CostProfile | None = None
    results = []
    for ref in drafts:
        draft = models.draft_runner(ref, target)
        profile = profile or measure_profile(runner, draft)
        replay_settings = ReplaySettings(
            num_speculative_tokens=settings.num_speculative_tokens,
            max_requests=count,
            batch_size=_REPLAY_BATCH,
            end_token_ids=models.tokenizer.eos_token_ids,
        )
        proposer = DraftModelProposer(draft, version=str(ref))
        results.append(replay(dataset.held_out, runner, proposer, replay_settings))
    assert profile is not None
    return profile, results


def publish_by_hand(settings: CycleSettings, draft: Path, comparison_file: Path) -> Publication:
    """Gate and publish a draft with the comparison that `judge` wrote, which must be with the current draft.

    Raises ConfigError if the comparison is not this draft's, CurrentChanged if it is not with the current one.
    """
    registry = DraftRegistry(settings.require_registry())
    try:
        comparison = Comparison.from_json(comparison_file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read --comparison {comparison_file}: {error.strerror}") from None
    name = draft_name(directory_ref(draft))
    if comparison.candidate_version != name:
        raise ConfigError(
            f"{comparison_file} is about draft {comparison.candidate_version}, and {draft} is {name}: "
            "run redraft-train evaluate for this draft"
        )
    models = Models(settings)
    check_compatible(models.tokenizer, load_tokenizer(directory_ref(draft)))
    provenance = read_provenance(draft)
    facts = DraftFacts(
        created_unix_s=(draft / "config.json").stat().st_mtime,  # the same when this is run again
        target_name=models.target_name,
        target_fingerprint=models.identity.target_fingerprint,
        tokenizer_fingerprint=models.identity.tokenizer_fingerprint,
        num_parameters=models.num_parameters(draft),
        parent_version=comparison.serving_version,
        draft_vocab_size=models.draft_vocab_size(draft),
        evaluation=comparison.to_summary(settings.num_speculative_tokens),
        training={"published": "by hand", "draft_config": provenance},
    )
    found = GateInput.from_comparison(comparison, num_non_finite=comparison.num_non_finite)
    try:
        return publish_draft(draft, registry, facts, decide(found, settings.gate))
    except CurrentChanged as error:
        raise CurrentChanged(f"{error}; compare with it: redraft-train evaluate --registry {registry.url}") from None
