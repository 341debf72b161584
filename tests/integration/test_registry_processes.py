"""Several processes at one registry on disk, and a process that is killed while it publishes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from redraft.registry.store import DraftRegistry

# One interpreter forks the processes: importing anew for each would take most of the time.
RACE = """
import json, multiprocessing, sys
from pathlib import Path
from redraft.registry.errors import CurrentChanged
from redraft.registry.store import DraftRegistry
from tests.unit.registry.fakes import make_draft, manifest_of

url, made, num_workers, num_rounds = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])

def work(worker, barrier, outcomes):
    registry = DraftRegistry(url)
    for round in range(num_rounds):
        directory = make_draft(made / f"{worker}-{round}", content=f"{worker}{round}")
        manifest = manifest_of(directory, f"r{round:03d}-w{worker}", created_unix_s=float(round))
        current = registry.current()
        barrier.wait()
        try:
            registry.publish(directory, manifest, expected_current=current.version if current else None)
            outcomes.put((round, worker, "won", current and current.version))
        except CurrentChanged:
            outcomes.put((round, worker, "lost", current and current.version))
        barrier.wait()

context = multiprocessing.get_context("fork")
barrier, outcomes = context.Barrier(num_workers), context.Queue()
workers = [context.Process(target=work, args=(i, barrier, outcomes)) for i in range(num_workers)]
for process in workers:
    process.start()
print(json.dumps([outcomes.get(timeout=100) for _ in range(num_workers * num_rounds)]))
for process in workers:
    process.join()
    assert process.exitcode == 0
"""

# Each child ends itself with SIGKILL at its n-th call that changes the disk; the parent carries on behind it.
KILL = """
import json, os, shutil, signal, sys
from pathlib import Path
from redraft.registry.store import DraftRegistry
from tests.unit.registry.fakes import make_draft, manifest_of

root = Path(sys.argv[1])
first, second = make_draft(root / "first", "a"), make_draft(root / "second", "b")
old, new = manifest_of(first, "v0"), manifest_of(second, "v1")

def die_at(point):
    count = 0
    def wrap(call):
        def wrapped(*args, **options):
            nonlocal count
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **options)
        return wrapped
    for name in ("replace", "link", "fsync"):
        setattr(os, name, wrap(getattr(os, name)))
    Path.unlink, Path.mkdir = wrap(Path.unlink), wrap(Path.mkdir)
    shutil.copyfileobj = wrap(shutil.copyfileobj)

killed, problems, point = [], [], 0
while True:
    point += 1
    url = str(root / f"registry-{point}")
    DraftRegistry(url).publish(first, old)
    child = os.fork()
    if child == 0:
        die_at(point)
        DraftRegistry(url).publish(second, new, expected_current="v0")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0
        break
    assert os.WTERMSIG(status) == signal.SIGKILL
    seen = DraftRegistry(url)
    for version in seen.versions():
        seen.verify(version)
    killed.append([seen.current().version, len(seen.versions())])
    DraftRegistry(url).publish(second, new, expected_current="v0")
    again = seen.current()
    if (again.version, again.history, again.generation) != ("v1", ("v0",), 2):
        problems.append([point, again.model_dump()])
    seen.verify("v1")
print(json.dumps({"killed": killed, "problems": problems}))
"""


def run(script: str, *arguments: object) -> Any:
    finished = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_of_racing_publishers_exactly_one_wins_each_round(tmp_path: Path) -> None:
    num_workers, num_rounds = 3, 25
    url = str(tmp_path / "registry")
    outcomes = run(RACE, url, tmp_path / "made", num_workers, num_rounds)

    winners = {round: worker for round, worker, result, _ in outcomes if result == "won"}
    assert sum(result == "won" for _, _, result, _ in outcomes) == num_rounds == len(winners)
    registry = DraftRegistry(url)
    current = registry.current()
    assert current is not None
    assert current.generation == num_rounds
    order = [f"r{round:03d}-w{winners[round]}" for round in range(num_rounds)]
    assert (*current.history, current.version) == tuple(order[-17:])
    assert {expected for round, _, _, expected in outcomes if round > 0} == set(order[:-1])
    entries = registry.list()
    assert len(entries) == num_workers * num_rounds  # the losers' drafts are stored, too
    for entry in entries:
        assert registry.verify(entry.version) == entry.manifest
    assert not list(Path(url).rglob("*.tmp"))


def test_killed_at_each_point_of_publishing(tmp_path: Path) -> None:
    outcome = run(KILL, tmp_path)
    assert outcome["problems"] == []
    states = [tuple(state) for state in outcome["killed"]]
    assert len(states) > 20
    # Nothing, then stored, then current: in this order and nothing in between.
    assert sorted(set(states)) == [("v0", 1), ("v0", 2), ("v1", 2)]
    assert states == sorted(states)
