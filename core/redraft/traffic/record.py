"""One served sequence as the traffic log keeps it. Plain values only: no tensors, no text.

Token ids are not anonymous, they decode to text: whoever may read the log may read the traffic.

**Positions.** Output tokens are counted from 0, the prompt is not counted. A verify step with start `s`,
drafted tokens `d[0..k)` and `a` accepted ones predicts the output positions `s .. s+k`: the prefix of
position `s+j` is the prompt, the output up to `s`, and `d[:j]`. For `j <= a` those drafted tokens *are* the
output text; for `j > a` the prefix leaves it, because it holds a rejected token. A teacher position therefore
names the drafted tokens that lie between the text and itself (`context_drafted`), and

    prefix = prompt + output[: output_index - len(context_drafted)] + context_drafted

holds for every position, accepted or rejected (`TrafficRecord.prefix_of`).

Worked example: output so far `[7, 8]`, drafted `[9, 4, 5]`, one accepted, 3 recovered: output `[7, 8, 9, 3]`.
The step is `start=2, drafted=(9, 4, 5), num_accepted=1`, and its four teacher positions are

    output_index  context_drafted  prefix after the prompt
    2             ()               7 8
    3             ()               7 8 9
    4             (4,)             7 8 9 4       rejected path
    5             (4, 5)           7 8 9 4 5     rejected path
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = 1
"""Raised when a field changes its meaning or goes. A new optional column does not raise it: readers ignore
columns that they do not know."""

SCHEMA_VERSION_KEY = b"redraft.traffic.schema_version"
"""Key of the version in a shard's Parquet metadata: a reader decides before it touches a row."""


@dataclass(frozen=True, slots=True)
class SamplingRecord:
    """The request's own sampling parameters: acceptance is only meaningful at these."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    """Signed 64-bit; None if the request gave none."""
    coupling: str
    """`maximal` or `drafter_invariant`."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs (token id, bias)."""


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One verify step that had a draft. Steps without one are not listed: their token is in the output."""

    start: int
    """Output position that the first drafted token was meant for."""
    drafted_token_ids: tuple[int, ...]
    num_accepted: int
    """As verified: a stop sequence may have cut accepted tokens off the output."""
    proposer: str
    """`draft_model` or `ngram`."""
    draft_version: str

    def context_of(self, offset: int, num_output_tokens: int) -> tuple[int, ...]:
        """`context_drafted` of teacher position `start + offset`, `0 <= offset <= len(drafted_token_ids)`.

        `num_output_tokens` is the final length of the output: if a stop cut off accepted tokens, those are no
        text any more and belong to the context.
        """
        on_path = min(offset, self.num_accepted, max(num_output_tokens - self.start, 0))
        return self.drafted_token_ids[on_path:offset]


@dataclass(frozen=True, slots=True)
class TeacherPosition:
    """The target's raw logits at one verified position: the n largest, and what the rest adds up to.

    Raw: before temperature, penalties and every other processor. `exp(logits - logsumexp)` are probabilities
    under the whole vocabulary, so `1 - sum` of them is the exact mass of the tail that is not kept.
    """

    output_index: int
    """Position of the token being predicted, counted in output tokens."""
    context_drafted: tuple[int, ...]
    """Drafted tokens between the text and this position; empty on the accepted path."""
    ids: tuple[int, ...]
    """Token ids, largest logit first."""
    logits: tuple[float, ...]
    """float32, one per id."""
    logsumexp: float
    """float32, over the whole vocabulary."""
    sampling_logsumexp: float | None = None
    """The same after the request's penalties, bias, bans and temperature, before top-k, top-p and min-p: gives the
    kept ids their exact probabilities at the request's own parameters. None at temperature 0."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds. NaN never; a stage that was not reached is 0."""

    queue_s: float
    ttft_s: float
    """Arrival to first token."""
    decode_s: float
    """First to last token."""


