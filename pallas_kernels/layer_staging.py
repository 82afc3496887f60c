"""How one thread of the kernel of decoder layers gets x: what other blocks sent, normalised, into shared memory.

``o`` is :class:`pallas_kernels.registers.Registers`, or what the tests have in its place. The idea is described in
:mod:`pallas_kernels.decoder_layers`.
"""

from __future__ import annotations

from typing import Any

from pallas_kernels.layer_plan import DOWN, NAMES, OUT, QKV, THREADS, UP, WARPS, LayerPlan, Norm, Product
from pallas_kernels.layer_stream import Memory
from pallas_kernels.quantized_threads import ordered, run_order

SOURCES = {QKV: "stream", OUT: "attended", UP: "middle", DOWN: "between"}
"""Which packets each product reads."""


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


def fetch_early(o: Any, plan: LayerPlan, memory: Memory) -> None:
    """Ask for the vectors of the second norm, and of the next layer's first; each block for some lines of 128 bytes.

    All blocks wait for them, and whose loads were late would wait behind all the weights that are on their way.
    """
    lines = -(-plan.hidden * 2 // 128)
    first = o.block * lines // plan.blocks
    line = first + o.thread
    following = o.select(memory.layer < plan.layers - 1, memory.layer + 1, plan.layers - 1)
    starts = []
    for which, layer in ((UP, memory.layer), (QKV, following)):
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
            words = received(token)
            if token == plan.m - 1:
                memory.mark(o, f"{NAMES[which]} received")
            for i, run in enumerate(words):
                place(i, token, ordered(o, run, order))
        return
    tokens = [received(token) for token in range(plan.m)]
    memory.mark(o, f"{NAMES[which]} received")
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
