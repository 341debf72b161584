"""The models of a retraining cycle: loaded when a stage needs them, the target only if labels must be made anew."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from redraft.errors import ModelError
from redraft.models.draft import load_draft
from redraft.models.draft_vocab import DraftVocab
from redraft.models.loader import LoadedModel, load_model, weights_fingerprint
from redraft.models.ref import ModelKind, ModelRef
from redraft.models.runner import ModelRunner
from redraft.models.source import resolve_source
from redraft.models.tokenizer import check_compatible, load_tokenizer
from redraft_training.dataset.packing import PackSettings
from redraft_training.dataset.read import Dataset
from redraft_training.dataset.select import TargetIdentity
from redraft_training.dataset.teachers import CapturedTeacher, NoTeacher, RerunTeacher
from redraft_training.distill.rollout import StudentRollouts
from redraft_training.objectives.targets import Teacher
from redraft_training.settings import CycleSettings
from redraft_training.student.checkpoint import DRAFT_CONFIG, read_provenance
from redraft_training.student.importance import Importance
from redraft_training.student.prune import DraftShape, init_draft
from redraft_training.student.student_model import HFStudent
from redraft_training.student.vocabulary import draft_vocabulary

_RERUN_TOP_N = 64
_MAX_ROLLOUT_TOKENS = 128
_KV_BLOCK, _KV_BLOCKS = 16, 1024


class Models:
    """What a cycle knows of its target, and the drafts it makes from it."""

    def __init__(self, settings: CycleSettings) -> None:
        self._settings = settings
        self._target_ref = ModelRef.parse(settings.target)
        self._source = resolve_source(self._target_ref)
        self.tokenizer = load_tokenizer(self._target_ref)
        self.target_name = self._source.name
        self.identity = TargetIdentity(
            weights_fingerprint(self._source.directory), self.tokenizer.fingerprint, self.tokenizer.vocab_size
        )
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def born(self, directory: Path, dataset: Dataset) -> ModelRef:
        """The draft that the settings name, else a new one, pruned into `directory` unless it is there already."""
        if self._settings.draft is not None:
            ref = ModelRef.parse(self._settings.draft)
            check_compatible(self.tokenizer, load_tokenizer(ref))
            return ref
        if not directory.exists():
            student = self._settings.student
            shape = DraftShape(
                layers=student.layers,
                num_layers=None if student.layers is not None else student.num_layers,
                importance=Importance(student.importance),
                intermediate_size=student.intermediate_size,
                num_key_value_heads=student.num_key_value_heads,
            )
            texts = [example.token_ids for example in dataset.training]
            init_draft(self._target_ref, directory, shape=shape, calibration=texts)
        return directory_ref(directory)

    def student(self, base: ModelRef, dataset: Dataset) -> HFStudent:
        """The draft to train. Its output vocabulary is chosen anew from the traffic: the head's rows are the target's
        own and nothing is learnt in them, so a change costs nothing and lets a draft follow new words."""
        size = self._settings.student.vocab_size
        vocab = None
        if size is not None and size < self.identity.vocab_size:
            vocab = draft_vocabulary(
                dataset.training,
                size,
                vocab_size=self.identity.vocab_size,
                always=self.tokenizer.eos_token_ids | self.tokenizer.special_token_ids,
            )
        quantise = self._settings.student.quantise
        return HFStudent.load(
            base, vocab=vocab, quantise=None if quantise is None else quantise == "int8", device=self._device
        )

    def scored(self, ref: ModelRef) -> HFStudent:
        """A finished draft, to be scored."""
        return HFStudent.load(ref, device=self._device)

    def captured(self) -> CapturedTeacher:
        """Labels of the log."""
        return CapturedTeacher(self.identity.vocab_size)

    def judge(self) -> RerunTeacher | None:
        """What scores held-out positions whose captured labels are not exact; None if they are left out."""
        if self._settings.teacher == "captured":
            return None
        return RerunTeacher(self._teacher_model.model, vocab_size=self.identity.vocab_size)

    def teacher(self) -> Teacher:
        """As the settings ask; the target itself where captured labels cannot tell what the objective needs."""
        objective = self._settings.distill.objective
        if not objective.needs_teacher:
            return NoTeacher()
        flat = objective.temperature is not None and objective.temperature != 1.0
        if self._settings.teacher == "captured" and not flat and not objective.uses_hidden_states:
            return self.captured()
        return RerunTeacher(
            self._teacher_model.model,
            vocab_size=self.identity.vocab_size,
            top_n=_RERUN_TOP_N,
            hidden_layers=objective.target_layers,
            seed=self._settings.distill.seed,
        )

    def rollouts(self, student: HFStudent, pack: PackSettings) -> StudentRollouts | None:
        """Text of the draft's own, if the objective learns from that."""
        objective = self._settings.distill.objective
        if objective.on_policy_source != "rollout" or objective.on_policy_fraction == 0.0:
            return None
        is_policy_gradient = objective.how == "policy_gradient"
        teacher = RerunTeacher(
            self._teacher_model.model,
            vocab_size=self.identity.vocab_size,
            top_n=None if is_policy_gradient else _RERUN_TOP_N,
            hidden_layers=objective.target_layers,
        )
        return StudentRollouts(
            student,
            teacher,
            objective,
            vocab_size=self.identity.vocab_size,
            end_token_ids=tuple(sorted(self.tokenizer.eos_token_ids)),
            max_new_tokens=_MAX_ROLLOUT_TOKENS,
            pack=pack,
            seed=self._settings.distill.seed,
            teacher_runner=self.target_runner() if is_policy_gradient and objective.teacher_mixing else None,
        )

    def num_parameters(self, draft: Path) -> int:
        """As `draft_config.json` says, which every draft that was trained here has. Raises ModelError without it."""
        count = read_provenance(draft).get("num_parameters")
        if not isinstance(count, int):
            raise ModelError(f"{draft} is no draft that redraft-train has made: its {DRAFT_CONFIG} is missing")
        return count

    def draft_vocab_size(self, draft: Path) -> int | None:
        vocab = DraftVocab.read(draft)
        return None if vocab is None else len(vocab.ids)

    @cached_property
    def _teacher_model(self) -> LoadedModel:
        return self.target()

    def target(self) -> LoadedModel:
        """A copy of the target of the caller's own, to be put into a runner."""
        dtype = torch.float32 if self._device.type == "cpu" else None
        return load_model(self._target_ref, dtype=dtype, device=self._device)

    def target_runner(self) -> ModelRunner:
        """The target as the server runs it, to generate. A copy of its own, since a runner owns its model."""
        return self.runner(self.target())

    def runner(self, loaded: LoadedModel, output_ids: torch.Tensor | None = None) -> ModelRunner:
        """The target, or a draft with its `output_ids`, as the server runs it; all runners agree on their KV blocks."""
        return ModelRunner(
            loaded.model,
            num_blocks=_KV_BLOCKS,
            block_size=_KV_BLOCK,
            vocab_size=self.identity.vocab_size,
            output_ids=output_ids,
        )

    def draft_runner(self, ref: ModelRef, target: LoadedModel) -> ModelRunner:
        """A finished draft, sharing what it has in common with `target`."""
        draft = load_draft(ref, target, tokenizer=self.tokenizer)
        return self.runner(draft.loaded, draft.output_ids)


def directory_ref(directory: Path) -> ModelRef:
    return ModelRef(ModelKind.DIRECTORY, str(directory))
