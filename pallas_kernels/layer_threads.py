"""What one thread of the kernel of decoder layers does for its products: fetch, stage x, multiply, finish.

``o`` is :class:`pallas_kernels.registers.Registers`, or what the tests have in its place; ``memory`` has the
addresses of arrays, ``smem`` names those in shared memory. The idea is described in
:mod:`pallas_kernels.decoder_layers`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pallas_kernels.attention import BLOCK_SIZE
from pallas_kernels.layer_plan import (
    CHUNK,
    ENTRY,
    LAG,
    NAMES,
    PAIRS,
    PIECES,
    ROW,
    ROW_PITCH,
    THREADS,
    WARPS,
    LayerPlan,
    Norm,
    Product,
)
from pallas_kernels.quantized_threads import ordered, run_order, widen

QKV, OUT, UP, DOWN = range(4)
SOURCES = {QKV: "stream", OUT: "attended", UP: "middle", DOWN: "between"}
TARGETS = {OUT: "middle", UP: "between", DOWN: "stream"}


def tiles_of(o: Any, plan: LayerPlan, which: int) -> tuple[Any, Any]:
    """The block's first tile of a product, and how many it has: every ``blocks``-th."""
    start = (o.block + plan.starts[which]) % plan.blocks
    return start, (o.constant(plan.products[which].tiles + plan.blocks - 1) - start) // plan.blocks


def channel_of(product: Product, tile: Any) -> Any:
    """The first channel of a tile."""
    per = product.apart // PAIRS
    return tile // per * (2 * product.apart) + tile % per * PAIRS


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
        self.table = o.shared(smem["pointers"])

        def keep() -> None:
            for layer in range(plan.layers):
                for number, name in enumerate(plan.parameters):
                    at = (layer * len(plan.parameters) + number) * 8
                    o.store_shared(self.table + at, o.halves(o.memory(ref[name][layer])))

        # One thread: of a branch for each warp ptxas makes a table of jumps, which ends as an illegal instruction.
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

    def of_layer(self, layer: Any, number: Any) -> Any:
        """The address of the array of a layer with a number in ``plan.parameters``."""
        at = self.table + (layer * len(self.plan.parameters) + number) * 8
        return self.o.address(*self.o.load_shared(at, 2))


