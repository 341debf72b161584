"""What a request may ask of sampling, validated once and immutable afterwards."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum

MAX_LOGIT_BIAS = 100.0
MAX_LOGIT_BIAS_ENTRIES = 1024


class Coupling(Enum):
    """How a draft token and the target's distribution are tied together at verification (docs/lossless.md)."""

    MAXIMAL = "maximal"
    DRAFTER_INVARIANT = "drafter_invariant"


class InvalidParameter(ValueError):
    """A parameter outside its range. `field` is the dotted path a caller would recognise."""

    def __init__(self, field: str, description: str) -> None:
        super().__init__(f"{field}: {description}")
        self.field = field
        self.description = description


def _require(condition: bool, name: str, description: str) -> None:
    if not condition:
        raise InvalidParameter(f"sampling.{name}", description)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters that turn logits into the distribution a token is drawn from.

    Temperature 0 is the one-hot distribution at the arg max: greedy is a case of sampling here, not another path.
    The order of operations is fixed and stated in `redraft.sampling.processors`.

    Raises:
        InvalidParameter: on construction, naming the field.
    """

    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # nucleus mass in (0, 1]
    min_p: float = 0.0  # relative to the most probable token, in [0, 1]
    repetition_penalty: float = 1.0  # > 0; applied to ids of prompt and output
    presence_penalty: float = 0.0  # [-2, 2]; output ids only
    frequency_penalty: float = 0.0  # [-2, 2]; output ids only, times their count
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None  # unsigned 64 bit
    coupling: Coupling | None = None  # None: drafter-invariant if a seed is given, else maximal

    def __post_init__(self) -> None:
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            _require(math.isfinite(getattr(self, name)), name, "must be a finite number")
        _require(0.0 <= self.temperature <= 100.0, "temperature", "must be between 0 and 100")
        _require(self.top_k >= 0, "top_k", "must be 0 (off) or positive")
        _require(0.0 < self.top_p <= 1.0, "top_p", "must be above 0 and at most 1")
        _require(0.0 <= self.min_p <= 1.0, "min_p", "must be between 0 and 1")
        _require(0.0 < self.repetition_penalty <= 100.0, "repetition_penalty", "must be above 0 and at most 100")
        for name in ("presence_penalty", "frequency_penalty"):
            _require(-2.0 <= getattr(self, name) <= 2.0, name, "must be between -2 and 2")
        _require(
            len(self.logit_bias) <= MAX_LOGIT_BIAS_ENTRIES,
            "logit_bias",
            f"at most {MAX_LOGIT_BIAS_ENTRIES} entries",
        )
        for token_id, bias in self.logit_bias:
            _require(token_id >= 0, "logit_bias", "token ids must not be negative")
            _require(
                math.isfinite(bias) and abs(bias) <= MAX_LOGIT_BIAS,
                f"logit_bias[{token_id}]",
                f"must be between -{MAX_LOGIT_BIAS:g} and {MAX_LOGIT_BIAS:g}",
            )
        _require(self.seed is None or 0 <= self.seed < 2**64, "seed", "must fit an unsigned 64-bit integer")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0

    @property
    def effective_coupling(self) -> Coupling:
        if self.coupling is not None:
            return self.coupling
        return Coupling.MAXIMAL if self.seed is None else Coupling.DRAFTER_INVARIANT


@dataclass(frozen=True, slots=True)
class StoppingParams:
    """When a completion ends.

    Raises:
        InvalidParameter: on construction, naming the field.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    stop_sequences: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    include_stop_sequence: bool = False
    ignore_eos: bool = False

    MAX_STOP_SEQUENCES = 16
    MAX_STOP_SEQUENCE_CHARS = 256
    MAX_STOP_TOKEN_IDS = 256

    def __post_init__(self) -> None:
        def require(condition: bool, name: str, description: str) -> None:
            if not condition:
                raise InvalidParameter(f"stopping.{name}", description)

        require(self.max_new_tokens >= 1, "max_new_tokens", "must be at least 1")
        require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            "must be between 0 and max_new_tokens",
        )
        require(
            len(self.stop_sequences) <= self.MAX_STOP_SEQUENCES,
            "stop_sequences",
            f"at most {self.MAX_STOP_SEQUENCES} sequences",
        )
        for index, text in enumerate(self.stop_sequences):
            require(
                0 < len(text) <= self.MAX_STOP_SEQUENCE_CHARS,
                f"stop_sequences[{index}]",
                f"must have 1 to {self.MAX_STOP_SEQUENCE_CHARS} characters",
            )
        require(
            len(self.stop_token_ids) <= self.MAX_STOP_TOKEN_IDS,
            "stop_token_ids",
            f"at most {self.MAX_STOP_TOKEN_IDS} ids",
        )
