"""Held-out examples for tests: texts that a tiny target wrote, with the labels that serving would have captured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from redraft.sampling.coupling import draw
from redraft.sampling.logprobs import teacher_rows
from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import SamplingRow, probabilities
from redraft_training.dataset.example import Example, Label
from redraft_training.evaluate.scores import DraftScores, ExampleScore
from tests.reference_decoding import plain_logits

VOCAB = 32
PROMPTS = [[3, 4, 5, 6, 7], [9, 8], [10, 11, 12, 10, 11, 12, 10], [4, 9, 4, 9, 4], [20, 21]]
NUM_TOKENS = 12


def example(
    target: PreTrainedModel,
    prompt: Sequence[int],
    params: SamplingParams,
    *,
    request_id: str = "r",
    domain: str = "sql",
    top_n: int = VOCAB,
    num_tokens: int = NUM_TOKENS,
    labelled: bool = True,
) -> Example:
    """A text of the target at the given parameters, deterministic, with `top_n` captured logits a position."""
    generator = torch.Generator().manual_seed(len(request_id) + sum(map(ord, request_id)))
    output: list[int] = []
    labels: list[Label | None] = []
    for _ in range(num_tokens):
        logits = plain_logits(target, [*prompt, *output])[-1:]
        row = SamplingRow(params, tuple(prompt), tuple(output))
        (kept,) = teacher_rows(logits, top_n, [row])
        label = Label(kept.ids, kept.logits, kept.logsumexp, kept.sampling_logsumexp)
        labels.append(label if labelled else None)
        uniform = torch.rand(1, generator=generator, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
        output.append(int(draw(probabilities(logits, [row]), uniform)))
    return Example(request_id, 0, domain, 0.0, tuple(prompt), tuple(output), params, tuple(labels))


def examples(target: PreTrainedModel, params: Sequence[SamplingParams], *, top_n: int = VOCAB) -> list[Example]:
    """One per prompt, alternating between the domains `sql` and `chat`."""
    return [
        example(
            target,
            prompt,
            params[index % len(params)],
            request_id=f"r{index}",
            domain=("sql", "chat")[index % 2],
            top_n=top_n,
        )
        for index, prompt in enumerate(PROMPTS)
    ]


def scored(request_id: str, alpha: Sequence[float], *, domain: str = "sql", sample_index: int = 0) -> ExampleScore:
    return ExampleScore(request_id, sample_index, domain, "greedy", np.array(alpha, dtype=np.float64))


def draft_scores(version: str, *parts: ExampleScore) -> DraftScores:
    return DraftScores(version, parts)
