"""Manifests are strict: what is not known, not finite or not safe does not get in."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from redraft.registry.errors import CorruptDraft, WrongTarget
from redraft.registry.manifest import (
    MAX_TRAINING_BYTES,
    DraftManifest,
    DraftState,
    EvaluationSummary,
    check_target,
    parse_manifest,
    parse_status,
)
from redraft.registry.names import is_safe_file_name, is_version, move_generation, move_name, new_version
from tests.unit.registry.fakes import EVALUATION, TARGET, TOKENIZER, make_draft, manifest_of


@pytest.fixture
def manifest(tmp_path: Path) -> DraftManifest:
    training = {"git": "abc", "steps": 12, "lr": 1e-3, "seeds": [1, 2], "data": {"watermark": None}}
    return manifest_of(make_draft(tmp_path / "d"), "v1", parent_version="v0", evaluation=EVALUATION, training=training)


def test_json_round_trip(manifest: DraftManifest) -> None:
    assert parse_manifest(manifest.encode(), "v1") == manifest
    assert manifest.num_bytes == 3000 + 2 + len('{"model_type": "llama"}')


@pytest.mark.parametrize(
    "change",
    [
        {"color": "red"},  # unknown
        {"schema_version": 2},
        {"version": "v2"},  # of another draft
        {"version": "../v1"},
        {"parent_version": "a/b"},
        {"num_parameters": "1000"},  # a string is not a number
        {"num_parameters": 0},
        {"created_unix_s": -1.0},
        {"target_name": ""},
        {"target_name": "x" * 257},
        {"files": {}},
        {"files": {"../../etc/cron.json": {"sha256": "0" * 64, "bytes": 1}}},
        {"files": {"model.bin": {"sha256": "0" * 64, "bytes": 1}}},
        {"files": {"model.safetensors": {"sha256": "0" * 63, "bytes": 1}}},
        {"files": {"model.safetensors": {"sha256": "0" * 64, "bytes": -1}}},
        {"files": {f"f{i}.json": {"sha256": "0" * 64, "bytes": 1} for i in range(1001)}},
        {"evaluation": {"expected_acceptance": 1.5, "num_positions": 1}},
        {"evaluation": {"expected_acceptance": 0.5}},
        {"training": {"log": "x" * MAX_TRAINING_BYTES}},
    ],
)
def test_a_manifest_that_is_not_valid_is_named_corrupt(manifest: DraftManifest, change: dict[str, Any]) -> None:
    content = {**json.loads(manifest.encode()), **change}
    with pytest.raises(CorruptDraft, match="v1"):
        parse_manifest(json.dumps(content).encode(), "v1")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff\xfe", b'{"expected_acceptance": NaN}', b"[" * 100_000])
def test_no_json_is_named_corrupt(data: bytes) -> None:
    with pytest.raises(CorruptDraft):
        parse_manifest(data, "v1")
    with pytest.raises(CorruptDraft):
        parse_status(data, "v1")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_is_refused_before_it_is_written(manifest: DraftManifest, value: float) -> None:
    with pytest.raises(ValidationError):
        EvaluationSummary(expected_acceptance=value, num_positions=1)
    with pytest.raises(ValidationError):
        DraftManifest.model_validate({**manifest.model_dump(), "training": {"loss": value}})


def test_the_message_never_repeats_the_input(manifest: DraftManifest) -> None:
    content = {**json.loads(manifest.encode()), "num_parameters": "a prompt that leaked"}
    with pytest.raises(CorruptDraft, match="num_parameters") as caught:
        parse_manifest(json.dumps(content).encode(), "v1")
    assert "leaked" not in str(caught.value)


def test_status_knows_its_states() -> None:
    status = parse_status(b'{"state": "rolled_back", "reason": "slow", "updated_unix_s": 1}', "v1")
    assert (status.state, status.reason) == (DraftState.ROLLED_BACK, "slow")
    assert parse_status(status.encode(), "v1") == status
    with pytest.raises(CorruptDraft, match="state"):
        parse_status(b'{"state": "fine", "updated_unix_s": 1}', "v1")


def test_wrong_target_and_wrong_vocabulary(manifest: DraftManifest) -> None:
    check_target(manifest, TARGET, TOKENIZER)
    with pytest.raises(WrongTarget, match="made for target demo"):
        check_target(manifest, "sha256:other", TOKENIZER)
    with pytest.raises(WrongTarget, match="vocabulary"):
        check_target(manifest, TARGET, "sha256:other")


def test_versions_sort_by_time_and_tell_contents_apart() -> None:
    first = new_version({"model.safetensors": "00", "config.json": "11"}, 1_795_541_100.9)
    assert first == new_version({"config.json": "11", "model.safetensors": "00"}, 1_795_541_100.1)
    assert first.startswith("20261124T172500Z-")
    assert first != new_version({"model.safetensors": "01", "config.json": "11"}, 1_795_541_100.0)
    assert first < new_version({"a.json": "00"}, 1_795_541_101.0)
    assert is_version(first)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b", ".hidden", "a\n", "ä", "x" * 81, "-v"])
def test_not_a_version(name: str) -> None:
    assert not is_version(name)


@pytest.mark.parametrize(
    ("name", "is_safe"),
    [
        ("model-00001-of-00002.safetensors", True),
        ("added_tokens.json", True),
        ("_x.json", True),
        ("manifest.json", False),
        ("status.json", False),
        ("modeling_evil.py", False),
        ("pytorch_model.bin", False),
        ("model.safetensors.bin", False),
        ("../config.json", False),
        ("/etc/x.json", False),
        (".x.json", False),
        ("config.json\0.safetensors", False),
        ("config.json\n", False),
        ("x" * 200 + ".json", False),
    ],
)
def test_safe_file_names(name: str, is_safe: bool) -> None:
    assert is_safe_file_name(name) is is_safe


def test_move_names_round_trip_and_sort() -> None:
    assert move_generation(move_name(42)) == 42
    assert move_name(9) < move_name(10)
    assert move_generation("moves/.0000000042.json.ab.tmp") is None
    assert move_generation("moves/CURRENT") is None
