"""What one thread of the kernel of decoder layers does for its products: fetch, stage x, multiply, finish.

``o`` is :class:`pallas_kernels.registers.Registers`, or what the tests have in its place; ``memory`` has the
addresses of arrays, ``smem`` names those in shared memory. The idea is described in
:mod:`pallas_kernels.decoder_layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pallas_kernels.attention import BLOCK_SIZE
from pallas_kernels.layer_attention import fetch as fetch_keys
from pallas_kernels.layer_plan import (
    CHUNK,
    DOWN,
    NAMES,
    OUT,
    PAIRS,
    PIECES,
    QKV,
    ROW_PITCH,
    UP,
    WARPS,
    LayerPlan,
)
from pallas_kernels.layer_staging import PLANE, stage, vectors_of_norm
from pallas_kernels.layer_staging import fetch as fetch_vectors
from pallas_kernels.layer_stream import Memory, Stream, channel_of, tiles_of
from pallas_kernels.quantized_threads import widen

CHAINS = 4
"""Sums that a warp adds products to in turn, since each product waits for the one before it in its sum."""

TARGETS = {OUT: "middle", UP: "between", DOWN: "stream"}


def multiply(o: Any, plan: LayerPlan, which: int, stream: Stream, smem: dict[str, Any], carry: list[Any]) -> list[Any]:
    """Multiply the block's tiles of a product, and put each warp's sums into shared memory.

    Args:
        o, plan, which, stream, smem: as elsewhere here.
        carry: the stage of the ring that is read next, its parity and, if the plan holds it, what has been read of the
            one before, which is multiplied next; so is what is returned.
    """
    product = plan.products[which]
    column = o.lane % 4
    piece_of = _integers if plan.integer else _halves
    add = piece_of(o, plan, which, smem)
    kept = 2 if plan.integer else 4

    def step(i: Any, carry: list[Any]) -> list[Any]:
        held, totals = carry[:-kept], carry[-kept:]
        if not plan.holds:
            held = read_next(o, plan, stream, held)
        place, words = held[:2], held[2:]
        each = len(words) // PIECES
        for piece in range(PIECES):
            totals = add((i * WARPS + o.warp) * PIECES + piece, words[piece * each : (piece + 1) * each], totals)
        return [*(read_next(o, plan, stream, place) if plan.holds else place), *totals]

    base = smem["work"] + plan.m * plan.x_line(which) + o.warp * (plan.m * 2 * PAIRS * 4) + o.lane // 4 * 4

    def tile(i: Any, carry: list[Any]) -> list[Any]:
        found = o.loop(product.steps, [*carry, *[o.constant(0.0)] * kept], step)
        at = base + i * (WARPS * plan.m * 2 * PAIRS * 4)
        tokens = [column] if plan.integer else [column * 2 + j for j in range(min(2, plan.m))]
        for j, token in enumerate(tokens):

            def keep(j: int = j, token: Any = token) -> None:
                for half in range(2):
                    value = found[len(found) - kept + half * (kept // 2) + j]
                    o.store_shared(at + token * (2 * PAIRS * 4) + half * PAIRS * 4, [value])

            o.when(token < plan.m, keep)
        return list(found[:-kept])

    return list(o.loop(tiles_of(o, plan, which)[1], carry, tile))


def read_next(o: Any, plan: LayerPlan, stream: Stream, place: list[Any]) -> list[Any]:
    """Read a stage, which is to be multiplied, into registers, and free it: those make the ring longer.

    Args:
        o, plan, stream: as elsewhere here.
        place: the stage that is read and its parity.

    Returns:
        The place of the next one, and for each piece four words of either half's channel and its groups' factors.
    """
    (slot, parity), held = place, []
    row, column = o.lane // 4, o.lane % 4
    stream.await_full(slot, parity)
    own = stream.ring + slot * plan.stage + row * ROW_PITCH + o.warp * (PIECES * CHUNK) + column * 16
    for piece in range(PIECES):
        for half in range(2):
            held += o.load_shared(own + half * PAIRS * ROW_PITCH + piece * CHUNK, 4)
        for group in range(plan.factors):
            for half in range(2):
                held += o.load_shared(stream.factors(slot, piece * plan.factors + group, half) + row * 4)
    stream.release(slot, parity)
    last = o.equal(slot, plan.stages - 1)
    return [o.select(last, 0, slot + 1), o.select(last, parity ^ 1, parity), *held]


Adds = Callable[[Any, list[Any], list[Any]], list[Any]]
"""Adds a piece's products to sums: of the number of a chunk, what was read of its weights, and the sums."""


