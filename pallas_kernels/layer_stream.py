"""How one thread of the kernel of decoder layers gets its weights: addresses, the ring, and what is copied into it.

``o`` is :class:`pallas_kernels.registers.Registers`, or what the tests have in its place. The idea is described in
:mod:`pallas_kernels.decoder_layers`.
"""

from __future__ import annotations

from typing import Any

from pallas_kernels.layer_plan import (
    CHUNK,
    ENTRY,
    LAG,
    MARKS,
    NAMES,
    PAIRS,
    PIECES,
    ROW,
    ROW_PITCH,
    THREADS,
    WARPS,
    LayerPlan,
    Product,
)


def tiles_of(o: Any, plan: LayerPlan, which: int) -> tuple[Any, Any]:
    """The first tile of a product that is the block's, and how many it has, as ``LayerPlan.share`` deals them out."""
    tiles = plan.products[which].tiles
    first = o.block * tiles // plan.blocks
    return first, (o.block + 1) * tiles // plan.blocks - first


def channel_of(product: Product, tile: Any) -> Any:
    """The first channel of a tile."""
    per = product.apart // PAIRS
    return tile // per * (2 * product.apart) + tile % per * PAIRS


def following(o: Any, plan: LayerPlan, memory: Memory) -> Any:
    """The number of the next layer; of the last, its own."""
    return o.select(memory.layer < plan.layers - 1, memory.layer + 1, plan.layers - 1)


class Memory:
    """Addresses of arrays in memory; of those that each layer has, the ones of the layer at hand.

    Attributes:
        layer: its number.
        epoch: of its packets; none has 0, which is what there is before.
    """

    def __init__(self, o: Any, plan: LayerPlan, ref: dict[str, Any], smem: dict[str, Any]) -> None:
        """Of what ``ref`` names: arrays, and where the layers have each their own, lists of them."""
        self.o, self.plan, self.ref = o, plan, ref
        self.layer = self.epoch = o.constant(0)
        self.table = smem["pointers"]

        def keep() -> None:
            for layer in range(plan.layers):
                for number, name in enumerate(plan.parameters):
                    at = (layer * len(plan.parameters) + number) * 8
                    o.store_shared(self.table + at, o.halves(o.memory(ref[name][layer])))

        # By one thread, straight on: a kernel's parameters cannot be indexed.
        o.when(o.thread < 1, keep)

    def __call__(self, name: str) -> Any:
        """The address of an array."""
        if name not in self.plan.parameters:
            return self.o.memory(self.ref[name])
        return self.of_layer(self.layer, self.o.constant(self.plan.parameters.index(name)))

    def packet(self, name: str, token: Any, number: Any) -> Any:
        """The address of a packet of a sequence."""
        start, count = self.plan.packets[name]
        return self("exchange") + self.o.wide(token * count + number + start) * 8

    def mark(self, o: Any, what: str) -> None:
        """Note that the block's first warp is here, where the plan wants that."""
        if self.plan.traced:
            number = (self.layer * len(MARKS) + MARKS.index(what)) * self.plan.blocks + o.block
            at = self("trace") + o.wide(number) * 8
            o.when(o.thread < 1, lambda: o.note_time(at))

    def of_layer(self, layer: Any, number: Any) -> Any:
        """The address of the array of a layer with a number in ``plan.parameters``."""
        at = self.table + (layer * len(self.plan.parameters) + number) * 8
        return self.o.address(*self.o.load_shared(at, 2))


