"""Examples as an Arrow table: one row each, everything about its labels in flat lists.

A *slot* is a place for a label: the positions on the path first, then those behind each token of each branch, in order.
`label_slots` names the slots that are filled; the kept ids and logits of all of them lie end to end in `label_ids` and
`label_logits`, `label_counts` apart. Flat lists go in and out as whole buffers, without a Python object per number.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from redraft.sampling.params import Coupling, SamplingParams
from redraft_training.dataset.example import Branch, Example, Label

INT_LISTS = (
    *("prompt_token_ids", "output_token_ids", "branch_starts", "branch_lengths", "branch_token_ids"),
    *("label_slots", "label_counts", "label_ids"),
)
FLOAT_LISTS = ("label_logits", "label_logsumexp", "label_sampling_logsumexp")

SCHEMA = pa.schema(
    [
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("domain", pa.string(), nullable=False),
        pa.field("created_unix_s", pa.float64(), nullable=False),
        pa.field("tenant", pa.string(), nullable=False),
        pa.field("sampling", pa.string(), nullable=False),  # JSON
        *(pa.field(name, pa.list_(pa.int32()), nullable=False) for name in INT_LISTS),
        *(pa.field(name, pa.list_(pa.float32()), nullable=False) for name in FLOAT_LISTS),
    ]
)


def to_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    """A few hundred examples as rows of `SCHEMA`. A missing `sampling_logsumexp` (temperature 0) is stored as NaN."""
    rows = [_lists(example) for example in examples]
    columns: dict[str, pa.Array] = {
        "request_id": pa.array([example.request_id for example in examples], pa.string()),
        "sample_index": pa.array([example.sample_index for example in examples], pa.int32()),
        "domain": pa.array([example.domain for example in examples], pa.string()),
        "created_unix_s": pa.array([example.created_unix_s for example in examples], pa.float64()),
        "tenant": pa.array([example.tenant for example in examples], pa.string()),
        "sampling": pa.array([_params_to_json(example.params) for example in examples], pa.string()),
    }
    for name in (*INT_LISTS, *FLOAT_LISTS):
        columns[name] = _list_column([row[name] for row in rows], np.int32 if name in INT_LISTS else np.float32)
    return pa.RecordBatch.from_arrays([columns[name] for name in SCHEMA.names], schema=SCHEMA)


def from_batch(batch: pa.RecordBatch) -> Iterator[Example]:
    """The examples of a batch of `SCHEMA`. Raises ValueError or KeyError when the columns contradict each other."""
    plain = {field.name: batch.column(field.name).to_pylist() for field in SCHEMA if not pa.types.is_list(field.type)}
    lists = {name: _rows_of(batch.column(name)) for name in (*INT_LISTS, *FLOAT_LISTS)}
    for index in range(batch.num_rows):
        yield _example(
            {name: values[index] for name, values in plain.items()},
            {name: values[index] for name, values in lists.items()},
        )


def _lists(example: Example) -> dict[str, Sequence[Any]]:
    slots = [*example.labels, *chain.from_iterable(branch.labels for branch in example.branches)]
    filled = [(slot, label) for slot, label in enumerate(slots) if label is not None]
    labels = [label for _, label in filled]
    normalisers = (label.sampling_logsumexp for label in labels)
    return {
        "prompt_token_ids": example.prompt_token_ids,
        "output_token_ids": example.output_token_ids,
        "branch_starts": [branch.start for branch in example.branches],
        "branch_lengths": [len(branch.token_ids) for branch in example.branches],
        "branch_token_ids": list(chain.from_iterable(branch.token_ids for branch in example.branches)),
        "label_slots": [slot for slot, _ in filled],
        "label_counts": [len(label.ids) for label in labels],
        "label_ids": list(chain.from_iterable(label.ids for label in labels)),
        "label_logits": list(chain.from_iterable(label.logits for label in labels)),
        "label_logsumexp": [label.logsumexp for label in labels],
        "label_sampling_logsumexp": [np.nan if value is None else value for value in normalisers],
    }


def _example(plain: dict[str, Any], lists: dict[str, np.ndarray[Any, Any]]) -> Example:
    outputs = tuple(lists["output_token_ids"].tolist())
    lengths = lists["branch_lengths"].tolist()
    slots: list[Label | None] = [None] * (len(outputs) + sum(lengths))
    for slot, label in zip(lists["label_slots"].tolist(), _labels(lists), strict=True):
        slots[slot] = label
    tokens = lists["branch_token_ids"].tolist()
    branches = []
    for start, length, end in zip(lists["branch_starts"].tolist(), lengths, accumulate(lengths), strict=True):
        own = slots[len(outputs) + end - length : len(outputs) + end]
        branches.append(Branch(start, tuple(tokens[end - length : end]), tuple(own)))
    return Example(
        request_id=plain["request_id"],
        sample_index=plain["sample_index"],
        domain=plain["domain"],
        created_unix_s=plain["created_unix_s"],
        prompt_token_ids=tuple(lists["prompt_token_ids"].tolist()),
        output_token_ids=outputs,
        params=_params_from_json(plain["sampling"]),
        labels=tuple(slots[: len(outputs)]),
        branches=tuple(branches),
        tenant=plain["tenant"],
    )


def _labels(lists: dict[str, np.ndarray[Any, Any]]) -> Iterator[Label]:
    ids, logits = array("i", lists["label_ids"].tobytes()), array("f", lists["label_logits"].tobytes())
    counts = lists["label_counts"].tolist()
    totals = lists["label_logsumexp"].tolist()
    sampling_totals = lists["label_sampling_logsumexp"].tolist()
    for count, end, total, own in zip(counts, accumulate(counts), totals, sampling_totals, strict=True):
        normaliser = None if own != own else own  # NaN
        yield Label(ids[end - count : end], logits[end - count : end], total, normaliser)


def _list_column(rows: Sequence[Sequence[Any]], kind: Any) -> pa.Array:
    offsets = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.fromiter(chain.from_iterable(rows), kind, count=int(offsets[-1]))
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))


def _rows_of(column: pa.ListArray) -> list[np.ndarray[Any, Any]]:
    offsets = column.offsets.to_numpy()
    values = column.values.to_numpy(zero_copy_only=False)
    return [values[start:end] for start, end in pairwise(offsets)]


def _params_to_json(params: SamplingParams) -> str:
    values = asdict(params)
    values["coupling"] = None if params.coupling is None else params.coupling.value
    return json.dumps(values)


def _params_from_json(text: str) -> SamplingParams:
    values = json.loads(text)
    values["logit_bias"] = tuple((int(token), float(bias)) for token, bias in values["logit_bias"])
    values["coupling"] = None if values["coupling"] is None else Coupling(values["coupling"])
    return SamplingParams(**values)
