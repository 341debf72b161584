"""`kill -9` of a cycle at any change that it makes to the file system: run again, it publishes the very same draft."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from typer.testing import CliRunner

from redraft_training.__main__ import app
from tests.unit.training.cycle_runs import SMALL, Site

# One process imports torch, every run is a fork of it. Clocks stand still, so that the version, which is a hash over
# everything published, report and provenance included, must come out the same. The audit hook sees every file opened to
# be written, renamed, linked, made or deleted; a killed run dies just before the one of its number.
RUNS = """
import json, os, random, shutil, signal, sys
from pathlib import Path
from types import SimpleNamespace
from redraft_training import cycle
from redraft_training.distill import provenance, trainer
from redraft_training.evaluate import charts
from tests.unit.training.cycle_runs import Site

root, num_kills = Path(sys.argv[1]), int(sys.argv[2])
site = Site.make(root / "site")
moment = cycle.time.time()
cycle.time = SimpleNamespace(time=lambda: moment)
charts.overview = charts.single = lambda *_: b"png"  # they would take most of the time
provenance.git_state = lambda _: {}
trainer._Clock.session_seconds = trainer._Clock.seconds = trainer._Clock.cpu_seconds = lambda self: 0.0
CHANGES = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}

def is_change(event, arguments):
    if event == "open":
        path, _, flags = arguments
        return isinstance(path, (str, bytes, os.PathLike)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    return event in CHANGES

def run(place, deadly):
    # -> how it ended, and how many changes it made
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0
        def hook(event, arguments):
            nonlocal count
            # files are named by a path, or within an open directory by their name alone
            if is_change(event, arguments):
                if count == deadly:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
        sys.addaudithook(hook)
        status = 1
        try:
            status = 0 if Site(place).run().version else 4
        finally:
            os.write(writer, str(count).encode())
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(writer)
    with os.fdopen(reader) as pipe:
        return status, int(pipe.read() or 0)

def fresh(name):
    return Path(shutil.copytree(site.root, root / name))

def published(place):
    registry = Site(place).registry
    entries = registry.list()
    for entry in entries:
        registry.verify(entry.version)
    current = registry.current()
    return {"versions": [entry.version for entry in entries], "current": current and current.version}

# settings hold paths, and go into the manifest: every run is at the same place
place = fresh("run")
status, total = run(place, None)
assert status == 0, status
results = [{"at": None, "first": status, "again": 0, **published(place)}]
rng = random.Random(11)
# one in each of as many equal parts of the run
for number in range(num_kills):
    shutil.rmtree(place)
    fresh("run")
    at = rng.randrange(total * number // num_kills, total * (number + 1) // num_kills)
    first, _ = run(place, at)
    before = published(place)
    again, _ = run(place, None)
    results.append({"at": at, "first": first, "again": again, "before": before, **published(place)})
print(json.dumps({"total": total, "results": results}))
"""

KILLS = 24


def test_killed_anywhere_publishes_the_same_draft(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUNS, str(tmp_path), str(KILLS)]
    done = subprocess.run(command, timeout=500, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    undisturbed, *killed = found["results"]
    assert undisturbed["versions"] == [undisturbed["current"]]
    assert len(killed) == KILLS
    for result in killed:
        assert result["first"] == -signal.SIGKILL, result
        # after the last file was renamed there is nothing left to do, and nothing new either
        assert result["again"] in (0, 4), result
        assert result["versions"] == undisturbed["versions"], result
        assert result["current"] == undisturbed["current"], result
        assert result["before"]["current"] in (None, undisturbed["current"]), result


def test_killed_command_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    """The real program, killed from outside as soon as it has something to lose."""
    site = Site.make(tmp_path)
    arguments = ["run", *(f"--{name.replace('_', '-')}={value}" for name, value in site.places().items())]
    arguments += [part for setting in (*SMALL, "distill.epochs=40") for part in ("--set", setting)]
    checkpoints = tmp_path / "work" / "cycle" / "distill" / "checkpoints"
    process = subprocess.Popen([sys.executable, "-m", "redraft_training", *arguments], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 300
        while not list(checkpoints.glob("step-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            os.sched_yield()
    finally:
        process.kill()
        process.wait()
    assert site.registry.current() is None

    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert "going on with the cycle under way" in result.stderr
    current = site.registry.current()
    assert current is not None
    assert site.registry.verify(current.version).training["settings"]["distill"]["epochs"] == 40