class Stream:
    """What keeps the ring of a block full: the weights of all its tiles, one product's after another's.

    A stage holds a part of a tile's 16 channels, a row each, and a warp has its row copied by the copy engine, with one
    instruction for 2 KiB. Factors of groups, 32 bytes for each group and half, are copied likewise by the warp that
    uses them, behind the rows: [piece, group, half, pair] of each warp. Not by its threads: what they load comes back
    in the order in which it was asked for, and packets would wait behind all factors that are on their way. A stage is
    full when what 16 warps have asked for has come, and empty when 16 warps have read it.

    A cursor is a layer, the tile in the table, the step in it, and what the table says of the tile. Every warp has one,
    for its row, in shared memory, since registers are few. It runs ahead of what is multiplied, and does not wait where
    the products wait for each other.
    """

    def __init__(self, o: Any, plan: LayerPlan, memory: Memory, smem: dict[str, Any]) -> None:
        """Write the table and make the ring; to be followed by a ``sync``."""
        self.o, self.plan, self.memory = o, plan, memory
        self.ring, self.table = smem["ring"], smem["table"]
        self.full = smem["barriers"]
        self.empty = self.full + 8 * plan.stages
        self.cursor = smem["cursors"] + o.warp * ENTRY
        self.entries = o.constant(0)
        for which, product in enumerate(plan.products):
            first, count = tiles_of(o, plan, which)
            low = channel_of(product, first + o.thread)
            words = [low * product.line, product.line, product.apart * product.line, product.steps, which]
            if plan.factors:
                each = product.channels // product.halves  # of a row of factors
                apart = product.apart if product.halves == 1 else product.inputs // product.group * each
                # From one piece's first factor to the next one's, and from a piece's first to its second.
                across = each * 4 * (product.span // product.group)
                second = each * 4 if product.span // product.group == 2 else 0
                words += [low * 4, apart * 4, across, plan.parameters.index(f"{NAMES[which]}_factors"), second]
            words += [0] * (12 - len(words))
            words = [word if not isinstance(word, int) else o.constant(word) for word in words]
            at = self.table + (self.entries + o.thread) * ENTRY

            def enter(at: Any = at, words: list[Any] = words) -> None:
                for i in range(0, 12, 4):
                    o.store_shared(at + 4 * i, words[i : i + 4])

            o.when(o.thread < count, enter)
            self.entries = self.entries + count

        def begin() -> None:
            zero = o.constant(0)
            o.init_barriers(self.full, 2 * plan.stages, WARPS)
            # A block without tiles finds lines of no bytes.
            o.when(o.equal(self.entries, 0), lambda: [o.store_shared(self.table + i, [zero] * 4) for i in (0, 16, 32)])

        o.when(o.thread < 1, begin)

        def clear(i: Any, carry: list[Any]) -> list[Any]:
            # What lies behind a line is multiplied with zeros, and must not be NaN.
            o.store_shared(self.ring + (o.thread + i * THREADS) * 16, [o.constant(0)] * 4)
            return carry

        whole, rest = divmod(plan.stages * plan.stage // 16, THREADS)
        o.loop(whole, [], clear)
        if rest:
            o.when(o.thread < rest, lambda: [clear(o.constant(whole), []), None][1])
        o.publish_to_copies()

    def fill(self) -> None:
        """Start to copy as much as the ring holds before anything is multiplied."""
        o, plan = self.o, self.plan
        zero = o.constant(0)
        self._go_to(zero, zero)

        def fetch(slot: Any, carry: list[Any]) -> list[Any]:
            self._copy(slot)
            return carry

        o.loop(plan.stages - LAG, [], fetch)

    def _go_to(self, layer: Any, entry: Any) -> None:
        """Put the cursor at the beginning of a tile."""
        o, plan, cursor = self.o, self.plan, self.cursor
        at = self.table + entry * ENTRY
        offset, line, apart, steps = o.load_shared(at, 4)
        which, factors, factors_apart, across = o.load_shared(at + 16, 4)
        there = layer < plan.layers  # behind the last, lines of no bytes, for ever
        held = o.select(there, layer, plan.layers - 1)
        row = o.warp % PAIRS * line + o.select(o.warp < PAIRS, 0, apart)
        source = self.memory.of_layer(held, which) + o.wide(offset) + o.wide(row)
        # By all lanes: it is the same.
        o.store_shared(cursor, [layer, entry, o.constant(0), steps])
        second = o.constant(0)
        if plan.factors:
            number, second, _, _ = o.load_shared(at + 32, 4)
            beside = self.memory.of_layer(held, number) + o.wide(factors + o.warp * across * PIECES)
            o.store_shared(cursor + 32, [*o.halves(beside), factors_apart, across])
        o.store_shared(cursor + 16, [*o.halves(source), o.select(there, line, 0), second])

    def _copy(self, slot: Any) -> None:
        """Start to copy what the cursor stands at into a stage, and move it on: to the next step, or the next tile."""
        o, plan, cursor = self.o, self.plan, self.cursor
        layer, entry, step, steps = o.load_shared(cursor, 4)
        low, high, left, second = o.load_shared(cursor + 16, 4)
        source = o.address(low, high)
        base = self.ring + slot * plan.stage
        size = o.select(left < ROW, left, ROW)
        copies = [(base + o.warp * ROW_PITCH, source, size)]
        if plan.factors:
            low, high, apart, across = o.load_shared(cursor + 32, 4)
            beside = o.address(low, high)
            for group in range(PIECES * plan.factors):  # of the warp
                # The bytes before the group's are there wherever the group is.
                inside = o.warp * (PIECES * CHUNK) + group * (CHUNK // plan.factors) < left
                some = o.select(inside, 4 * PAIRS, o.constant(0))
                piece, within = divmod(group, plan.factors)
                first = beside + o.wide(across * piece) if piece else beside
                first = first + o.wide(second) if within else first
                copies.append((self.factors(slot, group, 0), first, some))
                copies.append((self.factors(slot, group, 1), first + o.wide(apart), some))
        o.copy_rows(copies, self.full + slot * 8)

        def next_tile() -> list[Any]:
            last = self.entries < entry + 2
            self._go_to(o.select(last, layer + 1, layer), o.select(last, 0, entry + 1))
            return []

        def next_step() -> list[Any]:
            o.store_shared(cursor, [layer, entry, step + 1, steps])
            more = o.select(left < ROW, 0, left - ROW)
            o.store_shared(cursor + 16, [*o.halves(source + ROW), more, second])
            if plan.factors:
                ahead = beside + o.wide(across * (WARPS * PIECES))
                o.store_shared(cursor + 32, [*o.halves(ahead), apart, across])
            return []

        o.branch(step + 1 < steps, next_step, next_tile, [])

    def factors(self, slot: Any, group: int, half: int) -> Any:
        """Where a stage has a group of the warp's factors, one for each pair of channels."""
        plan = self.plan
        start = self.ring + slot * plan.stage + 2 * PAIRS * ROW_PITCH
        return start + ((self.o.warp * (PIECES * plan.factors) + group) * 2 + half) * (PAIRS * 4)

    def await_full(self, slot: Any, parity: Any) -> None:
        """Wait until a stage has come."""
        self.o.await_barrier(self.full + slot * 8, parity)

    def release(self, slot: Any, parity: Any) -> None:
        """Say that the warp has read a stage, and refill the one that was read ``LAG`` steps before."""
        o, plan = self.o, self.plan
        o.arrive(self.empty + slot * 8)
        around = slot < LAG
        old = o.select(around, slot + (plan.stages - LAG), slot - LAG)
        # At first the ring's last stages are empty without having been read: the phase before the first has ended.
        o.await_barrier(self.empty + old * 8, o.select(around, parity ^ 1, parity))
        self._copy(old)
