"""A worker for tests: returns the prompts it gets, and misbehaves when asked to."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from benchmarks.peers.workers.protocol import Generated, Request, run


@dataclass(frozen=True, slots=True)
class Behaviour:
    """`fails`: at loading. `dies_at`: ends the process at prompts that begin with this token."""

    fails: bool = False
    dies_at: int = -1


class EchoEngine:
    version = "echo 1"

    def __init__(self, behaviour: Behaviour) -> None:
        print("an engine's own chatter on standard output")  # noqa: T201
        if behaviour.fails:
            raise ValueError("no model\nhere")
        self._behaviour = behaviour

    def generate(self, request: Request) -> Generated:
        if request.prompts[0][0] == self._behaviour.dies_at:
            sys.stderr.write("out of memory\n")
            sys.stderr.flush()
            raise SystemExit(9)
        return Generated([prompt[: request.max_new_tokens] for prompt in request.prompts], 4, 3)

    def close(self) -> None:
        print("closed")  # noqa: T201


if __name__ == "__main__":
    run(EchoEngine, Behaviour)