@dataclass(frozen=True, slots=True)
class TrafficRecord:
    """One sequence: a request with n samples makes n records, told apart by `sample_index`.

    Raises ValueError from the constructor when the parts contradict each other, so that no reader need check.
    """

    request_id: str
    sample_index: int
    created_unix_s: float
    """When the sequence finished, Unix time."""
    tenant: str
    """Who sent it, as the operator chose to name or hash them; empty if not known."""
    model: str
    target_fingerprint: str
    """Of the target's weights: teacher logits are of use only for this target."""
    tokenizer_fingerprint: str
    """Of the vocabulary that all ids refer to."""
    draft_version: str
    """Of the last step that had a draft; empty if none had. Each step carries its own."""
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    finish_reason: str
    sampling: SamplingRecord
    timings: Timings
    steps: tuple[StepRecord, ...] = ()
    teacher: tuple[TeacherPosition, ...] = ()
    """Every verified position whose logits were captured; empty when capture was off."""
    domain: str = ""
    """What kind of traffic this is, in the application's own words (`sql`, `support`); empty if it did not say."""
    cached_prompt_tokens: int = 0
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        num_output = len(self.output_token_ids)
        for step in self.steps:
            if not (0 <= step.start <= num_output and 0 <= step.num_accepted <= len(step.drafted_token_ids)):
                raise ValueError("step outside the output, or more tokens accepted than drafted")
        for position in self.teacher:
            if len(position.ids) != len(position.logits):
                raise ValueError("teacher position with unequal numbers of ids and logits")
            if not 0 <= position.output_index - len(position.context_drafted) <= num_output:
                raise ValueError("teacher position whose prefix is not in the record")

    def prefix_of(self, position: TeacherPosition) -> tuple[int, ...]:
        """All tokens before a teacher position, the prompt first."""
        num_kept = position.output_index - len(position.context_drafted)
        return (*self.prompt_token_ids, *self.output_token_ids[:num_kept], *position.context_drafted)

    def memory_bytes(self) -> int:
        """About what the record occupies, at 36 bytes (pointer and object) for each number in a tuple."""
        numbers = len(self.prompt_token_ids) + len(self.output_token_ids) + 2 * len(self.sampling.logit_bias)
        numbers += sum(len(step.drafted_token_ids) + 6 for step in self.steps)
        numbers += sum(2 * len(position.ids) + len(position.context_drafted) + 6 for position in self.teacher)
        return 1024 + 36 * numbers

    def to_row(self) -> dict[str, Any]:
        """As a row of `ARROW_SCHEMA`."""
        # Not dataclasses.asdict, which deep-copies every number of the teacher.
        row = {name: getattr(self, name) for name in _PLAIN_FIELDS}
        row["prompt_token_ids"] = self.prompt_token_ids
        row["output_token_ids"] = self.output_token_ids
        row["sampling"] = _shallow(self.sampling)
        row["sampling"]["logit_bias"] = [{"id": i, "bias": bias} for i, bias in self.sampling.logit_bias]
        row["timings"] = _shallow(self.timings)
        row["steps"] = [_shallow(step) for step in self.steps]
        row["teacher"] = [_shallow(position) for position in self.teacher]
        return row

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> TrafficRecord:
        """From a row that holds at least the columns of `ARROW_SCHEMA`; further ones are ignored.

        Raises ValueError, KeyError or TypeError when the row does not make a record.
        """
        return cls(
            **{name: row[name] for name in _PLAIN_FIELDS},
            prompt_token_ids=tuple(row["prompt_token_ids"]),
            output_token_ids=tuple(row["output_token_ids"]),
            sampling=_sampling(row["sampling"]),
            timings=Timings(**_known(row["timings"], Timings)),
            steps=tuple(_step(step) for step in row["steps"]),
            teacher=tuple(_teacher_position(position) for position in row["teacher"]),
        )


