"""The Hopper kernel behind :func:`pallas_kernels.rotary_cache`, in Mosaic GPU.

A program has the 64 tokens whose keys share a block, and some of the heads of a sequence, queries, keys and values
alike: it fetches each head's rows by TMA, rotates them where they lie, and sends them where they belong, a query's to
the result, a key's or value's to its block. A block that the tokens do not fill, at either end of a chunk, is written
row by row: its other rows are not touched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention import BLOCK_SIZE

HEADS = 3
"""Heads of a program: angles are read once for all of them."""


def angle_rows(tokens: int) -> int:
    """Rows of angles that the kernel reads of a sequence: whole blocks, and one more for a start within a block."""
    return (-(-tokens // BLOCK_SIZE) + 1) * BLOCK_SIZE


# Jitted, so that the layers of a model trace, lower and compile one kernel, not one each.
@functools.partial(jax.jit, static_argnames=("heads", "interpret"))
def run(
    qkv: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    *,
    heads: int = HEADS,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run the kernel on operands that :func:`pallas_kernels.rotary_cache` has checked.

    Args:
        qkv: [B, T, G, R + 2, D].
        cos, sin: float32 [B, S, D / 2], of the positions from each sequence's start on, :func:`angle_rows` of them.
        keys, values: blocks [N, G, 64, D].
        tables: int32 [B, W].
        starts, lengths: int32 [B], position of the first token and number of tokens.
        heads: of a program.
        interpret: run it on the CPU.

    Returns:
        Queries [B, T, G, R, D], and the blocks with keys and values written.
    """
    batch, tokens, groups, roles, dim = qkv.shape
    per_key, half, width, num_blocks = roles - 2, dim // 2, tables.shape[1], keys.shape[0]
    pieces, total = angle_rows(tokens) // BLOCK_SIZE, groups * roles
    layout = plgpu.Layout.WG_STRIDED((BLOCK_SIZE, half), vec_size=8)

    def rotary_cache_kernel(
        qkv_gmem: Any, cos_gmem: Any, sin_gmem: Any, tables_gmem: Any, starts_gmem: Any, lengths_gmem: Any,
        keys_gmem: Any, values_gmem: Any, query_gmem: Any, rows_smem: Any, arrived: Any,
    ) -> None:  # fmt: skip
        first, piece, sequence = lax.axis_index("heads") * heads, lax.axis_index("piece"), lax.axis_index("sequence")
        start, length = starts_gmem[sequence], lengths_gmem[sequence]
        index = lax.div(start, jnp.int32(BLOCK_SIZE)) + piece
        # A chunk that starts within a block has a first piece of fewer tokens, and fetches some of the next one's too.
        token = jnp.maximum(index * BLOCK_SIZE - start, 0)
        offset = start + token - index * BLOCK_SIZE
        count = jnp.minimum(length - token, BLOCK_SIZE - offset)

        def each(of: Callable[[int, Any], None]) -> None:
            for i in range(heads):
                if total % heads == 0:
                    of(i, first + i)
                else:
                    pl.when(first + i < total)(functools.partial(of, i, first + i))

        def fetch(i: int, head: Any) -> None:
            for part in range(2):
                source = qkv_gmem.at[sequence, pl.ds(token, BLOCK_SIZE), head, pl.ds(part * half, half)]
                plgpu.copy_gmem_to_smem(source, rows_smem.at[i, part], arrived.at[i])

        def write(i: int, blocks: Any, group: Any) -> None:
            entry = tables_gmem[sequence, jnp.minimum(index, width - 1)]
            known, whole = (entry >= 0) & (entry < num_blocks), count == BLOCK_SIZE
            for part in range(2):
                columns = pl.ds(part * half, half)

                @pl.when(known & whole)
                def _(part: int = part, columns: Any = columns) -> None:
                    plgpu.copy_smem_to_gmem(
                        rows_smem.at[i, part], blocks.at[entry, group, pl.ds(0, BLOCK_SIZE), columns]
                    )

                @pl.when(known & jnp.logical_not(whole))
                def _(part: int = part, columns: Any = columns) -> None:
                    @pl.loop(0, jnp.maximum(count, 0))
                    def _(row: Any) -> None:
                        plgpu.copy_smem_to_gmem(
                            rows_smem.at[i, part, row], blocks.at[entry, group, offset + row, columns]
                        )

        @pl.when(token < tokens)
        def _() -> None:
            each(fetch)
            own = pl.ds(token, BLOCK_SIZE)
            cos = plgpu.load(cos_gmem.at[sequence, own], layout=layout, optimized=False)
            sin = plgpu.load(sin_gmem.at[sequence, own], layout=layout, optimized=False)

            def one(i: int, head: Any) -> None:
                group, role = lax.div(head, jnp.int32(roles)), lax.rem(head, jnp.int32(roles))
                plgpu.barrier_wait(arrived.at[i])

                @pl.when(role <= per_key)
                def _() -> None:
                    x, y = (plgpu.load(rows_smem.at[i, part], layout=layout).astype(jnp.float32) for part in range(2))
                    rows_smem[i, 0] = (x * cos - y * sin).astype(qkv.dtype)
                    rows_smem[i, 1] = (y * cos + x * sin).astype(qkv.dtype)

                plgpu.commit_smem()

                @pl.when(role < per_key)
                def _() -> None:
                    for part in range(2):
                        target = query_gmem.at[sequence, own, group * per_key + role, pl.ds(part * half, half)]
                        plgpu.copy_smem_to_gmem(rows_smem.at[i, part], target)

                pl.when(role == per_key)(lambda: write(i, keys_gmem, group))
                pl.when(role == per_key + 1)(lambda: write(i, values_gmem, group))

            each(one)
            plgpu.wait_smem_to_gmem(0)

    def scoped(*refs: Any) -> None:
        pl.run_scoped(
            functools.partial(rotary_cache_kernel, *refs),
            plgpu.SMEM((heads, 2, BLOCK_SIZE, half), qkv.dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=heads),
        )

    key_ref, value_ref = jax.new_ref(keys), jax.new_ref(values)
    query = pl.kernel(
        scoped,
        out_type=jax.ShapeDtypeStruct((batch, tokens, groups * per_key, dim), qkv.dtype),
        mesh=plgpu.Mesh(
            grid=(-(-total // heads), pieces, batch), grid_names=("heads", "piece", "sequence"),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        name="rotary_cache",
    )(qkv.reshape(batch, tokens, total, dim), cos, sin, tables, starts, lengths, key_ref, value_ref)  # fmt: skip
    query = query.reshape(batch, tokens, groups, per_key, dim)
    return query, jax.freeze(key_ref), jax.freeze(value_ref)
