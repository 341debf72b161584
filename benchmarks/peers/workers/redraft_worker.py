"""redraft: its server, over gRPC on loopback, as llama.cpp's is over HTTP. Runs in the project's own environment.

`options`: `weights` of the target, if not float32.
"""

from __future__ import annotations

import asyncio
from importlib.metadata import version

from benchmarks.peers.workers.protocol import Generated, Request, Settings, run
from redraft_client.aio import AsyncClient
from redraft_client.types import GenerationResult
from scripts.server_process import ServerProcess

_PROPOSERS = {"plain": "none", "draft": "draft_model", "ngram": "ngram", "ngram+draft": "ngram+draft_model"}
_START_TIMEOUT_S = 600.0


class RedraftServer:
    """No prefix cache: prompts come again. The draft's length is adaptive, as by default."""

    def __init__(self, settings: Settings) -> None:
        values = {
            "model.target": settings.target,
            "model.threads": settings.threads,
            "engine.prefix_cache": "false",
            "engine.max_running_requests": settings.streams,
            "engine.kv_cache_tokens": settings.streams * settings.context,
            "speculation.proposer": _PROPOSERS[settings.mode],
            "speculation.num_speculative_tokens": settings.num_draft_tokens,
            "speculation.ngram_min": settings.ngram_min,
            "speculation.ngram_max": settings.ngram_max,
        }
        if settings.draft is not None:
            values["model.draft"] = settings.draft
        if "weights" in settings.options:
            values["model.weights"] = settings.options["weights"]
        flags = [word for name, value in values.items() for word in (f"--{name}", str(value))]
        self._server = ServerProcess(flags, start_timeout_s=_START_TIMEOUT_S)
        self._server.__enter__()
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._connect())

    @property
    def version(self) -> str:
        return f"redraft {version('redraft')}"

    def generate(self, request: Request) -> Generated:
        results = self._runner.run(self._generate(request))
        stats = [result.speculation for result in results]
        tokens = [list(result.choices[0].token_ids) for result in results]
        drafted = sum(one.draft_tokens for one in stats)
        return Generated(tokens, drafted, sum(one.accepted_tokens for one in stats)) if drafted else Generated(tokens)

    def close(self) -> None:
        self._server.terminate()

    async def _connect(self) -> AsyncClient:
        return AsyncClient(self._server.address, timeout=None)

    async def _generate(self, request: Request) -> list[GenerationResult]:
        """Without a seed: such requests have the default coupling."""
        return await asyncio.gather(
            *(
                self._client.generate(
                    prompt,
                    max_new_tokens=request.max_new_tokens,
                    temperature=request.temperature,
                    top_p=request.top_p,
                    token_ids=True,
                )
                for prompt in request.prompts
            )
        )


if __name__ == "__main__":
    run(RedraftServer, Settings)
