"""Blocks are owned, shared, found again and handed out in the right order, whatever the sequence of operations."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from redraft.models.block_pool import NO_DRAFT, ROOT_HASH, BlockPool, chain_hash

SIZE = 2


@dataclass
class Table:
    tokens: tuple[int, ...]
    block_ids: list[int]
    num_registered: int
    prefix_hash: bytes


class PoolMachine(RuleBasedStateMachine):
    """Against a model that knows what every findable block holds."""

    cached = True

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(8, SIZE, prefix_cache=self.cached)
        self.tables: list[Table] = []
        self.findable: dict[tuple[int, ...], int] = {}  # prefix -> block that ends it
        self.drafts: dict[int, int] = {}

    def _handed_out(self, block_ids: list[int]) -> None:
        """The model forgets what the blocks held."""
        for block_id in block_ids:
            assert self.pool.draft_epoch(block_id) == NO_DRAFT
            self.drafts.pop(block_id, None)
            self.findable = {prefix: held for prefix, held in self.findable.items() if held != block_id}

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple))
    def start(self, tokens: tuple[int, ...]) -> None:
        found, prefix_hash = self.pool.acquire_prefix(tokens)
        expected = []
        for end in range(SIZE, len(tokens), SIZE):
            if tokens[:end] not in self.findable:
                break
            expected.append(self.findable[tokens[:end]])
        assert found == expected
        assert len(found) * SIZE < len(tokens)
        missing = self.pool.blocks_for(len(tokens)) - len(found)
        free = self.pool.num_free
        own = self.pool.allocate(missing)
        if own is None:
            assert free < missing
            assert self.pool.num_free == free
            self.pool.release(found)
            return
        self._handed_out(own)
        self.tables.append(Table(tokens, found + own, len(found), prefix_hash))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        own = self.pool.allocate(1)
        if own is not None:
            self._handed_out(own)
            table.block_ids += own
            table.tokens += (0,) * (len(table.block_ids) * SIZE - len(table.tokens))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def register(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        end = (table.num_registered + 1) * SIZE
        if end > len(table.tokens):
            return
        table.prefix_hash = chain_hash(table.prefix_hash, table.tokens[end - SIZE : end])
        block_id = table.block_ids[table.num_registered]
        self.pool.register(block_id, table.prefix_hash)
        table.num_registered += 1
        if self.cached:
            self.findable.setdefault(table.tokens[:end], block_id)

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), epoch=st.integers(0, 3))
    def mark_draft(self, data: st.DataObject, epoch: int) -> None:
        block_id = data.draw(st.sampled_from(data.draw(st.sampled_from(self.tables)).block_ids))
        self.pool.mark_draft(block_id, epoch)
        self.drafts[block_id] = epoch

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = data.draw(st.sampled_from(self.tables))
        self.tables.remove(table)
        self.pool.release(table.block_ids)

    @invariant()
    def keeps_its_books(self) -> None:
        self.pool.check_integrity([table.block_ids for table in self.tables])
        owned = {block_id for table in self.tables for block_id in table.block_ids}
        assert self.pool.num_free == self.pool.num_blocks - len(owned)
        for block_id, epoch in self.drafts.items():
            assert self.pool.draft_epoch(block_id) == epoch


class UncachedPoolMachine(PoolMachine):
    cached = False


TestPool = PoolMachine.TestCase
TestUncachedPool = UncachedPoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestUncachedPool.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)


def filled(pool: BlockPool, tokens: tuple[int, ...]) -> list[int]:
    """Blocks that hold `tokens`, all full ones registered."""
    block_ids = pool.allocate(pool.blocks_for(len(tokens)))
    assert block_ids is not None
    prefix_hash = ROOT_HASH
    for index in range(len(tokens) // pool.block_size):
        prefix_hash = chain_hash(prefix_hash, tokens[index * pool.block_size : (index + 1) * pool.block_size])
        pool.register(block_ids[index], prefix_hash)
    return block_ids


def test_findable_blocks_are_reused_last_and_least_recently_released_first() -> None:
    pool = BlockPool(6, SIZE)
    old, new = filled(pool, (1, 1, 2, 2)), filled(pool, (3, 3, 4, 4))
    plain = pool.allocate(2)
    assert plain is not None
    pool.release(old)
    pool.release(new)
    pool.release(plain)
    order = [block_id for _ in range(6) for block_id in pool.allocate(1) or []]
    # blocks without content first; then the older prefix, its tail before its head
    assert order == [*plain, old[1], old[0], new[1], new[0]]


def test_using_a_prefix_makes_it_recent() -> None:
    pool = BlockPool(4, SIZE)
    first, second = filled(pool, (1, 1, 9)), filled(pool, (2, 2, 9))
    pool.release(first)
    pool.release(second)
    found, _ = pool.acquire_prefix((1, 1, 5))
    assert found == first[:1]
    pool.release(found)
    assert pool.allocate(3) is not None
    assert pool.acquire_prefix((1, 1, 5))[0] == first[:1]
    assert pool.acquire_prefix((2, 2, 5))[0] == []


@pytest.mark.parametrize("length", range(1, 8))
def test_a_prefix_never_covers_all_tokens(length: int) -> None:
    pool = BlockPool(8, SIZE)
    tokens = tuple(range(length))
    filled(pool, tokens)
    found, _ = pool.acquire_prefix(tokens)
    assert len(found) == (length - 1) // SIZE


def test_the_same_block_after_another_prefix_is_not_found() -> None:
    pool = BlockPool(8, SIZE)
    filled(pool, (1, 1, 2, 2, 9))
    assert pool.acquire_prefix((3, 3, 2, 2, 9))[0] == []


def test_the_draft_half_survives_release_but_not_reuse() -> None:
    pool = BlockPool(2, SIZE)
    blocks = filled(pool, (1, 1, 9))
    pool.mark_draft(blocks[0], 7)
    pool.release(blocks)
    found, _ = pool.acquire_prefix((1, 1, 5))
    assert pool.draft_epoch(found[0]) == 7
    pool.release(found)
    assert pool.allocate(2) is not None
    assert [pool.draft_epoch(block_id) for block_id in range(2)] == [NO_DRAFT, NO_DRAFT]


def test_without_prefix_cache_nothing_is_found() -> None:
    pool = BlockPool(4, SIZE, prefix_cache=False)
    pool.release(filled(pool, (1, 1, 2, 2)))
    assert pool.acquire_prefix((1, 1, 2, 2)) == ([], ROOT_HASH)


def test_allocation_is_all_or_nothing() -> None:
    pool = BlockPool(3, SIZE)
    held = pool.allocate(2)
    assert pool.allocate(2) is None
    assert pool.num_free == 1
    assert held is not None
    pool.release(held)
    with pytest.raises(AssertionError, match="without an owner"):
        pool.release(held)
