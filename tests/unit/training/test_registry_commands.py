"""`redraft-train registry` from outside."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from redraft.registry.errors import Pinned
from redraft.registry.manifest import DraftState
from redraft.registry.store import DraftRegistry
from redraft_training.__main__ import app
from redraft_training.commands.common import Exit
from tests.unit.registry.fakes import Drafts


@pytest.fixture(name="root")
def _root(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture(name="drafts")
def _drafts(root: Path, tmp_path: Path) -> Drafts:
    return Drafts(DraftRegistry(str(root)), tmp_path / "made")


def call(root: Path, *arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["registry", *arguments, f"--registry={root}"], terminal_width=200)
    return result.exit_code, result.stdout, result.stderr


def test_an_empty_registry_is_said_to_be_one(root: Path) -> None:
    status, stdout, _ = call(root, "list")
    assert (status, stdout.endswith("holds no drafts\n")) == (0, True)
    status, _, stderr = call(root, "pin")
    assert (status, "nothing to pin" in stderr, len(stderr.splitlines())) == (Exit.ERROR, True, 1)


def test_a_list_says_which_is_current_and_what_was_refused(root: Path, drafts: Drafts) -> None:
    drafts.publish("v1")
    drafts.publish("v2")
    drafts.refuse("v3", "no gain")
    status, stdout, _ = call(root, "list")
    rows = {line.split("│")[1].strip(): line for line in stdout.splitlines() if line.count("│") > 5}
    assert (status, list(rows)) == (0, ["v3", "v2", "v1"])  # newest first
    assert "no gain" in rows["v3"]
    assert "current" in rows["v2"]
    assert "published" in rows["v1"]
    assert stdout.splitlines()[-1] == "current: v2 (before: v1), not pinned"


def test_nothing_moves_from_pin_to_unpin(root: Path, drafts: Drafts) -> None:
    drafts.publish("v1")
    drafts.publish("v2")
    assert call(root, "pin", "v1")[:2] == (
        0,
        "current: v1 (before: v2), pinned: nothing moves until `redraft-train registry unpin`\n",
    )
    with pytest.raises(Pinned):
        drafts.publish("v3")
    assert call(root, "unpin")[:2] == (0, "current: v1 (before: v2), not pinned\n")
    drafts.publish("v4")
    current = drafts.registry.current()
    assert current is not None
    assert current.version == "v4"


def test_a_draft_that_was_rolled_back_may_serve_again(root: Path, drafts: Drafts) -> None:
    drafts.publish("v1")
    drafts.publish("v2")
    drafts.registry.rollback(reason="worse", expected_current="v2")
    assert call(root, "reinstate", "v2")[:2] == (0, "v2 is published\n")
    assert drafts.registry.get("v2").state is DraftState.PUBLISHED
    status, _, stderr = call(root, "reinstate", "v9")
    assert (status, "has no version 'v9'" in stderr) == (Exit.ERROR, True)


def test_a_damaged_draft_is_found(root: Path, drafts: Drafts) -> None:
    drafts.publish("v1")
    drafts.refuse("v2")
    assert call(root, "verify")[:2] == (0, "2 of 2 drafts are whole\n")
    (weights,) = (root / "drafts" / "v1").rglob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    status, stdout, stderr = call(root, "verify")
    assert (status, stdout, stderr.startswith("v1: ")) == (Exit.ERROR, "1 of 2 drafts are whole\n", True)
    assert call(root, "verify", "v2")[0] == 0


def test_old_drafts_are_deleted_but_never_what_serves(root: Path, drafts: Drafts) -> None:
    for version in ("v1", "v2", "v3", "v4"):
        drafts.publish(version)
    drafts.registry.activate("v4")
    assert call(root, "prune", "--keep=0")[1] == "deleted 2 drafts: v1, v2\n"  # v4 is current, v3 the one before
    assert sorted(drafts.registry.versions()) == ["v3", "v4"]
    assert call(root, "prune")[0] == Exit.USAGE
