"""What a cycle learns from: the log and the replay memory, if there is enough that is new."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

from redraft.errors import ConfigError
from redraft.registry.manifest import DraftEntry, DraftState
from redraft.traffic.erasure import erasures_of
from redraft_training.cycle_state import Erased, Workspace
from redraft_training.dataset.errors import NotEnoughData
from redraft_training.dataset.example import Example
from redraft_training.dataset.read import Dataset, read_dataset
from redraft_training.dataset.replay import Mixture, Replay, ReplaySettings
from redraft_training.dataset.select import TargetIdentity
from redraft_training.settings import CycleSettings, DataSettings


@dataclass(frozen=True, slots=True)
class Attempts:
    """What the registry says of the cycles before: it is the only memory that another machine needs.

    Attributes:
        newest_unix_s: how far into the log they have read; -inf before the first.
        refusals: drafts refused in a row, up to now.
    """

    newest_unix_s: float
    refusals: int

    @classmethod
    def of(cls, entries: Sequence[DraftEntry]) -> Self:
        """From all drafts of a registry, newest first."""
        newest = max((_watermark(entry.manifest.training) for entry in entries), default=-math.inf)
        states = [entry.state is DraftState.REFUSED for entry in entries]
        return cls(newest, states.index(False) if False in states else len(states))


def _watermark(training: dict[str, Any]) -> float:
    found = training.get("data_watermark")
    newest = found.get("newest_unix_s") if isinstance(found, dict) else None
    return float(newest) if isinstance(newest, int | float) else -math.inf


def read_traffic(settings: CycleSettings, identity: TargetIdentity, *, now: float = math.inf) -> Dataset:
    """The selected part of the log, up to `now`. Raises what `read_dataset` raises, ConfigError for a bad URL."""
    url = settings.require_traffic()
    try:
        return read_dataset(url, identity, settings.selection, now=now)
    except (ValueError, ImportError) as error:
        # of fsspec, for the URL; a record that is damaged is skipped
        raise ConfigError(f"cannot use --traffic as a traffic log: {error}") from error


def forget_erased(settings: CycleSettings, workspace: Workspace, say: Callable[[str], None]) -> Erased:
    """Take out of the work directory what was erased from the log; return how much that was.

    For the holder of the directory's lock. Raises OSError, DatasetUnreadable, `ErasureUnreadable`, ConfigError for a
    bad URL.
    """
    try:
        erasures = erasures_of(settings.require_traffic())
    except (ValueError, ImportError) as error:
        raise ConfigError(f"cannot use --traffic as a traffic log: {error}") from error
    gone = workspace.erase(erasures)
    if gone.replay:
        say(f"{gone.replay:,} examples were erased from the log: they left the replay memory")
    if gone.cycle:
        say(f"{gone.cycle:,} examples of the cycle under way were erased from the log")
    return gone


def replay_settings(data: DataSettings) -> ReplaySettings:
    """The replay's part of a cycle's settings."""
    days = data.replay_max_age_days
    return ReplaySettings(
        recent_examples=data.recent_examples,
        memory_examples=data.replay_examples,
        max_age_s=None if days is None else days * 86400,
    )


def gather(
    settings: CycleSettings, identity: TargetIdentity, replay: Replay, attempts: Attempts, now: float
) -> Mixture:
    """Traffic and memory. Raises NotEnoughData if a cycle is not worth while, or could not be judged at its end."""
    dataset = read_traffic(settings, identity, now=now)
    require_news(dataset, attempts.newest_unix_s, settings.data.min_new_tokens)
    mixture = replay.mix(dataset, settings.selection)
    mixture.dataset.require(training=1, held_out=1)
    require_judges(mixture.dataset, settings)
    return mixture


def require_news(dataset: Dataset, since: float, wanted: int) -> None:
    """Raise NotEnoughData unless so many output tokens are newer than the last attempt."""
    examples = (*dataset.training, *dataset.held_out)
    fresh = sum(len(example.output_token_ids) for example in examples if example.created_unix_s > since)
    if fresh < wanted:
        skipped = ", ".join(f"{count} {reason}" for reason, count in dataset.report.skipped.items())
        raise NotEnoughData(
            f"{fresh} output tokens of use were logged since the last attempt, and data.min_new_tokens asks for "
            f"{wanted}: wait for more traffic" + (f" (records skipped: {skipped})" if skipped else "")
        )


def require_judges(dataset: Dataset, settings: CycleSettings) -> None:
    """Raise NotEnoughData if the gate would refuse any draft, for want of held-out positions."""
    captured = settings.teacher == "captured"
    positions = sum(_num_positions(example, captured=captured) for example in dataset.held_out)
    if positions < settings.gate.min_positions:
        way_out = (
            "wait for more traffic; set teacher=rerun if it is logged without captured logits"
            if captured
            else "wait for more traffic"
        )
        raise NotEnoughData(
            f"{positions} positions of held-out traffic can judge a draft, and gate.min_positions asks for "
            f"{settings.gate.min_positions}: {way_out}"
        )


def _num_positions(example: Example, *, captured: bool) -> int:
    """Output positions that a draft would be asked for; the first token comes with the prompt."""
    if not captured:
        return max(len(example.output_token_ids) - 1, 0)
    return sum(label is not None for label in example.labels[1:])
