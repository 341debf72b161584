"""From an engine's mode to a worker process: its files, settings and environment variables."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from benchmarks.peers.catalogue import FLOAT, Mode, Peer
from benchmarks.peers.checkpoints import Checkpoints
from benchmarks.peers.environments import FOLDER, Environment, llama_server, vllm_preloads
from benchmarks.peers.worker_process import WorkerProcess
from benchmarks.peers.workers.protocol import Settings

NGRAM_MIN, NGRAM_MAX = 2, 4  # as redraft-server's defaults
CONTEXT = 2048  # tokens of a prompt and its completion
_VLLM_CACHE_GB = 2


@dataclass(frozen=True, slots=True)
class Launcher:
    """Starts workers on one target and draft.

    Args:
        threads: of every engine.
        num_draft_tokens: drafted a step, at most.
    """

    checkpoints: Checkpoints
    threads: int
    num_draft_tokens: int

    def prepare(self, peer: Peer) -> None:
        """Install the peer, if it is not. Raises PeerUnavailable."""
        if peer.environment is not None:
            environment = Environment(peer.environment)
            environment.ensure()
            if peer.environment == "llamacpp":
                llama_server(environment)

    def worker(self, peer: Peer, mode: Mode, streams: int) -> WorkerProcess:
        """A worker that is not started yet; its files are converted now. Raises PeerUnavailable."""
        draft = None if "draft" not in mode.kind else self._file(peer, mode, is_draft=True)
        settings = Settings(
            target=self._file(peer, mode, is_draft=False),
            draft=draft,
            mode=mode.kind,
            threads=self.threads,
            num_draft_tokens=self.num_draft_tokens,
            ngram_min=NGRAM_MIN,
            ngram_max=NGRAM_MAX,
            streams=streams,
            context=CONTEXT,
            options={},
        )
        python, variables = Path(sys.executable), {"OMP_NUM_THREADS": str(self.threads)}
        if peer.environment is None:
            variables["OMP_WAIT_POLICY"] = "PASSIVE"  # as redraft-server has it
            if mode.weights != FLOAT:
                settings.options["weights"] = mode.weights
        else:
            environment = Environment(peer.environment)
            python = environment.python
            if peer.environment == "llamacpp":
                settings.options["server"] = str(llama_server(environment))
            if peer.environment == "vllm":
                variables |= _vllm_variables(environment)
        log = FOLDER / "logs" / f"{peer.name}-{mode.name}-{streams}.log".replace(" ", "-")
        return WorkerProcess(python, f"benchmarks.peers.workers.{peer.worker}", settings, log, variables)

    def _file(self, peer: Peer, mode: Mode, *, is_draft: bool) -> str:
        if peer.environment == "llamacpp":
            return str(self.checkpoints.gguf(Environment(peer.environment), is_draft, mode.weights))
        if peer.environment == "openvino":
            return str(self.checkpoints.openvino(Environment(peer.environment), is_draft))
        if peer.environment is None:
            return self.checkpoints.draft if is_draft else self.checkpoints.target
        return str(self.checkpoints.original(is_draft))


def _vllm_variables(environment: Environment) -> dict[str, str]:
    """vLLM's own advice for CPUs, and everything in one process."""
    return {
        "LD_PRELOAD": ":".join(map(str, vllm_preloads(environment))),
        "VLLM_CPU_KVCACHE_SPACE": str(_VLLM_CACHE_GB),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
