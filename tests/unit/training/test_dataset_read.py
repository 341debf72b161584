"""From the log to examples: conversion, what is left out and counted, the split, the watermark."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redraft.traffic.layout import new_shard_name
from redraft.traffic.record import ARROW_SCHEMA, StepRecord, TeacherPosition, TrafficRecord
from redraft_training.dataset.errors import ForeignLog, NotEnoughData
from redraft_training.dataset.example import Branch
from redraft_training.dataset.read import DatasetReport, read_dataset
from redraft_training.dataset.select import Selection, is_held_out, to_example
from tests.unit.traffic.fakes import SAMPLING, record
from tests.unit.training.dataset_examples import IDENTITY

NOW = 1_795_527_000.0
ALL = Selection(held_out_share=0.0)


def normalised(made: TrafficRecord) -> TrafficRecord:
    return replace(made, teacher=tuple(replace(p, sampling_logsumexp=2.5) for p in made.teacher))


def write(root: Path, *records: TrafficRecord, at: float = NOW) -> Path:
    path = root / new_shard_name(at, 0, "host", 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(
        pa.Table.from_pylist([r.to_row() for r in records], schema=ARROW_SCHEMA), path, write_page_checksum=True
    )
    return path


def ids(examples: Any) -> list[str]:
    return [example.request_id for example in examples]


def test_the_worked_example() -> None:
    made = to_example(normalised(record(domain="sql")))
    assert [label is None for label in made.labels] == [True, True, False, False]
    (branch,) = made.branches
    assert (branch.start, branch.token_ids, [label is None for label in branch.labels]) == (3, (4, 5), [False, False])
    assert made.labels[2] is not None
    assert (list(made.labels[2].ids), list(made.labels[2].logits)) == ([9, 3], [1.5, 0.25])
    assert (made.domain, made.tenant, made.params.top_p) == ("sql", "t", 0.95)
    assert to_example(record()).domain == "t"


def test_each_position_gets_the_label_of_its_own_prefix() -> None:
    """Two steps and one without a draft; distinct labels tell which went where."""

    def at(index: int, context: tuple[int, ...] = ()) -> TeacherPosition:
        return TeacherPosition(index, context, (index, 30 + len(context)), (2.0, 1.0), 3.0, 3.0)

    made = to_example(
        record(
            output_token_ids=(7, 8, 9, 3, 6),
            steps=(StepRecord(0, (1, 2), 0, "draft_model", "d"), StepRecord(2, (9, 3), 2, "draft_model", "d")),
            teacher=(at(0), at(1, (1,)), at(2, (1, 2)), at(1), at(2), at(3), at(4)),
        )
    )
    assert [list(label.ids) for label in made.labels if label] == [[i, 30] for i in range(5)]
    (branch,) = made.branches
    assert (branch.start, branch.token_ids) == (0, (1, 2))
    assert [list(label.ids) for label in branch.labels if label] == [[1, 31], [2, 32]]


def test_what_no_draft_will_be_asked_makes_no_branch() -> None:
    lookup = record(steps=(StepRecord(2, (9, 4, 5), 1, "ngram", "d-1"),))
    assert to_example(lookup).branches == ()
    # a stop cut the output behind two accepted tokens
    cut = record(output_token_ids=(7, 8), steps=(StepRecord(0, (7, 8, 1), 3, "draft_model", "d"),), teacher=())
    assert to_example(cut).branches == ()


def test_a_rejected_path_without_labels_is_still_a_branch() -> None:
    assert to_example(record(teacher=())).branches == (Branch(3, (4, 5), (None, None)),)


def test_a_label_without_its_normaliser_counts_only_where_it_can_do_without() -> None:
    assert to_example(record()).labels == (None,) * 4  # temperature 0.8 in a shard of before the column
    greedy = to_example(record(sampling=replace(SAMPLING, temperature=0.0)))
    plain = to_example(record(sampling=replace(SAMPLING, temperature=1.0)))
    assert greedy.labels[2] is not None
    assert plain.labels[2] is not None
    assert plain.labels[2].sampling_logsumexp == plain.labels[2].logsumexp


def test_a_signed_seed_is_the_requests_own() -> None:
    assert to_example(record(sampling=replace(SAMPLING, seed=-1))).params.seed == 2**64 - 1


def test_everything_not_used_is_counted(tmp_path: Path) -> None:
    torn = write(tmp_path, record("torn"), at=NOW + 1)
    torn.write_bytes(torn.read_bytes()[:200])
    write(
        tmp_path,
        record("good"),
        record("good"),
        record("good", sample_index=1),
        record("other", target_fingerprint="sha256:x"),
        record("vocab", tokenizer_fingerprint="sha256:x"),
        record("gone", tenant="t"),
        record("left", tenant="gone"),
        record("empty", output_token_ids=(), steps=(), teacher=()),
        record("beyond", prompt_token_ids=(1, 99)),
        record("odd", sampling=replace(SAMPLING, top_p=7.0)),
        record("unwanted", domain="chat"),
    )
    selection = Selection(
        domains=frozenset({"t"}),
        exclude_request_ids=frozenset({"gone"}),
        exclude_tenants=frozenset({"gone"}),
        held_out_share=0.0,
    )
    found = read_dataset(str(tmp_path), IDENTITY, selection)
    assert [(e.request_id, e.sample_index) for e in found.training] == [("good", 0), ("good", 1)]
    assert found.report.skipped == {
        "duplicate": 1,
        "other_target": 1,
        "other_tokenizer": 1,
        "excluded": 2,
        "empty": 1,
        "invalid": 2,
        "not_selected": 1,
    }
    assert found.report.problems == {"torn": 1}
    assert found.report.records == 11
    assert DatasetReport.from_json(found.report.to_json()) == found.report


def test_a_log_of_another_target_is_refused(tmp_path: Path) -> None:
    write(tmp_path, record("a", target_fingerprint="x"), record("b", tokenizer_fingerprint="x"))
    with pytest.raises(ForeignLog, match=r"all 2 records.*another target \(1\).*vocabulary \(1\)"):
        read_dataset(str(tmp_path), IDENTITY)


def test_an_empty_log_is_too_little_not_wrong(tmp_path: Path) -> None:
    found = read_dataset(str(tmp_path / "none"), IDENTITY)
    assert (found.report.records, found.report.watermark.newest_unix_s) == (0, None)
    with pytest.raises(NotEnoughData, match="0 training examples, and at least 5"):
        found.require(training=5)


def test_the_split_is_stable_and_follows_the_request(tmp_path: Path) -> None:
    names = [f"r{i}" for i in range(300)]
    write(tmp_path, *[record(name, sample_index=s) for name in names for s in (0, 1)])
    found = read_dataset(str(tmp_path), IDENTITY, Selection(held_out_share=0.1))
    held_out = set(ids(found.held_out))
    assert held_out == {name for name in names if is_held_out(name, 0.1)}
    assert held_out.isdisjoint(ids(found.training))
    assert 15 <= len(held_out) <= 45
    assert held_out < {name for name in names if is_held_out(name, 0.2)}
    # the same answer for ever: these were computed once
    assert [i for i in range(100) if is_held_out(f"r{i}", 0.1)] == [6, 43, 46, 47, 77, 78, 79, 82, 85, 89, 95]


def test_the_watermark_names_the_traffic_whatever_the_shards(tmp_path: Path) -> None:
    records = [record(f"r{i}", created_unix_s=NOW + i) for i in range(6)]
    write(tmp_path / "a", *records, at=NOW + 9)
    for n, part in enumerate((records[3:], records[:3])):
        write(tmp_path / "b", *part, at=NOW + 9 + n)
    first, second = (read_dataset(str(tmp_path / name), IDENTITY, ALL) for name in "ab")
    assert first.report.watermark == second.report.watermark
    assert ids(first.training) == ids(second.training) == [f"r{i}" for i in range(6)]
    assert first.report.watermark.newest_unix_s == NOW + 5
    window = read_dataset(str(tmp_path / "a"), IDENTITY, replace(ALL, since=NOW + 1, until=NOW + 4))
    assert ids(window.training) == ["r1", "r2", "r3"]
    assert window.report.watermark.sha256 != first.report.watermark.sha256


def test_servers_whose_clocks_differ_lose_nothing(tmp_path: Path) -> None:
    """One is an hour ahead, one a day behind; the shards are named by the servers' own clocks."""
    hour, day = 3600.0, 86_400.0
    write(tmp_path, record("right", created_unix_s=NOW - 1), at=NOW)
    write(tmp_path, record("ahead", created_unix_s=NOW + hour - 1), at=NOW + hour)
    first = read_dataset(str(tmp_path), IDENTITY, ALL, now=NOW)
    assert ids(first.training) == ["right"]
    assert first.report.skipped == {"future": 1}  # said, not silent
    assert first.report.watermark.newest_unix_s == NOW - 1  # else all other traffic would look old for an hour
    write(tmp_path, record("behind", created_unix_s=NOW - day), at=NOW - day)
    second = read_dataset(str(tmp_path), IDENTITY, ALL, now=NOW + 2 * hour)
    assert ids(second.training) == ["behind", "right", "ahead"]
    assert second.report.skipped == {}
    assert second.report.watermark.newest_unix_s == NOW + hour - 1


def test_the_newest_examples_that_fit_are_used(tmp_path: Path) -> None:
    write(tmp_path, *[record(f"r{i}", created_unix_s=NOW + i % 7) for i in range(50)], at=NOW + 9)
    size = to_example(record()).num_tokens
    found = read_dataset(str(tmp_path), IDENTITY, replace(ALL, max_tokens=10 * size))
    newest = sorted(range(50), key=lambda i: (i % 7, f"r{i}"))[-10:]
    assert ids(found.training) == [f"r{i}" for i in newest]
    assert found.report.skipped == {"over_limit": 40}


def test_the_report_sizes_each_domain(tmp_path: Path) -> None:
    write(tmp_path, normalised(record("a", domain="sql")), record("b", domain="chat", teacher=()))
    report = read_dataset(str(tmp_path), IDENTITY, ALL).report
    assert {name: (s.examples, s.output_tokens, s.positions) for name, s in report.training.items()} == {
        "chat": (1, 4, 0),
        "sql": (1, 4, 4),
    }
