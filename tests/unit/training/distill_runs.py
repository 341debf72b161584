"""A tiny target, a draft pruned from it and text that the target wrote: what a distillation run needs, in a second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from redraft.models.ref import ModelKind, ModelRef
from redraft.models.runner import ModelRunner
from redraft.sampling.params import SamplingParams
from redraft_training.dataset.example import Example
from redraft_training.dataset.generate import generate
from redraft_training.dataset.packing import BatchPlan, PackSettings
from redraft_training.dataset.teachers import RerunTeacher
from redraft_training.distill.metrics import MetricsRow
from redraft_training.distill.settings import DistillSettings
from redraft_training.distill.trainer import DistillResult, distill
from redraft_training.student.prune import prune_layers
from redraft_training.student.student_model import HFStudent
from tests.fakes import EOS_ID, save_tiny, tiny_model

VOCAB = 64
SAMPLED, GREEDY = SamplingParams(temperature=0.8, top_p=0.95), SamplingParams(temperature=0.0)
PACK = PackSettings(row_tokens=48, batch_tokens=96)


def save_draft(directory: Path) -> Path:
    """The target's first layer alone, as a checkpoint."""
    save_tiny(directory, layers=2)
    model = tiny_model("llama", layers=2)
    prune_layers(model, [0])
    model.save_pretrained(directory)
    return directory


def load_student(directory: Path, **options: Any) -> HFStudent:
    return HFStudent.load(ModelRef(ModelKind.DIRECTORY, str(directory)), progress=lambda _: None, **options)


def teacher(hidden_layers: tuple[int, ...] = ()) -> RerunTeacher:
    return RerunTeacher(tiny_model("llama", layers=2), vocab_size=VOCAB, hidden_layers=hidden_layers)


@lru_cache
def examples(count: int, *, seed: int = 0, output_tokens: int = 12) -> tuple[Example, ...]:
    """Half of them greedy; prompts and outputs of a few tokens."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [tuple(torch.randint(3, VOCAB, (3 + i % 4,), generator=generator).tolist()) for i in range(count)]
    params = [GREEDY if i % 2 else SAMPLED for i in range(count)]
    runner = ModelRunner(tiny_model("llama", layers=2), num_blocks=64, block_size=16, vocab_size=VOCAB)
    written = generate(runner, prompts, params, max_new_tokens=output_tokens, end_token_ids=(EOS_ID,), seed=seed)
    return tuple(
        Example(f"r{seed}-{i}", 0, "d", 0.0, prompts[i], made.token_ids, params[i], (None,) * len(made.token_ids))
        for i, made in enumerate(written)
    )


def plan(count: int, *, seed: int = 0) -> BatchPlan:
    return BatchPlan(examples(count, seed=seed), PACK, seed=seed)


@dataclass
class Parts:
    """The arguments of `distill`; change what a test is about."""

    student: HFStudent
    teacher: Any
    plan: Any
    heldout: Any
    settings: DistillSettings

    @classmethod
    def make(cls, draft: Path, *, train_examples: int = 30, **settings: Any) -> Parts:
        defaults: dict[str, Any] = {"epochs": 2, "learning_rate": 5e-3, "checkpoint_every_batches": 4}
        return cls(
            load_student(draft),
            teacher(),
            plan(train_examples),
            plan(12, seed=1),
            DistillSettings(**{**defaults, **settings}),
        )

    def run(
        self, output: Path, *, on_progress: Callable[[MetricsRow], None] | None = None, **options: Any
    ) -> DistillResult:
        return distill(
            self.student,
            self.teacher,
            self.plan,
            self.heldout,
            self.settings,
            output,
            on_progress=on_progress,
            **options,
        )


def parameters(student: HFStudent) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in student.model.named_parameters()}


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Bitwise."""
    assert left.keys() == right.keys()
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different
