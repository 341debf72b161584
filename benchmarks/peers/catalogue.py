"""Which engines are measured, in which modes, and what each needs."""

from __future__ import annotations

from dataclasses import dataclass

PLAIN = "plain"
FLOAT = "f32"
REDRAFT = "redraft"


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to run an engine.

    Attributes:
        name: in the results.
        kind: what its worker calls it: plain, draft, ngram, ngram+draft.
        weights: of the target, as `Checkpoints` or the engine itself names them; f32 is what engines are compared in.
        batches: whether it can run several streams together.
    """

    name: str
    kind: str
    weights: str = FLOAT
    batches: bool = True


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
            # of the demo target the same weights
            Mode("int4 plain", "plain", "int4"),
            Mode("int4 draft", "draft", "int4"),
            Mode("int4 ngram+draft", "ngram+draft", "int4"),
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
