"""Names carry the time of writing and the order of shards, and nothing else passes for one."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redraft.traffic.layout import list_files, new_shard_name, open_root

NOW = 1_795_527_000.0


@given(
    st.floats(0, 4e9),
    st.floats(0, 4e9),
    st.tuples(st.integers(0, 4095), st.integers(0, 4095)),
    st.text("a-/.%é", max_size=3),
)
def test_names_sort_by_time_then_sequence(one: float, other: float, sequences: tuple[int, int], host: str) -> None:
    early, late = sorted([(one, sequences[0]), (other, sequences[1])])
    names = [new_shard_name(unix_s, sequence, host, 7) for unix_s, sequence in (early, late)]
    if late[0] - early[0] > 0.001 or (early[0] == late[0] and early[1] < late[1]):
        assert names == sorted(names)
    assert names[0] != names[1]
    assert names[0].count("/") == 3


def test_listing_reads_the_names_back(tmp_path: Path) -> None:
    name = new_shard_name(NOW + 0.0004, 3, "web-1.example", 7)
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"12345")
    assert name.endswith("-web_1_example-7.parquet")
    (file,), foreign = list_files(*open_root(str(tmp_path)))
    assert (file.path, file.num_bytes, file.schema_version, file.is_temporary) == (str(path), 5, 1, False)
    assert NOW + 0.0004 <= file.written_unix_s <= NOW + 0.0014  # never before the records in it
    assert foreign == []


@pytest.mark.parametrize("wrong", ["x.parquet", "v1/x.parquet", "copy/{}", "{}.bak", "{}.tmp.tmp", ".{}"])
def test_other_names_are_foreign(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / wrong.format(new_shard_name(NOW, 0, "host", 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    assert list_files(*open_root(str(tmp_path))) == ([], [str(path)])


def test_an_unknown_protocol_is_an_error() -> None:
    with pytest.raises(ValueError, match="nope"):
        open_root("nope://bucket")
