"""What the registry knows of a draft: its manifest, written once, and its state, which changes.

A manifest is strict JSON: a field that is not known, a number that is not finite or a string beyond its bound
makes it invalid. It holds facts and hashes, never tensors and never prompt text.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError, model_validator

from redraft.registry.errors import CorruptDraft, WrongTarget
from redraft.registry.names import is_safe_file_name, is_version

MAX_MANIFEST_BYTES = 2**20
MAX_TRAINING_BYTES = 2**18
MAX_FILES = 1000
MAX_DOMAINS = 1000

_Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
_Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
_Share = Annotated[float, Field(ge=0.0, le=1.0)]
_Gain = Annotated[float, Field(ge=-1.0, le=1.0)]
_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class FileRecord(BaseModel):
    """One file of a draft."""

    model_config = _STRICT

    sha256: _Sha256
    bytes: int = Field(ge=0)


class EvaluationSummary(BaseModel):
    """What held-out traffic said before the draft was published; the baseline of what it then does live."""

    model_config = _STRICT

    expected_acceptance: _Share
    """Mean over the positions of Σ_v min(p_v, q_v), at each request's own sampling parameters."""
    per_domain: dict[_Name, _Share] = Field(default_factory=dict, max_length=MAX_DOMAINS)
    """The same, of each domain alone."""
    baseline_version: _Name | None = None
    """The draft it was compared with; None if none was serving."""
    baseline_expected_acceptance: _Share | None = None
    gain_low: _Gain | None = None
    """Lower end of the confidence interval of it minus the baseline's, over the same positions."""
    gain_high: _Gain | None = None
    num_positions: int = Field(ge=0)
    mean_acceptance_length: float | None = Field(default=None, ge=1.0)
    """Predicted: 1 + accepted tokens per verify step."""


class DraftManifest(BaseModel):
    """The facts about one version. Written last, so a draft that has one is complete."""

    model_config = _STRICT

    schema_version: Literal[1] = 1
    version: str
    parent_version: str | None = None
    """The version it was trained from; None for one that was pruned from the target."""
    created_unix_s: float = Field(ge=0.0)
    files: dict[str, FileRecord] = Field(min_length=1, max_length=MAX_FILES)
    target_name: _Name
    target_fingerprint: _Name
    tokenizer_fingerprint: _Name
    num_parameters: int = Field(ge=1)
    draft_vocab_size: int | None = Field(default=None, ge=1)
    """Entries of the reduced output vocabulary; None if the draft's head has the whole of it."""
    evaluation: EvaluationSummary | None = None
    """None if it was not measured."""
    training: dict[str, JsonValue] = Field(default_factory=dict)
    """Provenance: git commit, versions, settings, data watermark, tokens, seconds."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for version in (self.version, self.parent_version):
            if version is not None and not is_version(version):
                raise ValueError(f"not a version: {version[:100]!r}")
        for name in self.files:
            if not is_safe_file_name(name):
                raise ValueError(f"not the name of a draft's file: {name[:100]!r}")
        if len(json.dumps(self.training, allow_nan=False)) > MAX_TRAINING_BYTES:
            raise ValueError(f"training: more than {MAX_TRAINING_BYTES} bytes of JSON")
        return self

    def encode(self) -> bytes:
        """As indented JSON. Raises `CorruptDraft` beyond `MAX_MANIFEST_BYTES`."""
        data = (self.model_dump_json(indent=2) + "\n").encode()
        if len(data) > MAX_MANIFEST_BYTES:
            raise CorruptDraft(f"the manifest of {self.version} is larger than {MAX_MANIFEST_BYTES} bytes")
        return data

    @property
    def num_bytes(self) -> int:
        """Size of all files together."""
        return sum(file.bytes for file in self.files.values())


class DraftState(StrEnum):
    """Where a version is in its life."""

    PUBLISHED = "published"
    ROLLED_BACK = "rolled_back"  # was in service somewhere and did worse than it promised
    RETIRED = "retired"  # being deleted by `prune`
    REFUSED = "refused"  # did not pass the gate


class DraftStatus(BaseModel):
    """The part of a draft's description that changes: `status.json`."""

    model_config = _STRICT

    state: Annotated[DraftState, Field(strict=False)]
    reason: str = Field(default="", max_length=4096)
    updated_unix_s: float = Field(ge=0.0)

    def encode(self) -> bytes:
        """As indented JSON."""
        return (self.model_dump_json(indent=2) + "\n").encode()


@dataclass(frozen=True, slots=True)
class DraftEntry:
    """A version with its state, as `list` and `get` return it."""

    manifest: DraftManifest
    state: DraftState
    reason: str
    """Why it was refused or rolled back; empty otherwise."""
    updated_unix_s: float
    """When the state last changed."""

    @property
    def version(self) -> str:
        return self.manifest.version


def parse_manifest(data: bytes, version: str) -> DraftManifest:
    """The manifest of `version`. Raises `CorruptDraft` if it is not valid or describes another version."""
    try:
        manifest = DraftManifest.model_validate_json(data)
    except ValidationError as error:
        raise CorruptDraft(f"the manifest of {version} is not valid: {_first_problem(error)}") from error
    if manifest.version != version:
        raise CorruptDraft(f"the manifest of {version} describes another version, {manifest.version}")
    return manifest


def parse_status(data: bytes, version: str) -> DraftStatus:
    """The status of `version`. Raises `CorruptDraft` if it is not valid."""
    try:
        return DraftStatus.model_validate_json(data)
    except ValidationError as error:
        raise CorruptDraft(f"the status of {version} is not valid: {_first_problem(error)}") from error


def check_target(manifest: DraftManifest, target_fingerprint: str, tokenizer_fingerprint: str) -> None:
    """Raise `WrongTarget` unless the draft was made for this target and this vocabulary."""
    if manifest.tokenizer_fingerprint != tokenizer_fingerprint:
        raise WrongTarget(
            f"draft {manifest.version} has another vocabulary ({manifest.tokenizer_fingerprint}) "
            f"than this target ({tokenizer_fingerprint}): distil one from this target"
        )
    if manifest.target_fingerprint != target_fingerprint:
        raise WrongTarget(
            f"draft {manifest.version} was made for target {manifest.target_name} ({manifest.target_fingerprint}), "
            f"not for this one ({target_fingerprint}): distil one from this target"
        )


def _first_problem(error: ValidationError) -> str:
    """Where and what, without the input itself, which may be anything."""
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in problem["loc"])[:100]
    return f"{where}: {problem['msg']}" if where else problem["msg"][:300]
