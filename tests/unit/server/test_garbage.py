"""What is loaded before the server is ready costs no collection afterwards."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from redraft_server.garbage import settle


class Node:
    """Refers to itself: only a full collection finds it."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def _unfreeze() -> Iterator[None]:
    yield
    gc.unfreeze()


def test_what_was_there_is_not_looked_at_again_and_what_comes_still_is() -> None:
    kept = [Node() for _ in range(1000)]
    settle()
    assert gc.get_freeze_count() > len(kept)
    tracked = {id(each) for each in gc.get_objects()}
    assert not any(id(node) in tracked for node in kept)
    for _ in range(10):
        Node()
    assert gc.collect() >= 10
