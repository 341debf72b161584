"""Replay against forgetting: the newest traffic, and a bounded sample of everything that came before.

The sample is kept in files of its own, because the log forgets after its retention. It is a *bottom-k* sample (Cohen &
Kaplan 2007): every example has a fixed pseudo-random priority, and of each domain those with the lowest priorities
stay. That is a uniform sample of all traffic ever seen, like a classic reservoir (Vitter 1985), but it needs no
counters, does not depend on the order of arrival, and is not disturbed when the same traffic is read again: a run that
is killed and repeated ends with the same memory.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from redraft.traffic.erasure import Erasures
from redraft_training.dataset.errors import DatasetUnreadable
from redraft_training.dataset.example import Example
from redraft_training.dataset.read import Dataset, Watermark, ids_hash, shares, time_order
from redraft_training.dataset.select import Selection, TargetIdentity, is_held_out
from redraft_training.dataset.store import (
    HELD_OUT,
    TRAINING,
    num_covered,
    read_examples,
    stored_identity,
    without,
    write_examples,
)

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class ReplaySettings:
    """How much is kept and used.

    Attributes:
        recent_examples: newest training examples used, whatever their domain.
        memory_examples: examples kept of all traffic before, shared evenly by the domains seen. 0: no replay.
        held_out_memory: the same for held-out traffic, so that forgetting can be measured.
        max_age_s: examples older than the newest one by more than this leave the memory. Set it to the retention that
            was promised to those whose traffic it is; None: no limit.
        seed: of the priorities.
    """

    recent_examples: int = 4000
    memory_examples: int = 2000
    held_out_memory: int = 500
    max_age_s: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.recent_examples < 1 or self.memory_examples < 0 or self.held_out_memory < 0:
            raise ValueError("recent_examples must be positive, memory sizes not negative")


@dataclass(frozen=True, slots=True)
class Mixture:
    """A data set with replay, and the two memories as they are to be kept.

    Nothing is on disk until `Replay.save`; call it once the run that used the mixture is safe.
    """

    dataset: Dataset
    training_memory: tuple[Example, ...]
    held_out_memory: tuple[Example, ...]


class Replay:
    """The memory in a directory of its own (created on the first save).

    Example: `mixture = replay.mix(read_dataset(url, identity, selection), selection)`, train, `replay.save(mixture)`.

    Raises DatasetUnreadable from the constructor when a memory file is damaged or of another target: deleting it starts
    afresh.
    """

    def __init__(self, directory: Path, identity: TargetIdentity, settings: ReplaySettings | None = None) -> None:
        self.settings = settings or ReplaySettings()
        self._identity = identity
        self._training_path = directory / TRAINING
        self._held_out_path = directory / HELD_OUT
        self._training = self._read(self._training_path)
        self._held_out = self._read(self._held_out_path)

    def mix(self, dataset: Dataset, selection: Selection) -> Mixture:
        """New traffic plus the memory. The same log, memory, settings and selection give the same mixture.

        Exclusions of the selection also apply to what was remembered earlier; so does the held-out share: what was
        trained on under a smaller share leaves the training part.
        """
        settings = self.settings
        newest = max((e.created_unix_s for e in (*dataset.training, *dataset.held_out)), default=float("-inf"))
        oldest = float("-inf") if settings.max_age_s is None else newest - settings.max_age_s

        def may_stay(example: Example, held_out: bool) -> bool:
            return (
                example.created_unix_s >= oldest
                and example.request_id not in selection.exclude_request_ids
                and example.tenant not in selection.exclude_tenants
                and is_held_out(example.request_id, selection.held_out_share) is held_out
                and (not selection.domains or example.domain in selection.domains)
                and (not selection.tenants or example.tenant in selection.tenants)
            )

        old_training = [e for e in self._training if may_stay(e, held_out=False)]
        old_held_out = [e for e in self._held_out if may_stay(e, held_out=True)]
        training = _merged(old_training, dataset.training[-settings.recent_examples :])
        held_out = _merged(old_held_out, dataset.held_out)
        recent = {_key(e) for e in dataset.training[-settings.recent_examples :]}
        used = [*training.values()]
        report = replace(
            dataset.report,
            training=shares(used),
            held_out=shares(held_out.values()),
            replayed=dict(sorted(Counter(e.domain for e in used if _key(e) not in recent).items())),
            watermark=Watermark(
                dataset.report.watermark.newest_unix_s,
                len(training) + len(held_out),
                ids_hash(sorted([*used, *held_out.values()], key=time_order)),
            ),
        )
        return Mixture(
            Dataset(tuple(used), tuple(held_out.values()), report),
            _sample(_merged(old_training, dataset.training).values(), settings.memory_examples, settings.seed),
            _sample(held_out.values(), settings.held_out_memory, settings.seed),
        )

    def save(self, mixture: Mixture) -> None:
        """Keep a mixture's memory: each file is replaced atomically. Raises OSError."""
        for path, examples in (
            (self._training_path, mixture.training_memory),
            (self._held_out_path, mixture.held_out_memory),
        ):
            write_examples(path, examples, self._identity, _state(self.settings.seed, examples))
        self._training, self._held_out = list(mixture.training_memory), list(mixture.held_out_memory)

    def _read(self, path: Path) -> list[Example]:
        if not path.exists():
            return []
        examples, state = read_examples(path, self._identity)
        if state.get("sha256") != ids_hash(examples):
            raise DatasetUnreadable(f"{path} does not hold the examples it says: delete it to start afresh")
        return examples


