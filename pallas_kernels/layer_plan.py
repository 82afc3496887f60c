"""How the kernel of decoder layers divides its work: products in tiles of channels, attention in splits of the keys."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from pallas_kernels.attention import BLOCK_SIZE
from pallas_kernels.skinny_gemm import SMEM_PER_SM, SMS, Activation

WARPS = 16
THREADS = 32 * WARPS
CHUNK = 64
"""Bytes of a channel that a warp takes at once: 16 for each of the four lanes that share a channel."""

PIECES = 2
"""Chunks of a channel that a warp takes one after the other before it asks for more."""

ROW = PIECES * CHUNK * WARPS
"""Bytes of a channel that a block takes at once."""

ROW_PITCH = ROW + 64
"""From one row to the next in shared memory: two that are read at once are in different halves of the banks."""

LAG = 1
"""Steps after which what a block has multiplied is replaced in the ring: by then all its warps have read it."""

PARAMETERS = 480
"""Arrays that a kernel is given at most: their addresses are 8 bytes each of 4 KiB."""

ENTRY = 48
"""Bytes of what shared memory says of a tile: where its weights and factors lie."""

HEADS = (64, 128, 256)
"""Head sizes: four, two or one keys for a load by all lanes."""

MAX_INTEGER_ROWS = 4
"""Sequences with weights of integers: two of the eight columns of a product by integers are one's."""

MAX_SPLITS = 16
"""Parts of a sequence's keys, at most: the block of the first waits for what all others have found."""

NAMES = ("qkv", "out", "up", "down")
"""Of the products."""

QKV, OUT, UP, DOWN = range(4)

MARKS = tuple(
    mark
    for name in NAMES
    for mark in (
        *(f"{name} {what}" for what in ("received", "staged", "multiplied", "sent")),
        *(("query", "keys", "attended") if name == "qkv" else ()),
    )
)
"""Moments of a layer that a traced kernel notes, in order: of each product, and of attention after the first."""

PAIRS = 8
"""Pairs of channels of a tile."""

ROOM = SMEM_PER_SM - 1024
"""Bytes of shared memory for all arrays; Mosaic asks for 1 KiB more than it is given."""


@dataclass(frozen=True, kw_only=True)
class Norm:
    """A normalisation before a product; its vectors are operands.

    Attributes:
        kind: ``rms`` or ``layer``.
        eps: added to the mean square.
        scaled, shifted: whether there are a scale and a bias.
        unit_offset: whether one is added to the scale.
    """

    kind: Literal["rms", "layer"]
    eps: float
    scaled: bool
    shifted: bool
    unit_offset: bool = False