_PLAIN_FIELDS = (
    *("request_id", "sample_index", "created_unix_s", "tenant", "model", "target_fingerprint"),
    *("tokenizer_fingerprint", "draft_version", "finish_reason", "cached_prompt_tokens", "schema_version"),
    "domain",
)


def _shallow(part: Any) -> dict[str, Any]:
    return {name: getattr(part, name) for name in part.__dataclass_fields__}


def _known(row: Mapping[str, Any], kind: type[Any]) -> dict[str, Any]:
    return {name: row[name] for name in kind.__dataclass_fields__}


def _sampling(row: Mapping[str, Any]) -> SamplingRecord:
    values = _known(row, SamplingRecord)
    values["logit_bias"] = tuple((pair["id"], pair["bias"]) for pair in row["logit_bias"])
    return SamplingRecord(**values)


def _step(row: Mapping[str, Any]) -> StepRecord:
    values = _known(row, StepRecord)
    values["drafted_token_ids"] = tuple(row["drafted_token_ids"])
    return StepRecord(**values)


def _teacher_position(row: Mapping[str, Any]) -> TeacherPosition:
    values = _known(row, TeacherPosition)
    for name in ("context_drafted", "ids", "logits"):
        values[name] = tuple(row[name])
    return TeacherPosition(**values)


def _field(name: str, kind: pa.DataType, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable)


def _list(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.field("element", kind, nullable=False))


ARROW_SCHEMA = pa.schema(
    [
        _field("schema_version", pa.int32()),
        _field("request_id", pa.string()),
        _field("sample_index", pa.int32()),
        _field("created_unix_s", pa.float64()),
        _field("tenant", pa.string()),
        _field("domain", pa.string()),
        _field("model", pa.string()),
        _field("target_fingerprint", pa.string()),
        _field("tokenizer_fingerprint", pa.string()),
        _field("draft_version", pa.string()),
        _field("prompt_token_ids", _list(pa.int32())),
        _field("output_token_ids", _list(pa.int32())),
        _field("finish_reason", pa.string()),
        _field(
            "sampling",
            pa.struct(
                [
                    _field("temperature", pa.float64()),
                    _field("top_k", pa.int32()),
                    _field("top_p", pa.float64()),
                    _field("min_p", pa.float64()),
                    _field("repetition_penalty", pa.float64()),
                    _field("presence_penalty", pa.float64()),
                    _field("frequency_penalty", pa.float64()),
                    _field("seed", pa.int64(), nullable=True),
                    _field("coupling", pa.string()),
                    _field(
                        "logit_bias",
                        _list(pa.struct([_field("id", pa.int32()), _field("bias", pa.float64())])),
                    ),
                ]
            ),
        ),
        _field(
            "steps",
            _list(
                pa.struct(
                    [
                        _field("start", pa.int32()),
                        _field("drafted_token_ids", _list(pa.int32())),
                        _field("num_accepted", pa.int32()),
                        _field("proposer", pa.string()),
                        _field("draft_version", pa.string()),
                    ]
                )
            ),
        ),
        _field(
            "teacher",
            _list(
                pa.struct(
                    [
                        _field("output_index", pa.int32()),
                        _field("context_drafted", _list(pa.int32())),
                        _field("ids", _list(pa.int32())),
                        _field("logits", _list(pa.float32())),
                        _field("logsumexp", pa.float32()),
                        _field("sampling_logsumexp", pa.float32(), nullable=True),
                    ]
                )
            ),
        ),
        _field(
            "timings",
            pa.struct(
                [
                    _field("queue_s", pa.float64()),
                    _field("ttft_s", pa.float64()),
                    _field("decode_s", pa.float64()),
                ]
            ),
        ),
        _field("cached_prompt_tokens", pa.int32()),
    ],
    metadata={SCHEMA_VERSION_KEY: str(SCHEMA_VERSION).encode()},
)
"""A shard's columns: the fields of the dataclasses above, by the same names."""
