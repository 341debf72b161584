"""The traffic log as a data set: training and held-out examples, and a report of what was read and what was not."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from redraft.traffic.reader import Problem, TrafficReader
from redraft.traffic.record import TrafficRecord
from redraft_training.dataset.errors import ForeignLog, NotEnoughData
from redraft_training.dataset.example import Example
from redraft_training.dataset.select import (
    Selection,
    Skip,
    TargetIdentity,
    is_held_out,
    reason_to_skip,
    to_example,
)


@dataclass(frozen=True, slots=True)
class Watermark:
    """Which traffic a data set was made from; goes into the manifest of the draft that learns from it.

    `newest_unix_s` is that of the newest record of this target, used or not; None for an empty log. `sha256` is over
    the request id and sample index of every example, in order of time.
    """

    newest_unix_s: float | None
    num_examples: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Share:
    """How much a part of the data set holds. Positions: those with a captured label, branches included."""

    examples: int = 0
    tokens: int = 0
    output_tokens: int = 0
    positions: int = 0

    @classmethod
    def of(cls, examples: Iterable[Example]) -> Share:
        examples = list(examples)
        return cls(
            len(examples),
            sum(example.num_tokens for example in examples),
            sum(len(example.output_token_ids) for example in examples),
            sum(num_labels(example) for example in examples),
        )


@dataclass(frozen=True, slots=True)
class DatasetReport:
    """What a data set was made from.

    Attributes:
        records: read from the log, within the time window.
        skipped: records not used, by reason (`Skip`).
        problems: files not read, or not to their end, by kind (see `redraft.traffic.reader.Problem`).
        training, held_out: the two parts, by domain.
        replayed: of the training part, how many examples came from the replay memory, by domain.
    """

    records: int
    skipped: Mapping[str, int]
    problems: Mapping[str, int]
    training: Mapping[str, Share]
    held_out: Mapping[str, Share]
    watermark: Watermark
    replayed: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values, for a manifest or a report file."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DatasetReport:
        """What `to_json` gave. Raises KeyError or TypeError for anything else."""
        values = dict(data)
        for name in ("training", "held_out"):
            values[name] = {domain: Share(**share) for domain, share in values[name].items()}
        return cls(**{**values, "watermark": Watermark(**values["watermark"])})


@dataclass(frozen=True, slots=True)
class Dataset:
    """Examples in order of time, and where they come from."""

    training: tuple[Example, ...]
    held_out: tuple[Example, ...]
    report: DatasetReport

    def require(self, *, training: int = 1, held_out: int = 0) -> None:
        """Raise NotEnoughData unless there are so many examples."""
        for name, have, want in (
            ("training", len(self.training), training),
            ("held-out", len(self.held_out), held_out),
        ):
            if have < want:
                raise NotEnoughData(
                    f"{have} {name} examples, and at least {want} are needed: wait for more traffic, or widen the "
                    "selection (domains, tenants, time window)"
                )


def read_dataset(
    url: str, identity: TargetIdentity, selection: Selection | None = None, *, now: float = math.inf
) -> Dataset:
    """Read a log and split it. Bad files and foreign records are skipped, and counted in the report.

    Args:
        url: the traffic log, a directory or any fsspec URL. A log that does not exist yet is empty.
        identity: records of another target or vocabulary are not used.
        now: Unix seconds. What is dated later is not used yet, lest one clock that is ahead make all other traffic
            look old.

    Raises ForeignLog if there are records but all of another target or vocabulary, OSError if the store cannot be
    listed, ValueError or ImportError for a URL that fsspec cannot open.
    """
    selection = selection or Selection()
    problems: Counter[str] = Counter()

    def on_problem(problem: Problem) -> None:
        problems[problem.kind] += 1

    records = TrafficReader(url).iter_records(selection.since, selection.until, on_problem=on_problem)
    collected = _Collected(now)
    for record in records:
        collected.add(record, identity, selection)
    collected.refuse_foreign()
    return split(
        collected.newest(selection.max_tokens),
        selection.held_out_share,
        records=collected.num_records,
        skipped=collected.skipped,
        problems=problems,
        newest_unix_s=collected.newest_unix_s,
    )


def split(
    examples: Iterable[Example],
    held_out_share: float,
    *,
    records: int = 0,
    skipped: Mapping[str, int] | None = None,
    problems: Mapping[str, int] | None = None,
    newest_unix_s: float | None = None,
) -> Dataset:
    """Examples, in order of time and divided into training and held-out ones."""
    ordered = sorted(examples, key=time_order)
    held_out = [example for example in ordered if is_held_out(example.request_id, held_out_share)]
    training = [example for example in ordered if not is_held_out(example.request_id, held_out_share)]
    report = DatasetReport(
        records=records,
        skipped=dict(skipped or {}),
        problems=dict(problems or {}),
        training=shares(training),
        held_out=shares(held_out),
        watermark=Watermark(newest_unix_s, len(ordered), ids_hash(ordered)),
    )
    return Dataset(tuple(training), tuple(held_out), report)


def time_order(example: Example) -> tuple[float, str, int]:
    return example.created_unix_s, example.request_id, example.sample_index


def shares(examples: Iterable[Example]) -> dict[str, Share]:
    """Sizes by domain, in order of the domains' names."""
    by_domain: dict[str, list[Example]] = {}
    for example in examples:
        by_domain.setdefault(example.domain, []).append(example)
    return {domain: Share.of(by_domain[domain]) for domain in sorted(by_domain)}


