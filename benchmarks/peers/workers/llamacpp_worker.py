"""llama.cpp: its `llama-server`, one slot per stream, over HTTP on a loopback port. Standard library only.

`options`: `server`, the binary.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.peers.workers.protocol import Generated, Request, Settings, run

_START_TIMEOUT_S = 120.0
_ANSWER_TIMEOUT_S = 600.0


class LlamaServer:
    """A server process."""

    def __init__(self, settings: Settings) -> None:
        self._port = _free_port()
        self._binary = settings.options["server"]
        self._streams = settings.streams
        self._process = subprocess.Popen(
            [self._binary, *_flags(settings, self._port)],
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            stderr=sys.stderr,
            env={**os.environ, "OMP_NUM_THREADS": str(settings.threads)},
        )
        self._wait_until_ready()

    @property
    def version(self) -> str:
        done = subprocess.run([self._binary, "--version"], capture_output=True, text=True, check=True)
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version")]
        return f"llama.cpp {lines[0].removeprefix('version:').strip()}"

    def generate(self, request: Request) -> Generated:
        with ThreadPoolExecutor(len(request.prompts)) as pool:
            answers = list(pool.map(lambda item: self._complete(request, *item), enumerate(request.prompts)))
        timings = [answer["timings"] for answer in answers]
        tokens = [answer["tokens"] for answer in answers]
        if not any("draft_n" in one for one in timings):
            return Generated(tokens)
        drafted = sum(one.get("draft_n", 0) for one in timings)
        return Generated(tokens, drafted, sum(one.get("draft_n_accepted", 0) for one in timings))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _complete(self, request: Request, index: int, prompt: list[int]) -> Any:
        body = {
            "prompt": prompt,
            "n_predict": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "samplers": ["top_p", "temperature"],
            "seed": request.seed + index,
            "cache_prompt": False,
            "return_tokens": True,
        }
        status, answer = self._http("POST", "/completion", json.dumps(body), _ANSWER_TIMEOUT_S)
        if status != 200:
            raise RuntimeError(f"llama-server answered {status}: {answer[:200]!r}")
        return json.loads(answer)

    def _http(self, method: str, path: str, body: str | None, timeout_s: float) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=timeout_s)
        try:
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise RuntimeError(f"llama-server ended with {self._process.returncode}; its log says why")
            try:
                if self._http("GET", "/health", None, 1.0)[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(0.1)
        raise RuntimeError(f"llama-server was not ready after {_START_TIMEOUT_S:g} s")


def _flags(settings: Settings, port: int) -> list[str]:
    threads = str(settings.threads)
    flags = ["--host", "127.0.0.1", "--port", str(port), "--model", settings.target, "--no-webui"]
    flags += ["--threads", threads, "--threads-batch", threads, "--parallel", str(settings.streams)]
    # no copies of finished prompts: none comes back within reach of the cache
    flags += ["--ctx-size", str(settings.streams * settings.context), "--cache-ram", "0"]
    length = str(settings.num_draft_tokens)
    if settings.mode == "draft":
        assert settings.draft is not None
        flags += ["--spec-type", "draft-simple", "--model-draft", settings.draft, "--spec-draft-n-max", length]
    elif settings.mode == "ngram":
        flags += ["--spec-type", "ngram-simple"]
        flags += ["--spec-ngram-simple-size-n", str(settings.ngram_min), "--spec-ngram-simple-size-m", length]
    return flags


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


if __name__ == "__main__":
    run(LlamaServer, Settings)
