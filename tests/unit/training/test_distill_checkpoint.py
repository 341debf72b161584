"""Checkpoints: whole or absent, verified when read, and of this run only."""

from __future__ import annotations

import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from redraft_training.distill import checkpoint as module
from redraft_training.distill.checkpoint import CheckpointStore, Identity, TrainingState
from redraft_training.distill.errors import CheckpointError, CheckpointMismatch

IDENTITY = Identity({"learning_rate": 1e-3, "layers": ((1, 2),)}, "data", "parent")


def tensors(value: float, size: int = 8) -> dict[str, Tensor]:
    return {"layer.weight": torch.full((size, size), value), "layer.bias": torch.full((size,), value).bfloat16()}


def save(store: CheckpointStore, step: int, best_step: int = 0, size: int = 8) -> Path:
    state = TrainingState(step=step, best_step=best_step)
    return store.save(state, tensors(step, size), {"layer.weight/exp_avg": torch.full((2,), step + 0.5)})


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints", IDENTITY)


def test_what_was_saved_is_loaded(store: CheckpointStore) -> None:
    assert store.load() is None
    state = TrainingState(3, 1, 7, 900, 1.5, 1.25, 0.6, 2, 0.5, 1, "max_tokens")
    store.save(state, tensors(0.1), {"layer.weight/step": torch.tensor(3.0)})
    loaded = store.load()
    assert loaded is not None
    assert loaded.state == state
    assert {name: (value.dtype, value.tolist()) for name, value in loaded.model.items()} == {
        name: (value.dtype, value.tolist()) for name, value in tensors(0.1).items()
    }
    assert loaded.optimizer["layer.weight/step"].shape == ()


def test_the_last_two_and_the_best_stay(store: CheckpointStore) -> None:
    for step in range(1, 7):
        save(store, step, best_step=min(step, 3))
    assert store.steps() == [3, 5, 6]
    assert store.load_model(3)["layer.weight"][0, 0] == 3.0
    store.clear()
    assert store.steps() == []


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_checkpoint_is_passed_over(store: CheckpointStore, name: str, damage: str) -> None:
    save(store, 1)
    path = save(store, 2) / name
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        middle = len(content) // 2 if name == "state.json" else len(content) - 1
        path.write_bytes(content[:middle] + b"\x01" + content[middle + 1 :])
    else:
        path.unlink()
    loaded = store.load()
    assert loaded is not None
    assert loaded.state.step == 1
    (store.path(1) / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be read.*start over"):
        store.load()
    save(store, 2)  # a damaged one is replaced
    loaded = store.load()
    assert loaded is not None
    assert loaded.state.step == 2


def test_a_pickle_is_never_read(store: CheckpointStore) -> None:
    save(store, 1)
    path = save(store, 2)
    torch.save(tensors(9.0), path / "model.safetensors")
    state = json.loads((path / "state.json").read_text())
    state["sha256"]["model.safetensors"] = module.sha256_file(path / "model.safetensors")
    (path / "state.json").write_text(json.dumps(state))
    loaded = store.load()
    assert loaded is not None
    assert loaded.state.step == 1


def test_another_run_is_refused_by_name(store: CheckpointStore) -> None:
    save(store, 1)

    def other(**changes: object) -> CheckpointStore:
        return CheckpointStore(store.directory, replace(IDENTITY, **changes))  # type: ignore[arg-type]

    with pytest.raises(CheckpointMismatch, match=r"other settings \(learning_rate\)"):
        other(settings={"learning_rate": 2e-3, "layers": [[1, 2]]}).load()
    with pytest.raises(CheckpointMismatch, match="another parent draft"):
        other(parent="x").load()
    with pytest.raises(CheckpointMismatch, match="other training data and another parent"):
        other(parent="x", data="y").load()


def test_what_a_killed_process_leaves_is_ignored_and_removed(store: CheckpointStore) -> None:
    save(store, 1)
    save(store, 2)
    # what a killed process leaves: the temporary directory, written but not renamed
    leftover = store.directory / ".step-00000003.abc"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    loaded = store.load()
    assert loaded is not None
    assert (store.steps(), loaded.state.step) == ([1, 2], 2)
    store.clean()
    assert not leftover.exists()
    assert store.steps() == [1, 2]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Writing beyond it fails in the kernel, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_write_that_fails_is_named_and_leaves_the_earlier_one(store: CheckpointStore) -> None:
    save(store, 1)
    with file_size_limit(10_000), pytest.raises(CheckpointError, match="the checkpoint of step 1 is intact"):
        save(store, 2, size=200)
    assert store.steps() == [1]
    assert [path.name for path in store.directory.iterdir()] == ["step-00000001"]
    loaded = store.load()
    assert loaded is not None
    assert loaded.state.step == 1
    save(store, 2, size=200)
    assert store.steps() == [1, 2]


def test_a_full_disk_is_called_one(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(CheckpointError, match=r"there is no earlier one.*the disk is full: free some space"):
        save(store, 1)
