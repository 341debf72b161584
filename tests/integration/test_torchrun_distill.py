"""Two processes under torchrun, on CPUs: both end with one model, which is that of a single process."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.unit.training.distill_runs import Parts, save_draft

TRAIN = """
import json, os, sys
from pathlib import Path
import torch
from redraft_training.distill.metrics import MetricsRow
from tests.unit.training.distill_runs import Parts, parameters

torch.set_num_threads(1)
draft, out, options = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
stop_at = options.pop("stop_at")
rank = int(os.environ["RANK"])

class Stop(Exception):
    pass

def stop(row: MetricsRow) -> None:
    if row.step == stop_at:
        raise Stop

try:
    Parts.make(draft, **options).run(out, on_progress=stop)
    raise SystemExit("it was to be interrupted")
except Stop:
    pass
parts = Parts.make(draft, **options)
result = parts.run(out)
report = {"losses": [row.loss for row in result.history], "alpha": result.best_alpha, "world": result.world_size}
if os.environ.get("ACCELERATE_USE_FSDP") != "true":
    own = parameters(parts.student)
    report["bytes"] = hash(b"".join(value.numpy().tobytes() for value in own.values()))
(out / f"rank{rank}.json").write_text(json.dumps(report))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def torchrun(script: Path, draft: Path, output: Path, options: dict[str, Any], extra: dict[str, str]) -> list[Any]:
    output.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "PYTHONPATH": os.getcwd(), **extra}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(
        [*command, str(draft), str(output), json.dumps(options)],
        env=environment,
        timeout=180,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(TRAIN)
    return path


@pytest.mark.parametrize("extra", [{}, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_are_one_that_accumulates(tmp_path: Path, script: Path, extra: dict[str, str]) -> None:
    """13 batches an epoch: the last step leaves one rank idle. The run is interrupted and resumed."""
    draft = save_draft(tmp_path / "draft")
    options = {"train_examples": 75, "epochs": 2}
    alone = Parts.make(draft, accumulation=2, **options)
    assert alone.plan.num_batches(0) % 2 == 1
    expected = alone.run(tmp_path / "alone")

    output = tmp_path / "shared"
    reports = torchrun(script, draft, output, {**options, "stop_at": 6}, extra)
    assert [report["world"] for report in reports] == [2, 2]
    assert reports[0].get("bytes") == reports[1].get("bytes")
    assert reports[0]["losses"] == reports[1]["losses"]

    losses = reports[0]["losses"]
    assert losses == pytest.approx([row.loss for row in expected.history], rel=1e-3)
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert reports[0]["alpha"] == pytest.approx(expected.best_alpha, abs=1e-4)
    assert not math.isnan(reports[0]["alpha"])
    made, wanted = (load_file(path / "draft" / "model.safetensors") for path in (output, tmp_path / "alone"))
    assert made.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(made[name], value, rtol=1e-3, atol=1e-4)