class Stream:
    """What keeps the ring of a block full: the weights of all its tiles, one product's after another's.

    A stage holds a part of a tile's 16 channels, a row each, and a warp has it copied by the copy engine: so loads of
    what other blocks hand on do not queue behind weights, as they do behind copies by threads. Factors of groups, few
    bytes in short pieces, are copied by the threads that use them. A stage is full when its 16 rows have come, and
    empty when 16 warps have read it.

    A cursor is a layer, the tile in the table, the step in it, and what the table says of the tile. Every warp has one,
    for its row, in shared memory, since registers are few. It runs ahead of what is multiplied, and does not wait where
    the products wait for each other.
    """

    def __init__(self, o: Any, plan: LayerPlan, memory: Memory, smem: dict[str, Any]) -> None:
        """Write the table and make the ring; to be followed by a ``sync``."""
        self.o, self.plan, self.memory = o, plan, memory
        self.ring, self.table = o.shared(smem["ring"]), o.shared(smem["table"])
        self.full = o.shared(smem["barriers"])
        self.empty = self.full + 8 * plan.stages
        self.cursor = o.shared(smem["cursors"]) + o.warp * ENTRY
        self.entries = o.constant(0)
        for which, product in enumerate(plan.products):
            start, count = tiles_of(o, plan, which)
            low = channel_of(product, start + o.thread * plan.blocks)
            words = [low * product.line, product.line, product.apart * product.line, product.steps, which]
            if plan.factors:
                each = product.channels // product.halves  # of a row of factors
                apart = product.apart if product.halves == 1 else product.inputs // product.group * each
                words += [low * 4, apart * 4, each * 4, plan.parameters.index(f"{NAMES[which]}_factors")]
            words = [word if not isinstance(word, int) else o.constant(word) for word in words]
            words += [o.constant(0)] * (12 - len(words))
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
        zero = self.o.constant(0)
        self._go_to(zero, zero)

        def fetch(slot: Any, carry: list[Any]) -> list[Any]:
            self(slot)
            return carry

        self.o.loop(self.plan.stages - LAG, [], fetch)

    def _go_to(self, layer: Any, entry: Any) -> None:
        """Put the cursor at the beginning of a tile."""
        o, plan = self.o, self.plan
        at = self.table + entry * ENTRY
        offset, line, apart, steps = o.load_shared(at, 4)
        which, factors, factors_apart, across = o.load_shared(at + 16, 4)
        there = layer < plan.layers  # behind the last, lines of no bytes, for ever
        held = o.select(there, layer, plan.layers - 1)
        row = o.warp % PAIRS * line + o.select(o.warp < PAIRS, 0, apart)
        source = self.memory.of_layer(held, which) + o.wide(offset) + o.wide(row)
        # By all lanes: it is the same.
        o.store_shared(self.cursor, [layer, entry, o.constant(0), steps])
        o.store_shared(self.cursor + 16, [*o.halves(source), o.select(there, line, 0), across])
        if plan.factors:
            number = o.load_shared(at + 32)[0]
            beside = self.memory.of_layer(held, number) + o.wide(factors)
            o.store_shared(self.cursor + 32, [*o.halves(beside), factors_apart, across])

    def __call__(self, slot: Any) -> None:
        """Start to copy what the cursor stands at into a stage that is empty, and move it on."""
        o, plan = self.o, self.plan
        layer, entry, step, steps = o.load_shared(self.cursor, 4)
        low, high, left, across = o.load_shared(self.cursor + 16, 4)
        source = o.address(low, high)
        base = self.ring + slot * plan.stage
        size = o.select(left < ROW, left, ROW)
        o.copy_rows(base + o.warp * ROW_PITCH, source, size, self.full + slot * 8)
        if plan.factors:
            low, high, factors_apart, _ = o.load_shared(self.cursor + 32, 4)
            beside = o.address(low, high) + o.wide(o.lane // 4 * 4)
            goal = base + 2 * PAIRS * ROW_PITCH + o.thread * 4
            each = PIECES * plan.factors
            for group in range(each):
                # The bytes before the group's are there wherever the group is.
                inside = o.warp * (PIECES * CHUNK) + group * (CHUNK // plan.factors) < left
                index = (step * WARPS + o.warp) * each + group
                first = beside + o.wide(index * across)
                for half in range(2):
                    there = first + o.wide(factors_apart) if half else first
                    o.copy_async(goal + (2 * group + half) * 4 * THREADS, there, 4, o.select(inside, 4, o.constant(0)))
            o.commit_copies()

        def following() -> list[Any]:
            last = self.entries < entry + 2
            self._go_to(o.select(last, layer + 1, layer), o.select(last, 0, entry + 1))
            return []

        def onward() -> list[Any]:
            o.store_shared(self.cursor, [layer, entry, step + 1, steps])
            more = [*o.halves(source + ROW), o.select(left < ROW, 0, left - ROW), across]
            o.store_shared(self.cursor + 16, more)
            return []

        o.branch(step + 1 < steps, onward, following, [])

    def await_full(self, slot: Any, parity: Any) -> None:
        """Wait until a stage has come."""
        self.o.await_barrier(self.full + slot * 8, parity)
        if self.plan.factors:
            self.o.wait_copies(self.plan.stages - LAG - 1)

    def release(self, slot: Any, parity: Any) -> None:
        """Say that the warp has read a stage, and refill the one that was read ``LAG`` steps before."""
        o, plan = self.o, self.plan
        o.arrive(self.empty + slot * 8)
        around = slot < LAG
        old = o.select(around, slot + (plan.stages - LAG), slot - LAG)
        # At first the ring's last stages are empty without having been read: the phase before the first has ended.
        o.await_barrier(self.empty + old * 8, o.select(around, parity ^ 1, parity))
        self(old)


def vectors_of_norm(o: Any, plan: LayerPlan, which: int, memory: Memory) -> list[Any]:
    """What a thread needs of the scale and bias of the norm before a product: words of its runs."""
    norm = plan.norms[which // 2]
    there = [name for name, given in (("scale", norm.scaled), ("shift", norm.shifted)) if given]
    starts = [memory(f"{NAMES[which]}_{name}") for name in there]
    found = []
    for run, inside in runs_of(o, plan.products[which]):
        at = o.wide(o.select(inside, run, 0)) * 16
        for start in starts:
            found += o.load_memory(start + at, 4)
    return found


def runs_of(o: Any, product: Product) -> list[tuple[Any, Any]]:
    """The runs of 8 inputs that a thread stages, and whether the input has them."""
    found = []
    for i in range(-(-product.staged // 8 // THREADS)):
        run = o.thread + i * THREADS
        found.append((run, run < product.inputs // 8))
    return found


def place_of(o: Any, plan: LayerPlan, product: Product, run: Any) -> Any:
    """Where a run is staged: of a chunk, the thread that multiplies it, and which of its runs it is."""
    lanes = plan.runs
    chunk, within = run // (4 * lanes), run % (4 * lanes)
    place = (chunk * (4 * lanes) + within % lanes * 4 + within // lanes) * 16
    last = product.staged // 8
    # Of the last runs some have no place: they repeat one that is of zeros, or the last.
    return o.select(run < last, place, (last - 1) * 16) if last % THREADS else place


def stage(o: Any, plan: LayerPlan, which: int, vectors: list[Any], memory: Memory, smem: dict[str, Any]) -> None:
    """Put x, normalised, into shared memory in the order in which it is multiplied."""
    product = plan.products[which]
    norm = plan.norms[which // 2] if which in (QKV, UP) else None
    staged, order = o.shared(smem["staged"]), run_order(plan.bits)
    runs = runs_of(o, product)
    last = product.staged // 8

    def place(i: int, token: int, pairs: list[Any]) -> None:
        """Stage a run."""
        run = runs[i][0]
        if plan.factors:
            _sum_groups(o, plan, product, pairs, run, token, smem)
        at = staged + token * plan.x_line + place_of(o, plan, product, run)
        if last % THREADS and (i + 1) * THREADS > last:
            o.when(run < last, lambda: o.store_shared(at, pairs))
        else:
            o.store_shared(at, pairs)

    def received(token: int) -> list[list[Any]]:
        found = _received(o, which, token, memory, runs)
        return [[o.select(inside, word, 0) for word in words] for (_, inside), words in zip(runs, found, strict=True)]

    if norm is None:
        for token in range(plan.m):
            for i, words in enumerate(received(token)):
                place(i, token, ordered(o, words, order))
        return
    tokens = [received(token) for token in range(plan.m)]
    sizes = _sizes(o, plan, norm, product.inputs, [words for token in tokens for words in token], smem)
    each = len(vectors) // len(runs)
    for i, (_, inside) in enumerate(runs):
        beside = vectors[i * each : (i + 1) * each]
        for token in range(plan.m):
            place(i, token, _normed(o, plan, norm, tokens[token][i], sizes[token], beside, order, inside))


def _received(o: Any, which: int, token: int, memory: Memory, runs: list[tuple[Any, Any]]) -> list[list[Any]]:
    """Four words of each run of a sequence: what a product's blocks have sent, or of the first layer's input."""
    inputs = memory.plan.products[which].inputs
    at = [o.select(inside, run, 0) for run, inside in runs]

    def received() -> list[Any]:
        found = []
        for i in range(0, len(at), 4):  # registers for as many at once
            both = [
                memory.packet(SOURCES[which], o.constant(token), run * 4 + j) for run in at[i : i + 4] for j in (0, 2)
            ]
            found += o.receive(both, memory.epoch if which else memory.layer, pairs=True)
        return found

    def given() -> list[Any]:
        x = memory("x")
        return [word for run in at for word in o.load_memory(x + o.wide(run * 16 + token * inputs * 2), 4)]

    like = [o.constant(0)] * (4 * len(at))
    found = o.branch(memory.layer < 1, given, received, like) if which == QKV else received()
    return [found[i : i + 4] for i in range(0, len(found), 4)]


def _sum_groups(
    o: Any, plan: LayerPlan, product: Product, pairs: list[Any], run: Any, token: int, smem: dict[str, Any]
) -> None:
    """Keep what undoes :func:`offset_of`, added to each weight of a group, in the group's product."""
    values = [value for pair in pairs for value in o.unpack(plan.kind, pair)]
    while len(values) > 1:
        values = [a + b for a, b in zip(values[::2], values[1::2], strict=True)]
    (total,) = values
    lanes = product.group // 8
    apart = 1
    while apart < lanes:
        total = total + o.across(total, apart)
        apart *= 2
    held = product.staged // product.group
    at = o.shared(smem["group_sums"]) + (run // lanes + token * held) * 4
    total = total * -offset_of(plan)
    o.when(o.equal(run % lanes, 0) & (run < product.staged // 8), lambda: o.store_shared(at, [total]))


def offset_of(plan: LayerPlan) -> float:
    """What is added to entries of 4 bits while they are widened, and taken from the sum: less work than from each."""
    return 1032.0 if plan.kind == "f16" else 136.0


def _sizes(
    o: Any, plan: LayerPlan, norm: Norm, inputs: int, words: list[list[Any]], smem: dict[str, Any]
) -> list[tuple[Any, Any]]:
    """Mean (None where it is not subtracted) and one over the size of each token, from what all threads have of it."""
    scratch, each = o.shared(smem["scratch"]), len(words) // plan.m
    totals = []
    for token in range(plan.m):
        total, square = o.constant(0.0), o.constant(0.0)
        for run in words[token * each : (token + 1) * each]:
            for word in run:
                for value in o.unpack(plan.kind, word):
                    total, square = total + value, o.fma(value, value, square)
        totals += [total, square]
    for lanes in (16, 8, 4, 2, 1):
        totals = [total + o.across(total, lanes) for total in totals]
    for i, total in enumerate(totals):  # by all lanes: it is the same
        o.store_shared(scratch + i * WARPS * 4 + o.warp * 4, [total])
    o.sync()
    found = []
    for token in range(plan.m):
        both = []
        for i in range(2):
            parts = [
                o.float_of(part)
                for j in range(0, WARPS, 4)
                for part in o.load_shared(scratch + ((2 * token + i) * WARPS + j) * 4, 4)
            ]
            while len(parts) > 1:
                parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
            both.append(parts[0] * (1.0 / inputs))
        mean, square = both
        if norm.kind == "layer":
            square = o.maximum(square - mean * mean, 0.0)
        found.append((mean if norm.kind == "layer" else None, o.rsqrt(square + norm.eps)))
    return found


def _normed(
    o: Any,
    plan: LayerPlan,
    norm: Norm,
    words: list[Any],
    size: tuple[Any, Any],
    beside: list[Any],
    order: list[int],
    inside: Any,
) -> list[Any]:
    """Eight inputs, normalised."""
    mean, factor = size
    wide = [value for word in words for value in o.unpack(plan.kind, word)]
    if mean is not None:
        wide = [value - mean for value in wide]
    wide = [value * factor for value in wide]
    if norm.scaled:
        scale = [value for word in beside[:4] for value in o.unpack(plan.kind, word)]
        offset = 1.0 if norm.unit_offset else 0.0
        wide = [v * (s + offset if offset else s) for v, s in zip(wide, scale, strict=True)]
    if norm.shifted:
        shift = [value for word in beside[-4:] for value in o.unpack(plan.kind, word)]
        wide = [v + s for v, s in zip(wide, shift, strict=True)]
    wide = [wide[i] for i in order]
    pairs = [o.pack(plan.kind, *wide[i : i + 2]) for i in range(0, 8, 2)]
    return [o.select(inside, pair, 0) for pair in pairs]


def multiply(o: Any, plan: LayerPlan, which: int, stream: Stream, smem: dict[str, Any], carry: list[Any]) -> list[Any]:
    """Multiply the block's tiles of a product, and put each warp's sums into shared memory.

    Args:
        o, plan, which, stream, smem: as elsewhere here.
        carry: the stage of the ring that is multiplied next, and its parity; so is what is returned.
    """
    product, (_, count) = plan.products[which], tiles_of(o, plan, which)
    row, column = o.lane // 4, o.lane % 4
    token = o.shared(smem["staged"]) + column * 16
    if plan.m > 1:
        token = token + o.select(row < plan.m, row, plan.m - 1) * plan.x_line
    zero = o.constant(0.0)

    def products(totals: Sequence[Any], words: list[list[Any]], pairs: list[list[Any]]) -> list[Any]:
        totals = list(totals)
        low, high = ([part for word in half for part in widen_any(o, plan, word)] for half in words)
        for i in range(len(low) // 2):
            a = [low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1]]
            totals = o.mma(plan.kind, a, pairs[i], totals)
        return totals

    def undone(index: Any, j: int) -> Any:
        """What undoes the offset of a group's weights, of the token of the thread's column ``j``."""
        at = o.shared(smem["group_sums"]) + index * 4
        if plan.m > 1:
            own = column * 2 + j
            at = at + o.select(own < plan.m, own, plan.m - 1) * (product.staged // product.group * 4)
        return o.float_of(o.load_shared(at)[0])

    def step(i: Any, carry: list[Any]) -> list[Any]:
        slot, parity, totals = carry[0], carry[1], carry[2:]
        stream.await_full(slot, parity)
        for piece in range(PIECES):
            totals = multiply_piece(i, slot, piece, totals)
        stream.release(slot, parity)
        last = o.equal(slot, plan.stages - 1)
        return [o.select(last, 0, slot + 1), o.select(last, parity ^ 1, parity), *totals]

    def multiply_piece(i: Any, slot: Any, piece: int, totals: list[Any]) -> list[Any]:
        base = stream.ring + slot * plan.stage
        own = base + row * ROW_PITCH + o.warp * (PIECES * CHUNK) + (piece * CHUNK + column * 16)
        words = [o.load_shared(own + half * PAIRS * ROW_PITCH, 4) for half in range(2)]
        number = (i * WARPS + o.warp) * PIECES + piece
        chunk = token + number * (product.span * 2)
        runs = [o.load_shared(chunk + run * 64, 4) for run in range(plan.runs)]
        pairs = [run[j : j + 2] for run in runs for j in (0, 2)]
        totals = list(totals)
        if not plan.factors:
            totals = products(totals, words, pairs)
        for group in range(plan.factors):
            kept = pairs
            if plan.factors == 2:
                # Lanes 0 and 1 of the four that share a channel have the first group, 2 and 3 the second.
                own_group = (column < 2) if group == 0 else (column - 2 < 2)
                kept = [[o.select(own_group, word, 0) for word in pair] for pair in pairs]
            found = products([zero] * 4, words, kept)
            beside = base + 2 * PAIRS * ROW_PITCH + o.thread * 4
            at = 2 * (piece * plan.factors + group)
            factors = [o.float_of(o.load_shared(beside + (at + half) * 4 * THREADS)[0]) for half in range(2)]
            for j in range(4):
                whole = found[j] + undone(number * plan.factors + group, j % 2)
                totals[j] = o.fma(whole, factors[j // 2], totals[j])
        return totals

    base = o.shared(smem["sums"]) + o.warp * (plan.m * 2 * PAIRS * 4) + row * 4

    def tile(i: Any, carry: list[Any]) -> list[Any]:
        found = o.loop(product.steps, [*carry, *[zero] * 4], step)
        at = base + i * (WARPS * plan.m * 2 * PAIRS * 4)
        for j in range(min(2, plan.m)):
            own = column * 2 + j

            def keep(j: int = j, own: Any = own) -> None:
                for half in range(2):
                    o.store_shared(at + own * (2 * PAIRS * 4) + half * PAIRS * 4, [found[2 * half + j - 4]])

            o.when(own < plan.m, keep)
        return list(found[:-4])

    return list(o.loop(count, carry, tile))


def widen_any(o: Any, plan: LayerPlan, word: Any) -> list[Any]:
    """As :func:`pallas_kernels.quantized_threads.widen`, of any weight; of 4 bits with :func:`offset_of` added."""
    if plan.bits == 4:
        magic = 0x64086408 if plan.kind == "f16" else 0x43084308
        return [o.merge(word >> (4 * i) if i else word, 0x000F000F, magic, toggle=True) for i in range(4)]
    return [word] if plan.bits == 16 else widen(o, plan, word)


@dataclass(frozen=True)
class Result:
    """What a thread finishes of a product: a pair of channels of a token."""

    active: Any
    slot: Any
    token: Any
    pair: Any
    low: Any
    high: Any

    @staticmethod
    def of(o: Any, plan: LayerPlan, which: int) -> Result:
        """The thread's."""
        product, (start, count) = plan.products[which], tiles_of(o, plan, which)
        active = o.thread < count * (PAIRS * plan.m)
        slot = o.select(active, o.thread // (PAIRS * plan.m), 0)
        token, pair = o.thread // PAIRS % plan.m, o.thread % PAIRS
        tile = start + slot * plan.blocks
        if plan.products[which].tiles < plan.blocks:
            tile = o.select(tile < product.tiles, tile, 0)
        low = channel_of(product, tile) + pair
        return Result(active, slot, token, pair, low, low + product.apart)

    def sums(self, o: Any, plan: LayerPlan, smem: dict[str, Any]) -> list[Any]:
        """The products of the two channels, from the sums of all warps."""
        each = plan.m * 2 * PAIRS * 4
        base = o.shared(smem["sums"]) + self.slot * (WARPS * each) + self.token * (2 * PAIRS * 4) + self.pair * 4
        found = []
        for half in range(2):
            parts = [o.float_of(o.load_shared(base + warp * each + half * PAIRS * 4)[0]) for warp in range(WARPS)]
            while len(parts) > 1:
                parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
            found.append(parts[0])
        return found


def vectors_of_result(
    o: Any, plan: LayerPlan, which: int, result: Result, memory: Memory
) -> tuple[list[Any] | None, list[Any] | None]:
    """Factors and biases of the two channels, or None where there are none."""
    name, channels = NAMES[which], (result.low, result.high)
    factors = biases = None
    if plan.quantized and not plan.factors:
        start = memory(f"{name}_factors")
        factors = [o.float_of(o.load_memory(start + o.wide(channel) * 4)[0]) for channel in channels]
    if plan.biased[which]:
        start = memory(f"{name}_bias")
        biases = [o.load_half(plan.kind, start + o.wide(channel) * 2) for channel in channels]
    return factors, biases


def affine(values: list[Any], factors: list[Any] | None, biases: list[Any] | None) -> list[Any]:
    """Products times factors plus biases."""
    if factors is not None:
        values = [value * factor for value, factor in zip(values, factors, strict=True)]
    if biases is not None:
        values = [value + bias for value, bias in zip(values, biases, strict=True)]
    return values


def activate(o: Any, plan: LayerPlan, value: Any) -> Any:
    """The activation of an f32, as :func:`pallas_kernels.skinny_gemm.activate` has it."""
    log2e = 1.4426950408889634

    def sigmoid_of(x: Any, factor: float) -> Any:
        return o.divide(x, o.exp2(x * (-factor * log2e)) + 1.0)

    match plan.activation:
        case None:
            return value
        case "silu":
            return sigmoid_of(value, 1.0)
        case "quick_gelu":
            return sigmoid_of(value, 1.702)
        case "relu":
            return o.maximum(value, 0.0)
        case "gelu_tanh":
            # Half of one plus a hyperbolic tangent is a logistic function of twice its argument.
            inner = value * (o.fma(value * value, o.constant(0.044715), o.constant(1.0)) * 0.7978845608028654)
            return o.divide(value, o.exp2(inner * (-2.0 * log2e)) + 1.0)
    # Abramowitz and Stegun 7.1.26, as there.
    x = value * 0.7071067811865476
    a = o.maximum(x, x * -1.0)
    t = o.divide(o.constant(1.0), o.fma(a, o.constant(0.3275911), o.constant(1.0)))
    series = o.constant(1.061405429)
    for factor in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = o.fma(series, t, o.constant(factor))
    y = o.constant(1.0) - series * t * o.exp2(a * a * -log2e)
    y = o.select(x < 0.0, y * -1.0, y)
    return value * 0.5 * (y + 1.0)


def load_angles(o: Any, plan: LayerPlan, result: Result, memory: Memory) -> list[Any]:
    """Cosine and sine for a pair of channels of a head."""
    entry = result.low % (plan.dim // 2)
    at = o.wide(result.token * (plan.dim // 2) + entry) * 4
    return [o.float_of(o.load_memory(memory(name) + at)[0]) for name in ("cos", "sin")]


def finish_qkv(
    o: Any, plan: LayerPlan, result: Result, values: list[Any], angles: list[Any] | None, memory: Memory
) -> None:
    """Rotate queries and keys; send all heads to who attends, and write keys and values to their rows of the blocks."""
    head, entry = result.low // plan.dim, result.low % plan.dim
    group, which = head // (plan.per_group + 2), head % (plan.per_group + 2)
    if angles is not None:
        cos, sin = angles
        turned = [values[0] * cos - values[1] * sin, values[1] * cos + values[0] * sin]
        values = [o.select(which < plan.per_group + 1, a, b) for a, b in zip(turned, values, strict=True)]
    _send_pairs(o, plan, "heads", result, values, memory)
    slot = o.load_memory(memory("slots") + o.wide(result.token) * 4)[0]
    there = result.active & (slot < (1 << 31))  # not negative
    block, inside = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    row = o.wide((block * plan.groups + group) * BLOCK_SIZE + inside) * (plan.dim * 2) + o.wide(entry) * 2
    for number, name in enumerate(("keys", "values")):
        own = there & o.equal(which, plan.per_group + number)
        for half in range(2):
            apart = half * plan.products[QKV].apart
            o.store_half(plan.kind, memory(name) + row + apart * 2, values[half], own)


def finish_row(
    o: Any, plan: LayerPlan, which: int, result: Result, values: list[Any], added: list[Any] | None, memory: Memory
) -> None:
    """Send a row of the stream, or of what is between up and down; the last layer's result is written too."""
    if which == UP:
        values = [activate(o, plan, values[0]), values[1] if plan.gated else activate(o, plan, values[1])]
        if plan.gated:
            values = [values[0] * values[1]]
    if added is not None:
        values = [value + more for value, more in zip(values, added, strict=True)]
    _send_pairs(o, plan, TARGETS[which], result, values, memory)
    if which != DOWN:
        return
    target = memory("result") + o.wide(result.token * plan.hidden) * 2
    last = result.active & o.equal(memory.layer, plan.layers - 1)
    for value, channel in zip(values, (result.low, result.high), strict=True):
        o.store_half(plan.kind, target + o.wide(channel) * 2, value, last)


def _send_pairs(o: Any, plan: LayerPlan, name: str, result: Result, values: list[Any], memory: Memory) -> None:
    """Send what a thread and its neighbour have of two adjacent channels; of two pairs, each sends one."""
    odd = result.pair % 2
    even = o.equal(odd, 0)
    if len(values) == 1:
        beside = o.across(values[0], 1)
        word, channel, own = o.pack(plan.kind, values[0], beside), result.low, result.active & even
    else:
        beside = o.across(o.select(even, values[1], values[0]), 1)
        low = o.select(even, values[0], beside)
        high = o.select(even, beside, values[1])
        word, own = o.pack(plan.kind, low, high), result.active
        channel = o.select(even, result.low, result.high - 1)
    at = memory.packet(name, result.token, channel // 2)
    o.when(own, lambda: o.send(at, word, memory.epoch))


def load_row(o: Any, plan: LayerPlan, which: int, result: Result, memory: Memory) -> list[Any]:
    """The two channels of a row of the stream that has been received before."""
    if which == OUT:
        first = memory.layer < 1
        start = o.select(first, memory("x"), memory.packet("stream", o.constant(0), o.constant(0)))
        pitch = o.select(first, 4, o.constant(8))
    else:
        start, pitch = memory.packet("middle", o.constant(0), o.constant(0)), o.constant(8)
    found = []
    for channel in (result.low, result.high):
        at = (result.token * (plan.hidden // 2) + channel // 2) * pitch + channel % 2 * 2
        found.append(o.load_half(plan.kind, start + o.wide(at), fresh=True))
    return found


def run(
    o: Any,
    plan: LayerPlan,
    ref: dict[str, Any],
    smem: dict[str, Any],
    attend: Callable[[Any, LayerPlan, Memory, dict[str, Any]], None],
) -> None:
    """All layers, one after the other.

    What a thread needs of parameters is loaded before it waits for what others send, and the ring is full by then. A
    buffer of packets is written again when all who read it before have sent something that depended on it.
    """
    memory = Memory(o, plan, ref, smem)
    stream = Stream(o, plan, memory, smem)
    o.sync()
    stream.fill()

    def layer(number: Any, carry: list[Any]) -> list[Any]:
        memory.layer, memory.epoch = number, number + 1
        for which in (QKV, OUT, UP, DOWN):
            beside = vectors_of_norm(o, plan, which, memory) if which in (QKV, UP) else []
            result = Result.of(o, plan, which)
            factors, biases = vectors_of_result(o, plan, which, result, memory)
            angles = load_angles(o, plan, result, memory) if which == QKV and plan.rotary else None

            def staged(which: int = which, beside: list[Any] = beside) -> None:
                stage(o, plan, which, beside, memory, smem)

            _, count = tiles_of(o, plan, which)
            if plan.products[which].tiles < plan.blocks:
                # A block that has nothing to do with x does not read it: nobody would wait until it has.
                o.when(o.constant(0) < count, staged)
            else:
                staged()
            added = load_row(o, plan, which, result, memory) if which in (OUT, DOWN) else None
            o.sync()
            carry = multiply(o, plan, which, stream, smem, carry)
            o.sync()
            values = affine(result.sums(o, plan, smem), factors, biases)
            if which == QKV:
                finish_qkv(o, plan, result, values, angles, memory)
                attend(o, plan, memory, smem)
            else:
                finish_row(o, plan, which, result, values, added, memory)
        return carry

    o.loop(plan.layers, [o.constant(0), o.constant(0)], layer)
    if plan.factors:
        o.wait_copies(0)
