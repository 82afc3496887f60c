"""Which block of the KV cache belongs to whom: the host side of paged attention."""

from __future__ import annotations

from collections.abc import Sequence

from jaxinfer.errors import CapacityError
from pallas_kernels import BLOCK_SIZE

NULL_BLOCK = 0
"""Never allocated and never written: what a block table names past a sequence's end."""


def blocks_for(tokens: int) -> int:
    """Blocks that hold this many tokens."""
    return -(-tokens // BLOCK_SIZE)


class BlockAllocator:
    """Hands out the blocks of one data shard's cache; block 0 is :data:`NULL_BLOCK`.

    Args:
        num_blocks: blocks of the cache, the null block included; at least 2.
    """

    def __init__(self, num_blocks: int) -> None:
        """Start with every block free."""
        if num_blocks < 2:
            raise CapacityError(f"a KV cache needs at least 2 blocks (one is never used), got {num_blocks}")
        self.capacity = num_blocks - 1
        # Last in, first out: a block that was just released is likeliest to be in the L2 cache.
        self._free = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self._used: set[int] = set()

    @property
    def free(self) -> int:
        """The number of free blocks."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` blocks.

        Raises:
            CapacityError: fewer are free; nothing is taken.
        """
        if count < 0 or count > len(self._free):
            raise CapacityError(f"asked for {count} KV blocks, {len(self._free)} of {self.capacity} are free")
        taken = [self._free.pop() for _ in range(count)]
        self._used.update(taken)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back.

        Raises:
            ValueError: a block that is not in use, or is named twice; nothing is released.
        """
        wrong = [block for block in blocks if block not in self._used]
        if wrong or len(set(blocks)) != len(blocks):
            raise ValueError(f"released KV blocks that are not in use, or twice: {list(wrong or blocks)}")
        self._used.difference_update(blocks)
        self._free.extend(reversed(blocks))
