"""transformers' own `generate` on its own copy of the weights: the reference for speed and for tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from redraft.models.loader import load_model
from redraft.models.ref import ModelRef
from redraft.models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class PeerOutput:
    token_ids: list[tuple[int, ...]]  # new tokens per prompt, the end-of-text token included
    target_passes: int  # forward passes of the target, prefill included


class TransformersPeer:
    """Greedy generation, fp32, transformers' default attention.

    Args:
        ignore_eos: never stop before `max_new_tokens`; end-of-text is then a token like any other.
        draft: the assistant of `assisted`; None if that is not wanted.
        num_draft_tokens: of `assisted` and `prompt_lookup`, the same as redraft's k; all else is their default.
    """

    def __init__(
        self,
        target: str,
        tokenizer: Tokenizer,
        *,
        max_new_tokens: int,
        ignore_eos: bool,
        draft: str | None = None,
        num_draft_tokens: int = 4,
    ) -> None:
        self._pad_id = min(tokenizer.eos_token_ids)
        self._num_draft_tokens = num_draft_tokens
        # In the model, not an argument: `generate` fills what its argument leaves out from the model's own.
        make_config: Any = GenerationConfig
        self._config: GenerationConfig = make_config(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=self._pad_id,
            eos_token_id=None if ignore_eos else sorted(tokenizer.eos_token_ids),
        )
        self.model = _load(target, self._config)
        self._assistant: PreTrainedModel | None = None
        if draft is not None:
            assistant_config = make_config(
                num_assistant_tokens=num_draft_tokens,
                num_assistant_tokens_schedule="constant",
                pad_token_id=self._pad_id,
            )
            self._assistant = _load(draft, assistant_config)
        self._passes = 0
        self.model.register_forward_pre_hook(self._count)

    def plain(self, prompts: Sequence[tuple[int, ...]]) -> PeerOutput:
        """One batch, prompts padded on the left."""
        return self._generate(prompts)

    def assisted(self, prompts: Sequence[tuple[int, ...]]) -> PeerOutput:
        """Batch of one: transformers can do no more."""
        assert self._assistant is not None
        return self._generate(prompts, assistant_model=self._assistant)

    def prompt_lookup(self, prompts: Sequence[tuple[int, ...]]) -> PeerOutput:
        """Batch of one."""
        return self._generate(prompts, prompt_lookup_num_tokens=self._num_draft_tokens)

    @torch.inference_mode()
    def logits_after(self, token_ids: Sequence[int]) -> Tensor:
        """Logits of the token that follows `token_ids`, [vocab_size] float32."""
        logits: Tensor = self.model(input_ids=torch.tensor([list(token_ids)]), logits_to_keep=1).logits
        return logits[0, -1].float()

    def _generate(self, prompts: Sequence[tuple[int, ...]], **options: Any) -> PeerOutput:
        width = max(map(len, prompts))
        padded = [[self._pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        self._passes = 0
        generator: Any = self.model
        output = generator.generate(
            input_ids=torch.tensor(padded), attention_mask=torch.tensor(mask), do_sample=False, **options
        )
        return PeerOutput([self._cut(row[width:].tolist()) for row in output], self._passes)

    def _cut(self, tokens: list[int]) -> tuple[int, ...]:
        """Without the padding behind the end-of-text token of a row that ended before the others."""
        ends = self._config.eos_token_id or []
        stop = next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))
        return tuple(tokens[:stop])

    def _count(self, module: torch.nn.Module, arguments: object) -> None:
        self._passes += 1


def _load(name: str, config: GenerationConfig) -> PreTrainedModel:
    model = load_model(ModelRef.parse(name)).model
    model.generation_config = config
    return model
