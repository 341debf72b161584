"""`kill -9` in the middle of training, several times: what comes out is, bit for bit, what an undisturbed run makes."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file

from tests.unit.training.distill_runs import Parts, assert_equal, save_draft

# Forks a run for each pair (place, call): it kills itself at that call of the function, counted from 0. Between steps,
# in a step, at every stage of a checkpoint, and while the draft is written.
KILL_AT_EACH = """
import itertools, os, signal, sys
from pathlib import Path
from redraft_training.distill import checkpoint, output, step
from tests.unit.training.distill_runs import Parts

draft, out = Path(sys.argv[1]), Path(sys.argv[2])
PLACES = {
    "save_file": (checkpoint, "save_file"),
    "rename": (Path, "rename"),
    "sync": (checkpoint, "sync_directory"),
    "prune": (checkpoint.CheckpointStore, "_prune"),
    "update": (step.Stepper, "_update"),
    "draft": (output, "sync_directory"),
}

def deadly(function, at):
    calls = itertools.count()
    def call(*args, **kwargs):
        if next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call

for pair in sys.argv[3:]:
    place, at = pair.split(":")
    child = os.fork()
    if child == 0:
        on_progress = deadly(lambda row: None, int(at)) if place == "row" else None
        if place != "row":
            owner, name = PLACES[place]
            setattr(owner, name, deadly(getattr(owner, name), int(at)))
        Parts.make(draft, epochs=4).run(out, on_progress=on_progress)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != -signal.SIGKILL:
        sys.exit(f"the run to be killed at {pair} ended with {status}")
"""

RANDOM = random.Random(7)
KILLS = [
    f"update:{RANDOM.randrange(1, 4)}",
    f"row:{RANDOM.randrange(4, 8)}",
    "save_file:1",
    "rename:0",
    "sync:1",
    "prune:0",
    "row:0",
    "draft:0",
]


def test_killed_and_resumed_is_undisturbed(tmp_path: Path) -> None:
    draft, output = save_draft(tmp_path / "draft"), tmp_path / "killed"
    expected = Parts.make(draft, epochs=4).run(tmp_path / "straight")
    command = [sys.executable, "-c", KILL_AT_EACH, str(draft), str(output), *KILLS]
    done = subprocess.run(command, timeout=300, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = Parts.make(draft, epochs=4).run(output)

    weights = [load_file(made.draft / "model.safetensors") for made in (expected, result)]
    assert_equal(*weights)
    assert (result.best_step, result.best_alpha) == (expected.best_step, expected.best_alpha)
    assert [row.step for row in result.history] == list(range(1, expected.steps + 1))
    assert [row.loss for row in result.history] == [row.loss for row in expected.history]
    assert not list(output.rglob(".*"))  # nothing half-written is left
