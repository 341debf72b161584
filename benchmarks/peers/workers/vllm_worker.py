"""vLLM's CPU build, compiled; a draft model (mode draft) or n-grams (mode ngram)."""

from __future__ import annotations

from typing import Any

import vllm  # type: ignore[import-not-found]
from vllm import LLM, SamplingParams

from benchmarks.peers.workers.protocol import Generated, Request, Settings, run

_DRAFTED, _ACCEPTED = "vllm:spec_decode_num_draft_tokens", "vllm:spec_decode_num_accepted_tokens"
_SLACK_TOKENS = 64  # of context, for the drafted ones


class VllmEngine:
    """fp32, no prefix cache: prompts come again."""

    def __init__(self, settings: Settings) -> None:
        speculation: dict[str, Any] | None = None
        if settings.mode == "draft":
            speculation = {"method": "draft_model", "model": settings.draft}
        elif settings.mode == "ngram":
            lookup = {"prompt_lookup_min": settings.ngram_min, "prompt_lookup_max": settings.ngram_max}
            speculation = {"method": "ngram", **lookup}
        if speculation is not None:
            speculation["num_speculative_tokens"] = settings.num_draft_tokens
        self._llm = LLM(
            model=settings.target,
            dtype="float32",
            max_model_len=settings.context + _SLACK_TOKENS,
            max_num_seqs=settings.streams,
            enable_prefix_caching=False,
            speculative_config=speculation,
            disable_log_stats=False,
        )

    @property
    def version(self) -> str:
        return f"vLLM {vllm.__version__}"

    def close(self) -> None:
        """Nothing outlives this process."""

    def generate(self, request: Request) -> Generated:
        before = self._counters()
        params = [
            SamplingParams(
                temperature=request.temperature,
                top_p=request.top_p,
                top_k=0,
                max_tokens=request.max_new_tokens,
                seed=None if request.temperature == 0.0 else request.seed + index,
                detokenize=False,
            )
            for index in range(len(request.prompts))
        ]
        prompts: Any = [{"prompt_token_ids": prompt} for prompt in request.prompts]
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        after = self._counters()
        if _DRAFTED not in after:
            return Generated(tokens)
        drafted, accepted = (int(after[name] - before.get(name, 0)) for name in (_DRAFTED, _ACCEPTED))
        return Generated(tokens, drafted, accepted)

    def _counters(self) -> dict[str, float]:
        metrics: Any = self._llm.get_metrics()
        return {metric.name: metric.value for metric in metrics if metric.name in (_DRAFTED, _ACCEPTED)}


if __name__ == "__main__":
    run(VllmEngine, Settings)