def erase_remembered(directory: Path, erasures: Erasures) -> int:
    """Take out of a memory what the erasures cover; return how many examples that were.

    Each file is replaced whole. Raises OSError, and DatasetUnreadable for a damaged memory.
    """
    count = num_covered(directory, erasures)
    for path in (directory / TRAINING, directory / HELD_OUT) if count else ():
        if path.exists():
            identity = stored_identity(path)
            examples, state = read_examples(path, identity)
            kept = without(examples, erasures)
            write_examples(path, kept, identity, _state(int(state["seed"]), kept))
    return count


def quotas(available: Mapping[str, int], capacity: int) -> dict[str, int]:
    """How many of each domain are kept: equal shares, and what a small domain leaves over goes to the larger ones.

    >>> quotas({"chat": 900, "code": 50, "sql": 400}, 450)
    {'chat': 200, 'code': 50, 'sql': 200}
    """
    result: dict[str, int] = {}
    left = capacity
    # smallest first: what it does not need raises the share of all that follow
    for rank, (domain, count) in enumerate(sorted(available.items(), key=lambda item: (item[1], item[0]))):
        result[domain] = min(count, left // (len(available) - rank))
        left -= result[domain]
    return dict(sorted(result.items()))


def priority(example: Example, seed: int) -> bytes:
    """The example's fixed random number: the lowest stay."""
    text = f"{seed}\0{example.request_id}\0{example.sample_index}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=8, person=b"replay").digest()


def _sample(examples: Iterable[Example], capacity: int, seed: int) -> tuple[Example, ...]:
    by_domain: dict[str, list[Example]] = {}
    for example in examples:
        by_domain.setdefault(example.domain, []).append(example)
    kept: list[Example] = []
    for domain, quota in quotas({domain: len(own) for domain, own in by_domain.items()}, capacity).items():
        kept += sorted(by_domain[domain], key=lambda example: priority(example, seed))[:quota]
    return tuple(sorted(kept, key=time_order))


def _merged(old: Iterable[Example], new: Iterable[Example]) -> dict[Key, Example]:
    """Both, each example once, in order of time."""
    merged = {_key(example): example for example in (*old, *new)}
    return dict(sorted(merged.items(), key=lambda item: time_order(item[1])))


def _key(example: Example) -> Key:
    return example.request_id, example.sample_index


def _state(seed: int, examples: Collection[Example]) -> dict[str, object]:
    by_domain = Counter(example.domain for example in examples)
    return {"seed": seed, "sha256": ids_hash(examples), "domains": dict(sorted(by_domain.items()))}
