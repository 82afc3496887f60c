"""The Hopper kernel behind :func:`pallas_kernels.rotary_cache`, in Mosaic GPU.

A program has the 64 tokens whose keys share a block, and some of the heads of a sequence, queries, keys and values
alike: it fetches each head's rows by TMA, rotates them where they lie, if at all, and sends them where they belong, a
query's to the result, a key's or value's to its block. A block that the tokens do not fill, at either end of a chunk,
is written row by row: its other rows are not touched.
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
    angles: tuple[jax.Array, jax.Array] | None,
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
        angles: cos and sin, float32 [B, S, D / 2], of the positions from each sequence's start on, :func:`angle_rows`
            of them; None where nothing is rotated.
        keys, values: blocks [N, G, 64, D].
        tables: int32 [B, W].
        starts, lengths: int32 [B], position of the first token and number of tokens.
        heads: of a program.
        interpret: run it on the CPU.

    Returns:
        Queries [B, T, G, R, D], and the blocks with keys and values written.
    """
    batch, tokens, groups, roles, dim = qkv.shape
    per_key, width, num_blocks = roles - 2, tables.shape[1], keys.shape[0]
    # A rotation is arithmetic between two matrices of the same layout: the halves of a head.
    parts = 1 if angles is None else 2
    columns = [pl.ds(part * dim // parts, dim // parts) for part in range(parts)]
    pieces, total = angle_rows(tokens) // BLOCK_SIZE, groups * roles

    def rotary_cache_kernel(qkv_gmem: Any, *refs: Any, rows_smem: Any, arrived: Any) -> None:
        *angles_gmem, tables_gmem, starts_gmem, lengths_gmem, keys_gmem, values_gmem, query_gmem = refs
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
            for part, own in enumerate(columns):
                source = qkv_gmem.at[sequence, pl.ds(token, BLOCK_SIZE), head, own]
                plgpu.copy_gmem_to_smem(source, rows_smem.at[i, part], arrived.at[i])

        def write(i: int, blocks: Any, group: Any) -> None:
            entry = tables_gmem[sequence, jnp.minimum(index, width - 1)]
            known, whole = (entry >= 0) & (entry < num_blocks), count == BLOCK_SIZE
            for part, own in enumerate(columns):

                @pl.when(known & whole)
                def _(part: int = part, own: Any = own) -> None:
                    plgpu.copy_smem_to_gmem(rows_smem.at[i, part], blocks.at[entry, group, pl.ds(0, BLOCK_SIZE), own])

                @pl.when(known & jnp.logical_not(whole))
                def _(part: int = part, own: Any = own) -> None:
                    @pl.loop(0, jnp.maximum(count, 0))
                    def _(row: Any) -> None:
                        plgpu.copy_smem_to_gmem(rows_smem.at[i, part, row], blocks.at[entry, group, offset + row, own])

        @pl.when(token < tokens)
        def _() -> None:
            each(fetch)
            rows = pl.ds(token, BLOCK_SIZE)
            turn = _rotation([ref.at[sequence, rows] for ref in angles_gmem], (BLOCK_SIZE, dim // parts))

            def one(i: int, head: Any) -> None:
                group, role = lax.div(head, jnp.int32(roles)), lax.rem(head, jnp.int32(roles))
                plgpu.barrier_wait(arrived.at[i])
                if turn is not None:
                    pl.when(role <= per_key)(lambda: turn(rows_smem.at[i]))
                    plgpu.commit_smem()

                @pl.when(role < per_key)
                def _() -> None:
                    for part, own in enumerate(columns):
                        target = query_gmem.at[sequence, rows, group * per_key + role, own]
                        plgpu.copy_smem_to_gmem(rows_smem.at[i, part], target)

                pl.when(role == per_key)(lambda: write(i, keys_gmem, group))
                pl.when(role == per_key + 1)(lambda: write(i, values_gmem, group))

            each(one)
            plgpu.wait_smem_to_gmem(0)

    def scoped(*refs: Any) -> None:
        pl.run_scoped(
            functools.partial(rotary_cache_kernel, *refs),
            rows_smem=plgpu.SMEM((heads, parts, BLOCK_SIZE, dim // parts), qkv.dtype),
            arrived=plgpu.Barrier(num_arrivals=parts, num_barriers=heads),
        )

    key_ref, value_ref = jax.new_ref(keys), jax.new_ref(values)
    query = pl.kernel(
        scoped,
        out_type=jax.ShapeDtypeStruct((batch, tokens, groups * per_key, dim), qkv.dtype),
        mesh=plgpu.Mesh(
            grid=(-(-total // heads), pieces, batch),
            grid_names=("heads", "piece", "sequence"),
        ),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        name="rotary_cache",
    )(qkv.reshape(batch, tokens, total, dim), *(angles or ()), tables, starts, lengths, key_ref, value_ref)
    query = query.reshape(batch, tokens, groups, per_key, dim)
    return query, jax.freeze(key_ref), jax.freeze(value_ref)


def _rotation(angles: list[Any], shape: tuple[int, int]) -> Callable[[Any], None] | None:
    """Given references of cos and sin [64, D / 2], what rotates the halves of a head [2, 64, D / 2]; None without."""
    if not angles:
        return None
    layout = plgpu.Layout.WG_STRIDED(shape, vec_size=8)
    cos, sin = (plgpu.load(ref, layout=layout, optimized=False) for ref in angles)

    def turn(halves: Any) -> None:
        x, y = (plgpu.load(halves.at[part], layout=layout).astype(jnp.float32) for part in range(2))
        halves[0] = (x * cos - y * sin).astype(halves.dtype)
        halves[1] = (y * cos + x * sin).astype(halves.dtype)

    return turn
