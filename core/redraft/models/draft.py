"""Loading a draft for a target: checked against it, and without a second copy of what the two have in common."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from redraft.models.cache import Progress, stderr_progress
from redraft.models.draft_vocab import DraftVocab
from redraft.models.heads import output_head, reduce_head, share_embedding, share_head
from redraft.models.loader import LoadedModel, load_model
from redraft.models.packed import pack_linears_int8
from redraft.models.quantised import DraftQuant
from redraft.models.ref import ModelKind, ModelRef
from redraft.models.tokenizer import Tokenizer, check_compatible, load_tokenizer


@dataclass(frozen=True)
class LoadedDraft:
    """A draft ready for a `ModelRunner`: `ModelRunner(draft.model, output_ids=draft.output_ids, ...)`.

    Attributes:
        loaded: the draft; its head is cut to `output_ids` already.
        quant: how its weights are quantised; None: not at all. On a CPU they are kept in int8.
        output_ids: [width] int64 ids of the head's columns, ascending; None: column v is id v.
        shares_embedding: whether its embedding is the target's own tensor.
    """

    loaded: LoadedModel
    output_ids: Tensor | None
    shares_embedding: bool
    quant: DraftQuant | None = None

    @property
    def model(self) -> PreTrainedModel:
        return self.loaded.model

    @property
    def version(self) -> str:
        """A short name for a draft that no registry has named."""
        return self.loaded.draft_version


def load_draft(
    ref: ModelRef,
    target: LoadedModel,
    *,
    tokenizer: Tokenizer | None = None,
    tokenizer_checked: bool = False,
    dtype: torch.dtype | None = None,
    cache_dir: Path | None = None,
    progress: Progress = stderr_progress,
) -> LoadedDraft:
    """Load the draft that `ref` names, for `target`, onto the target's device.

    `tokenizer` is the target's (None: read from its directory); `tokenizer_checked` says that a manifest has vouched
    for the draft's being the same: reading one holds Python's lock for up to seconds, which a server at work cannot
    spare. `dtype` None is the target's. Where the embedding, or the head, equals the target's, the draft refers to the
    target's tensors and its own are freed; this works before and after the target has gone into a `ModelRunner`.

    Raises `TokenizerMismatch` if an id does not mean the same to both, `ModelError` for a damaged checkpoint or
    draft vocabulary, and whatever `load_model` raises.
    """
    if tokenizer is None:
        tokenizer = _tokenizer(target.directory, progress)
    loaded = load_model(ref, dtype=dtype or target.dtype, device=target.device, cache_dir=cache_dir, progress=progress)
    if not tokenizer_checked:
        check_compatible(tokenizer, _tokenizer(loaded.directory, progress))
    vocab, quant = DraftVocab.read(loaded.directory), DraftQuant.read(loaded.directory)
    shares_embedding = share_embedding(loaded.model, target.model)
    output_ids: Tensor | None = None
    if vocab is None:
        share_head(loaded.model, target.model)
    else:
        vocab.check(min(tokenizer.vocab_size, loaded.config.vocab_size))
        output_ids = vocab.tensor(loaded.device)
        reduce_head(loaded.model, output_ids)
    if quant is not None:
        # a whole head is the target's, or large enough that int8 would be worth a setting of its own
        pack_linears_int8(loaded.model, head=None if vocab is None else output_head(loaded.model))
    return LoadedDraft(loaded, output_ids, shares_embedding, quant)


def _tokenizer(directory: Path, progress: Progress) -> Tokenizer:
    return load_tokenizer(ModelRef(ModelKind.DIRECTORY, str(directory)), progress=progress)
