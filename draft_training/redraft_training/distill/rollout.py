"""On-policy data: text that the draft itself writes behind logged prompts, to be labelled by the target.

A share of the training batches (the objective's `on_policy_fraction`) is replaced by rollouts of their own prompts,
drawn from the draft as it is at that step. Which batches, and every draw, follow from (seed, epoch, batch index):
a resumed run writes the same text.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from redraft.models.heads import output_head, set_output_head
from redraft.models.runner import ModelRunner
from redraft.sampling.params import SamplingParams
from redraft.sampling.processors import probabilities
from redraft.sampling.randomness import mix64
from redraft_training.dataset.batch import Batch
from redraft_training.dataset.example import Example
from redraft_training.dataset.generate import generate, mixed_runner
from redraft_training.dataset.packing import PackSettings, build_batch, pack_rows, pieces
from redraft_training.objectives.objective import Objective
from redraft_training.objectives.policy_gradient import RolloutTargets
from redraft_training.objectives.supervision import supervision
from redraft_training.objectives.targets import Targets, Teacher
from redraft_training.student.packed_forward import SelectiveHead
from redraft_training.student.student import Student

_BLOCK_SIZE = 16
_MAX_RUNNING = 16


class StudentRollouts:
    """Writes and labels rollouts.

    Args:
        student: whose model is a transformers model, on one process or under DDP.
        teacher: labels any text: the target run again, with dense probabilities (`RerunTeacher`, `top_n` None) if the
            objective is policy_gradient.
        vocab_size: of the target.
        end_token_ids: a rollout ends behind one of them.
        max_new_tokens: longest rollout; none is longer than the logged output that it replaces.
        pack: row size of the batches.
        teacher_runner: a copy of the target that generates, for policy_gradient with teacher mixing; KV blocks of 16.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        objective: Objective,
        *,
        vocab_size: int,
        end_token_ids: tuple[int, ...],
        max_new_tokens: int,
        pack: PackSettings,
        seed: int,
        teacher_runner: ModelRunner | None = None,
    ) -> None:
        self.teacher = teacher
        self._student, self._objective, self._pack, self._seed = student, objective, pack, seed
        self._vocab_size, self._ends, self._max_new_tokens = vocab_size, end_token_ids, max_new_tokens
        self._teacher_runner = teacher_runner

    @property
    def mixing(self) -> float:
        """Share of the teacher in what rollout tokens are drawn from."""
        mixes = self._objective.how == "policy_gradient" and self._teacher_runner is not None
        return self._objective.teacher_mixing if mixes else 0.0

    def replaces(self, epoch: int, index: int) -> bool:
        """Whether batch `index` of an epoch is replaced by rollouts."""
        return self._key(epoch, index) % 2**32 < self._objective.on_policy_fraction * 2**32

    def batch(self, batch: Batch, epoch: int, index: int) -> Batch:
        """A batch of rollouts of the prompts in `batch`; itself if none of its examples has a prompt."""
        examples = self.examples(batch, epoch, index)
        if not examples:
            return batch
        cut = [piece for number, example in enumerate(examples) for piece in pieces(number, example, self._pack)]
        return build_batch(examples, pack_rows(cut, self._pack.row_tokens))

    def examples(self, batch: Batch, epoch: int, index: int) -> tuple[Example, ...]:
        """The rollouts: examples whose output the student wrote, at the request's own sampling parameters (or, where
        the objective has one, at its temperature), without labels."""
        logged = [example for example in batch.examples if example.prompt_token_ids and example.output_token_ids]
        if not logged:
            return ()
        limit = min(self._max_new_tokens, max(len(example.output_token_ids) for example in logged))
        written = generate(
            self._runner(logged, limit),
            [example.prompt_token_ids for example in logged],
            [self._params(example) for example in logged],
            max_new_tokens=limit,
            end_token_ids=self._ends,
            seed=self._key(epoch, index) >> 1,
            max_running=_MAX_RUNNING,
        )
        texts = [made.token_ids[: len(example.output_token_ids)] for made, example in zip(written, logged, strict=True)]
        return tuple(
            replace(example, output_token_ids=text, labels=(None,) * len(text), branches=())
            for example, text in zip(logged, texts, strict=True)
            if text
        )

    @torch.no_grad()
    def targets(self, batch: Batch) -> Targets | RolloutTargets:
        """The teacher's labels of a batch of rollouts; call it before the student has changed."""
        targets = supervision(self.teacher, batch, self._objective)
        if self._objective.how != "policy_gradient":
            return targets
        return RolloutTargets.from_dense(targets, batch, self._behaviour_log_probs(batch, targets))

    def _behaviour_log_probs(self, batch: Batch, targets: Targets) -> Tensor:
        """[n] log-probability with which each token of the rollouts was drawn: of the mixture of both raw
        distributions, after the sampling parameters, as `mixed_runner` draws. `targets`: of the objective, dense."""
        output = self._student(batch)
        mixed = output.logits
        if output.vocab_ids is not None:
            full = mixed.new_full((len(mixed), output.vocab_size), -torch.inf)
            mixed = full.index_copy_(1, output.vocab_ids, mixed)
        mixed = mixed[:, : self._vocab_size].log_softmax(dim=1)
        if self.mixing:
            raw = targets if self._objective.temperature == 1.0 else self.teacher.targets(batch, temperature=1.0)
            p = raw.probs.to(mixed.device)
            mixed = (self.mixing * p + (1.0 - self.mixing) * mixed.exp()).log()
        rows = [replace(row, params=self._sampling(row.params)) for row in batch.sampling_rows]
        drawn = batch.next_ids.clamp(min=0).to(mixed.device).unsqueeze(1)
        return probabilities(mixed, rows).gather(1, drawn).squeeze(1).clamp(min=1e-30).log()

    def _params(self, example: Example) -> SamplingParams:
        return self._sampling(example.params)

    def _sampling(self, params: SamplingParams) -> SamplingParams:
        fixed = self._objective.temperature
        return params if fixed is None else SamplingParams(temperature=fixed)

    def _runner(self, examples: list[Example], max_new_tokens: int) -> ModelRunner:
        """The student as it is now, with enough KV memory, mixed with the teacher where that is wanted."""
        longest = max(len(example.prompt_token_ids) for example in examples) + max_new_tokens
        num_blocks = -(-longest // _BLOCK_SIZE) * min(len(examples), _MAX_RUNNING)
        runner = ModelRunner(
            _frozen_copy(self._student.model),
            num_blocks=num_blocks,
            block_size=_BLOCK_SIZE,
            vocab_size=self._vocab_size,
            output_ids=self._student.vocab_ids,
        )
        return (
            mixed_runner(self._teacher_runner, runner, self.mixing) if self.mixing and self._teacher_runner else runner
        )

    def _key(self, epoch: int, index: int) -> int:
        return mix64(mix64(mix64(self._seed) + epoch) + index)


def _frozen_copy(model: torch.nn.Module) -> PreTrainedModel:
    """A copy of a draft in training that a runner may take over. What does not train is shared, not copied."""
    assert isinstance(model, PreTrainedModel)
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    made = copy.deepcopy(model, shared)
    head = output_head(made)
    if isinstance(head, SelectiveHead):
        set_output_head(made, head.linear)
    return torch.nn.Module.eval(made).requires_grad_(False)
