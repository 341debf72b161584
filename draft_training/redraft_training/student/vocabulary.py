"""Which ids a draft should be able to propose: those that the traffic's outputs use most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from redraft.errors import ConfigError
from redraft.models.draft_vocab import DraftVocab
from redraft_training.dataset.example import Example


def draft_vocabulary(
    examples: Iterable[Example], size: int, *, vocab_size: int, always: Iterable[int] = ()
) -> DraftVocab:
    """The `size` ids of the reduced output vocabulary.

    First `always` (end-of-text and other special ids), then by how often the outputs have an id, then by how often the
    prompts do (answers repeat their questions), then the lowest ids: those a BPE tokenizer merged first are the
    commonest in general. Raises `ConfigError` for a size out of range.
    """
    fixed = sorted(set(always))
    if not max(len(fixed), 1) <= size <= vocab_size:
        raise ConfigError(
            f"a draft vocabulary of {size} ids is out of range: the target has {vocab_size} ids, "
            f"{len(fixed)} of which must be in it"
        )
    outputs: Counter[int] = Counter()
    prompts: Counter[int] = Counter()
    for example in examples:
        outputs.update(example.output_token_ids)
        prompts.update(example.prompt_token_ids)
    others = sorted(set(range(vocab_size)).difference(fixed), key=lambda v: (-outputs[v], -prompts[v], v))
    return DraftVocab(tuple(sorted([*fixed, *others[: size - len(fixed)]])))


def coverage(examples: Iterable[Example], vocab: DraftVocab) -> float:
    """Share of the output tokens that the vocabulary has: no draft with it is accepted more often. 1 without tokens."""
    known = frozenset(vocab.ids)
    counts = Counter(token in known for example in examples for token in example.output_token_ids)
    return counts[True] / counts.total() if counts else 1.0