def _halves(o: Any, plan: LayerPlan, which: int, smem: dict[str, Any]) -> Adds:
    """Of weights of 16 bits or fp8. Sums: of either half's channel for the two tokens of the thread's column."""
    row, column = o.lane // 4, o.lane % 4
    token = smem["work"] + column * 16
    if plan.m > 1:
        token = token + o.select(row < plan.m, row, plan.m - 1) * plan.x_line(which)
    zero = o.constant(0.0)

    def add(number: Any, held: list[Any], totals: list[Any]) -> list[Any]:
        chunk = token + number * (plan.products[which].span * 2)
        runs = [o.load_shared(chunk + run * 64, 4) for run in range(plan.runs)]
        pairs = [run[j : j + 2] for run in runs for j in (0, 2)]
        low, high = (
            [part for word in half for part in ([word] if plan.bits == 16 else widen(o, plan, word))]
            for half in (held[:4], held[4:])
        )
        chains = [list(totals), *([zero] * 4 for _ in range(min(CHAINS, len(low) // 2) - 1))]
        for i in range(len(low) // 2):
            a = [low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1]]
            chains[i % len(chains)] = o.mma(plan.kind, a, pairs[i], chains[i % len(chains)])
        while len(chains) > 1:
            chains = [
                [a + b for a, b in zip(*both, strict=True)] for both in zip(chains[::2], chains[1::2], strict=True)
            ]
        return chains[0]

    return add


def _integers(o: Any, plan: LayerPlan, which: int, smem: dict[str, Any]) -> Adds:
    """Of weights that are integers. Sums: of either half's channel for the token of the thread's column.

    Each token is two columns of the product, one of high bytes and one of low ones, whose sums are a thread's.
    """
    product, (row, column) = plan.products[which], (o.lane // 4, o.lane % 4)
    x, units = smem["work"] + row % 2 * PLANE + column * 16, smem["units"]
    if plan.m > 1:
        x = x + o.select(row // 2 < plan.m, row // 2, plan.m - 1) * plan.x_line(which)
        units = units + o.select(column < plan.m, column, plan.m - 1) * (product.staged // product.span * 4)

    def add(number: Any, held: list[Any], totals: list[Any]) -> list[Any]:
        chunk = x + number * (plan.runs * PLANE)
        runs = [o.load_shared(chunk + i * 2 * PLANE, 4) for i in range(plan.runs // 2)]
        pairs = [run[j : j + 2] for run in runs for j in (0, 2)]
        low, high, factors = held[:4], held[4:8], [o.float_of(word) for word in held[8:]]
        if plan.bits == 4:  # even ones, then odd ones, each 16 times what it is
            low, high = ([part & 0xF0F0F0F0 for word in half for part in (word << 4, word)] for half in (low, high))
        unit = o.float_of(o.load_shared(units + number * 4)[0])
        totals = list(totals)
        for group in range(max(1, plan.factors)):
            kept = pairs
            if plan.factors == 2:
                # Lanes 0 and 1 of the four that share a channel have the first group, 2 and 3 the second.
                own_group = (column < 2) if group == 0 else (column - 2 < 2)
                kept = [[o.select(own_group, word, 0) for word in pair] for pair in pairs]
            found = [o.constant(0)] * 4
            for i, pair in enumerate(kept):
                a = [low[2 * i], high[2 * i], low[2 * i + 1], high[2 * i + 1]]
                found = o.mma_integers(a, pair, found)
            for half in range(2):
                whole = o.as_float(found[2 * half] * 256 + found[2 * half + 1])
                factor = unit * factors[2 * group + half] if factors else unit
                totals[half] = o.fma(whole, factor, totals[half])
        return totals

    return add


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
        product, (first, count) = plan.products[which], tiles_of(o, plan, which)
        slot, token, pair = o.thread // (PAIRS * plan.m), o.thread // PAIRS % plan.m, o.thread % PAIRS
        active = slot < count
        slot, tile = o.select(active, slot, 0), o.select(active, first + slot, 0)
        low = channel_of(product, tile) + pair
        return Result(active, slot, token, pair, low, low + product.apart)

    def sums(self, o: Any, plan: LayerPlan, which: int, smem: dict[str, Any]) -> list[Any]:
        """The products of the two channels, from the sums of all warps."""
        each = plan.m * 2 * PAIRS * 4
        base = smem["work"] + plan.m * plan.x_line(which) + self.slot * (WARPS * each)
        base = base + self.token * (2 * PAIRS * 4) + self.pair * 4
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
    thread: Any,
    plan: LayerPlan,
    ref: dict[str, Any],
    smem: dict[str, Any],
    attend: Callable[[Any, LayerPlan, Memory, dict[str, Any]], None],
) -> None:
    """All layers, one after the other.

    What a thread needs of parameters is loaded before it waits for what others send, and the ring is full by then. A
    buffer of packets is written again when all who read it before have sent something that depended on it.
    """
    o = thread
    memory = Memory(o, plan, ref, smem)
    stream = Stream(o, plan, memory, smem)
    o.sync()
    stream.fill()
    start = [o.constant(0), o.constant(0)]
    if plan.holds:
        start = read_next(o, plan, stream, start)

    def layer(number: Any, carry: list[Any]) -> list[Any]:
        memory.layer, memory.epoch = number, number + 1
        fetch_keys(thread.fresh(), plan, memory)
        fetch_vectors(thread.fresh(), plan, memory)
        for which in (QKV, OUT, UP, DOWN):
            o = thread.fresh()
            beside = vectors_of_norm(o, plan, which, memory) if which in (QKV, UP) else []
            result = Result.of(o, plan, which)
            factors, biases = vectors_of_result(o, plan, which, result, memory)
            angles = load_angles(o, plan, result, memory) if which == QKV and plan.rotary else None

            def staged(o: Any = o, which: int = which, beside: list[Any] = beside) -> None:
                stage(o, plan, which, beside, memory, smem)

            if plan.products[which].tiles < plan.blocks:
                # A block that has nothing to do with x does not read it: nobody would wait until it has.
                o.when(o.constant(0) < tiles_of(o, plan, which)[1], staged)
            else:
                staged()
            added = load_row(o, plan, which, result, memory) if which in (OUT, DOWN) else None
            o.sync()
            memory.mark(o, f"{NAMES[which]} staged")
            carry = multiply(o, plan, which, stream, smem, carry)
            o.sync()
            memory.mark(o, f"{NAMES[which]} multiplied")
            if plan.per_group > 2:  # who attends with many heads has no registers for what is known before
                o = thread.fresh()
                result = Result.of(o, plan, which)
            values = affine(result.sums(o, plan, which, smem), factors, biases)
            if which == QKV:
                finish_qkv(o, plan, result, values, angles, memory)
                memory.mark(o, "qkv sent")
                o.sync()  # what comes next may lie where the sums do
                attend(thread.fresh(), plan, memory, smem)
            else:
                finish_row(o, plan, which, result, values, added, memory)
                memory.mark(o, f"{NAMES[which]} sent")
                o.sync()
        return carry

    o.loop(plan.layers, start, layer)
