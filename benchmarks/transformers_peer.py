"""transformers' own `generate` on its own copy of the weights: the reference for tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from redraft.models.loader import load_model
from redraft.models.ref import ModelRef
from redraft.models.tokenizer import Tokenizer


class TransformersPeer:
    """Greedy generation, fp32, transformers' default attention."""

    def __init__(self, target: str, tokenizer: Tokenizer, *, max_new_tokens: int) -> None:
        self.model = load_model(ModelRef.parse(target)).model
        # In the model, not an argument: `generate` fills what its argument leaves out from the model's own.
        make_config: Any = GenerationConfig
        self.model.generation_config = make_config(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=min(tokenizer.eos_token_ids),
            eos_token_id=sorted(tokenizer.eos_token_ids),
        )

    def greedy(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """New tokens, the end-of-text token included."""
        generator: Any = self.model
        ids = torch.tensor([prompt])
        output = generator.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False)
        return tuple(output[0, len(prompt) :].tolist())

    @torch.inference_mode()
    def logits_after(self, token_ids: Sequence[int]) -> Tensor:
        """Logits of the token that follows `token_ids`, [vocab_size] float32."""
        logits: Tensor = self.model(input_ids=torch.tensor([list(token_ids)]), logits_to_keep=1).logits
        return logits[0, -1].float()
