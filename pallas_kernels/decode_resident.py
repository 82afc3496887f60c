"""The Hopper kernel of :func:`pallas_kernels.decode_attention.decode_attention` for short contexts, in Mosaic GPU.

A short context is latency, not bytes: the ring of :mod:`pallas_kernels.decode_kernel` walks through its blocks one
after the other, and each is a chain of scores, a maximum across warps, weights, and a product. Here a program has room
for all blocks that it serves. One warpgroup asks for all of them at once, takes the scores of all, one maximum, one
sum, and one product. Programs that share a sequence are a cluster, whose first is sent what the others found.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import BLOCK_SIZE, Bias
from pallas_kernels.decode_config import DecodeConfig, block_range, cdiv, columns_of
from pallas_kernels.decode_kernel import LOG2E, NEVER, REDUCTION_BYTES, log2_scores, transforms

FLOOR = NEVER / 2
"""The least maximum of a program: where it sees no key, exp2(NEVER - FLOOR) is 0."""


# Jitted, so that the layers of a model trace, lower and compile one kernel, not one each.
@functools.partial(jax.jit, static_argnames=("config", "scale", "softcap", "window"))
def resident_attention(
    query: jax.Array,
    key_blocks: jax.Array,
    value_blocks: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    config: DecodeConfig,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    bias: Bias | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """Run the kernel; arguments as in :func:`pallas_kernels.decode_attention.decode_attention`, checked by it.

    Returns:
        The result [B, G, R, D].
    """
    batch, groups, heads, dim = query.shape
    width, num_blocks = tables.shape[1], key_blocks.shape[0]
    dtype, columns, splits, stages = query.dtype, columns_of(heads), config.splits, config.stages
    shape, layout = (BLOCK_SIZE, columns), plgpu.Layout.WGMMA
    # The rows of wgmma come in 64s. Where they do not divide the head, two products overlap: 0..63 and D-64..D-1.
    parts = ((0, dim),) if dim % 64 == 0 else ((0, 64), (dim - 64, 64))
    # TMA fills what is past an array's end with zeros; more than 8 heads must be whole tiles.
    if heads > 8:
        query = jnp.pad(query, ((0, 0), (0, 0), (0, columns - heads), (0, 0)))
    padding = ((0, 0), (0, columns - heads))
    rows: dict[str, jax.Array] = {}
    if bias is not None:
        slopes = bias.slopes.astype(jnp.float32)
        rows["slopes"] = jnp.pad(lax.reduce_precision(slopes, 8, 7) if bias.bfloat16 else slopes, padding)
    if sinks is not None:
        rows["sinks"] = jnp.pad(sinks.astype(jnp.float32) * LOG2E, padding)

    def across(row: Any, size: int) -> Any:
        return lax.broadcast_in_dim(row, (size, columns), [1])

    def decode_attention_kernel(
        query_gmem: Any, keys_gmem: Any, values_gmem: Any, tables_gmem: Any, lengths_gmem: Any, rows_gmem: Any,
        out_gmem: Any, query_smem: Any, keys_smem: Any, values_smem: Any, weights_smem: Any, out_smem: Any,
        query_ready: Any, keys_ready: Any, values_ready: Any, sent: Any,
    ) -> None:  # fmt: skip
        sequence, group = lax.axis_index("sequence"), lax.axis_index("group")
        split = lax.axis_index("split") if splits > 1 else jnp.int32(0)
        # Reads of global memory first, none of which waits for another unless a window says where to begin.
        length = jnp.minimum(lengths_gmem[sequence], width * BLOCK_SIZE)
        first, last = block_range(length, width=width, window=window)
        start = first + split
        # In bounds whatever the table says, as in the reference.
        blocks = [
            jnp.clip(tables_gmem[sequence, jnp.minimum(start + slot * splits, width - 1)], 0, num_blocks - 1)
            for slot in range(stages)
        ]
        # Rows past the end are zeros; where heads are whole tiles there are none.
        plgpu.copy_gmem_to_smem(query_gmem.at[sequence, group, pl.ds(0, columns)], query_smem, query_ready)
        count = cdiv(jnp.maximum(last - start, 0), splits)

        def fetch(source: Any, target: Any, ready: Any) -> None:
            for slot, block in enumerate(blocks):

                @pl.when(slot < count)
                def _(slot: int = slot, block: Any = block) -> None:
                    plgpu.copy_gmem_to_smem(source.at[block, group], target.at[slot], ready.at[slot])

        def wait(ready: Any) -> None:
            for slot in range(stages):
                pl.when(slot < count)(functools.partial(plgpu.barrier_wait, ready.at[slot]))

        def load_row(name: str) -> Any:
            return plgpu.load(rows_gmem[name].at[group], layout=layout.reduce(0), optimized=False)

        fetch(keys_gmem, keys_smem, keys_ready)
        fetch(values_gmem, values_smem, values_ready)
        bases = [(start + slot * splits) * BLOCK_SIZE for slot in range(stages)]
        row = {name: load_row(name) for name in rows}
        # Weights there are zero, but what was never written may be NaN, and zero times NaN is NaN.
        for slot in range(stages):

            @pl.when(slot >= count)
            def _(slot: int = slot) -> None:
                values_smem.at[slot][...] = plgpu.layout_cast(jnp.zeros((BLOCK_SIZE, dim), values_smem.dtype), layout)

        plgpu.barrier_wait(query_ready)
        wait(keys_ready)

        def take_scores(*accs: Any) -> Any:
            for slot, acc in enumerate(accs):
                plgpu.wgmma(acc, keys_smem.at[slot], query_smem.T)
            return [acc[...] for acc in accs]

        found = pl.run_scoped(take_scores, *(plgpu.WGMMAAccumulatorRef(shape, jnp.float32) for _ in range(stages)))
        seen = None if window is None else min(window, width * BLOCK_SIZE)
        scores = [
            log2_scores(score, base, length, row.get("slopes"), scale=scale, softcap=softcap, window=seen, bias=bias)
            for score, base in zip(found, bases, strict=True)
        ]
        maximum = jnp.maximum(functools.reduce(jnp.maximum, scores).max(axis=0), FLOOR)
        top = across(maximum, BLOCK_SIZE)
        weights = [jnp.exp2(score - top) for score in scores]
        for slot, weight in enumerate(weights):
            target = weights_smem.at[slot].T
            target[...] = plgpu.layout_cast(weight.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
        plgpu.commit_smem()
        wait(values_ready)
        for slot, base in enumerate(bases):

            @pl.when((slot < count) & (base + BLOCK_SIZE > length))
            def _(slot: int = slot, base: Any = base) -> None:
                # What lies past a sequence's end may be NaN too.
                places = plgpu.broadcasted_iota(jnp.int32, (BLOCK_SIZE, dim), 0, layout=layout)
                tile = plgpu.load(values_smem.at[slot], layout=layout)
                values_smem.at[slot][...] = jnp.where(places + base < length, tile, jnp.zeros_like(tile))
                plgpu.commit_smem()

        def product(*accs: Any) -> Any:
            for acc, (offset, size) in zip(accs, parts, strict=True):
                for slot in range(stages):
                    values = values_smem.at[slot]
                    if size != dim:
                        values = values.at[:, pl.ds(offset, size)]
                    plgpu.wgmma(acc, values.T, weights_smem.at[slot].T)
            # Before the products are waited for, since it goes through shared memory.
            total = functools.reduce(jnp.add, weights).sum(axis=0)
            return [acc[...] for acc in accs], total

        outs, total = pl.run_scoped(
            product, *(plgpu.WGMMAAccumulatorRef((size, columns), jnp.float32) for _, size in parts)
        )

        def give_alone() -> None:
            if "sinks" in row:
                raised = jnp.maximum(maximum, row["sinks"])
                fade = jnp.exp2(maximum - raised)
                factor = fade / (total * fade + jnp.exp2(row["sinks"] - raised))
            else:
                factor = jnp.where(total > 0, 1 / total, 0.0)
            write([out * across(factor, size) for out, (_, size) in zip(outs, parts, strict=True)])

        def give_to_first() -> None:
            matrices, places, arrived = sent
            factor = jnp.where(total > 0, 1 / total, 0.0)
            # Of a split without keys, NEVER: no other has less. As a matrix, so that all that follows is elementwise.
            place = jnp.where(total > 0, maximum + jnp.log(jnp.maximum(total, 1e-30)) * LOG2E, NEVER)
            for number, (out, (_, size)) in enumerate(zip(outs, parts, strict=True)):
                for value, target in ((out * across(factor, size), matrices), (across(place, size), places)):
                    plgpu.async_store_smem(
                        plgpu.layout_cast(value, layout), target[number].at[split], arrived,
                        cluster_idx=jnp.int32(0), cluster_dim="split", optimized=False,
                    )  # fmt: skip
            pl.when(split == 0)(gather)

        def gather() -> None:
            """Put together what the programs of this cluster sent."""
            matrices, places, arrived = sent
            plgpu.barrier_wait(arrived)
            combined = []
            for values, at, (_, size) in zip(matrices, places, parts, strict=True):
                tops = [plgpu.load(at.at[peer], layout=layout, optimized=False) for peer in range(splits)]
                top = functools.reduce(jnp.maximum, tops)
                total = jnp.zeros_like(top)
                if "sinks" in row:
                    sink = across(row["sinks"], size)
                    top = jnp.maximum(top, sink)
                    total = jnp.exp2(sink - top)
                out = jnp.zeros_like(top)
                for peer in range(splits):
                    weight = jnp.exp2(tops[peer] - top)
                    total = total + weight
                    out = out + weight * plgpu.load(values.at[peer], layout=layout, optimized=False)
                combined.append(out / total)
            write(combined)

        def write(outs: Any) -> None:
            for out, staged in zip(outs, out_smem, strict=True):
                staged.T[...] = plgpu.layout_cast(out.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            for staged, (offset, size) in zip(out_smem, parts, strict=True):
                target = out_gmem.at[sequence, group]
                if size != dim:
                    target = target.at[:, pl.ds(offset, size)]
                plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, heads)], target)
                # Each before the next, since two parts overlap; the last need only have left shared memory.
                plgpu.wait_smem_to_gmem(0, wait_read_only=offset + size == dim)

        if splits == 1:
            give_alone()
        else:
            give_to_first()

    staging: tuple[Any, ...] = ()
    if dim % 64 and heads % 8 == 0:
        # Left to itself Mosaic tiles what can be tiled by 64, which does not divide the result's rows.
        tile = 32 // dtype.itemsize
        staging = plgpu.TilingTransform((8, tile)), plgpu.SwizzleTransform(32)  # type: ignore[abstract]
    tiles = plgpu.TilingTransform((8, 8)), plgpu.SwizzleTransform(32)  # type: ignore[abstract]

    def matrices() -> list[Any]:
        return [plgpu.SMEM((splits, size, columns), jnp.float32, transforms=tiles) for _, size in parts]

    sent: tuple[Any, ...] = ()
    if splits > 1:
        sent = matrices(), matrices(), plgpu.Barrier(num_arrivals=2 * splits * len(parts))
    block = (stages, BLOCK_SIZE, dim)
    return plgpu.kernel(
        decode_attention_kernel,
        out_type=jax.ShapeDtypeStruct((batch, groups, heads, dim), dtype),
        scratch_types=[
            plgpu.SMEM((columns, dim), dtype, transforms=transforms(dim)),
            plgpu.SMEM(block, dtype, transforms=transforms(dim)),
            plgpu.SMEM(block, dtype, transforms=transforms(dim)),
            # wgmma has one swizzle for both operands.
            plgpu.SMEM((stages, columns, BLOCK_SIZE), dtype, transforms=transforms(math.gcd(dim, BLOCK_SIZE))),
            [plgpu.SMEM((columns, size), dtype, transforms=staging) for _, size in parts],
            plgpu.Barrier(),
            *(plgpu.Barrier(num_barriers=stages) for _ in range(2)),
            sent,
        ],
        grid=(batch, groups),
        grid_names=("sequence", "group"),
        cluster=(splits,) if splits > 1 else (),
        cluster_names=("split",) if splits > 1 else (),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            approx_math=True,
            reduction_scratch_bytes=REDUCTION_BYTES,
        ),
    )(query, key_blocks, value_blocks, tables, lengths, rows)
