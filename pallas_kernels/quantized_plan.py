"""How the kernel of quantized products divides its work: what a block does, and how much of it there is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.choices import MAX_QUANTIZED_ROWS
from pallas_kernels.skinny_gemm import DTYPES, QUANTIZED, SMEM_PER_SM, SMS, InputNorm

WARPS = 4
CHUNK = 64
"""Bytes of a channel that a warp takes at once: 16 for each of the four lanes that share a channel."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a block does.

    Attributes:
        m: rows of x.
        n: channels, of each half of a gated weight.
        k: inputs.
        parts: 2 for a gated weight, else 1.
        weight: ``int8``, ``int4`` or ``float8_e4m3fn``.
        kind: ``bf16`` or ``f16``, of x.
        group: inputs that share a factor; 0 if all of a channel do.
        rows: channels of a block, a multiple of 16.
        stages: chunks of a warp in its ring.
        splits: parts of K.
    """

    m: int
    n: int
    k: int
    parts: int
    weight: str
    kind: str
    group: int
    rows: int
    stages: int
    splits: int

    @property
    def bits(self) -> int:
        """Bits of an entry of the weight."""
        return 4 if self.weight == "int4" else 8

    @property
    def line(self) -> int:
        """Bytes of a channel."""
        return self.k * self.bits // 8

    @property
    def inputs(self) -> int:
        """Inputs of a chunk."""
        return CHUNK * 8 // self.bits

    @property
    def chunks(self) -> int:
        """Chunks of a channel, the last maybe not whole."""
        return -(-self.line // CHUNK)

    @property
    def steps(self) -> int:
        """Chunks that a warp takes, the last ones maybe beyond its part of K and then of zeros."""
        own = -(-self.chunks // self.splits)
        return -(-own // WARPS)

    @property
    def tiles(self) -> int:
        """Tiles of 16 channels."""
        return self.parts * self.rows // 16

    @property
    def groups(self) -> int:
        """Groups of a chunk."""
        return self.inputs // self.group if self.group else 0

    @property
    def tokens(self) -> int:
        """Columns of the products: the rows of x, made a multiple of 8."""
        return -(-self.m // 8) * 8

    @property
    def stage(self) -> int:
        """Bytes of a stage of the ring: of each tile two channels a thread, 16 bytes and their groups' factors."""
        return self.tiles * 2 * (16 + 4 * self.groups) * 128

    @property
    def x_line(self) -> int:
        """Bytes of a staged row of x. Two rows that are read at once start in different halves of the banks."""
        return self.steps * WARPS * self.inputs * 2 + (64 if self.m > 1 else 0)

    @property
    def sums(self) -> int:
        """Bytes of what the warps add up."""
        return 4 * WARPS * self.parts * self.tokens * self.rows

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.stages * self.stage + self.m * self.x_line + self.sums + 1024

    @property
    def runs(self) -> int:
        """Runs of 8 consecutive inputs that a thread has of a chunk."""
        return self.inputs // 32


def plan_for(
    x: jax.Array,
    weight: jax.Array,
    weight_scale: jax.Array,
    *,
    norm: InputNorm | None = None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> Plan | None:
    """Choose how the kernel divides a product, or answer None where it does not run it.

    By what was measured on an H200 with a 7B layer, int8 and int4. One row: 16 channels a block and no splits were the
    fastest of the divisions tried, or within a tenth of it. A ring of 16 stages was the fastest of int8's out, where
    there are two blocks an SM, and of 6 of its gate and up, where there are five. Eight rows: x, which every block
    stages, is as large as 16 channels, so a block has 64. With them, 3 stages and two splits, qkv of int8 took 30.0 us,
    34.0 with the kernel for all weights; the other products of 8 rows, those of 2 to 7, fp8 and float16 have not been
    timed.

    Args:
        x: [M, K].
        weight: [P, N, K], quantized.
        weight_scale: of int4 [P, K / g, N], else of one factor a channel.
        norm, bias, residual: as in :func:`pallas_kernels.skinny_gemm`.
    """
    (m, k), (parts, n, _) = x.shape, weight.shape
    # Threads read pairs of the dtype of x, and copy 16 bytes of a channel.
    vectors = [residual] if norm is None else [residual, norm.scale, norm.bias]
    alike = all(array is None or array.dtype == x.dtype for array in vectors)
    if not alike or x.dtype not in DTYPES or weight.dtype not in QUANTIZED:
        return None
    if bias is not None and bias.dtype not in (*DTYPES, jnp.float32):
        return None
    group = k // weight_scale.shape[1] if weight.dtype == jnp.int4 else 0
    plan = Plan(
        m=m, n=n, k=k, parts=parts, weight=weight.dtype.name, kind="bf16" if x.dtype == jnp.bfloat16 else "f16",
        group=group, rows=16, stages=1, splits=1,
    )  # fmt: skip
    if not 1 <= m <= MAX_QUANTIZED_ROWS or n < plan.rows or plan.line % 16:
        return None
    if m > 1 and n >= 64 // parts:
        plan = dataclasses.replace(plan, rows=64 // parts)
    few = SMEM_PER_SM // 2 - 1024
    blocks = -(-n // plan.rows)
    stages = 3 if m > 1 else 16 if blocks <= 2 * SMS else 6
    for splits in (1, 2, 4, 8):
        if splits > 1 and plan.chunks < WARPS * splits:
            break  # a warp would have no chunk
        split = dataclasses.replace(plan, splits=splits)
        plan = dataclasses.replace(split, stages=min(stages, split.steps))
        if plan.shared <= few and (m == 1 or blocks * splits >= 256):
            break
    while plan.stages > 1 and plan.shared > few:
        plan = dataclasses.replace(plan, stages=plan.stages - 1)
    return plan if plan.shared <= SMEM_PER_SM - 1024 else None
