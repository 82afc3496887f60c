"""How one thread of the kernel of decoder layers gets x: what other blocks sent, normalised, into shared memory.

Beside weights of 16 bits or fp8, x is of 16 bits itself. Weights that are integers are multiplied by integers, which
takes less than half of the instructions that widening them to bfloat16 does: x is then in fixed point, 16 bits with a
unit of its own for each chunk of 64 or 128 inputs, and kept as two planes of signed bytes, a high one and a low one.
What that rounds is at most 2**-16 of the chunk's largest input; bfloat16 itself rounds each input by up to 2**-9.

``o`` is :class:`pallas_kernels.registers.Registers`, or what the tests have in its place. The idea is described in
:mod:`pallas_kernels.decoder_layers`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pallas_kernels.layer_plan import DOWN, NAMES, OUT, QKV, THREADS, UP, WARPS, LayerPlan, Norm, Product
from pallas_kernels.layer_stream import Memory, following
from pallas_kernels.quantized_threads import ordered, run_order

SOURCES = {QKV: "stream", OUT: "attended", UP: "middle", DOWN: "between"}
"""Which packets each product reads."""

PLANE = 64
"""Bytes from high to low bytes of x in fixed point."""

LARGEST = 127 * 256
"""Of 16 bits whose high byte is signed and whose low byte, signed too, may be rounded up to."""

LEAST = 1e-30
"""Of a chunk whose inputs are not all taken for 0: the reciprocals of less are not finite."""


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


def fetch(o: Any, plan: LayerPlan, memory: Memory) -> None:
    """Have the vectors of the second norm and of the next layer's first brought into the L2 cache, some by each block.

    All blocks wait for them, and where memory has much else to do it is slow to give them.
    """
    lines = -(-plan.hidden * 2 // 128)
    first = o.block * lines // plan.blocks
    line = first + o.thread
    starts = []
    for which, layer in ((UP, memory.layer), (QKV, following(o, plan, memory))):
        for name in (f"{NAMES[which]}_scale", f"{NAMES[which]}_shift"):
            if name in plan.parameters:
                starts.append(memory.of_layer(layer, o.constant(plan.parameters.index(name))))

    def ask() -> None:
        for start in starts:
            o.prefetch(start + o.wide(line) * 128)

    o.when(line < (o.block + 1) * lines // plan.blocks, ask)


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
    # Of the last runs some have no place, and are not stored.
    return o.select(run < last, place, (last - 1) * 16) if last % THREADS else place


def place_of_integers(o: Any, plan: LayerPlan, run: Any) -> Any:
    """Where the high bytes of a run are staged; the low ones are ``PLANE`` bytes behind.

    Of a chunk a thread reads 16 bytes at a time, two runs of a plane; those that are read at once are 128 in a row.
    """
    chunk, within = run // (4 * plan.runs), run % (4 * plan.runs)
    column, number = within // plan.runs, within % plan.runs
    return chunk * (plan.runs * PLANE) + number // 2 * (2 * PLANE) + column * 16 + number % 2 * 8


def stage(o: Any, plan: LayerPlan, which: int, vectors: list[Any], memory: Memory, smem: dict[str, Any]) -> None:
    """Put x, normalised, into shared memory in the order in which it is multiplied."""
    product = plan.products[which]
    norm = plan.norms[which // 2] if which in (QKV, UP) else None
    order = run_order(plan.bits)
    runs = runs_of(o, product)
    last = product.staged // 8

    def where(i: int, do: Callable[[], None]) -> None:
        """Do something for a thread's run, unless it has no such run."""
        if last % THREADS and (i + 1) * THREADS > last:
            o.when(runs[i][0] < last, do)
        else:
            do()

    def place(i: int, token: int, words: list[Any]) -> None:
        """Stage a run of 16 bits."""
        at = smem["work"] + token * plan.x_line(which) + place_of(o, plan, product, runs[i][0])
        where(i, lambda: o.store_shared(at, words))

    def place_integers(i: int, token: int, values: list[Any]) -> None:
        """Stage a run of f32 in fixed point."""
        run = runs[i][0]
        high, low, unit = _fixed(o, plan, values)
        at = smem["work"] + token * plan.x_line(which) + place_of_integers(o, plan, run)
        beside = smem["units"] + (run // (4 * plan.runs) + token * (product.staged // product.span)) * 4

        def keep() -> None:
            o.store_shared(at, high)
            o.store_shared(at + PLANE, low)
            o.when(o.equal(run % (4 * plan.runs), 0), lambda: o.store_shared(beside, [unit]))

        where(i, keep)

    def received(token: int) -> list[list[Any]]:
        found = _received(o, which, token, memory, runs)
        return [[o.select(inside, word, 0) for word in words] for (_, inside), words in zip(runs, found, strict=True)]

    if norm is None:
        for token in range(plan.m):
            words = received(token)
            if token == plan.m - 1:
                memory.mark(o, f"{NAMES[which]} received")
            for i, run in enumerate(words):
                if plan.integer:
                    place_integers(i, token, [value for word in run for value in o.unpack(plan.kind, word)])
                else:
                    place(i, token, ordered(o, run, order))
        return
    tokens = [received(token) for token in range(plan.m)]
    memory.mark(o, f"{NAMES[which]} received")
    sizes = _sizes(o, plan, norm, product.inputs, [words for token in tokens for words in token], smem)
    each = len(vectors) // len(runs)
    for i, (_, inside) in enumerate(runs):
        beside = vectors[i * each : (i + 1) * each]
        for token in range(plan.m):
            values = _normed(o, plan, norm, tokens[token][i], sizes[token], beside)
            values = [o.select(inside, value, 0.0) for value in values]
            if plan.integer:
                place_integers(i, token, values)
            else:
                values = [values[j] for j in order]
                place(i, token, [o.pack(plan.kind, *values[j : j + 2]) for j in range(0, 8, 2)])


def _fixed(o: Any, plan: LayerPlan, values: list[Any]) -> tuple[list[Any], list[Any], Any]:
    """High and low bytes of 8 inputs, two words each, and what their chunk's unit is; by all lanes that have a chunk.

    In the order in which weights lie: of 4 bits the even ones come first, and are 16 times as large as they should be.
    The unit of what is not finite is not either, so that nothing finite comes of it.
    """
    top = o.constant(0.0)
    for value in values:
        top = o.maximum(top, o.maximum(value, value * -1.0))
    apart = 1
    while apart < 4 * plan.runs:
        top = o.maximum(top, o.across(top, apart))
        apart *= 2
    factor = o.select(o.constant(LEAST) < top, o.divide(o.constant(float(LARGEST)), top), 0.0)
    whole = [o.rounded(value * factor) for value in values]
    order = (0, 2, 4, 6, 1, 3, 5, 7) if plan.bits == 4 else range(8)
    whole = [whole[i] for i in order]

    def bytes_of(words: list[Any], number: int) -> Any:
        """The bytes with a number of four words."""
        pairs = [o.bytes_of(a, b, number | (4 + number) << 4) for a, b in (words[:2], words[2:])]
        return o.bytes_of(*pairs, 0x5410)

    # The low byte is signed, so the high one is that of what is half of its range more.
    more = [value + 128 for value in whole]
    high, low = ([bytes_of(words[i : i + 4], number) for i in (0, 4)] for words, number in ((more, 1), (whole, 0)))
    return high, low, top * (1 / LARGEST / (16 if plan.bits == 4 else 1))


def _received(o: Any, which: int, token: int, memory: Memory, runs: list[tuple[Any, Any]]) -> list[list[Any]]:
    """Four words of each run of a sequence: what a product's blocks have sent, or of the first layer's input."""
    inputs = memory.plan.products[which].inputs
    at = [o.select(inside, run, 0) for run, inside in runs]

    def received() -> list[Any]:
        found = []
        for i in range(0, len(at), 3):  # registers for as many at once
            both = [
                memory.packet(SOURCES[which], o.constant(token), run * 4 + j) for run in at[i : i + 3] for j in (0, 2)
            ]
            found += o.receive(both, memory.epoch if which else memory.layer, pairs=True)
        return found

    def given() -> list[Any]:
        x = memory("x")
        return [word for run in at for word in o.load_memory(x + o.wide(run * 16 + token * inputs * 2), 4)]

    like = [o.constant(0)] * (4 * len(at))
    found = o.branch(memory.layer < 1, given, received, like) if which == QKV else received()
    return [found[i : i + 4] for i in range(0, len(found), 4)]


def _sizes(
    o: Any, plan: LayerPlan, norm: Norm, inputs: int, words: list[list[Any]], smem: dict[str, Any]
) -> list[tuple[Any, Any]]:
    """Mean (None where it is not subtracted) and one over the size of each token, from what all threads have of it."""
    scratch, each = smem["scratch"], len(words) // plan.m
    kinds = 2 if norm.kind == "layer" else 1  # of sums: squares, and where there is a mean, of the inputs themselves
    totals = []
    for token in range(plan.m):
        total, square = o.constant(0.0), o.constant(0.0)
        for run in words[token * each : (token + 1) * each]:
            for word in run:
                for value in o.unpack(plan.kind, word):
                    total, square = total + value, o.fma(value, value, square)
        totals += [square, total][:kinds]
    for lanes in (16, 8, 4, 2, 1):
        totals = [total + o.across(total, lanes) for total in totals]
    for i, total in enumerate(totals):  # by all lanes: it is the same
        o.store_shared(scratch + i * WARPS * 4 + o.warp * 4, [total])
    o.sync()
    found = []
    for token in range(plan.m):
        means = []
        for i in range(kinds):
            parts = [
                o.float_of(part)
                for j in range(0, WARPS, 4)
                for part in o.load_shared(scratch + ((kinds * token + i) * WARPS + j) * 4, 4)
            ]
            while len(parts) > 1:
                parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
            means.append(parts[0] * (1.0 / inputs))
        square, mean = means[0], means[1] if kinds == 2 else None
        if mean is not None:
            square = o.maximum(square - mean * mean, 0.0)
        found.append((mean, o.rsqrt(square + norm.eps)))
    return found


def _normed(
    o: Any, plan: LayerPlan, norm: Norm, words: list[Any], size: tuple[Any, Any], beside: list[Any]
) -> list[Any]:
    """Eight inputs, normalised, as f32."""
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
    return wide
