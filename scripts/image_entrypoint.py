#!/usr/bin/env python3
"""Entrypoint of the image: server | train | client, each with the arguments of the command behind it.

It stays process 1 and passes SIGTERM on, since the kernel keeps from process 1 every signal that it has no handler
for: a server that is still loading its models, or a trainer, would otherwise sit out the whole grace period.

REDRAFT_DONE_CODES="3 4": exit codes of the command that count as done. A scheduler knows only 0 as success, and a
training run that published nothing, for a good reason, is no failure.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from types import FrameType

PROGRAMS = {"server": "redraft-server", "train": "redraft-train", "client": "redraft"}
USAGE = "usage: server | train | client, then the arguments of redraft-server, redraft-train or redraft"


def main() -> int:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("--help", "-h"):
        sys.stdout.write(f"{USAGE}\n")
        return 0
    if command not in PROGRAMS:
        sys.stderr.write(f"{command or 'nothing'} is not a command of this image; {USAGE}\n")
        return 2
    program = PROGRAMS[command]
    if command == "client":  # has a terminal, maybe, and handles its signals
        os.execvp(program, [program, *sys.argv[2:]])
    status = run([program, *sys.argv[2:]])
    if str(status) in os.environ.get("REDRAFT_DONE_CODES", "").split():
        sys.stderr.write(f"{program} ended with status {status}, which counts as done\n")
        return 0
    return status


def run(command: list[str]) -> int:
    """Run a command, pass on SIGTERM and SIGINT, and return its exit status as a shell would."""
    early: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        if child is None:
            early.append(number)
        else:
            child.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    child = subprocess.Popen(command)
    if early:
        child.terminate()
    status = child.wait()
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main())
