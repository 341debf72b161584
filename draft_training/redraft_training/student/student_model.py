"""`HFStudent`: a transformers checkpoint as a draft in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from redraft.errors import UnsupportedModel
from redraft.files import atomic_directory
from redraft.models.cache import Progress, stderr_progress
from redraft.models.checkpoint_files import copy_tokenizer
from redraft.models.draft_vocab import DraftVocab
from redraft.models.heads import embedding, output_head, set_output_head, share_embedding, sliced_head
from redraft.models.loader import LoadedModel, load_model
from redraft.models.quantised import DraftQuant, layer_linears
from redraft.models.ref import ModelRef
from redraft_training.dataset.batch import Batch
from redraft_training.student.checkpoint import parameters, read_provenance, write_provenance
from redraft_training.student.packed_forward import packed_forward, prepare
from redraft_training.student.quantise import fake_quantise, fake_quantise_layers
from redraft_training.student.student import StudentOutput


class HFStudent:
    """A draft whose layers and final norm are trained; embedding and head are the target's and stay as they are.

    With `quantise` the layers are rounded to int8 as they run, and learn in spite of it; so is a reduced head.
    Training is in float32 (or under autocast); a checkpoint is written in the dtype it was read in. The head computes
    only the batch's positions and, with a reduced output vocabulary, only that vocabulary's rows.

    Attributes:
        model: what to train; a data-parallel wrapper may be put in its place.
        vocab_ids: [width] int64 of the reduced output vocabulary, or None.
        provenance: goes into `draft_config.json`; add to it before `save`.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        vocab: DraftVocab | None = None,
        save_dtype: torch.dtype | None = None,
        quantise: bool = False,
    ) -> None:
        """Take over `loaded`, a model in the dtype it is to be trained in.

        `vocab` None: the whole vocabulary. `save_dtype` None: the dtype it has; a quantised draft is always saved
        in float32, the only one of the dtypes in which its grid survives. Raises `ModelError` for ids that the
        model does not have, `UnsupportedModel` for a model without a linear head.
        """
        self._loaded = loaded
        self._unwrapped: PreTrainedModel = loaded.model
        self.model: nn.Module = loaded.model
        head = output_head(loaded.model)
        if type(head) is not nn.Linear:
            raise UnsupportedModel(f"{loaded.name} ({loaded.config.model_type}) has no linear output head to train on")
        self._full_head = head
        self._save_dtype = torch.float32 if quantise else save_dtype or loaded.dtype
        self._quantised = quantise
        self._vocab = vocab
        self.vocab_ids: Tensor | None = None
        self.provenance: dict[str, Any] = read_provenance(loaded.directory)
        _freeze_ends(loaded.model)
        reduced: nn.Linear | None = None
        if vocab is not None:
            vocab.check(loaded.config.vocab_size)
            self.vocab_ids = vocab.tensor(loaded.device)
            reduced = sliced_head(self._full_head, self.vocab_ids)
            if quantise:
                reduced.weight.copy_(fake_quantise(reduced.weight))
        if quantise:
            fake_quantise_layers(loaded.model)
        self._head = prepare(loaded.model, reduced)

    @classmethod
    def load(
        cls,
        ref: ModelRef,
        *,
        vocab: DraftVocab | None = None,
        target: LoadedModel | None = None,
        quantise: bool | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        progress: Progress = stderr_progress,
    ) -> HFStudent:
        """Load a draft checkpoint for training.

        `vocab` None: the checkpoint's own `draft_vocab.json`, if it has one; `quantise` None: as its `draft_quant.json`
        says. `target`: a model in this process, whose
        embedding is used instead of a second copy where the two are equal. Raises whatever `load_model` raises.
        """
        loaded = load_model(ref, dtype=dtype, device=device, progress=progress)
        if target is not None:
            share_embedding(loaded.model, target.model)
        if quantise is None:
            quantise = DraftQuant.read(loaded.directory) is not None
        vocab = vocab or DraftVocab.read(loaded.directory)
        return cls(loaded, vocab=vocab, save_dtype=_stored_dtype(loaded), quantise=quantise)

    def __call__(self, batch: Batch, *, hidden_layers: tuple[int, ...] = ()) -> StudentOutput:
        """See `Student`. The last hidden state is the one after the final norm."""
        output = packed_forward(
            self.model, self._head, batch, device=self._unwrapped.device, hidden_layers=hidden_layers
        )
        return StudentOutput(output.logits, self.vocab_ids, int(self._loaded.config.vocab_size), output.hidden)

    def save(self, directory: Path) -> None:
        """Write a complete checkpoint: weights with the full embedding and head, config, tokenizer, provenance, and the
        reduced vocabulary. It appears whole or not at all. Raises `FileExistsError` if `directory` is not empty."""
        with atomic_directory(directory) as temporary:
            self._save_weights(temporary)
            copy_tokenizer(self._loaded.directory, temporary)
            provenance = {**self.provenance, "num_parameters": parameters(self._unwrapped)}
            if self._vocab is not None:
                self._vocab.write(temporary)
                provenance["draft_vocab_size"] = len(self._vocab.ids)
            if self._quantised:
                DraftQuant().write(temporary)
            write_provenance(temporary, provenance)

    @torch.no_grad()
    def _save_weights(self, directory: Path) -> None:
        model = self._unwrapped
        set_output_head(model, self._full_head)
        try:
            state = {name: self._stored(tensor) for name, tensor in model.state_dict().items()}
            if self._quantised:
                state |= {f"{name}.weight": fake_quantise(linear.weight) for name, linear in layer_linears(model)}
            for alias, kept in model.all_tied_weights_keys.items():
                state[alias] = state[kept]
            model.save_pretrained(directory, state_dict=state)
            # it named the dtype that the model has in memory
            in_memory, model.config.dtype = model.config.dtype, self._save_dtype
            model.config.save_pretrained(directory)
            model.config.dtype = in_memory
        finally:
            set_output_head(model, self._head)

    def _stored(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._save_dtype) if tensor.is_floating_point() else tensor


def _freeze_ends(model: PreTrainedModel) -> None:
    """Everything learns but the embedding and the head."""
    nn.Module.requires_grad_(model, True)
    for end in (embedding(model), output_head(model)):
        if end is not None:
            end.requires_grad_(False)


def _stored_dtype(loaded: LoadedModel) -> torch.dtype:
    """The dtype that the checkpoint's config names; the one it was loaded in if it names none."""
    config = json.loads((loaded.directory / "config.json").read_text(encoding="utf-8"))
    found = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
    return found if isinstance(found, torch.dtype) else loaded.dtype
