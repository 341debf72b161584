"""The record's arithmetic: which prefix a captured position belongs to, and that a row gives the record back."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redraft.traffic.record import (
    ARROW_SCHEMA,
    SamplingRecord,
    StepRecord,
    TeacherPosition,
    Timings,
    TrafficRecord,
)
from tests.unit.traffic.fakes import record

token = st.integers(0, 2**31 - 1)
tokens = st.lists(token, max_size=6).map(tuple)
real = st.floats(allow_nan=False)
real32 = st.floats(allow_nan=False, width=32)
text = st.text("a \0é€𝄞", max_size=4)
bias = st.lists(st.tuples(token, real), max_size=3).map(tuple)
seed = st.none() | st.integers(-(2**63), 2**63 - 1)
samplings = st.builds(SamplingRecord, *(real, st.integers(0, 1000), real, real, real, real, real, seed, text, bias))
timings = st.builds(Timings, real, real, real)


@st.composite
def steps(draw: st.DrawFn, num_output: int) -> StepRecord:
    drafted = draw(tokens)
    return StepRecord(
        draw(st.integers(0, num_output)), drafted, draw(st.integers(0, len(drafted))), draw(text), draw(text)
    )


@st.composite
def teacher_positions(draw: st.DrawFn, num_output: int) -> TeacherPosition:
    context = draw(tokens)
    top = draw(st.lists(st.tuples(token, real32), max_size=4))
    index = draw(st.integers(0, num_output)) + len(context)
    return TeacherPosition(index, context, tuple(i for i, _ in top), tuple(logit for _, logit in top), draw(real32))


@st.composite
def records(draw: st.DrawFn) -> TrafficRecord:
    output = draw(tokens)
    return TrafficRecord(
        *(draw(text), draw(st.integers(0, 7)), draw(real)),
        *(draw(text), draw(text), draw(text), draw(text), draw(text)),
        prompt_token_ids=draw(tokens),
        output_token_ids=output,
        finish_reason=draw(text),
        sampling=draw(samplings),
        timings=draw(timings),
        steps=tuple(draw(st.lists(steps(len(output)), max_size=3))),
        teacher=tuple(draw(st.lists(teacher_positions(len(output)), max_size=3))),
        cached_prompt_tokens=draw(st.integers(0, 100)),
    )


@given(st.lists(records(), max_size=3))
def test_rows_give_the_records_back(originals: list[TrafficRecord]) -> None:
    table = pa.Table.from_pylist([original.to_row() for original in originals], schema=ARROW_SCHEMA)
    assert [TrafficRecord.from_row(row) for row in table.to_pylist()] == originals


def test_unknown_columns_are_ignored_at_every_level() -> None:
    row = record().to_row()
    row["later"] = 1
    for part in (row["sampling"], row["timings"], row["steps"][0], row["teacher"][0]):
        part["later"] = 1
    assert TrafficRecord.from_row(row) == record()


def test_prefixes_of_the_worked_example() -> None:
    example = record()
    assert [example.prefix_of(position) for position in example.teacher] == [
        (1, 2, 7, 8),
        (1, 2, 7, 8, 9),
        (1, 2, 7, 8, 9, 4),
        (1, 2, 7, 8, 9, 4, 5),
    ]


@given(st.data(), st.integers(0, 5), st.integers(0, 5), st.integers(1, 5))
def test_context_leads_back_to_the_prefix_that_was_verified(
    data: st.DataObject, start: int, num_drafted: int, num_emitted: int
) -> None:
    """Whatever was rejected or cut off by a stop, the prefix is what the target saw: text before, then draft."""
    num_accepted = data.draw(st.integers(0, num_drafted))
    before = tuple(range(100, 100 + start))
    drafted = tuple(range(200, 200 + num_drafted))
    # A stop may cut the accepted run and its recovered or bonus token anywhere.
    output = before + (*drafted[:num_accepted], 300)[:num_emitted]
    step = StepRecord(start, drafted, num_accepted, "draft_model", "d-1")

    teacher = tuple(
        TeacherPosition(start + j, step.context_of(j, len(output)), (), (), 0.0) for j in range(num_drafted + 1)
    )
    made = record(output_token_ids=output, steps=(step,), teacher=teacher)
    for j, position in enumerate(made.teacher):
        assert made.prefix_of(position) == (1, 2, *before, *drafted[:j])
    on_path = [not position.context_drafted for position in teacher]
    assert sum(on_path) == 1 + min(num_accepted, num_emitted)


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": (StepRecord(5, (1,), 0, "ngram", ""),)},
        {"steps": (StepRecord(-1, (1,), 0, "ngram", ""),)},
        {"steps": (StepRecord(0, (1,), 2, "ngram", ""),)},
        {"teacher": (TeacherPosition(0, (), (1, 2), (0.5,), 1.0),)},
        {"teacher": (TeacherPosition(5, (), (), (), 1.0),)},
        {"teacher": (TeacherPosition(1, (1, 2), (), (), 1.0),)},
    ],
)
def test_parts_that_contradict_each_other_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        record(**changes)


def test_memory_estimate_follows_the_teacher() -> None:
    position = TeacherPosition(0, (), tuple(range(64)), (0.0,) * 64, 1.0)
    growth = record(teacher=(position,) * 101).memory_bytes() - record(teacher=(position,)).memory_bytes()
    assert 100 * 128 * 36 <= growth <= 100 * 140 * 36
