"""transformers: `generate`, assisted generation (mode draft), prompt lookup (mode ngram)."""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

from benchmarks.peers.workers.protocol import Generated, Request, Settings, cut_at_end, run


class TransformersEngine:
    """fp32, transformers' default attention; several prompts are one batch, padded on the left."""

    def __init__(self, settings: Settings) -> None:
        if settings.mode != "plain" and settings.streams > 1:
            raise ValueError("transformers speculates for one sequence only")
        torch.set_num_threads(settings.threads)
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self._settings = settings
        self._model = _load(settings.target)
        self._assistant = None if settings.draft is None else _load(settings.draft)
        ends = self._model.generation_config.eos_token_id
        self._ends = frozenset([ends] if isinstance(ends, int) else ends)
        self._passes = {"target": 0, "draft": 0}
        self._count(self._model, "target")
        self._options: dict[str, Any] = {}
        if self._assistant is not None:
            self._count(self._assistant, "draft")
            # a fixed length, whatever the draft's confidence, as the other engines have it
            config = self._assistant.generation_config
            config.num_assistant_tokens = settings.num_draft_tokens
            config.num_assistant_tokens_schedule = "constant"
            config.assistant_confidence_threshold = 0.0
            self._options["assistant_model"] = self._assistant
        elif settings.mode == "ngram":
            self._options["prompt_lookup_num_tokens"] = settings.num_draft_tokens
            self._options["max_matching_ngram_size"] = settings.ngram_max

    @property
    def version(self) -> str:
        return f"transformers {transformers.__version__}, torch {torch.__version__}"

    def close(self) -> None:
        """Nothing outlives this process."""

    @torch.inference_mode()
    def generate(self, request: Request) -> Generated:
        pad = min(self._ends)
        width = max(map(len, request.prompts))
        padded = [[pad] * (width - len(prompt)) + prompt for prompt in request.prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in request.prompts]
        self._passes.update(target=0, draft=0)
        torch.manual_seed(request.seed)
        # in the model, not an argument: `generate` fills what its argument leaves out from the model's own
        self._model.generation_config = _config(request, self._ends, pad)
        output = self._model.generate(
            input_ids=torch.tensor(padded), attention_mask=torch.tensor(mask), **self._options
        )
        tokens = [cut_at_end(row[width:].tolist(), self._ends) for row in output]
        if self._assistant is None:
            return Generated(tokens)
        return Generated(tokens, self._passes["draft"], len(tokens[0]) - self._passes["target"])

    def _count(self, model: Any, name: str) -> None:
        def count(module: object, arguments: object) -> None:
            self._passes[name] += 1

        model.register_forward_pre_hook(count)


def _config(request: Request, ends: frozenset[int], pad: int) -> Any:
    make: Any = GenerationConfig
    common = {"max_new_tokens": request.max_new_tokens, "eos_token_id": sorted(ends), "pad_token_id": pad}
    if request.temperature == 0.0:
        return make(do_sample=False, **common)
    return make(do_sample=True, temperature=request.temperature, top_p=request.top_p, top_k=0, **common)


def _load(directory: str) -> Any:
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(directory, dtype=torch.float32).eval()


if __name__ == "__main__":
    run(TransformersEngine, Settings)
