"""Decoding as simple as it gets: one transformers forward over the whole sequence for every token.

No KV cache, no batch, no speculation: what redraft's step must reproduce. Also a small driver that runs
`speculative_step` until every sequence has its tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from redraft.models.runner import ModelRunner
from redraft.sampling.coupling import race
from redraft.sampling.params import Coupling, SamplingParams
from redraft.sampling.processors import SamplingRow, probabilities
from redraft.sampling.randomness import as_key_tensor, exponentials
from redraft.speculation.proposer import Proposer
from redraft.speculation.state import SequenceState
from redraft.speculation.step import StepOutput, StepResult, Work, speculative_step

BLOCK_SIZE = 4
NUM_BLOCKS = 256
MAX_TOKENS = 100


@torch.inference_mode()
def plain_logits(model: PreTrainedModel, token_ids: Sequence[int]) -> Tensor:
    """[tokens, vocab_size] float32: row i predicts the token after token_ids[: i + 1]."""
    logits: Tensor = model(input_ids=torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    return logits.float()


def plain_distribution(model: PreTrainedModel, state: SequenceState, drafted: Sequence[int] = ()) -> Tensor:
    """[vocab_size]: what the token after the state's and the drafted ones is drawn from."""
    logits = plain_logits(model, [*state.token_ids, *drafted])[-1:]
    return probabilities(logits, [state.sampling_row(drafted)])[0]


def plain_decode(
    model: PreTrainedModel,
    prompt: Sequence[int],
    params: SamplingParams,
    num_tokens: int,
    *,
    key: int = 0,
    min_new_tokens: int = 0,
    end_token_ids: tuple[int, ...] = (),
) -> list[int]:
    """Greedy or drafter-invariant decoding, written out once more without `SequenceState`."""
    assert params.is_greedy or params.effective_coupling is Coupling.DRAFTER_INVARIANT
    output: list[int] = []
    while len(output) < num_tokens:
        logits = plain_logits(model, [*prompt, *output])[-1:]
        banned = end_token_ids if len(output) < min_new_tokens else ()
        probs = probabilities(logits, [SamplingRow(params, tuple(prompt), tuple(output), banned)])
        if params.is_greedy:
            output.append(int(probs.argmax()))
        else:
            noise = exponentials(as_key_tensor([key]), torch.tensor([len(output)]), probs.shape[1])
            output.append(int(race(probs, noise)))
    return output


def make_runner(model: PreTrainedModel) -> ModelRunner:
    return ModelRunner(
        model, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, vocab_size=model.config.get_text_config().vocab_size
    )


def make_states(
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    *,
    min_new_tokens: int = 0,
    end_token_ids: tuple[int, ...] = (),
) -> list[SequenceState]:
    """States with scattered blocks for MAX_TOKENS positions each; state i has key 1000 + i."""
    free = list(range(NUM_BLOCKS))
    random.Random(7).shuffle(free)
    count = -(-MAX_TOKENS // BLOCK_SIZE)
    states = []
    for index, (prompt, own) in enumerate(zip(prompts, params, strict=True)):
        state = SequenceState(list(prompt), len(prompt), own, 1000 + index, min_new_tokens, end_token_ids)
        state.block_ids = free[index * count : (index + 1) * count]
        states.append(state)
    return states


def check_state(state: SequenceState) -> None:
    """The invariants of `SequenceState` between steps."""
    assert 0 <= state.num_computed < len(state.token_ids)
    assert 0 <= state.num_draft_computed < len(state.token_ids)


def step(
    states: Sequence[SequenceState],
    target: ModelRunner,
    proposer: Proposer | None,
    k: int,
    *,
    chunk: int = 64,
    **options: int,
) -> StepResult:
    """One step: every sequence gets at most `chunk` pending tokens and, if it emits, at most k drafted ones."""
    work = []
    for state in states:
        num_tokens = min(state.num_pending, chunk)
        emits = num_tokens == state.num_pending
        work.append(Work(state, num_tokens, k if emits else 0, **options))
    result = speculative_step(work, target, proposer)
    for state in states:
        check_state(state)
    return result


def decode_all(
    states: Sequence[SequenceState],
    target: ModelRunner,
    proposer: Proposer | None,
    k: int,
    num_tokens: int,
    *,
    chunk: int = 64,
    **options: int,
) -> list[list[StepOutput]]:
    """Step until each has `num_tokens` output tokens (more are cut off); every state's outputs, step by step."""
    outputs: list[list[StepOutput]] = [[] for _ in states]
    while unfinished := [i for i, s in enumerate(states) if s.num_output_tokens < num_tokens]:
        result = step([states[i] for i in unfinished], target, proposer, k, chunk=chunk, **options)
        for index, output in zip(unfinished, result.outputs, strict=True):
            outputs[index].append(output)
    for state in states:
        del state.token_ids[state.num_prompt_tokens + num_tokens :]
    return outputs
