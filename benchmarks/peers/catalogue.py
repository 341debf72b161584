"""Which engines are measured, in which modes, and what each needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

PLAIN = "plain"
REDRAFT = "redraft"


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to run an engine.

    Attributes:
        name: in the results.
        kind: what its worker calls it: plain, draft, ngram, ngram+draft.
        weights: of the target, as `Checkpoints` names them.
        batches: whether it can run several streams together.
        options: for its worker.
    """

    name: str
    kind: str
    weights: str = "f32"
    batches: bool = True
    options: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Peer:
    """An engine. `environment` is its folder in `build/peers`, None for the project's own."""

    name: str
    worker: str
    environment: str | None
    modes: tuple[Mode, ...]

    def mode(self, name: str) -> Mode:
        """Raises StopIteration if there is none of this name."""
        return next(mode for mode in self.modes if mode.name == name)


_INT4 = {"flags": ("--model.weights", "int4")}  # of the demo target the same function, bit for bit

PEERS = (
    Peer(
        REDRAFT,
        "redraft_worker",
        None,
        (
            Mode(PLAIN, "plain"),
            Mode("draft", "draft"),
            Mode("ngram", "ngram"),
            Mode("ngram+draft", "ngram+draft"),
            Mode("int4 plain", "plain", options=_INT4),
            Mode("int4 draft", "draft", options=_INT4),
            Mode("int4 ngram+draft", "ngram+draft", options=_INT4),
        ),
    ),
    Peer(
        "llama.cpp",
        "llamacpp_worker",
        "llamacpp",
        (
            Mode("f32 plain", "plain"),
            Mode("f32 draft", "draft"),
            Mode("f32 ngram", "ngram"),
            Mode("q8_0 plain", "plain", "q8_0"),
            Mode("q8_0 draft", "draft", "q8_0"),
            Mode("q4_1 plain", "plain", "q4_1"),
            Mode("q4_1 draft", "draft", "q4_1"),
        ),
    ),
    Peer(
        "openvino",
        "openvino_worker",
        "openvino",
        (Mode(PLAIN, "plain"), Mode("draft", "draft"), Mode("prompt lookup", "ngram")),
    ),
    Peer(
        "vllm",
        "vllm_worker",
        "vllm",
        (Mode(PLAIN, "plain"), Mode("draft", "draft"), Mode("ngram", "ngram")),
    ),
    Peer(
        "transformers",
        "transformers_worker",
        "transformers",
        (
            Mode(PLAIN, "plain"),
            Mode("assisted", "draft", batches=False),
            Mode("prompt lookup", "ngram", batches=False),
        ),
    ),
)
