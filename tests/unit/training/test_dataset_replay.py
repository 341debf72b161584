"""The data set on disk, and the memory of earlier traffic."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from redraft.sampling.params import Coupling, SamplingParams
from redraft_training.dataset import store
from redraft_training.dataset.errors import DatasetUnreadable
from redraft_training.dataset.example import Example
from redraft_training.dataset.read import Dataset, split
from redraft_training.dataset.replay import Replay, ReplaySettings, quotas
from redraft_training.dataset.select import Selection, TargetIdentity
from redraft_training.dataset.store import load_dataset, read_examples, save_dataset, write_examples
from tests.unit.training.dataset_examples import IDENTITY, example

ALL = Selection(held_out_share=0.0)
OTHER = TargetIdentity("sha256:other", "sha256:2", IDENTITY.vocab_size)


def traffic(domain: str, count: int, first: int = 0) -> list[Example]:
    return [example(f"{domain}{i}", 3, seed=first + i, domain=domain) for i in range(count)]


def dataset(*examples: Example, share: float = 0.0) -> Dataset:
    return split(examples, share, newest_unix_s=max(e.created_unix_s for e in examples))


def names(examples: tuple[Example, ...]) -> set[str]:
    return {e.request_id for e in examples}


def test_examples_come_back_as_they_were(tmp_path: Path) -> None:
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(seed=2**64 - 1, coupling=Coupling.MAXIMAL, logit_bias=((3, -1.5), (4, 100.0))),
        SamplingParams(temperature=0.7, top_k=3, top_p=0.4, min_p=0.1, repetition_penalty=1.1, frequency_penalty=-0.5),
    ]
    examples = [example(f"ü{i}", num_output=i % 9 + 1, seed=i, params=params[i % 3], tenant="a") for i in range(300)]
    examples.append(example("bare", branches=(), labels=(None,) * 6))
    greedy = tuple(label and replace(label, sampling_logsumexp=None) for label in example().labels)
    examples.append(example("greedy", labels=greedy, params=SamplingParams(temperature=0.0)))
    write_examples(tmp_path / "e.parquet", examples, IDENTITY, {"seed": 3})
    found, state = read_examples(tmp_path / "e.parquet", IDENTITY)
    assert found == examples
    assert state == {"seed": 3}
    assert os.stat(tmp_path / "e.parquet").st_mode & 0o777 == 0o600


def test_a_data_set_is_saved_whole_and_once(tmp_path: Path) -> None:
    made = dataset(*traffic("a", 30), share=0.3)
    save_dataset(tmp_path / "d", made, IDENTITY)
    assert load_dataset(tmp_path / "d", IDENTITY) == made
    with pytest.raises(FileExistsError):
        save_dataset(tmp_path / "d", made, IDENTITY)
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "missing", "format"])
def test_damaged_or_foreign_files_are_refused(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e.parquet"
    write_examples(path, traffic("a", 40), IDENTITY)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[200] ^= 0xFF
        path.write_bytes(data)
    elif damage == "format":
        monkeypatch.setattr(store, "FORMAT_VERSION", 2)
    elif damage == "missing":
        path.unlink()
    with pytest.raises(DatasetUnreadable, match=r"e\.parquet"):
        read_examples(path, OTHER if damage == "foreign" else IDENTITY)


def test_quotas_are_even_and_nothing_is_left_over() -> None:
    assert quotas({"chat": 900, "code": 50, "sql": 400}, 450) == {"chat": 200, "code": 50, "sql": 200}
    assert quotas({"a": 5, "b": 5}, 100) == {"a": 5, "b": 5}
    assert sum(quotas({"a": 50, "b": 50, "c": 50}, 100).values()) == 100
    assert quotas({}, 10) == {}
    assert quotas({"a": 3}, 0) == {"a": 0}


def test_old_domains_are_remembered_beside_the_newest_traffic(tmp_path: Path) -> None:
    settings = ReplaySettings(recent_examples=20, memory_examples=12)
    replay = Replay(tmp_path, IDENTITY, settings)
    old = traffic("a", 60)
    first = replay.mix(dataset(*old), ALL)
    assert names(first.dataset.training) == names(tuple(old[-20:]))
    assert len(first.training_memory) == 12
    replay.save(first)
    # the log has forgotten domain a
    replay = Replay(tmp_path, IDENTITY, settings)
    new = traffic("b", 40, first=1000)
    second = replay.mix(dataset(*new), ALL)
    assert names(second.dataset.training) == names(tuple(new[-20:])) | names(first.training_memory)
    assert second.dataset.report.replayed == {"a": 12}
    assert {d: s.examples for d, s in second.dataset.report.training.items()} == {"a": 12, "b": 20}
    kept = [e.domain for e in second.training_memory]
    assert (kept.count("a"), kept.count("b")) == (6, 6)
    assert second.dataset.report.watermark.num_examples == 32


def test_a_cycle_that_is_repeated_ends_with_the_same_memory(tmp_path: Path) -> None:
    """Killed after the save, run again on the same log: nothing drifts. Order and pieces do not matter either."""
    settings = ReplaySettings(recent_examples=5, memory_examples=10)
    examples = traffic("a", 50) + traffic("b", 50, first=30)
    replay = Replay(tmp_path / "1", IDENTITY, settings)
    once = replay.mix(dataset(*examples), ALL)
    replay.save(once)
    again = Replay(tmp_path / "1", IDENTITY, settings).mix(dataset(*examples), ALL)
    assert again.training_memory == once.training_memory
    pieces = Replay(tmp_path / "2", IDENTITY, settings)
    for part in (examples[70:], examples[20:70], examples[:20]):
        pieces.save(pieces.mix(dataset(*part), ALL))
    assert names(pieces.mix(dataset(*examples[:1]), ALL).training_memory) == names(once.training_memory)


def test_the_memory_is_a_uniform_sample() -> None:
    """Over many seeds early and late traffic are kept equally often."""
    examples = dataset(*traffic("a", 40))
    kept = [0] * 40
    for seed in range(200):
        settings = ReplaySettings(recent_examples=1, memory_examples=10, seed=seed)
        for made in Replay(Path("/nonexistent"), IDENTITY, settings).mix(examples, ALL).training_memory:
            kept[int(made.request_id[1:])] += 1
    assert sum(kept) == 2000
    # 200 draws at 1/4 each: mean 50, standard deviation 6.1
    assert min(kept) > 25
    assert max(kept) < 75
    assert abs(sum(kept[:20]) - 1000) < 100


def test_held_out_traffic_is_remembered_but_never_trained_on(tmp_path: Path) -> None:
    selection = Selection(held_out_share=0.3)
    settings = ReplaySettings(recent_examples=100, memory_examples=20, held_out_memory=8)
    replay = Replay(tmp_path, IDENTITY, settings)
    first = replay.mix(dataset(*traffic("a", 60), share=0.3), selection)
    replay.save(first)
    second = replay.mix(dataset(*traffic("b", 60, first=500), share=0.3), selection)
    assert {e.domain for e in second.dataset.held_out} == {"a", "b"}
    assert sum(e.domain == "a" for e in second.dataset.held_out) == 8
    assert names(second.dataset.held_out).isdisjoint(names(second.dataset.training))
    wider = replay.mix(dataset(*traffic("b", 60, first=500), share=0.9), Selection(held_out_share=0.9))
    assert len(wider.dataset.training) < 20  # what is held out now is not trained on, remembered or not
    assert names(wider.dataset.held_out).isdisjoint(names(wider.dataset.training))


def test_what_was_taken_back_or_is_too_old_leaves_the_memory(tmp_path: Path) -> None:
    settings = ReplaySettings(recent_examples=1, memory_examples=100, max_age_s=50.0)
    replay = Replay(tmp_path, IDENTITY, settings)
    old = [replace(e, tenant="x" if i == 9 else "y") for i, e in enumerate(traffic("a", 10))]
    replay.save(replay.mix(dataset(*old), ALL))
    late = example("late", 3, created_unix_s=1055.0)
    selection = replace(ALL, exclude_request_ids=frozenset({"a8"}), exclude_tenants=frozenset({"x"}))
    mixture = replay.mix(dataset(late), selection)
    assert names(mixture.dataset.training) == {"a5", "a6", "a7", "late"}  # created at 1005, 1006, 1007
    assert names(mixture.training_memory) == {"a5", "a6", "a7", "late"}


def test_a_damaged_memory_is_refused(tmp_path: Path) -> None:
    replay = Replay(tmp_path, IDENTITY)
    replay.save(replay.mix(dataset(*traffic("a", 10)), ALL))
    write_examples(tmp_path / "training.parquet", traffic("b", 3), IDENTITY, {"sha256": "lies"})
    with pytest.raises(DatasetUnreadable, match="delete it to start afresh"):
        Replay(tmp_path, IDENTITY)
    with pytest.raises(DatasetUnreadable, match="another target"):
        Replay(tmp_path, OTHER)
