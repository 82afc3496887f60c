"""What one thread of the kernel of decoder layers does for attention: of one token a sequence, over KV blocks.

A unit is a sequence, a key head and one of the ``splits`` of its keys; a block of threads takes every ``blocks``-th.
Its warps take ``tokens`` keys at a time. A lane loads 8 entries of a key or value, all of its loads before the first is
used; lanes that share a key add their products up. What the warps have found is put together in shared memory, what
the splits have by the block of the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pallas_kernels.attention import BLOCK_SIZE
from pallas_kernels.layer_plan import THREADS, WARPS, LayerPlan
from pallas_kernels.layer_stream import Memory

NEVER = -1e30
"""A score that is none; finite, since it is subtracted from itself."""

LOG2E = 1.4426950408889634

FETCHED = 4
"""Steps of a warp whose keys and values are asked for when the layer begins."""

HEADS = 2
"""Query heads that a warp attends with at once; more would not fit into its registers, and are further passes."""


def attend(o: Any, plan: LayerPlan, memory: Memory, smem: dict[str, Any]) -> None:
    """Attend for the block's units."""

    def unit(whose: Any, split: Any) -> None:
        def heads(number: Any, carry: list[Any]) -> list[Any]:
            first = number * HEADS
            own = o.fresh()
            _put_down(own, plan, smem, first, _of_warp(own, plan, memory, whose, split, first))
            return carry

        o.loop(-(-plan.per_group // HEADS), [], heads)
        o.sync()
        memory.mark(o, "keys")
        for part in range(-(-plan.per_group * plan.dim // THREADS)):
            _together(o.fresh(), plan, memory, smem, whose, split, part * THREADS)
        o.sync()
        memory.mark(o, "attended")

    _each_unit(o, plan, unit)


@dataclass(frozen=True)
class Keys:
    """The keys of a unit that a warp takes: every sixteenth step of ``tokens`` of them.

    Attributes:
        sequence, group: whose they are.
        length: of the sequence, the new token included.
        before: keys that are in the cache; the new token's is not read there, where it may not be yet.
        first: number of the first that is seen.
        mine, count: the warp's first step, and how many it has.
    """

    sequence: Any
    group: Any
    length: Any
    before: Any
    first: Any
    mine: Any
    count: Any

    @staticmethod
    def of(o: Any, plan: LayerPlan, memory: Memory, whose: Any, split: Any) -> Keys:
        """Those of the warp."""
        sequence, group = whose // plan.groups, whose % plan.groups
        length = o.load_memory(memory("lengths") + o.wide(sequence) * 4)[0]
        before = o.select(length < 1, 0, length - 1)
        first = o.constant(0)
        if plan.window is not None:
            first = o.select(length < plan.window, 0, length - plan.window)
        begin, end = first // plan.tokens, (before + (plan.tokens - 1)) // plan.tokens
        whole = o.select(begin < end, end - begin, 0)
        low, high = begin + whole * split // plan.splits, begin + whole * (split + 1) // plan.splits
        mine = low + o.warp
        count = (high + (WARPS - 1) - mine) // WARPS  # the first is at most 15 more than the last
        return Keys(sequence, group, length, before, first, mine, count)

    def place(self, o: Any, plan: LayerPlan, memory: Memory, step: Any) -> tuple[Any, Any, Any]:
        """A step's first key, where a lane's part of it is, and whether the table names a block that there is."""
        lanes = plan.dim // 8  # that share a key
        token = (self.mine + step * WARPS) * plan.tokens
        table = memory("tables") + o.wide(self.sequence * plan.width) * 4
        block = o.load_memory(table + o.wide(token // BLOCK_SIZE) * 4)[0]
        there = block < plan.kv_blocks
        block = o.select(there, block, 0)
        row = (block * plan.groups + self.group) * BLOCK_SIZE + token % BLOCK_SIZE + o.lane // lanes
        return token, o.wide(row) * (plan.dim * 2) + o.wide(o.lane % lanes * 16), there


def fetch(o: Any, plan: LayerPlan, memory: Memory) -> None:
    """Have the first keys and values of the block's units brought into the L2 cache, long before they are attended to.

    Loads of a warp come back in the order in which they were asked for, those of what others send too: what memory is
    slow to give would be waited for twice.
    """

    def unit(whose: Any, split: Any) -> None:
        own = Keys.of(o, plan, memory, whose, split)
        caches = [memory(name) for name in ("keys", "values")]
        rows = 32 // (plan.dim // 8)

        def ask(step: Any, carry: list[Any]) -> list[Any]:
            _, at, _ = own.place(o, plan, memory, step)
            for number in range(plan.tokens // rows):
                for start in caches:
                    o.prefetch(start + at + number * rows * plan.dim * 2)
            return carry

        o.loop(o.select(own.count < FETCHED, own.count, FETCHED), [], ask)

    _each_unit(o, plan, unit)


def _each_unit(o: Any, plan: LayerPlan, do: Callable[[Any, Any], None]) -> None:
    """Do something for each unit of the block: its sequence and key head, in one number, and its split."""
    units = plan.m * plan.groups * plan.splits
    count = (o.constant(plan.blocks - 1 + units) - o.block) // plan.blocks

    def unit(i: Any, carry: list[Any]) -> list[Any]:
        one = o.block + i * plan.blocks
        do(*((one // plan.splits, one % plan.splits) if plan.splits > 1 else (one, o.constant(0))))
        return carry

    o.loop(count, [], unit)


def _of_warp(o: Any, plan: LayerPlan, memory: Memory, whose: Any, split: Any, first_head: Any) -> list[list[Any]]:
    """What a warp finds in its keys: for some query heads the largest score, the sum, and its lane's 8 entries."""
    lanes = plan.dim // 8  # that share a key
    rows = 32 // lanes
    loads, heads = plan.tokens // rows, range(min(HEADS, plan.per_group))
    own, own_row = Keys.of(o, plan, memory, whose, split), o.lane // lanes
    sequence, group, before, first = own.sequence, own.group, own.before, own.first

    def receive(numbers: list[Any]) -> list[Any]:
        """A lane's 8 entries of heads that were sent: four words each."""
        starts = [((group * (plan.per_group + 2) + number) * plan.dim + o.lane % lanes * 8) // 2 for number in numbers]
        both = [memory.packet("heads", sequence, at + j) for at in starts for j in (0, 2)]
        found: list[Any] = o.receive(both, memory.epoch, pairs=True)
        return found

    numbers = []
    for head in heads:
        number = first_head + head
        if plan.per_group % HEADS and plan.per_group > HEADS:  # there may be none: its values go nowhere
            number = o.select(number < plan.per_group, number, 0)
        numbers.append(number)
    # One warp has the new token's key and value as well, which come from where the query does: with them it begins.
    newest = [o.constant(plan.per_group + i) for i in range(2)]
    has_newest = (o.constant(0) < own.length) & o.equal(split * WARPS + o.warp, 0)
    none = [o.constant(0)] * 8
    like = [o.constant(0)] * (4 * len(numbers) + 8)
    words = o.branch(has_newest, lambda: receive([*numbers, *newest]), lambda: [*receive(numbers), *none], like)
    memory.mark(o, "query")
    values = [value for word in words for value in o.unpack(plan.kind, word)]
    queries = [values[8 * head : 8 * head + 8] for head in heads]
    key, value = values[-16:-8], values[-8:]
    start = []
    for query in queries:
        score = key[0] * query[0]
        for a, b in zip(key[1:], query[1:], strict=True):
            score = o.fma(a, b, score)
        for apart in (1, 2, 4, 8, 16):
            if apart < lanes:
                score = score + o.across(score, apart)
        counted = has_newest & (own_row < 1)
        start += [
            o.select(has_newest, score * (plan.scale * LOG2E), NEVER), o.select(counted, o.constant(1.0), 0.0),
            *(o.select(counted, entry, 0.0) for entry in value),
        ]  # fmt: skip

    def add(carry: list[Any], keys: list[list[Any]], values: list[list[Any]], seen: list[Any]) -> list[Any]:
        """Attend to some keys more: of each load a lane's 8 entries of a key and a value, and whether it is seen."""
        scores: list[list[Any]] = [[] for _ in heads]
        for words in keys:
            key = [v for word in words for v in o.unpack(plan.kind, word)]
            for head in heads:
                score = key[0] * queries[head][0]
                for a, b in zip(key[1:], queries[head][1:], strict=True):
                    score = o.fma(a, b, score)
                scores[head].append(score * (plan.scale * LOG2E))
        weights, state = [], []
        for head in heads:
            largest, total = carry[10 * head], carry[10 * head + 1]
            own = scores[head]
            for apart in (1, 2, 4, 8, 16):
                if apart < lanes:
                    own = [score + o.across(score, apart) for score in own]
            own = [o.select(inside, score, NEVER) for inside, score in zip(seen, own, strict=True)]
            top = largest
            for score in own:
                top = o.maximum(top, score)
            for apart in (1, 2, 4, 8, 16):
                if apart >= lanes:
                    top = o.maximum(top, o.across(top, apart))
            weight = [o.select(inside, o.exp2(score - top), 0.0) for inside, score in zip(seen, own, strict=True)]
            less = o.exp2(largest - top)
            total = total * less
            for value in weight:
                total = total + value
            weights.append(weight)
            state.append([top, total, *(value * less for value in carry[10 * head + 2 : 10 * head + 10])])
        for load, words in enumerate(values):
            # What lies behind a sequence's end may be anything, NaN included.
            value = [v for word in words for v in o.unpack(plan.kind, o.select(seen[load], word, 0))]
            for head in heads:
                state[head][2:] = [
                    o.fma(weights[head][load], a, b) for a, b in zip(value, state[head][2:], strict=True)
                ]
        return [value for head in state for value in head]

    def step(i: Any, carry: list[Any]) -> list[Any]:
        token, at, there = own.place(o, plan, memory, i)
        keys, values = (
            [o.load_memory(memory(name) + at + number * rows * plan.dim * 2, 4) for number in range(loads)]
            for name in ("keys", "values")
        )
        seen = []
        for number in range(loads):
            key = token + own_row + number * rows
            inside = there & (key < before)
            seen.append(inside if plan.window is None else inside & (first < key + 1))
        return add(carry, keys, values, seen)

    carry = list(o.loop(own.count, start, step))
    found = []
    for head in heads:
        largest, *sums = carry[10 * head : 10 * head + 10]
        for apart in (1, 2, 4, 8, 16):
            if apart >= lanes:
                sums = [value + o.across(value, apart) for value in sums]
        found.append([largest, *sums])
    return found


def _put_down(o: Any, plan: LayerPlan, smem: dict[str, Any], first: Any, found: list[list[Any]]) -> None:
    """Keep what a warp has found: [warp, head, entry], and after all of them [warp, head, 2]."""
    base, lanes = smem["work"], plan.dim // 8
    beside = base + WARPS * plan.per_group * plan.dim * 4
    for head, (largest, total, *values) in enumerate(found):
        number = o.warp * plan.per_group + first + head
        there = o.lane < lanes
        if plan.per_group % HEADS and head:
            there = there & (first + head < plan.per_group)

        def keep(number: Any = number, largest: Any = largest, total: Any = total, values: Any = values) -> None:
            at = base + (number * plan.dim + o.lane * 8) * 4
            o.store_shared(at, values[:4])
            o.store_shared(at + 16, values[4:])
            o.store_shared(beside + number * 8, [largest])  # by all: it is the same
            o.store_shared(beside + number * 8 + 4, [total])

        o.when(there, keep)


def _put_together(o: Any, parts: list[tuple[Any, Any, Any]]) -> tuple[Any, Any, Any]:
    """Largest score, sum and weighted values of all parts from those of each."""
    top = parts[0][0]
    for largest, _, _ in parts[1:]:
        top = o.maximum(top, largest)
    total = value = o.constant(0.0)
    for largest, one, entry in parts:
        factor = o.exp2(largest - top)
        total, value = o.fma(factor, one, total), o.fma(factor, entry, value)
    return top, total, value


def _together(
    o: Any, plan: LayerPlan, memory: Memory, smem: dict[str, Any], whose: Any, split: Any, first: int
) -> None:
    """Put together what the warps, and of the first split also what the others, have of 512 entries of the heads."""
    size = plan.per_group * plan.dim
    thread = o.thread + first
    active = thread < size
    thread = o.select(active, thread, 0) if size - first < THREADS else thread
    head = thread // plan.dim
    base = smem["work"]
    beside = base + WARPS * size * 4
    parts = []
    for warp in range(WARPS):
        largest, total = (o.float_of(w) for w in o.load_shared(beside + (head + warp * plan.per_group) * 8, 2))
        value = o.float_of(o.load_shared(base + (thread + warp * size) * 4)[0])
        parts.append((largest, total, value))
    top, total, value = _put_together(o, parts)
    epoch, (start, _) = memory.epoch, plan.packets["partial"]
    each = plan.per_group * (plan.dim + 2)

    def partial(number: Any, place: Any) -> Any:
        return memory("exchange") + o.wide((whose * plan.splits + number) * each + place + start) * 8

    def leave() -> None:
        o.send(partial(split, thread), value, epoch)

        def sizes() -> None:
            o.send(partial(split, size + 2 * head), top, epoch)
            o.send(partial(split, size + 2 * head + 1), total, epoch)

        o.when(o.equal(thread % plan.dim, 0), sizes)

    def finish(parts: list[tuple[Any, Any, Any]]) -> None:
        _, total, value = _put_together(o, parts)
        value = o.select(o.constant(0.0) < total, o.divide(value, total), 0.0)
        word = o.pack(plan.kind, value, o.across(value, 1))
        at = memory.packet("attended", whose // plan.groups, (whose % plan.groups * size + thread) // 2)
        o.when(active & o.equal(thread % 2, 0), lambda: o.send(at, word, epoch))

    def collect() -> None:
        found, some = (top, total, value), 4 if plan.per_group <= HEADS else 2  # registers for as many at once
        for i in range(1, plan.splits, some):
            places = (size + 2 * head, size + 2 * head + 1, thread)
            wanted = [partial(o.constant(j), at) for j in range(i, min(i + some, plan.splits)) for at in places]
            words = [o.float_of(word) for word in o.receive(wanted, epoch)]
            parts = [(words[j], words[j + 1], words[j + 2]) for j in range(0, len(words), 3)]
            found = _put_together(o, [found, *parts])
        finish([found])

    if plan.splits == 1:
        finish([(top, total, value)])
        return
    o.when(active & (o.constant(0) < split), leave)
    o.when(o.equal(split, 0), collect)
