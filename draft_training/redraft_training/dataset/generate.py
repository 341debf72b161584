"""Text from a model, many prompts at a time: the target writing prompts and answers, a draft's own rollouts.

It is the very `speculative_step` that serves, without a draft, over a queue of prompts that share the runner's KV
memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from redraft.models.block_pool import BlockPool
from redraft.models.runner import Chunk, ModelRunner
from redraft.sampling.logprobs import TeacherRow
from redraft.sampling.params import SamplingParams
from redraft.sampling.randomness import sequence_key
from redraft.speculation.state import SequenceState
from redraft.speculation.step import StepOutput, Work, speculative_step
from redraft_training.dataset.errors import DatasetError

_MAX_PREFILL_TOKENS = 1024  # prompt tokens in one step, beside the sequences that decode


@dataclass(frozen=True, slots=True)
class Generated:
    """Tokens behind one prompt. `ended`: the last is an end token, not the length limit. `labels`: the model's
    prediction of each token, if asked for. `failed`: its logits were not finite; there are tokens up to that point."""

    token_ids: tuple[int, ...]
    ended: bool
    labels: tuple[TeacherRow, ...] = ()
    failed: bool = False


def generate(
    runner: ModelRunner,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    *,
    max_new_tokens: int,
    end_token_ids: Sequence[int] = (),
    seed: int = 0,
    max_running: int = 16,
    label_top_n: int = 0,
    on_done: Callable[[int], None] | None = None,
) -> list[Generated]:
    """Continue every prompt until an end token (which is kept) or `max_new_tokens`.

    What a prompt gets depends on (prompt, its parameters, seed, its index) alone, not on its neighbours.

    Args:
        runner: of the model; its KV memory must not be in use. For a draft that is being trained, load a copy of it
            (`ModelRunner` takes a model over).
        params: one for all, or one for each prompt. A request's own seed is not looked at.
        max_running: sequences at a time, as far as they fit the runner's KV memory.
        label_top_n: keep so many of the model's largest logits at every token.
        on_done: called with the number of finished prompts whenever it grows.

    Raises DatasetError for a prompt that is empty, or too long for the KV memory.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    pool = BlockPool(runner.num_blocks, runner.block_size, prefix_cache=False)
    for prompt in prompts:
        if not prompt or pool.blocks_for(len(prompt) + max_new_tokens) > pool.num_blocks:
            raise DatasetError(
                f"a prompt of {len(prompt)} tokens cannot be continued by {max_new_tokens}: it must not be empty, and "
                f"both must fit {runner.num_blocks * runner.block_size} tokens of KV memory"
            )
    ends = frozenset(end_token_ids)
    results: dict[int, Generated] = {}
    running: dict[int, _Running] = {}
    waiting = iter(enumerate(prompts))
    following = next(waiting, None)
    while following is not None or running:
        prefill = 0
        while following is not None and len(running) < max_running:
            index, prompt = following
            prefill += len(prompt)
            if running and prefill > _MAX_PREFILL_TOKENS:
                break
            blocks = pool.allocate(pool.blocks_for(len(prompt) + max_new_tokens))
            if blocks is None:
                break
            state = SequenceState(list(prompt), len(prompt), each[index], key=sequence_key(seed, index))
            state.block_ids = blocks
            running[index] = _Running(state, [])
            following = next(waiting, None)
        work = [Work(r.state, r.state.num_pending, teacher_top_n=label_top_n) for r in running.values()]
        outputs = speculative_step(work, runner, None).outputs
        for index, output in zip(list(running), outputs, strict=True):
            finished = running[index].take(output, ends, max_new_tokens)
            if finished is not None:
                results[index] = finished
                pool.release(running.pop(index).state.block_ids)
                if on_done is not None:
                    on_done(len(results))
    return [results[index] for index in range(len(prompts))]


@dataclass(slots=True)
class _Running:
    state: SequenceState
    labels: list[TeacherRow]

    def take(self, output: StepOutput, ends: frozenset[int], max_new_tokens: int) -> Generated | None:
        """Note one step's token; the result if it was the last."""
        self.labels += output.teacher
        made = tuple(self.state.token_ids[self.state.num_prompt_tokens :])
        if output.failed:
            return Generated(made, ended=False, labels=tuple(self.labels), failed=True)
        ended = made[-1] in ends
        return Generated(made, ended, tuple(self.labels)) if ended or len(made) >= max_new_tokens else None


class _MixedRunner:
    """Two models as one, as far as a step without a draft needs a `ModelRunner`."""

    def __init__(self, first: ModelRunner, second: ModelRunner, share: float) -> None:
        self._runners = (first, second)
        self._log_shares = torch.tensor([share, 1.0 - share], device=first.device).log()
        self.vocab_size = first.vocab_size
        self.device = first.device
        self.num_blocks = min(first.num_blocks, second.num_blocks)
        self.block_size = first.block_size
        self.runs_ahead = first.runs_ahead

    def forward(self, chunks: Sequence[Chunk], drawn: Tensor | None = None) -> Tensor:
        parts = [runner.forward(chunks, drawn).log_softmax(dim=1) for runner in self._runners]
        return torch.logaddexp(parts[0] + self._log_shares[0], parts[1] + self._log_shares[1])


def mixed_runner(teacher: ModelRunner, student: ModelRunner, teacher_share: float) -> ModelRunner:
    """What `generate` takes for teacher-mixed sampling (Gu et al. 2024, MiniLLM, equation 4): every token is drawn from
    `teacher_share * p + (1 - teacher_share) * q` of the raw distributions, before the sampling parameters.

    Raises DatasetError unless both have the same vocabulary and block size, ValueError for a share outside 0 to 1.
    """
    if not 0.0 <= teacher_share <= 1.0:
        raise ValueError("teacher_share must be between 0 and 1")
    if (teacher.vocab_size, teacher.block_size) != (student.vocab_size, student.block_size):
        raise DatasetError("teacher and student runners must have the same vocabulary and KV block size")
    return cast(ModelRunner, _MixedRunner(teacher, student, teacher_share))
