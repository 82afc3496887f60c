"""The Hopper kernel of :func:`pallas_kernels.decode_attention.decode_attention`, in Mosaic GPU.

How the kernel works: a program serves one (sequence, key/value head, split). Its last warpgroup walks the block
table and keeps a ring of TMA copies in flight; the others take the blocks in turn and compute, for each, the scores as
``K q^T`` and the output as ``V^T p^T``. Keys are the 64 rows of wgmma and query heads its columns, so a few query heads
cost the tensor cores and the softmax 8 columns, where heads as rows would cost 64. Splits take a sequence's blocks in
turn too; each gives an unnormalised output, a maximum and a sum, which one fusion of XLA puts together.

Keys and values of 8 bits are widened on their way from one tile of shared memory to another, exactly; a key's factor
multiplies its row of the scores, and a value's factor its row of the weights.
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

LOG2E = math.log2(math.e)
SLICE = 64
"""Entries of 64 rows of 8 bits that are in registers at once while they are widened."""
REDUCTION_BYTES = 2048
"""Shared memory of a reduction across warps."""
NEVER = -1e30
"""Score of a hidden key, and the maximum before the first key: finite, and exp2 of it is 0."""


def transforms(columns: int) -> tuple[Any, ...]:
    """How a matrix of 16-bit entries lies in shared memory: tiles as wide as the widest swizzle that divides a row."""
    tile = next(tile for tile in (64, 32, 16) if columns % tile == 0)
    return plgpu.TilingTransform((8, tile)), plgpu.SwizzleTransform(2 * tile)  # type: ignore[abstract]


def _narrow_transforms() -> tuple[Any, ...]:
    """The same for 8-bit entries, whose tiles are as wide as the slices that are widened at a time."""
    return plgpu.TilingTransform((8, SLICE)), plgpu.SwizzleTransform(SLICE)  # type: ignore[abstract]


def log2_scores(
    scores: Any,
    base: Any,
    length: Any,
    slopes: Any,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    bias: Bias | None,
) -> Any:
    """Products of a block's keys with queries [64, columns] to scores in units of log2, hidden ones NEVER; in a kernel.

    ``base`` is the position of the first key, ``length`` the tokens there are, ``slopes`` [columns] those of ``bias``.
    """
    positions = plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=plgpu.Layout.WGMMA) + base
    alibi = None
    if bias is not None:
        places = positions.astype(jnp.float32)
        if bias.bfloat16:
            places = places.astype(jnp.bfloat16).astype(jnp.float32)
        alibi = lax.broadcast_in_dim(slopes, scores.shape, [1]) * places
        if bias.bfloat16:
            alibi = alibi.astype(jnp.bfloat16).astype(jnp.float32)
        if bias.scaled:
            scores = scores + alibi
    if softcap is not None:
        # tanh(x) = 1 - 2 / (1 + exp(2x)): the hardware's own tanh has 11 bits, too few to be scaled by a cap.
        scores = softcap - (2 * softcap) / (1 + jnp.exp2(scores * (2 * LOG2E * scale / softcap)))
        scores = scores * LOG2E
    else:
        scores = scores * (scale * LOG2E)
    if alibi is not None and bias is not None and not bias.scaled:
        scores = scores + alibi * LOG2E
    visible = positions < length
    if window is not None:
        visible &= positions >= length - window
    return jnp.where(visible, scores, NEVER)


# Jitted, so that the layers of a model trace, lower and compile one kernel, not one each.
@functools.partial(jax.jit, static_argnames=("config", "scale", "softcap", "window"))
def split_attention(
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
    key_scales: jax.Array | None = None,
    value_scales: jax.Array | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Run the kernel; arguments as in :func:`pallas_kernels.decode_attention.decode_attention`, checked by it.

    Returns:
        The result [B, G, R, D] where there is one split. Else float32 unnormalised results [B, G, S, R, D], their
        maxima in units of log2 and their sums [B, G, S, R], and which splits have any of it, bool [B, S]: what the
        others left in memory may be anything.
    """
    batch, groups, heads, dim = query.shape
    width, num_blocks = tables.shape[1], key_blocks.shape[0]
    dtype, columns, splits, stages = query.dtype, columns_of(heads), config.splits, config.stages
    consumers = config.consumers
    scores_shape, layout = (BLOCK_SIZE, columns), plgpu.Layout.WGMMA
    # The rows of wgmma come in 64s. Where they do not divide the head, two products overlap: 0..63 and D-64..D-1.
    parts = ((0, dim),) if dim % 64 == 0 else ((0, 64), (dim - 64, 64))
    whole = splits == 1
    narrow = key_scales is not None and value_scales is not None
    factors = {"keys": key_scales, "values": value_scales} if narrow else {}
    # TMA fills what is past an array's end with zeros, so that fewer than 8 heads are one tile as they lie in memory;
    # more must be whole tiles.
    if heads > 8:
        query = jnp.pad(query, ((0, 0), (0, 0), (0, columns - heads), (0, 0)))
    # Of parameters, so that XLA pads them before all steps.
    padding = ((0, 0), (0, columns - heads))
    rows: dict[str, jax.Array] = {}
    if bias is not None:
        slopes = bias.slopes.astype(jnp.float32)
        rows["slopes"] = jnp.pad(lax.reduce_precision(slopes, 8, 7) if bias.bfloat16 else slopes, padding)
    if sinks is not None and whole:
        rows["sinks"] = jnp.pad(sinks.astype(jnp.float32) * LOG2E, padding)
    out_type: dict[str, Any] = {
        "out": jax.ShapeDtypeStruct(
            (batch, groups, 1 if whole else splits, heads, dim), dtype if whole else jnp.float32
        )
    }
    if not whole:
        out_type |= {
            name: jax.ShapeDtypeStruct((batch, groups, splits, columns), jnp.float32) for name in ("maxima", "sums")
        }

    def across(row: Any, size: int) -> Any:
        return lax.broadcast_in_dim(row, (size, columns), [1])

    def load_row(ref: Any) -> Any:
        return plgpu.load(ref, layout=layout.reduce(0), optimized=False)

    def decode_attention_kernel(
        query_gmem: Any, keys_gmem: Any, values_gmem: Any, tables_gmem: Any, lengths_gmem: Any, rows_gmem: Any,
        factors_gmem: Any, out_gmem: Any, query_smem: Any, keys_smem: Any, values_smem: Any, weights_smem: Any,
        out_smem: Any, query_ready: Any, keys_ready: Any, values_ready: Any, keys_used: Any,
        values_used: Any, widened: Any, merged: Any,
    ) -> None:  # fmt: skip
        sequence, group, split = (lax.axis_index(name) for name in ("sequence", "group", "split"))
        warpgroup = lax.axis_index("warpgroup")

        def wait_for_kernel_before() -> None:
            if config.overlap:
                plgpu.griddepcontrol_wait()

        if config.overlap:
            plgpu.griddepcontrol_launch_dependents()
        if not config.ahead:
            wait_for_kernel_before()
        length = jnp.minimum(lengths_gmem[sequence], width * BLOCK_SIZE)
        first, last = block_range(length, width=width, window=window)
        start = first + split
        count = cdiv(jnp.maximum(last - start, 0), splits)

        def block_at(index: Any) -> Any:
            # In bounds whatever the table says, as in the reference.
            place = jnp.minimum(start + index * splits, width - 1)
            return jnp.clip(tables_gmem[sequence, place], 0, num_blocks - 1)

        def copy_keys(block: Any, slot: Any) -> None:
            plgpu.copy_gmem_to_smem(keys_gmem.at[block, group], keys_smem.at[slot], keys_ready.at[slot])
            copy_factors("keys", block, slot, keys_ready)

        def copy_values(block: Any, slot: Any) -> None:
            plgpu.copy_gmem_to_smem(values_gmem.at[block, group], values_smem.at[slot], values_ready.at[slot])
            copy_factors("values", block, slot, values_ready)

        def copy_factors(name: str, block: Any, slot: Any, ready: Any) -> None:
            if narrow:
                source = factors_gmem[name].at[block, group]
                plgpu.copy_gmem_to_smem(source, widened[f"{name} factors"].at[slot], ready.at[slot])

        def widen(tile: Any, name: str, slot: Any) -> Any:
            """Widen the 8 bits of a tile into another one; gives the factors at every column of the scores."""
            target = widened[name].at[warpgroup]
            for offset in range(0, dim, SLICE):
                some = pl.ds(offset, SLICE)
                value = plgpu.load(tile.at[:, some], layout=plgpu.Layout.WGMMA_UPCAST_2X)
                value = plgpu.layout_cast(value, layout)
                if tile.dtype == jnp.float8_e4m3fn:
                    # Hopper widens e4m3 to float16 only; by float32, each value is kept on its way to bfloat16.
                    value = value.astype(jnp.float16)
                    value = value if dtype == jnp.float16 else value.astype(jnp.float32)
                target[:, some] = value.astype(dtype)
            factor = plgpu.load(widened[f"{name} factors"].at[slot], layout=layout.reduce(1), optimized=False)
            plgpu.commit_smem()
            return lax.broadcast_in_dim(factor, scores_shape, (0,))

        def produce() -> None:
            # All ids before the first copy: each is a read of GMEM, and one after the other would cost their latencies.
            blocks = [block_at(jnp.int32(i)) for i in range(stages)]
            following = block_at(jnp.int32(stages))

            def copy(index: Any, block: Any) -> None:
                copy_keys(block, index)
                copy_values(block, index)

            if not config.ahead:
                for i, block in enumerate(blocks):
                    pl.when(i < count)(functools.partial(copy, i, block))
            else:
                # The newest token's block is the last of this split, or of another.
                newest = start + (count - 1) * splits == last - 1
                newest_block = block_at(jnp.maximum(count - 1, 0))
                older = count - jnp.where(newest, 1, 0)
                for i, block in enumerate(blocks):
                    pl.when(i < older)(functools.partial(copy, i, block))
                wait_for_kernel_before()
                first_round = newest & (count > 0) & (count <= stages)
                pl.when(first_round)(functools.partial(copy, jnp.maximum(count - 1, 0), newest_block))

            def refill(index: Any, block: Any) -> Any:
                after = block_at(index + 1)
                slot = lax.rem(index, jnp.int32(stages))
                plgpu.barrier_wait(keys_used.at[slot])
                copy_keys(block, slot)
                plgpu.barrier_wait(values_used.at[slot])
                copy_values(block, slot)
                return after

            lax.fori_loop(stages, jnp.maximum(count, stages), refill, following)

        def scores_of(slot: Any, base: Any) -> Any:
            """Scores of a block's keys in units of log2, hidden ones NEVER: [64, columns]."""
            factor = widen(keys_smem.at[slot], "keys", slot) if narrow else None
            tile = widened["keys"].at[warpgroup] if narrow else keys_smem.at[slot]

            def product(acc: Any) -> Any:
                plgpu.wgmma(acc, tile, query_smem.T)
                return acc[...]

            scores = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef(scores_shape, jnp.float32))
            if factor is not None:
                scores = scores * factor
            slopes = None if bias is None else load_row(rows_gmem["slopes"].at[group])
            seen = None if window is None else min(window, width * BLOCK_SIZE)
            return log2_scores(scores, base, length, slopes, scale=scale, softcap=softcap, window=seen, bias=bias)

        def clear_past_end(tile: Any, base: Any) -> None:
            # What lies past a sequence's end may be NaN, and zero times NaN is NaN.
            @pl.when(base + BLOCK_SIZE > length)
            def _() -> None:
                places = plgpu.broadcasted_iota(jnp.int32, (BLOCK_SIZE, dim), 0, layout=layout)
                values = plgpu.load(tile, layout=layout)
                tile[...] = jnp.where(places + base < length, values, jnp.zeros_like(values))
                plgpu.commit_smem()

        def step(turn: Any, carry: Any) -> Any:
            outs, maximum, total = carry
            index = turn * consumers + warpgroup
            slot = lax.rem(index, jnp.int32(stages))
            base = (start + index * splits) * BLOCK_SIZE
            refills = index + stages < count
            plgpu.barrier_wait(keys_ready.at[slot])
            scores = scores_of(slot, base)

            @pl.when(refills)
            def _() -> None:
                plgpu.barrier_arrive(keys_used.at[slot])

            raised = jnp.maximum(maximum, scores.max(axis=0))
            fade = jnp.exp2(maximum - raised)
            weights = jnp.exp2(scores - across(raised, BLOCK_SIZE))
            # Summed over keys only at the end: a sum over rows goes through shared memory.
            total = total * across(fade, BLOCK_SIZE) + weights
            if narrow:
                plgpu.barrier_wait(values_ready.at[slot])
                factor = widen(values_smem.at[slot], "values", slot)
                place = plgpu.broadcasted_iota(jnp.int32, scores_shape, 0, layout=layout) + base
                # A factor that nobody wrote may be NaN too.
                weights = weights * jnp.where(place < length, factor, jnp.zeros_like(factor))
            own_weights = weights_smem.at[warpgroup].T
            own_weights[...] = plgpu.layout_cast(weights.astype(dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            if not narrow:
                plgpu.barrier_wait(values_ready.at[slot])
            tile = widened["values"].at[warpgroup] if narrow else values_smem.at[slot]
            clear_past_end(tile, base)

            def product(*accs: Any) -> Any:
                for acc, (offset, size) in zip(accs, parts, strict=True):
                    values = tile
                    if size != dim:
                        values = values.at[:, pl.ds(offset, size)]
                    plgpu.wgmma(acc, values.T, own_weights)
                return [acc[...] for acc in accs]

            # Into fresh accumulators, since interpret mode cannot start one from registers; an addition each is cheap.
            new = pl.run_scoped(
                product, *(plgpu.WGMMAAccumulatorRef((size, columns), jnp.float32) for _, size in parts)
            )

            @pl.when(refills)
            def _() -> None:
                plgpu.barrier_arrive(values_used.at[slot])

            outs = [out * across(fade, size) + add for out, add, (_, size) in zip(outs, new, parts, strict=True)]
            return outs, raised, total

        def fetch_query() -> None:
            # Rows past the end are zeros; where heads are whole tiles there are none.
            source = query_gmem.at[sequence, group, pl.ds(0, columns)]
            plgpu.copy_gmem_to_smem(source, query_smem, query_ready)

        def consume() -> None:
            if config.ahead:
                wait_for_kernel_before()
            if consumers == 1:
                fetch_query()
            else:
                pl.when(warpgroup == 0)(fetch_query)
            zeros = [plgpu.layout_cast(jnp.zeros((size, columns), jnp.float32), layout) for _, size in parts]
            maximum = plgpu.layout_cast(jnp.full((columns,), NEVER, jnp.float32), layout.reduce(0))
            total = plgpu.layout_cast(jnp.zeros(scores_shape, jnp.float32), layout)
            plgpu.barrier_wait(query_ready)
            own = cdiv(jnp.maximum(count - warpgroup, 0), consumers) if consumers > 1 else count
            outs, maximum, total = lax.fori_loop(0, own, step, (zeros, maximum, total))
            total = total.sum(axis=0)
            if consumers == 1:
                finish(outs, maximum, total)
                return
            pl.when(warpgroup > 0)(functools.partial(hand_over, outs, maximum, total))
            pl.when(warpgroup == 0)(functools.partial(take_over, outs, maximum, total))

        def hand_over(outs: Any, maximum: Any, total: Any) -> None:
            """Leave what this warpgroup found to the first."""
            matrices, maxima, sums, handed = merged
            other = warpgroup - 1
            for out, target in zip(outs, matrices, strict=True):
                target[other] = out
            maxima[other] = maximum
            sums[other] = total
            plgpu.commit_smem()
            plgpu.barrier_arrive(handed)

        def take_over(outs: Any, maximum: Any, total: Any) -> None:
            """Add what the other warpgroups found."""
            matrices, maxima, sums, handed = merged
            plgpu.barrier_wait(handed)
            for other in range(consumers - 1):
                theirs = load_row(maxima.at[other])
                raised = jnp.maximum(maximum, theirs)
                fade, rise = jnp.exp2(maximum - raised), jnp.exp2(theirs - raised)
                total = total * fade + load_row(sums.at[other]) * rise
                outs = [
                    out * across(fade, size) + across(rise, size) * plgpu.load(found.at[other], layout=layout)
                    for out, found, (_, size) in zip(outs, matrices, parts, strict=True)
                ]
                maximum = raised
            finish(outs, maximum, total)

        def finish(outs: Any, maximum: Any, total: Any) -> None:
            """Write the result, or this split's share of it."""
            if splits == 1:
                if "sinks" in rows:
                    sink = load_row(rows_gmem["sinks"].at[group])
                    raised = jnp.maximum(maximum, sink)
                    fade = jnp.exp2(maximum - raised)
                    factor = fade / (total * fade + jnp.exp2(sink - raised))
                else:
                    factor = jnp.where(total > 0, 1 / total, 0.0)
                outs = [out * across(factor, size) for out, (_, size) in zip(outs, parts, strict=True)]
            else:
                out_gmem["maxima"][sequence, group, split] = maximum
                out_gmem["sums"][sequence, group, split] = total
            write(outs)

        def write(outs: Any) -> None:
            for out, staged in zip(outs, out_smem, strict=True):
                staged.T[...] = plgpu.layout_cast(out.astype(staged.dtype), plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            for staged, (offset, size) in zip(out_smem, parts, strict=True):
                target = out_gmem["out"].at[sequence, group, 0 if whole else split]
                if size != dim:
                    target = target.at[:, pl.ds(offset, size)]
                plgpu.copy_smem_to_gmem(staged.at[pl.ds(0, heads)], target)
                # Each before the next, since two parts overlap; the last need only have left shared memory.
                plgpu.wait_smem_to_gmem(0, wait_read_only=offset + size == dim)

        def work() -> None:
            consume_from(1)
            pl.when(warpgroup == 0)(consume)
            pl.when(warpgroup == consumers)(produce)

        def consume_from(number: int) -> None:
            """Start the warpgroups from ``number`` on, each over its own end of shared memory.

            Mosaic reduces across warps by way of what lies behind the allocations of the moment (JAX 0.11.2), and
            warpgroups that run the same operation would share that. Only the start of an allocation waits for all.
            """
            if number < consumers:

                def behind(_: Any) -> None:
                    consume_from(number + 1)
                    pl.when(warpgroup == number)(consume)

                pl.run_scoped(behind, plgpu.SMEM((REDUCTION_BYTES,), jnp.int8), collective_axes="warpgroup")

        if whole:
            work()
        else:
            pl.when(count > 0)(work)

    block = (stages, BLOCK_SIZE, dim)
    widened: dict[str, Any] = {}
    for name in factors:
        widened[name] = plgpu.SMEM((consumers, BLOCK_SIZE, dim), dtype, transforms=transforms(dim))
        widened[f"{name} factors"] = plgpu.SMEM((stages, BLOCK_SIZE), jnp.float32)
    stored = _narrow_transforms() if narrow else transforms(dim)
    staging: tuple[Any, ...] = ()
    if dim % 64 and heads % 8 == 0:
        # Left to itself Mosaic tiles what can be tiled by 64, which does not divide the result's rows.
        tile = 32 // out_type["out"].dtype.itemsize
        staging = plgpu.TilingTransform((8, tile)), plgpu.SwizzleTransform(32)  # type: ignore[abstract]
    tiles = plgpu.TilingTransform((8, 8)), plgpu.SwizzleTransform(32)  # type: ignore[abstract]

    def matrices(number: int) -> list[Any]:
        return [plgpu.SMEM((number, size, columns), jnp.float32, transforms=tiles) for _, size in parts]

    merged: tuple[Any, ...] = ()
    if (others := consumers - 1) > 0:
        found = [plgpu.SMEM((others, columns), jnp.float32)] * 2
        merged = matrices(others), *found, plgpu.Barrier(num_arrivals=others)
    results = plgpu.kernel(
        decode_attention_kernel,
        out_type=out_type,
        scratch_types=[
            plgpu.SMEM((columns, dim), dtype, transforms=transforms(dim)),
            plgpu.SMEM(block, key_blocks.dtype, transforms=stored),
            plgpu.SMEM(block, value_blocks.dtype, transforms=stored),
            # wgmma has one swizzle for both operands.
            plgpu.SMEM((consumers, columns, BLOCK_SIZE), dtype, transforms=transforms(math.gcd(dim, BLOCK_SIZE))),
            [plgpu.SMEM((columns, size), out_type["out"].dtype, transforms=staging) for _, size in parts],
            plgpu.Barrier(),
            *(plgpu.Barrier(num_arrivals=1 + narrow, num_barriers=stages) for _ in range(2)),
            *(plgpu.Barrier(num_barriers=stages) for _ in range(2)),
            widened,
            merged,
        ],
        grid=(batch, groups, splits),
        grid_names=("sequence", "group", "split"),
        num_threads=consumers + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            approx_math=True,
            reduction_scratch_bytes=REDUCTION_BYTES,
        ),
    )(query, key_blocks, value_blocks, tables, lengths, rows, factors)
    if whole:
        return results["out"][:, :, 0]
    first, last = block_range(jnp.minimum(lengths, width * BLOCK_SIZE), width=width, window=window)
    start = jnp.broadcast_to(first, lengths.shape)[:, None] + jnp.arange(splits, dtype=jnp.int32)
    return results["out"], results["maxima"][..., :heads], results["sums"][..., :heads], start < last[:, None]
