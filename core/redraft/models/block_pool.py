"""Ownership of KV blocks: allocation, reference counts and the prefix cache. Pure bookkeeping, no tensors.

One block holds `block_size` consecutive tokens of one sequence in *every* model's cache: a block id addresses the same
slots in the target's KV and in the draft's. A full block whose tokens are final can be *registered* under the hash of
its whole prefix; it stays findable after its last owner released it, until the block is handed out again (least
recently released first). Whether its draft half is filled is a tag of its own, `draft_epoch`, because a prefix hit
that lacks draft KV must be noticed and made up for, not silently used.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

ROOT_HASH = b"redraft"
NO_DRAFT = -1


@dataclass(slots=True)
class _Block:
    num_owners: int = 0
    prefix_hash: bytes | None = None
    draft_epoch: int = NO_DRAFT


def chain_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a prefix that ends with one more full block."""
    return hashlib.blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


class BlockPool:
    """A fixed number of blocks.

    Args:
        num_blocks: blocks in the pool; ids are 0 .. num_blocks - 1.
        block_size: tokens a block holds.
        prefix_cache: whether released blocks can be found again by their content.
    """

    def __init__(self, num_blocks: int, block_size: int, *, prefix_cache: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._blocks = [_Block() for _ in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict((block_id, None) for block_id in range(num_blocks))
        self._by_hash: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks without an owner, those still findable by prefix included."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks for one owner, or None (and no change) if there are not enough."""
        if count > len(self._free):
            return None
        allocated = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block_id in allocated:
            block = self._blocks[block_id]
            self._forget(block_id)
            block.num_owners = 1
        return allocated

    def release(self, block_ids: Sequence[int]) -> None:
        """Give up one ownership of each. A prefix's tail is released first, so that it is also reused first."""
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            assert block.num_owners > 0, f"block {block_id} released without an owner"
            block.num_owners -= 1
            if block.num_owners == 0:
                self._free[block_id] = None
                if block.prefix_hash is None:
                    self._free.move_to_end(block_id, last=False)

    def register(self, block_id: int, prefix_hash: bytes) -> None:
        """Make an owned, full, final block findable. The first block registered under a hash stays the one."""
        block = self._blocks[block_id]
        if self.prefix_cache and block.prefix_hash is None and prefix_hash not in self._by_hash:
            block.prefix_hash = prefix_hash
            self._by_hash[prefix_hash] = block_id

    def acquire_prefix(self, token_ids: Sequence[int]) -> tuple[list[int], bytes]:
        """Own the longest cached chain of full blocks that is a *proper* prefix of `token_ids`.

        At least one token is left over: its logits are needed.

        Returns:
            The block ids in order, and the hash of the prefix they hold.
        """
        found: list[int] = []
        prefix_hash = ROOT_HASH
        for start in range(0, len(token_ids) - self.block_size, self.block_size):
            next_hash = chain_hash(prefix_hash, token_ids[start : start + self.block_size])
            block_id = self._by_hash.get(next_hash)
            if block_id is None:
                break
            found.append(block_id)
            prefix_hash = next_hash
        for block_id in found:
            self._blocks[block_id].num_owners += 1
            self._free.pop(block_id, None)
        return found, prefix_hash

    def mark_draft(self, block_id: int, epoch: int) -> None:
        """Record that the draft of this epoch has filled its half of the block."""
        self._blocks[block_id].draft_epoch = epoch

    def draft_epoch(self, block_id: int) -> int:
        return self._blocks[block_id].draft_epoch

    def _forget(self, block_id: int) -> None:
        block = self._blocks[block_id]
        if block.prefix_hash is not None:
            del self._by_hash[block.prefix_hash]
            block.prefix_hash = None
        block.draft_epoch = NO_DRAFT

    def check_integrity(self, tables: Sequence[Sequence[int]]) -> None:
        """Assert the invariants, given every live block table.

        Raises:
            AssertionError: naming the block at fault.
        """
        owners = [0] * self.num_blocks
        for table in tables:
            assert len(set(table)) == len(table), f"a table holds a block twice: {table}"
            for block_id in table:
                owners[block_id] += 1
        for block_id, block in enumerate(self._blocks):
            assert block.num_owners == owners[block_id], (
                f"block {block_id} counts {block.num_owners} owners but {owners[block_id]} tables hold it"
            )
            assert (block_id in self._free) == (block.num_owners == 0), f"block {block_id} is free and owned"
            if block.prefix_hash is not None:
                assert self._by_hash.get(block.prefix_hash) == block_id, f"block {block_id} has a stale hash"
        assert len(self._by_hash) == sum(block.prefix_hash is not None for block in self._blocks)
