"""OpenVINO GenAI: its pipeline with paged attention, a draft model (mode draft) or prompt lookup (mode ngram)."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy
import openvino  # type: ignore[import-not-found]
import openvino_genai  # type: ignore[import-not-found]

from benchmarks.peers.workers.protocol import Generated, Request, Settings, cut_at_end, run

_CACHE_GB = 2
_PROPERTIES = {"KV_CACHE_PRECISION": "f32", "INFERENCE_PRECISION_HINT": "f32"}  # its default is 8 bits


class OpenVinoEngine:
    """fp32 weights, activations and KV, as the others have it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = _CACHE_GB
        scheduler.max_num_seqs = max(settings.streams, 1)
        scheduler.enable_prefix_caching = False
        options: dict[str, Any] = {
            **_PROPERTIES,
            "INFERENCE_NUM_THREADS": settings.threads,
            "scheduler_config": scheduler,
        }
        if settings.mode == "draft":
            assert settings.draft is not None
            options["draft_model"] = openvino_genai.draft_model(
                settings.draft, "CPU", INFERENCE_NUM_THREADS=settings.threads, **_PROPERTIES
            )
        elif settings.mode == "ngram":
            options["prompt_lookup"] = True
        self._pipeline = openvino_genai.LLMPipeline(settings.target, "CPU", **options)
        # the speculative pipelines' own configuration does not know where a text ends
        ends = openvino_genai.GenerationConfig(f"{settings.target}/generation_config.json")
        self._ends = frozenset({ends.eos_token_id, *ends.stop_token_ids})

    @property
    def version(self) -> str:
        return f"OpenVINO GenAI {version('openvino-genai')}"

    def close(self) -> None:
        """Nothing outlives this process."""

    def generate(self, request: Request) -> Generated:
        width = max(map(len, request.prompts))
        pad = min(self._ends)
        padded = [[pad] * (width - len(prompt)) + prompt for prompt in request.prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in request.prompts]
        inputs = openvino_genai.TokenizedInputs(_tensor(padded), _tensor(mask))
        result: Any = self._pipeline.generate(inputs, self._config(request))
        tokens = [cut_at_end([int(token) for token in row], self._ends) for row in result.tokens]
        return Generated(tokens, *self._speculation(result, tokens))

    def _config(self, request: Request) -> Any:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = request.max_new_tokens
        config.eos_token_id = min(self._ends)
        config.stop_token_ids = set(self._ends)
        config.rng_seed = request.seed
        config.do_sample = request.temperature > 0.0
        if config.do_sample:
            config.temperature = request.temperature
            config.top_p = request.top_p
        if self._settings.mode != "plain":
            config.num_assistant_tokens = self._settings.num_draft_tokens
        if self._settings.mode == "ngram":
            config.max_ngram_size = self._settings.ngram_max
        return config

    def _speculation(self, result: Any, tokens: list[list[int]]) -> tuple[int | None, int | None]:
        """Drafted and accepted tokens; the former are as many a step as asked for."""
        metrics = getattr(result, "extended_perf_metrics", None)
        if self._settings.mode != "draft" or metrics is None:
            return None, None
        accepted = int(metrics.get_num_accepted_tokens())
        steps = sum(map(len, tokens)) - accepted
        return steps * self._settings.num_draft_tokens, accepted


def _tensor(rows: list[list[int]]) -> Any:
    return openvino.Tensor(numpy.array(rows, dtype=numpy.int64))


if __name__ == "__main__":
    run(OpenVinoEngine, Settings)