def num_labels(example: Example) -> int:
    """Positions with a captured label, on the path and off it."""
    count = sum(label is not None for label in example.labels)
    return count + sum(label is not None for branch in example.branches for label in branch.labels)


def ids_hash(examples: Iterable[Example]) -> str:
    """SHA-256 over request ids and sample indices in the order given; tells two data sets apart."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example.request_id}\0{example.sample_index}\0".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


class _Collected:
    """Examples while the log is read: never more than twice the limit."""

    def __init__(self, now: float) -> None:
        self._now = now
        self.num_records = 0
        self.skipped: Counter[str] = Counter()
        self.newest_unix_s: float | None = None
        self._examples: list[Example] = []
        self._num_tokens = 0
        self._seen: set[tuple[str, int]] = set()

    def add(self, record: TrafficRecord, identity: TargetIdentity, selection: Selection) -> None:
        self.num_records += 1
        reason = reason_to_skip(record, identity, selection)
        if reason not in (Skip.OTHER_TARGET, Skip.OTHER_TOKENIZER) and record.created_unix_s >= self._now:
            reason = Skip.FUTURE
        elif reason not in (Skip.OTHER_TARGET, Skip.OTHER_TOKENIZER):
            self.newest_unix_s = max(record.created_unix_s, self.newest_unix_s or record.created_unix_s)
        if reason is None and (record.request_id, record.sample_index) in self._seen:
            reason = Skip.DUPLICATE
        if reason is None:
            try:
                example = to_example(record)
            except ValueError:
                reason = Skip.INVALID
        if reason is not None:
            self.skipped[reason.value] += 1
            return
        self._seen.add((record.request_id, record.sample_index))
        self._examples.append(example)
        self._num_tokens += example.num_tokens
        if self._num_tokens > 2 * selection.max_tokens:
            self.newest(selection.max_tokens)

    def newest(self, max_tokens: int) -> list[Example]:
        """Drop all but the newest examples that fit, and return these."""
        self._examples.sort(key=time_order, reverse=True)
        kept: list[Example] = []
        total = 0
        for example in self._examples:
            if total + example.num_tokens > max_tokens:
                break
            kept.append(example)
            total += example.num_tokens
        dropped = len(self._examples) - len(kept)
        if dropped:
            self.skipped[Skip.OVER_LIMIT.value] += dropped
        self._examples, self._num_tokens = kept, total
        return kept

    def refuse_foreign(self) -> None:
        foreign = self.skipped[Skip.OTHER_TARGET.value], self.skipped[Skip.OTHER_TOKENIZER.value]
        if self.num_records and sum(foreign) == self.num_records:
            raise ForeignLog(
                f"all {self.num_records} records of the traffic log are of another target ({foreign[0]}) or another "
                f"vocabulary ({foreign[1]}): give the log of this target, or the target of this log"
            )