@dataclass(frozen=True, kw_only=True)
class Product:
    """A product with a weight [channels, inputs], whose channels come in pairs, ``apart`` one from the other.

    A tile is 8 pairs. The two of a pair are what an epilogue needs at once: the gate of a channel and its value, or the
    two entries of a head that a rotation mixes.

    Attributes:
        channels: rows of the weight, both halves of a gated one.
        inputs: its columns.
        apart: distance of the two channels of a pair.
        halves: 2 for a gated weight.
        bits: of an entry.
        group: inputs that share a factor; 0 if all of a channel do, or there is none.
    """

    channels: int
    inputs: int
    apart: int
    halves: int
    bits: int
    group: int

    @property
    def line(self) -> int:
        """Bytes of a channel."""
        return self.inputs * self.bits // 8

    @property
    def span(self) -> int:
        """Inputs of a chunk."""
        return CHUNK * 8 // self.bits

    @property
    def steps(self) -> int:
        """Parts of each channel that a block takes; of the last, some may be beyond the channel."""
        return -(-self.line // ROW)

    @property
    def tiles(self) -> int:
        """Tiles of 8 pairs."""
        return self.channels // (2 * PAIRS)

    @property
    def staged(self) -> int:
        """Inputs of a row of x as it is staged, zeros at its end included."""
        return self.steps * WARPS * PIECES * self.span

    def problem(self, name: str) -> str | None:
        """Why the kernel cannot run it, or None."""
        if self.line % 16 or self.inputs % 8:
            return f"{self.inputs} inputs of {name}, whose channels are not of whole 16 bytes"
        if self.apart % PAIRS or self.channels % (2 * self.apart):
            return f"{self.channels} channels of {name}, which {2 * self.apart} does not divide"
        if self.group and (self.span % self.group or self.inputs % self.group):
            return f"groups of {self.group} inputs of {name}"
        return None


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What the kernel computes, and how it is divided.

    Attributes:
        layers: that run one after the other, all alike.
        m: sequences, one token each.
        hidden: size of the stream.
        groups: key heads.
        per_group: query heads of each.
        dim: entries of a head.
        width: blocks of a row of the block tables.
        kv_blocks: blocks of a cache; what a table says beyond them is read nowhere.
        products: of query, key and value; of the attention's output; up; down.
        norms: before the first product, and before the third.
        biased: for each product, whether a bias is added.
        weight: dtype of the weights.
        kind: ``bf16`` or ``f16``, of everything else.
        activation: of the MLP.
        rotary: whether queries and keys are rotated, by halves.
        scale: of the scores.
        window: a query sees itself and the ``window - 1`` keys before it; None: all.
        blocks: of the grid; all are there at once, one on each SM.
        splits: parts of a sequence's keys.
        stages: of the ring.
        traced: note when each block gets to each of :data:`MARKS`.
    """

    layers: int
    m: int
    hidden: int
    groups: int
    per_group: int
    dim: int
    width: int
    kv_blocks: int
    products: tuple[Product, Product, Product, Product]
    norms: tuple[Norm, Norm]
    biased: tuple[bool, bool, bool, bool]
    weight: str
    kind: str
    activation: Activation | None
    rotary: bool
    scale: float
    window: int | None
    blocks: int = SMS
    splits: int = 1
    stages: int = LAG + 1
    traced: bool = False

    @property
    def bits(self) -> int:
        """Bits of an entry of the weights."""
        return self.products[0].bits

    @property
    def quantized(self) -> bool:
        """Whether weights have factors."""
        return self.bits < 16

    @property
    def holds(self) -> bool:
        """Whether warps have what they multiply next in registers meanwhile; attending with many heads needs those."""
        return self.per_group <= 2

    @property
    def integer(self) -> bool:
        """Whether weights are integers: they are multiplied as such, by x in fixed point; see ``layer_staging``."""
        return self.weight in ("int8", "int4")

    @property
    def runs(self) -> int:
        """Runs of 8 consecutive inputs that a thread has of a chunk."""
        return self.products[0].span // 32

    @property
    def factors(self) -> int:
        """Groups of a chunk; of the product that has most, the others have each of theirs more than once."""
        return max(product.span // product.group if product.group else 0 for product in self.products)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the arrays that each layer has of its own."""
        names = list(NAMES)
        names += [f"{name}_factors" for name in NAMES if self.quantized]
        names += [f"{name}_bias" for name, there in zip(NAMES, self.biased, strict=True) if there]
        for name, norm in zip((NAMES[0], NAMES[2]), self.norms, strict=True):
            names += [f"{name}_scale"] * norm.scaled + [f"{name}_shift"] * norm.shifted
        return (*names, "keys", "values")

    @property
    def gated(self) -> bool:
        """Whether the MLP is."""
        return self.products[2].halves == 2

    def share(self, which: int, block: int) -> tuple[int, int]:
        """The first of a product's tiles that are a block's, and the first after them.

        Whole tiles, though some blocks then have a tenth more of the largest product than others: parts of tiles leave
        stages of the ring half empty. A run with them was slower, in which other things had changed too.
        """
        tiles = self.products[which].tiles
        return tiles * block // self.blocks, tiles * (block + 1) // self.blocks

    @property
    def most(self) -> tuple[int, ...]:
        """Tiles of a block, of each product: the most that any has."""
        return tuple(-(-product.tiles // self.blocks) for product in self.products)

    @property
    def stage(self) -> int:
        """Bytes of a stage of the ring: rows of a tile's channels, and each warp's factors of their groups."""
        return 2 * PAIRS * ROW_PITCH + PIECES * self.factors * 2 * PAIRS * 4 * WARPS

    def x_line(self, which: int) -> int:
        """Bytes of a staged row. Two rows that are read at once start in different halves of the banks."""
        return 2 * self.products[which].staged + (64 if self.m > 1 else 0)

    @property
    def tokens(self) -> int:
        """Keys that a warp takes at once."""
        return 4 * max(1, 256 // self.dim)  # four loads by all lanes

    @property
    def work(self) -> int:
        """Bytes of a product's staged rows and, behind them, of what the warps add up: [tile, warp, token, channel].

        And, between two products, of what the warps have attended to.
        """
        each = WARPS * self.m * 2 * PAIRS * 4
        sizes = [self.m * self.x_line(which) + self.most[which] * each for which in range(len(self.products))]
        return max(*sizes, WARPS * self.per_group * (self.dim + 2) * 4)

    @property
    def packets(self) -> dict[str, tuple[int, int]]:
        """What blocks hand each other in packets of 8 bytes, for each sequence: where it begins, and how many."""
        inner, heads = self.groups * self.per_group * self.dim, self.groups * (self.per_group + 2)
        counts = {
            "stream": self.hidden // 2, "heads": heads * self.dim // 2, "attended": inner // 2,
            "middle": self.hidden // 2, "between": self.products[3].inputs // 2,
            "partial": self.groups * self.splits * self.per_group * (self.dim + 2) if self.splits > 1 else 0,
        }  # fmt: skip
        found, start = {}, 0
        for name, count in counts.items():
            found[name] = start, count
            start += self.m * count
        return found

    @property
    def exchange(self) -> int:
        """Words of all packets."""
        return 2 * self.m * sum(count for _, count in self.packets.values())

    @property
    def trace(self) -> tuple[int, ...]:
        """Shape of what is noted: for each layer, mark and block the SM's cycles and the GPU's nanoseconds."""
        return self.layers, len(MARKS), self.blocks, 2

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return sum(self.arrays.values())

    @property
    def arrays(self) -> dict[str, int]:
        """Bytes of each array in shared memory, multiples of 16.

        In the order in which they lie there: the ring; ``work``; what the warps have of the sums of a norm; the fixed
        point's units of x; addresses of the layers' arrays; what is said of the block's tiles; the cursors; barriers.
        """
        chunks = max(product.staged // product.span for product in self.products)
        sizes = {
            "ring": self.stages * self.stage, "work": self.work, "scratch": 2 * self.m * WARPS * 4,
            "units": 4 * self.m * chunks if self.integer else 0, "pointers": 8 * self.layers * len(self.parameters),
            "table": max(1, sum(self.most)) * ENTRY, "cursors": WARPS * ENTRY, "barriers": 16 * self.stages,
        }  # fmt: skip
        return {name: -(-size // 16) * 16 for name, size in sizes.items()}

    def problem(self) -> str | None:
        """Why the kernel cannot run it, or None; apart from dtypes, which ``dtype_problem`` knows."""
        for name, product in zip(("query, key and value", "out", "up", "down"), self.products, strict=True):
            problem = product.problem(name)
            if problem is not None:
                return problem
        if self.integer and self.m > MAX_INTEGER_ROWS:
            return f"{self.m} sequences with weights of {self.weight}"
        if self.dim not in HEADS:
            return f"head_dim {self.dim}"
        if self.per_group > 8:
            return f"{self.per_group} query heads a key head with head_dim {self.dim}"
        if max(self.most) * PAIRS * self.m > THREADS:
            return f"{self.m} sequences with {max(product.channels for product in self.products)} channels"
        if self.splits > 1 and self.m * self.groups * self.splits > self.blocks:
            return f"{self.splits} splits of {self.m * self.groups} heads' keys: those of a head wait for each other"
        if self.shared > ROOM:
            return f"{self.m} sequences with {max(product.inputs for product in self.products)} inputs"
        return None


def divided(plan: LayerPlan) -> LayerPlan:
    """The plan with splits and stages chosen: all SMs attend, and the ring is what shared memory has left."""
    units = plan.m * plan.groups
    splits = max(1, min(MAX_SPLITS, plan.blocks // units, plan.width * BLOCK_SIZE // (WARPS // 2 * plan.tokens)))
    plan = dataclasses.replace(plan, splits=splits, stages=LAG + 1)
    room = ROOM - (plan.shared - (LAG + 1) * plan.stage)
    return dataclasses.replace(plan, stages=max(LAG + 1, min(24, room // plan.stage)))


def places(o: Any, plan: LayerPlan, memory: Any) -> dict[str, Any]:
    """The address of each array in the shared memory of a block."""
    at, found = o.shared(memory), {}
    for name, size in plan.arrays.items():
        found[name], at = at, at + size
    return found
