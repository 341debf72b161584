"""From a finished draft directory to the registry: into service if the gate says so, else aside with the reason.

Every step may be interrupted and run again with the same arguments: the same version, and the same result. The
directory holds the checkpoint and, if there is one, the report of the evaluation (html, png, json), which the
registry keeps beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from pydantic import JsonValue, ValidationError

from redraft.registry.contents import describe_directory
from redraft.registry.errors import CorruptDraft, DraftWithdrawn, Pinned
from redraft.registry.manifest import DraftManifest, EvaluationSummary
from redraft.registry.names import new_version
from redraft.registry.store import DraftRegistry
from redraft_training.gate import GateDecision


@dataclass(frozen=True, slots=True)
class DraftFacts:
    """What a manifest says beyond the files; see `DraftManifest` for each field."""

    created_unix_s: float
    """Part of the version: a run that may be interrupted keeps it, to arrive at the same version again."""
    target_name: str
    target_fingerprint: str
    tokenizer_fingerprint: str
    num_parameters: int
    parent_version: str | None = None
    draft_vocab_size: int | None = None
    evaluation: EvaluationSummary | None = None
    training: Mapping[str, JsonValue] = field(default_factory=dict)


class Outcome(StrEnum):
    """What became of a draft."""

    PUBLISHED = "published"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Publication:
    """A draft as the registry now has it."""

    outcome: Outcome
    manifest: DraftManifest
    reason: str
    """The gate's."""
    not_current_because: str | None
    """Why a published draft is not the current one, if it is not: CURRENT is pinned, or it was rolled back since."""


def build_manifest(directory: Path, facts: DraftFacts) -> DraftManifest:
    """Hash the files of a draft directory and give it its version.

    Raises `CorruptDraft` or `UnsafeDraft` for a directory that a registry does not take, `CorruptDraft` for facts
    that a manifest cannot hold, such as a number that is not finite.
    """
    files = describe_directory(directory)
    try:
        return DraftManifest(
            version=new_version({name: file.sha256 for name, file in files.items()}, facts.created_unix_s),
            parent_version=facts.parent_version,
            created_unix_s=facts.created_unix_s,
            files=files,
            target_name=facts.target_name,
            target_fingerprint=facts.target_fingerprint,
            tokenizer_fingerprint=facts.tokenizer_fingerprint,
            num_parameters=facts.num_parameters,
            draft_vocab_size=facts.draft_vocab_size,
            evaluation=facts.evaluation,
            training=dict(facts.training),
        )
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in problem["loc"]) or "manifest"
        raise CorruptDraft(f"cannot describe the draft in {directory}: {where}: {problem['msg']}") from error


def publish_draft(
    directory: Path,
    registry: DraftRegistry,
    facts: DraftFacts,
    decision: GateDecision,
    *,
    keep_refused_weights: bool = True,
) -> Publication:
    """Publish the draft in `directory` and make it current, or refuse it, as the gate decided.

    It becomes current only in place of the draft that it was compared with (`evaluation.baseline_version`; none,
    if there was none): otherwise the gate's comparison says nothing. Raises `CurrentChanged` then, with the draft
    stored: evaluate against the new one. Raises what `build_manifest` and the registry raise.
    """
    manifest = build_manifest(directory, facts)
    if not decision.publish:
        kept = registry.refuse(directory, manifest, decision.reason, keep_weights=keep_refused_weights)
        return Publication(Outcome.REFUSED, kept, decision.reason, None)
    baseline = facts.evaluation.baseline_version if facts.evaluation is not None else None
    try:
        stored = registry.publish(directory, manifest, expected_current=baseline)
    except (Pinned, DraftWithdrawn) as error:
        stored = registry.get(manifest.version).manifest
        return Publication(Outcome.PUBLISHED, stored, decision.reason, str(error))
    return Publication(Outcome.PUBLISHED, stored, decision.reason, None)
