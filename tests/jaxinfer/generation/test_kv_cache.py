from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxinfer.errors import CapacityError
from jaxinfer.generation.kv_cache import NULL_BLOCK, BlockAllocator, blocks_for


@given(tokens=st.integers(0, 1 << 20))
def test_blocks_hold_their_tokens_and_no_block_is_empty(tokens):
    blocks = blocks_for(tokens)
    assert 64 * blocks >= tokens > 64 * (blocks - 1) or tokens == blocks == 0


@pytest.mark.parametrize("num_blocks", [-1, 0, 1])
def test_a_cache_without_a_block_to_give_is_refused(num_blocks):
    with pytest.raises(CapacityError, match=f"at least 2 blocks .* got {num_blocks}"):
        BlockAllocator(num_blocks)


class Allocation(RuleBasedStateMachine):
    """Any order of taking and giving back: blocks are neither lost nor owned twice."""

    @initialize(num_blocks=st.integers(2, 20))
    def start(self, num_blocks):
        self.allocator = BlockAllocator(num_blocks)
        self.owned: list[list[int]] = []
        self.num_blocks = num_blocks

    @rule(count=st.integers(-1, 22))
    def allocate(self, count):
        free = self.allocator.free
        if 0 <= count <= free:
            blocks = self.allocator.allocate(count)
            assert len(blocks) == count
            self.owned.append(blocks)
        else:
            with pytest.raises(CapacityError, match=f"asked for {count} KV blocks, {free} of"):
                self.allocator.allocate(count)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def release(self, data):
        blocks = self.owned.pop(data.draw(st.integers(0, len(self.owned) - 1)))
        kept = data.draw(st.integers(0, len(blocks)))
        self.allocator.release(blocks[kept:])
        self.owned.append(blocks[:kept])

    @rule(data=st.data())
    def release_what_is_not_owned(self, data):
        used = sorted(block for blocks in self.owned for block in blocks)
        stranger = data.draw(st.integers(-2, self.num_blocks + 2).filter(lambda block: block not in used))
        with pytest.raises(ValueError, match="not in use"):
            self.allocator.release([*used[:1], stranger])

    @precondition(lambda self: any(self.owned))
    @rule(data=st.data())
    def release_twice_at_once(self, data):
        block = data.draw(st.sampled_from([block for blocks in self.owned for block in blocks]))
        with pytest.raises(ValueError, match="twice"):
            self.allocator.release([block, block])

    @invariant()
    def every_block_is_free_or_owned_once(self):
        used = [block for blocks in self.owned for block in blocks]
        assert len(set(used)) == len(used)
        assert set(used) <= set(range(1, self.num_blocks))
        assert NULL_BLOCK not in used
        assert self.allocator.free == self.num_blocks - 1 - len(used)
        assert self.allocator.capacity == self.num_blocks - 1


TestAllocation = Allocation.TestCase


def test_a_block_that_was_just_released_is_given_out_first():
    allocator = BlockAllocator(9)
    first, second = allocator.allocate(2), allocator.allocate(3)
    allocator.release(first)
    assert allocator.allocate(2) == first
    allocator.release(second[:1])
    assert allocator.allocate(2)[0] == second[0]
