"""Settings of a retraining cycle: one file (or flags) for every command that takes part in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from redraft.errors import ConfigError
from redraft_training.dataset.select import Selection
from redraft_training.distill.settings import DistillSettings
from redraft_training.gate import GateSettings

_Model = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class DataSettings(BaseModel):
    """What of the traffic log is learnt from."""

    model_config = _Model

    domains: tuple[str, ...] = ()
    """Only these domains. Empty: all."""
    tenants: tuple[str, ...] = ()
    """Only these tenants. Empty: all."""
    exclude_request_ids: tuple[str, ...] = ()
    """Requests whose senders took back their consent."""
    exclude_tenants: tuple[str, ...] = ()
    """Tenants who took back their consent."""
    since_unix_s: float | None = None
    """Only records finished at or after this time."""
    until_unix_s: float | None = None
    """Only records finished before this time."""
    held_out_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the requests that are never trained on and judge the draft, by a hash of the request id."""
    max_tokens: Annotated[int, Field(ge=1)] = 2_000_000
    """The newest examples, up to so many tokens. Bounds memory."""
    min_new_tokens: Annotated[int, Field(ge=1)] = 5_000
    """Output tokens logged since the last attempt that make a cycle worth while."""
    recent_examples: Annotated[int, Field(ge=1)] = 4_000
    """Newest training examples used."""
    replay_examples: Annotated[int, Field(ge=0)] = 2_000
    """Examples of earlier traffic kept and used against forgetting, shared evenly by the domains. 0: no replay."""
    replay_max_age_days: Annotated[float, Field(gt=0.0)] | None = None
    """Replayed examples older than this are forgotten; set it to the retention promised to users."""


class StudentSettings(BaseModel):
    """The draft: its shape when it is born (no draft in the registry or in `draft`), its vocabulary and precision."""

    model_config = _Model

    layers: tuple[int, ...] | None = None
    """Target layers to keep, 0-based. null: num_layers of them."""
    num_layers: Annotated[int, Field(ge=1)] = 4
    """How many layers to keep."""
    importance: Literal["even", "block_influence", "greedy"] = "even"
    """How num_layers are chosen: evenly spaced, or measured on the traffic."""
    intermediate_size: Annotated[int, Field(ge=1)] | None = None
    """MLP channels to keep in every layer, by measured importance. null: all."""
    num_key_value_heads: Annotated[int, Field(ge=1)] | None = None
    """Key/value heads to keep in every layer, with their query heads. null: all."""
    vocab_size: Annotated[int, Field(ge=1)] | None = 8_192
    """Output vocabulary of the draft: the traffic's most frequent ids. null: all of the target's."""
    quantise: Literal["none", "int8"] | None = None
    """int8: round the layers while they learn, so that distillation heals that too. null: as the draft begun from."""


class CycleSettings(BaseModel):
    """A retraining cycle: which traffic, which draft, how to train and when to publish."""

    model_config = _Model

    target: str = "demo"
    """The target that is served: demo, a Hugging Face id, a directory or a .gguf file."""
    traffic: str | None = None
    """The traffic log: a directory or any fsspec URL."""
    registry: str | None = None
    """The draft registry: a directory or any fsspec URL."""
    work_dir: Path = Path("retraining")
    """Local directory for checkpoints, reports and the replay memory. A cycle that was killed goes on from it."""
    draft: str | None = None
    """Draft to begin from when the registry has none. null: prune the target."""
    teacher: Literal["captured", "rerun"] = "captured"
    """captured: labels kept when the traffic was served. rerun: run the target again over the text, where they are not
    enough; needed for a log that was written without them."""
    keep_drafts: Annotated[int, Field(ge=1)] | None = 20
    """The newest published drafts stay in the registry when a cycle ends, and as many refused ones. Never deleted: the
    current draft, the one before it, and the last that a server promoted. null: all stay."""
    num_speculative_tokens: Annotated[int, Field(ge=1, le=64)] = 4
    """k that the mean acceptance length is stated for."""
    data: DataSettings = DataSettings()
    """Which traffic."""
    student: StudentSettings = StudentSettings()
    """Which draft."""
    distill: DistillSettings = DistillSettings()
    """How it is trained."""
    gate: GateSettings = GateSettings()
    """When it is published."""

    @property
    def selection(self) -> Selection:
        """`data` as the reader takes it."""
        data = self.data
        return Selection(
            since=data.since_unix_s,
            until=data.until_unix_s,
            domains=frozenset(data.domains),
            tenants=frozenset(data.tenants),
            exclude_request_ids=frozenset(data.exclude_request_ids),
            exclude_tenants=frozenset(data.exclude_tenants),
            held_out_share=data.held_out_share,
            max_tokens=data.max_tokens,
        )

    def require_traffic(self) -> str:
        """The traffic log's URL. Raises ConfigError if none is set."""
        if self.traffic is None:
            raise ConfigError("traffic is not set: give --traffic, the directory or URL that the server logs to")
        return self.traffic

    def require_registry(self) -> str:
        """The registry's URL. Raises ConfigError if none is set."""
        if self.registry is None:
            raise ConfigError("registry is not set: give --registry, the directory or URL that the server watches")
        return self.registry


def load_settings(
    config: Path | None, overrides: Sequence[str], *, objective: Mapping[str, Any] | None = None, **given: Any
) -> CycleSettings:
    """Settings from a YAML file, then an `objective` in place of the file's, then `key.path=value` overrides, then
    `given` (those that are not None).

    Raises ConfigError with all problems, each naming the setting.
    """
    values: dict[str, Any] = {} if config is None else _read_yaml(config)
    if objective is not None:
        distill = values.setdefault("distill", {})
        if not isinstance(distill, dict):
            raise ConfigError("wrong settings: distill: expected settings such as `epochs: 2`")
        distill["objective"] = dict(objective)
    for override in overrides:
        _assign(values, override)
    values.update({name: value for name, value in given.items() if value is not None})
    try:
        return CycleSettings.model_validate(values)
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in detail['loc'])}: {detail['msg']}"
            for detail in error.errors(include_url=False, include_input=False)
        ]
        raise ConfigError("wrong settings: " + "; ".join(problems)) from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read --config {path}: {error.strerror}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" (line {mark.line + 1})"
        raise ConfigError(f"--config {path} is not YAML{where}") from None
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"--config {path} must hold settings such as `registry: drafts`")
    return content or {}


def _assign(values: dict[str, Any], override: str) -> None:
    """Put `distill.epochs=2` into the nested `values`; the value is read as YAML."""
    path, equals, text = override.partition("=")
    if not equals or not path:
        raise ConfigError(f"--set {override!r}: expected name=value, such as distill.epochs=2")
    *parents, name = path.split(".")
    for parent in parents:
        if values.get(parent) is None:  # absent, or a heading without settings in the file
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override!r}: {parent} has no settings of its own")
    try:
        values[name] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override!r}: the value is not YAML") from None
