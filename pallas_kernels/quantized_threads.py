"""What one thread of the kernel of quantized products does: fetch, stage x, multiply, collect.

``o`` is :class:`pallas_kernels.registers.Registers`, or what the tests have in its place. The idea is described in
:mod:`pallas_kernels.skinny_gemm_quantized`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pallas_kernels.quantized_plan import CHUNK, WARPS, Plan
from pallas_kernels.skinny_gemm import InputNorm


def widen(o: Any, plan: Any, word: Any) -> list[Any]:
    """Turn 4 or 8 weights in a register into pairs: (0, 2), (1, 3), or (0, 4), (1, 5), (2, 6), (3, 7). Exact."""
    short = plan.kind == "f16"
    if plan.weight == "int4":
        # Behind the exponent of 128 (1024), the lowest bits count ones. The sign bit counts 8 after it is toggled.
        magic = 0x64086408 if short else 0x43084308
        nibbles = [word >> (4 * i) if i else word for i in range(4)]
        shifted = [o.merge(nibble, 0x000F000F, magic, toggle=True) for nibble in nibbles]
        return [o.subtract(plan.kind, pair, o.constant(magic)) for pair in shifted]
    if plan.weight == "int8":
        pairs = (word, word >> 8)
        if short:
            magic = 0x64806480
            return [
                o.subtract(plan.kind, o.merge(pair, 0x00FF00FF, magic, toggle=True), o.constant(magic))
                for pair in pairs
            ]
        # bfloat16 counts ones up to 7 bits. The eighth, the sign, makes 256 of 128.
        magic = 0x43004300
        return [
            o.subtract(plan.kind, o.merge(pair, 0x007F007F, magic), o.merge(pair, 0x00800080, magic)) for pair in pairs
        ]
    # The exponent and the mantissa move to where the wider format has them; its bias is larger by 8 or 120.
    move, mask, power = (1, 0x3F803F80, 0x5C005C00) if short else (4, 0x07F007F0, 0x7B807B80)
    pairs = (word << 8, word)
    return [o.multiply(plan.kind, o.merge(pair, 0x80008000, (pair >> move) & mask), power) for pair in pairs]


def run_order(bits: int) -> list[int]:
    """The order in which 8 consecutive inputs are staged: that of :func:`widen`."""
    return {4: [0, 4, 1, 5, 2, 6, 3, 7], 8: [0, 2, 1, 3, 4, 6, 5, 7], 16: [0, 1, 2, 3, 4, 5, 6, 7]}[bits]


@dataclass(frozen=True)
class Place:
    """Where a block is: its first channel, its first chunk and the one after its last."""

    channel: Any
    first: Any
    last: Any

    @staticmethod
    def of(o: Any, plan: Plan, tile: Any, split: Any) -> Place:
        """The place of a block. The last block of a ragged N repeats channels of the one before."""
        channel = tile * plan.rows
        if plan.n % plan.rows:
            channel = o.select(channel < plan.n - plan.rows, channel, plan.n - plan.rows)
        return Place(channel, split * plan.chunks // plan.splits, (split + 1) * plan.chunks // plan.splits)


class Fetch:
    """What starts the copies of a thread."""

    def __init__(self, o: Any, plan: Plan, place: Place, weight: Any, factors: Any, ring: Any) -> None:
        self.o, self.plan, self.place = o, plan, place
        self.ring = o.shared(ring)
        g, q = o.lane // 4, o.lane % 4
        start = o.memory(weight) + o.wide(place.channel + g) * plan.line
        self.weights = [start + part * plan.n * plan.line for part in range(plan.parts)]
        self.column = q * 16
        if plan.groups:
            start = o.memory(factors) + o.wide(place.channel + g) * 4
            self.factors = [start + part * (plan.k // plan.group) * plan.n * 4 for part in range(plan.parts)]

    def __call__(self, step: Any, slot: Any) -> None:
        """Start to copy what the warp multiplies at a step into the slot at an offset of the ring."""
        o, plan = self.o, self.plan
        chunk = self.place.first + step * WARPS + o.warp
        offset = chunk * CHUNK + self.column
        own = chunk < self.place.last
        whole = o.select(own, 16, o.constant(0))
        if plan.line % CHUNK:
            whole = o.select(offset < plan.line, whole, 0)
        target = self.ring + slot + o.thread * 16
        beside = self.ring + slot + plan.tiles * 2 * 16 * 128 + o.thread * 4
        for tile in range(plan.tiles):
            part, row = divmod(tile, plan.rows // 16)
            for half in range(2):
                at = self.weights[part] + o.wide(offset) + (16 * row + 8 * half) * plan.line
                o.copy_async(target + (2 * tile + half) * 16 * 128, at, 16, whole)
        for group in range(plan.groups):
            index = chunk * plan.groups + group
            size = o.select(own, 4, o.constant(0))
            if plan.line % CHUNK:
                size = o.select(index < plan.k // plan.group, size, 0)
            across = o.wide(index) * (plan.n * 4)
            for tile in range(plan.tiles):
                part, row = divmod(tile, plan.rows // 16)
                for half in range(2):
                    at = self.factors[part] + across + (16 * row + 8 * half) * 4
                    o.copy_async(beside + ((group * plan.tiles + tile) * 2 + half) * 4 * 128, at, 4, size)
        o.commit_copies()


def fill(o: Any, fetch: Fetch) -> None:
    """Start to copy as much as the ring holds."""
    for step in range(fetch.plan.stages):
        fetch(o.constant(step), o.constant(step * fetch.plan.stage))


def stage_x(
    o: Any, plan: Plan, place: Place, norm: InputNorm | None, x: Any, scale: Any, shift: Any, staged: Any, scratch: Any
) -> None:
    """Put the block's part of x, normalised, into shared memory in the order in which it is multiplied."""
    x, staged = o.memory(x), o.shared(staged)
    vectors = [o.memory(array) for array in (scale, shift) if array is not None]

    def values(address: Any) -> list[Any]:
        return [value for word in o.load_memory(address, 4) for value in o.unpack(plan.kind, word)]

    means, sizes = [], []
    if norm is not None:
        totals = [o.constant(0.0)] * (2 * plan.m)
        whole = plan.k // 8

        def add(first: Any, totals: list[Any], count: int, ragged: bool) -> list[Any]:
            """Add the runs of a thread from the one numbered ``first`` to the sums and the sums of squares."""
            found = []
            for token in range(plan.m):
                for i in range(count):
                    run = first + o.thread + i * 128
                    inside = run < whole
                    run = o.select(inside, run, 0) if ragged else run
                    found.append((token, inside, values(x + token * plan.k * 2 + o.wide(run) * 16)))
            totals = list(totals)
            for token, inside, run in found:
                for value in run:
                    kept = o.select(inside, value, 0.0) if ragged else value
                    totals[2 * token] = totals[2 * token] + kept
                    totals[2 * token + 1] = totals[2 * token + 1] + kept * kept
            return totals

        batch = max(1, 4 // plan.m)
        steps = whole // (batch * 128)
        if steps:
            totals = o.loop(steps, totals, lambda i, totals: add(i * (batch * 128), totals, batch, False))
        if rest := -(-(whole - steps * batch * 128) // 128):
            totals = add(o.constant(steps * batch * 128), totals, rest, True)
        for lanes in (16, 8, 4, 2, 1):
            totals = [total + o.across(total, lanes) for total in totals]
        scratch = o.shared(scratch)
        for i, total in enumerate(totals):  # by all lanes: it is the same
            o.store_shared(scratch + (i * WARPS * 4) + o.warp * 4, [total])
        o.sync()
        for token in range(plan.m):
            found = []
            for i in range(2):
                parts = [o.float_of(part) for part in o.load_shared(scratch + (2 * token + i) * WARPS * 4, 4)]
                found.append((parts[0] + parts[1] + parts[2] + parts[3]) * (1.0 / plan.k))
            mean, square = found
            if norm.kind == "layer":
                square = o.maximum(square - mean * mean, 0.0)
            means.append(mean)
            sizes.append(o.rsqrt(square + norm.eps))

    lanes = plan.runs
    order = run_order(plan.bits)

    total = plan.steps * WARPS * plan.inputs // 8

    def stage(first: Any, count: int, ragged: bool = False) -> None:
        """Stage the runs of a thread from the one numbered ``first``."""
        found = []
        for i in range(count):
            run = first + o.thread + i * 128
            if ragged:  # what is left over stages the last run once more
                run = o.select(run < total, run, total - 1)
            index = place.first * (plan.inputs // 8) + run
            inside = index < plan.k // 8
            index = o.wide(o.select(inside, index, 0)) * 16
            # Of a chunk, the thread that multiplies the run, and which of its runs it is.
            chunk, within = run // (4 * lanes), run % (4 * lanes)
            slot = chunk * (4 * lanes) + (within % lanes) * 4 + within // lanes
            words = [o.load_memory(x + token * plan.k * 2 + index, 4) for token in range(plan.m)]
            beside = [values(vector + index) for vector in vectors] if norm is not None else []
            found.append((slot, inside, words, beside))
        for slot, inside, words, beside in found:
            for token in range(plan.m):
                pairs = ordered(o, words[token], order)
                if norm is not None:
                    wide = [value for word in words[token] for value in o.unpack(plan.kind, word)]
                    if norm.kind == "layer":
                        wide = [value - means[token] for value in wide]
                    wide = [value * sizes[token] for value in wide]
                    if scale is not None:
                        offset = 1.0 if norm.unit_offset else 0.0
                        wide = [v * (s + offset if offset else s) for v, s in zip(wide, beside[0], strict=True)]
                    if shift is not None:
                        wide = [v + s for v, s in zip(wide, beside[-1], strict=True)]
                    wide = [wide[i] for i in order]
                    pairs = [o.pack(plan.kind, *wide[i : i + 2]) for i in range(0, 8, 2)]
                pairs = [o.select(inside, pair, 0) for pair in pairs]
                o.store_shared(staged + token * plan.x_line + slot * 16, pairs)

    batch = max(1, 4 // plan.m)
    steps, rest = divmod(total, batch * 128)

    def body(i: Any, carry: list[Any]) -> list[Any]:
        stage(i * (batch * 128), batch)
        return carry

    if steps:
        o.loop(steps, [], body)
    if rest:
        stage(o.constant(steps * batch * 128), -(-rest // 128), ragged=True)


def ordered(o: Any, words: list[Any], order: list[int]) -> list[Any]:
    """Eight inputs in four registers, in an order whose pairs are both of even or both of odd place, or as they are."""
    if order == sorted(order):
        return words
    pairs = []
    for i in range(0, 8, 2):
        low, high = order[i], order[i + 1]
        pairs.append(o.bytes_of(words[low // 2], words[high // 2], 0x7632 if low % 2 else 0x5410))
    return pairs


def multiply(o: Any, plan: Plan, fetch: Fetch, staged: Any, sums: Any) -> None:
    """Add up a warp's products and put them into shared memory as [warp, part, token, row]."""
    g, q = o.lane // 4, o.lane % 4
    columns = plan.tokens // 8
    # Chains of products that wait for one another: more than one where a warp has little else to do.
    chains = 2 if plan.tiles * columns < 4 else 1
    zero = o.constant(0.0)
    tokens = [o.shared(staged) + q * 16]
    if plan.m > 1:
        rows = [o.select(8 * t + g < plan.m, 8 * t + g, plan.m - 1) for t in range(columns)]
        tokens = [o.shared(staged) + q * 16 + row * plan.x_line for row in rows]
    count = plan.tiles * columns * 4

    def products(totals: list[Any], words: list[list[list[Any]]], pairs: list[list[list[Any]]]) -> list[Any]:
        """Add the products of a chunk: of words[tile][half], pairs[column][product]."""
        accs = [list(totals), *([zero] * count for _ in range(chains - 1))]
        for tile in range(plan.tiles):
            wide = [[pair for word in half for pair in widen(o, plan, word)] for half in words[tile]]
            for i in range(len(wide[0]) // 2):
                low, high = wide[0][2 * i : 2 * i + 2], wide[1][2 * i : 2 * i + 2]
                acc = accs[i % chains]
                for column in range(columns):
                    at = slice((tile * columns + column) * 4, (tile * columns + column) * 4 + 4)
                    acc[at] = o.mma(plan.kind, [low[0], high[0], low[1], high[1]], pairs[column][i], acc[at])
        if chains == 1:
            return accs[0]
        return [a + b for a, b in zip(*accs, strict=True)]

    def step(i: Any, carry: list[Any]) -> list[Any]:
        slot, totals = carry[0], carry[1:]
        o.wait_copies(plan.stages - 1)
        own = fetch.ring + slot + o.thread * 16
        words = [
            [o.load_shared(own + (2 * tile + half) * 16 * 128, 4) for half in range(2)] for tile in range(plan.tiles)
        ]
        at = (i * WARPS + o.warp) * (plan.inputs * 2)
        pairs: list[list[list[Any]]] = []
        for token in tokens:
            runs = [o.load_shared(token + at + run * 64, 4) for run in range(plan.runs)]
            pairs.append([run[j : j + 2] for run in runs for j in (0, 2)])
        if not plan.groups:
            totals = products(totals, words, pairs)
        for group in range(plan.groups):
            beside = fetch.ring + slot + plan.tiles * 2 * 16 * 128 + o.thread * 4
            kept = pairs
            if plan.groups == 2:
                # Lanes 0 and 1 of the four that share a channel have the first group, 2 and 3 the second.
                own_group = (q < 2) if group == 0 else (q - 2 < 2)
                kept = [[[o.select(own_group, word, 0) for word in pair] for pair in column] for column in pairs]
            found = products([zero] * count, words, kept)
            totals = list(totals)
            for tile in range(plan.tiles):
                first = beside + (group * plan.tiles + tile) * 2 * 4 * 128
                factors = [o.float_of(o.load_shared(first + half * 4 * 128)[0]) for half in range(2)]
                for j in range(tile * columns * 4, (tile + 1) * columns * 4):
                    totals[j] = totals[j] + found[j] * factors[j % 4 // 2]
        fetch(i + plan.stages, slot)
        following = slot + plan.stage
        following = o.select(following < plan.stages * plan.stage, following, 0)
        return [following, *totals]

    totals = o.loop(plan.steps, [o.constant(0), *[zero] * count], step)[1:]
    o.wait_copies(0)
    base = o.shared(sums) + o.warp * (plan.parts * plan.tokens * plan.rows * 4) + q * (2 * plan.rows * 4) + g * 4
    for tile in range(plan.tiles):
        part, row = divmod(tile, plan.rows // 16)
        for column in range(columns):
            for j in range(4):
                token, channel = 8 * column + j % 2, 16 * row + 8 * (j // 2)
                at = base + ((part * plan.tokens + token) * plan.rows + channel) * 4
                o.store_shared(at, [totals[(tile * columns + column) * 4 + j]])


def entries(o: Any, plan: Plan) -> list[tuple[Any, Any]]:
    """Token and row of the results of a thread."""
    linear = [o.thread + i * 128 for i in range(plan.tokens * plan.rows // 128)]
    return [(at // plan.rows, at % plan.rows) for at in linear]


def collect(o: Any, plan: Plan, sums: Any) -> list[list[Any]]:
    """Add up what the warps, of all blocks of a cluster, have found: a list of results for each part."""
    base = o.shared(sums)
    found = []
    for part in range(plan.parts):
        values = []
        for i in range(plan.tokens * plan.rows // 128):
            total = None
            for block in range(plan.splits):
                for warp in range(WARPS):
                    at = (warp * plan.parts + part) * plan.tokens * plan.rows * 4 + i * 512
                    address = base + o.thread * 4 + at
                    value = o.load_other(address, block) if block else o.float_of(o.load_shared(address)[0])
                    total = value if total is None else total + value
            values.append(total)
        found.append(values)
    return found
