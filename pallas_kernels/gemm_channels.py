"""Which output channels a block of the skinny GEMM's kernel has, and what becomes of their sums."""

from __future__ import annotations

from typing import Any, Protocol

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import BLOCK_SIZE
from pallas_kernels.qkv_gemm import FEW_TOKENS
from pallas_kernels.skinny_gemm import Activation, epilogue

ACC = plgpu.Layout.WGMMA
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED

Copies = list[tuple[Any, Any]]
"""What to copy of global memory, and where to in shared memory."""


def tiled(columns: int, dtype: Any, divides: int = 64) -> tuple[Any, ...]:
    """Transforms of a shared array whose rows have ``columns`` entries: the widest swizzle whose tiles divide them.

    Tiles must also divide the rows of the array in global memory, of ``divides`` entries.
    """
    bits = 4 if dtype == jnp.int4 else 8 * jnp.dtype(dtype).itemsize
    wide = next(w for w in (128, 64, 32, 16) if columns * bits % (8 * w) == 0 and divides * bits % (8 * w) == 0)
    tiling = plgpu.TilingTransform((8, 8 * wide // bits))  # type: ignore[abstract]
    return (tiling,) if wide == 16 else (tiling, plgpu.SwizzleTransform(wide))  # type: ignore[abstract]


def whole_tiles(x: jax.Array) -> jax.Array:
    """Pad rows: tiles have 8, and an array of fewer is one tile, of more must be whole tiles."""
    m = x.shape[0]
    return jnp.pad(x, ((0, 0 if m < 8 else -m % 8), (0, 0)))


class Channels(Protocol):
    """The channels of a block, ``rows`` in each of its ``parts``, and what becomes of their sums.

    Attributes:
        parts: sums that :meth:`finish` is given.
        blocks: blocks of the grid along the channels.
        pieces: copies of :meth:`vector`.
        weight_copies, factor_copies: those of :meth:`weight` and :meth:`factors`.
        groups_axis: of the factors of groups of inputs, the axis of groups.
        operands, scratch, outs: arrays of global and shared memory that only :meth:`fetch` and :meth:`finish` need.
        fetched: of the operands, those that :meth:`fetch` copies, one copy each.
    """

    parts: int
    blocks: int
    pieces: int
    weight_copies: int
    factor_copies: int
    groups_axis: int
    operands: dict[str, jax.Array]
    scratch: dict[str, Any]
    outs: dict[str, Any]
    fetched: tuple[str, ...]

    def weight(self, ref: Any, smem: Any, tile: Any, inputs: Any) -> Copies:
        """A tile of the weight, for [parts, rows, tile_k]."""

    def factors(self, ref: Any, smem: Any, tile: Any, groups: Any) -> Copies:
        """Factors of groups of inputs, for [parts, groups, rows]."""

    def vector(self, ref: Any, smem: Any, tile: Any, part: int) -> Copies:
        """A part's share of a vector over all channels, for [rows]."""

    def fetch(self, gmem: Any, smem: Any, tile: Any) -> None:
        """Fetch operands that kernels before may have written; the barrier is ``smem["extra"]``."""

    def finish(self, parts: list[jax.Array], bias: list[jax.Array] | None, gmem: Any, smem: Any, tile: Any) -> None:
        """Turn the sums, float32 [rows, tokens] each, into results, and wait until they are written."""


class Matrix:
    """Of a weight [P, N, K], the next ``rows`` channels of each part; the result is [M, N]. See :class:`Channels`."""

    pieces = weight_copies = factor_copies = groups_axis = 1

    def __init__(
        self, parts: int, n: int, *, rows: int, tokens: int, held: int, dtype: Any, activation: Activation | None,
        residual: jax.Array | None,
    ) -> None:  # fmt: skip
        """Take the result's dtype and its rows in memory, ``held``."""
        self.parts, self.n, self.rows, self.tokens, self.activation = parts, n, rows, tokens, activation
        self.blocks = -(-n // rows)
        self.operands = {} if residual is None else {"residual": residual}
        self.fetched = tuple(self.operands)
        self.scratch = {"out_smem": plgpu.SMEM((tokens, rows), dtype, transforms=tiled(rows, dtype, n))}
        if residual is not None:
            transforms = tiled(rows, residual.dtype, n)
            self.scratch["residual_smem"] = plgpu.SMEM((tokens, rows), residual.dtype, transforms=transforms)
        self.outs: dict[str, Any] = {"out": jax.ShapeDtypeStruct((held, n), dtype)}

    def weight(self, ref: Any, smem: Any, tile: Any, inputs: Any) -> Copies:
        """All parts in one copy."""
        return [(ref.at[:, pl.ds(tile * self.rows, self.rows), inputs], smem)]

    def factors(self, ref: Any, smem: Any, tile: Any, groups: Any) -> Copies:
        """Of [P, K / g, N], all parts in one copy."""
        return [(ref.at[:, groups, pl.ds(tile * self.rows, self.rows)], smem)]

    def vector(self, ref: Any, smem: Any, tile: Any, part: int) -> Copies:
        """Of [P * N]."""
        return [(ref.at[pl.ds(part * self.n + tile * self.rows, self.rows)], smem)]

    def fetch(self, gmem: Any, smem: Any, tile: Any) -> None:
        """Fetch the residual."""
        source = gmem["residual"].at[pl.ds(0, self.tokens), pl.ds(tile * self.rows, self.rows)]
        plgpu.copy_gmem_to_smem(source, smem["residual_smem"], smem["extra"])

    def finish(self, parts: list[jax.Array], bias: list[jax.Array] | None, gmem: Any, smem: Any, tile: Any) -> None:
        """Activation, gate and residual."""
        out = smem["out_smem"]
        y = epilogue(parts, bias, self.activation, None)
        if "residual" in gmem:
            y = plgpu.layout_cast(y, TRANSPOSED)
            y = y + plgpu.load(smem["residual_smem"].T, layout=TRANSPOSED).astype(jnp.float32)
            out.T[...] = y.astype(out.dtype)
        else:
            out.T[...] = plgpu.layout_cast(y.astype(out.dtype), TRANSPOSED)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out, gmem["out"].at[pl.ds(0, self.tokens), pl.ds(tile * self.rows, self.rows)])
        plgpu.wait_smem_to_gmem(0)


class Heads:
    """Of a weight [G, R + 2, D, K], ``rows`` channels of a head, or of each half of one. See :class:`Channels`.

    The query is [M, G, R, D]; a token's key and value go to its row of the blocks. Halves are two parts, since they
    are what a rotation mixes: then it is arithmetic between two matrices of the same layout.

    Attributes:
        rows, parts: channels of a block in each part of a head, and the parts: 2 where heads are rotated.
    """

    pieces = weight_copies = 1
    groups_axis = 0

    def __init__(
        self, groups: int, per_group: int, dim: int, *, parts: int, rows: int, m: int, tokens: int, held: int,
        dtype: Any, blocks: tuple[Any, Any], slots: jax.Array, rotary: tuple[jax.Array, jax.Array] | None,
    ) -> None:  # fmt: skip
        """Take the blocks [N, G, 64, D] of keys and of values as mutable references; ``rows`` divides D / ``parts``.

        Args:
            groups, per_group, dim: G, R and D.
            parts, rows: as the attributes.
            m, tokens, held: rows of x, of a matrix of sums, and of the result in memory.
            dtype: of the query.
            blocks: references of key and value blocks.
            slots: int32 [tokens], the row of the blocks for each token; negative for none.
            rotary: cos and sin, float32 [D / 2, tokens]; None for heads that are not rotated.
        """
        self.groups, self.per_group, self.dim = groups, per_group, dim
        self.parts, self.rows, self.m, self.tokens, self.written = parts, rows, m, tokens, blocks
        self.each = dim // parts
        self.per_head = self.each // rows
        self.heads = groups * (per_group + 2)
        self.blocks = self.heads * self.per_head
        self.factor_copies = parts
        self.operands = {"slots": slots}
        self.ahead = tokens <= FEW_TOKENS
        columns = parts * rows if self.per_head == 1 else rows
        self.scratch: dict[str, Any] = {
            "slots_smem": plgpu.SMEM(slots.shape, jnp.int32),
            # A head whole, or its parts one by one: what lies together in both memories is one copy.
            "out_smem": plgpu.SMEM((parts * rows // columns, tokens, columns), dtype),
        }
        if rotary is not None:
            transforms = tiled(tokens, jnp.float32)
            for name, array in zip(("cos", "sin"), rotary, strict=True):
                self.operands[name] = array
                if self.ahead:
                    self.scratch[f"{name}_smem"] = plgpu.SMEM((rows, tokens), jnp.float32, transforms=transforms)
        self.fetched = tuple(name for name in self.operands if f"{name}_smem" in self.scratch)
        self.outs: dict[str, Any] = {"out": jax.ShapeDtypeStruct((held, groups, per_group, dim), dtype)}

    def _place(self, tile: Any) -> tuple[Any, Any]:
        """A block's head, and where its rows begin in each part of it."""
        if self.per_head == 1:
            return tile, 0
        return lax.div(tile, jnp.int32(self.per_head)), lax.rem(tile, jnp.int32(self.per_head)) * self.rows

    def weight(self, ref: Any, smem: Any, tile: Any, inputs: Any) -> Copies:
        """Of [heads * parts, D / parts, K], all parts in one copy."""
        head, start = self._place(tile)
        return [(ref.at[pl.ds(head * self.parts, self.parts), pl.ds(start, self.rows), inputs], smem)]

    def factors(self, ref: Any, smem: Any, tile: Any, groups: Any) -> Copies:
        """Of [K / g, heads, D], a copy for each part."""
        head, start = self._place(tile)
        return [
            (ref.at[groups, head, pl.ds(part * self.each + start, self.rows)], smem.at[part])
            for part in range(self.parts)
        ]

    def vector(self, ref: Any, smem: Any, tile: Any, part: int) -> Copies:
        """Of [heads * D]."""
        head, start = self._place(tile)
        return [(ref.at[pl.ds(head * self.dim + part * self.each + start, self.rows)], smem)]

    def fetch(self, gmem: Any, smem: Any, tile: Any) -> None:
        """Fetch where tokens go, and their angles."""
        for name in self.fetched:
            source = gmem["slots"] if name == "slots" else self._angles(gmem[name], tile)
            plgpu.copy_gmem_to_smem(source, smem[f"{name}_smem"], smem["extra"])

    def _angles(self, ref: Any, tile: Any) -> Any:
        return ref.at[pl.ds(self._place(tile)[1], self.rows)]

    def finish(self, parts: list[jax.Array], bias: list[jax.Array] | None, gmem: Any, smem: Any, tile: Any) -> None:
        """Rotate, and write query, key or value."""
        head, start = self._place(tile)
        group, kind = (f(head, jnp.int32(self.per_group + 2)) for f in (lax.div, lax.rem))
        if bias is not None:
            parts = [part + b for part, b in zip(parts, bias, strict=True)]
        if "cos" in gmem:
            cos, sin = (
                plgpu.load(smem[f"{name}_smem"], layout=ACC)
                if self.ahead
                else plgpu.load(self._angles(gmem[name], tile), layout=ACC, optimized=False)
                for name in ("cos", "sin")
            )
            turn = jnp.where(kind <= self.per_group, 1.0, 0.0)  # values are not rotated
            cos, sin = (cos - 1.0) * turn + 1.0, sin * turn
            parts = [parts[0] * cos - parts[1] * sin, parts[1] * cos + parts[0] * sin]
        out = smem["out_smem"]
        staged = []
        for part, value in enumerate(parts):
            if out.shape[0] == self.parts:
                matrix, columns = out.at[part], pl.ds(0, self.rows)
                staged.append((part, pl.ds(part * self.each + start, self.rows)))
            else:
                matrix, columns = out.at[0], pl.ds(part * self.rows, self.rows)
            matrix.at[:, columns].T[...] = plgpu.layout_cast(value.astype(out.dtype), TRANSPOSED)
        staged = staged or [(0, pl.ds(0, self.dim))]
        plgpu.commit_smem()

        @pl.when(kind < self.per_group)
        def _() -> None:
            for number, channels in staged:
                target = gmem["out"].at[pl.ds(0, self.tokens), group, kind, channels]
                plgpu.copy_smem_to_gmem(out.at[number], target)

        for which, blocks in enumerate(self.written):

            @pl.when(kind == self.per_group + which)
            def _(blocks: Any = blocks) -> None:
                @pl.loop(0, self.m)
                def _(row: Any) -> None:
                    slot = smem["slots_smem"][row]

                    @pl.when(slot >= 0)
                    def _() -> None:
                        block, inside = (f(slot, jnp.int32(BLOCK_SIZE)) for f in (lax.div, lax.rem))
                        for number, channels in staged:
                            plgpu.copy_smem_to_gmem(out.at[number, row], blocks.at[block, group, inside, channels])

        plgpu.wait_smem_to_gmem(0)
