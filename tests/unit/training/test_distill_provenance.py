"""Provenance goes into a manifest: plain JSON, complete, and nobody's name in it."""

from __future__ import annotations

import getpass
import json
import re
import socket
from pathlib import Path

from redraft_training.distill.provenance import git_state, machine, package_versions, provenance
from redraft_training.distill.settings import DistillSettings


def test_it_is_json_and_complete() -> None:
    made = provenance(
        settings=DistillSettings().identity(),
        parent_draft="d-1",
        parent_fingerprint="abc",
        target_fingerprint="sha256:1",
        data_watermark={"newest_unix_s": 1.5},
        tokens=10,
        steps=2,
        wall_seconds=1.23456,
        cpu_seconds=2.0,
        world_size=1,
    )
    assert json.loads(json.dumps(made)) == made
    assert made["settings"]["objective"]["how"] == "forward_kl"
    assert made["wall_seconds"] == 1.235
    assert made["data_watermark"] == {"newest_unix_s": 1.5}
    text = json.dumps(made)
    assert socket.gethostname() not in text
    assert str(Path.home()) + "/" not in text or getpass.getuser() not in text


def test_versions_and_machine() -> None:
    versions = package_versions()
    assert {"python", "redraft", "torch", "transformers"} <= versions.keys()
    found = machine()
    assert found["threads"] >= 1
    assert found["cpu"]


def test_git_only_where_the_code_is_tracked(tmp_path: Path) -> None:
    assert git_state(tmp_path) == {"git_sha": None, "git_dirty": None}
    state = git_state(Path(__file__).parents[3] / "draft_training" / "redraft_training" / "distill")
    # None where the suite runs from an unpacked archive
    assert state["git_sha"] is None or re.fullmatch("[0-9a-f]{40,64}", state["git_sha"])
