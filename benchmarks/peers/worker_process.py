"""A worker program (see `workers/protocol.py`), started and spoken to."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from benchmarks.peers.environments import PeerUnavailable
from benchmarks.peers.workers.protocol import Request

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

START_TIMEOUT_S = 900.0
"""vLLM compiles its kernels the first time."""
ANSWER_TIMEOUT_S = 1200.0
_STOP_TIMEOUT_S = 20.0


class WorkerProcess:
    """Starts on enter and waits until the models are loaded; ends, with all it has started, on exit.

    Args:
        python: interpreter to run it with.
        module: the program.
        settings: a dataclass, its argument.
        log: where what it prints goes.
        environment: variables beside or in place of ours.

    Raises:
        PeerUnavailable: it did not become ready, or failed at a request; the message says why.
    """

    def __init__(
        self, python: Path, module: str, settings: DataclassInstance, log: Path, environment: Mapping[str, str]
    ) -> None:
        self.version = ""
        self._command = [str(python), "-m", module, json.dumps(asdict(settings))]
        repository = str(Path(__file__).resolve().parents[2])
        # how threads wait is each engine's own choice: redraft's makes others slow
        inherited = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
        self._environment = {**inherited, "PYTHONPATH": repository, "HF_HUB_OFFLINE": "1", **environment}
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def session(self) -> int:
        """Id of the session that all its processes belong to."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._environment,
                start_new_session=True,
            )
        try:
            self.version = str(self._answer(START_TIMEOUT_S)["ready"])
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def generate(self, request: Request) -> Any:
        """The worker's answer: token_ids, seconds, draft_tokens, accepted_tokens."""
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has said why, or will be found dead
            self._process.stdin.write(json.dumps(asdict(request)).encode() + b"\n")
            self._process.stdin.flush()
        return self._answer(ANSWER_TIMEOUT_S)

    def _answer(self, timeout_s: float) -> Any:
        assert self._process is not None
        assert self._process.stdout is not None
        deadline = time.monotonic() + timeout_s
        line = b""
        while not line.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not select.select([self._process.stdout], [], [], remaining)[0]:
                raise PeerUnavailable(f"no answer after {timeout_s:g} s; see {self._log}")
            piece = os.read(self._process.stdout.fileno(), 1 << 20)
            if not piece:
                raise PeerUnavailable(f"ended with status {self._process.wait()}: {self._last_words()}")
            line += piece
        answer = json.loads(line)
        if "error" in answer:
            raise PeerUnavailable(f"{answer['error']}; see {self._log}")
        return answer

    def _last_words(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return " / ".join(lines[-2:])[:400] or "it said nothing"

    def _end(self) -> None:
        assert self._process is not None
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_TIMEOUT_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # whatever it has started
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
