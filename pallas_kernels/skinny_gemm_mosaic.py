"""The Hopper kernel behind :func:`pallas_kernels.skinny_gemm`; see that module for the idea."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.skinny_gemm import QUANTIZED, Activation, InputNorm, Tuning, epilogue, padded_rows

ACC = plgpu.Layout.WGMMA
TRANSPOSED = plgpu.Layout.WGMMA_TRANSPOSED


def _tiled(columns: int, dtype: Any, divides: int = 64) -> tuple[Any, ...]:
    """Transforms of a shared array whose rows have ``columns`` entries: the widest swizzle whose tiles divide them.

    Tiles must also divide the rows of the array in global memory, of ``divides`` entries.
    """
    bits = 4 if dtype == jnp.int4 else 8 * jnp.dtype(dtype).itemsize
    wide = next(w for w in (128, 64, 32, 16) if columns * bits % (8 * w) == 0 and divides * bits % (8 * w) == 0)
    tiling = plgpu.TilingTransform((8, 8 * wide // bits))  # type: ignore[abstract]
    return (tiling,) if wide == 16 else (tiling, plgpu.SwizzleTransform(wide))  # type: ignore[abstract]


def run(
    x: jax.Array,
    weight: jax.Array,
    *,
    norm: InputNorm | None,
    bias: jax.Array | None,
    activation: Activation | None,
    residual: jax.Array | None,
    weight_scale: jax.Array | None,
    tuning: Tuning,
    interpret: bool,
) -> jax.Array:
    """Run the kernel on operands that :func:`pallas_kernels.skinny_gemm` has checked; ``weight`` is [P, N, K]."""
    (m, k), (parts, n, _), dtype = x.shape, weight.shape, x.dtype
    tokens = padded_rows(m)
    rows, tile_k, stages, splits, consumers = tuning.rows, tuning.tile_k, tuning.stages, tuning.splits, tuning.consumers
    tiles = -(-k // tile_k)
    grouped = weight_scale is not None and weight_scale.ndim == 3
    quantized = weight.dtype in QUANTIZED
    in_memory = splits > 1 and tuning.reduce == "memory"
    in_cluster = splits > 1 and not in_memory
    finish = not in_memory
    # Tiles have 8 rows: an array of fewer is one tile, of more must be whole tiles.
    held = m if m < 8 else tokens
    full_rows = ((0, held - m), (0, 0))
    x = jnp.pad(x, full_rows)
    if residual is not None and finish:
        residual = jnp.pad(residual, full_rows)

    names = ["x", "weight"]
    operands: list[jax.Array] = [x, weight]
    vectors = {} if norm is None else {"scale": norm.scale, "shift": norm.bias}
    vectors = {name: array for name, array in vectors.items() if array is not None}
    channels = {}
    if finish:
        factor = None if weight_scale is None or grouped else weight_scale.astype(jnp.float32)
        channels = {"bias": bias, "factor": factor}
        channels = {name: array.reshape(-1) for name, array in channels.items() if array is not None}
    others = {"group": weight_scale if grouped else None, "residual": residual if finish else None}
    for name, array in (*vectors.items(), *channels.items(), *others.items()):
        if array is not None:
            names.append(name)
            operands.append(array)

    # A norm needs all of x before the first product: x then lies in shared memory as a whole.
    x_tiles = stages if norm is None else tiles
    scratch: dict[str, Any] = {
        "weight_smem": plgpu.SMEM(
            (stages, parts, rows, tile_k), weight.dtype, transforms=_tiled(tile_k, weight.dtype, k)
        ),
        "x_smem": plgpu.SMEM((x_tiles, tokens, tile_k), dtype, transforms=_tiled(tile_k, dtype, k)),
        "full": plgpu.Barrier(num_arrivals=1 + (norm is None) + grouped, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=1, num_barriers=stages),
    }
    if grouped:
        scratch["group_smem"] = plgpu.SMEM((stages, parts, rows), jnp.float32)
    if norm is not None:
        scratch |= {f"{name}_smem": plgpu.SMEM((tiles, tile_k), array.dtype) for name, array in vectors.items()}
        scratch |= {f"sum{i}_smem": plgpu.SMEM((tokens,), jnp.float32) for i in range(2)}
        scratch["x_full"] = plgpu.Barrier(num_arrivals=tiles * (1 + len(vectors)))
        scratch["summed"] = plgpu.Barrier(num_arrivals=1)
        scratch["normed"] = plgpu.Barrier(num_arrivals=consumers)
    tiled = _tiled(tokens, jnp.float32)
    # One array each: a slice of the array of another block cannot be read.
    for part in range(parts * (consumers > 1 or in_cluster)):
        scratch[f"part{part}_smem"] = plgpu.SMEM((rows, tokens), jnp.float32, transforms=tiled)
        for consumer in range(2, consumers):
            scratch[f"part{part}_{consumer}_smem"] = plgpu.SMEM((rows, tokens), jnp.float32, transforms=tiled)
    if consumers > 1:
        scratch["multiplied"] = plgpu.Barrier(num_arrivals=consumers - 1)
    if in_memory:
        scratch["out_smem"] = plgpu.SMEM((parts, rows, tokens), jnp.float32, transforms=tiled)
    else:
        scratch["out_smem"] = plgpu.SMEM((tokens, rows), dtype, transforms=_tiled(rows, dtype, n))
        for name, array in channels.items():
            scratch[f"{name}_smem"] = plgpu.SMEM((parts, rows), array.dtype)
        if residual is not None:
            transforms = _tiled(rows, residual.dtype, n)
            scratch["residual_smem"] = plgpu.SMEM((tokens, rows), residual.dtype, transforms=transforms)
        extras = parts * len(channels) + (residual is not None)
        if extras:
            scratch["extra"] = plgpu.Barrier(num_arrivals=extras)
    if in_cluster:
        scratch["cluster"] = plgpu.ClusterBarrier(collective_axes=("split",), num_barriers=2)

    outs: dict[str, Any] = {}
    if in_memory:
        outs["out"] = jax.ShapeDtypeStruct((splits, parts, n, tokens), jnp.float32)
    else:
        outs["out"] = jax.ShapeDtypeStruct((held, n), dtype)

    def body(*refs: Any, **smem: Any) -> None:
        gmem = dict(zip([*names, *outs], refs, strict=True))
        channel = lax.axis_index("tile") * rows
        split: Any = lax.axis_index("split") if splits > 1 else 0
        worker = lax.axis_index("worker")
        first, count = split * tiles // splits, tiles // splits
        if tiles % splits:
            count = (split + 1) * tiles // splits - first

        def inputs(tile: Any) -> Any:
            return pl.ds(tile * tile_k, tile_k)

        def when_leader(do: Any) -> None:
            if in_cluster:
                pl.when(split == 0)(do)
            else:
                do()

        def produce() -> None:
            """Fill the ring: fetch a tile as soon as the one that lay there has been read."""

            def fetch_weight(i: Any) -> None:
                slot = lax.rem(i, stages)
                full, own = smem["full"].at[slot], pl.ds(channel, rows)
                source = gmem["weight"].at[:, own, inputs(first + i)]
                plgpu.copy_gmem_to_smem(source, smem["weight_smem"].at[slot], full)
                if grouped:
                    plgpu.copy_gmem_to_smem(gmem["group"].at[:, first + i, own], smem["group_smem"].at[slot], full)

            def fetch_x(i: Any) -> None:
                slot = lax.rem(i, stages)
                source = gmem["x"].at[pl.ds(0, tokens), inputs(first + i)]
                plgpu.copy_gmem_to_smem(source, smem["x_smem"].at[slot], smem["full"].at[slot])

            def fetch_all_x(tile: Any) -> None:
                source = gmem["x"].at[pl.ds(0, tokens), inputs(tile)]
                plgpu.copy_gmem_to_smem(source, smem["x_smem"].at[tile], smem["x_full"])

            def fetch_norm(tile: Any) -> None:
                for name in vectors:
                    source = gmem[name].at[inputs(tile)]
                    plgpu.copy_gmem_to_smem(source, smem[f"{name}_smem"].at[tile], smem["x_full"])

            def fetch_channels() -> None:
                for name in channels:
                    for part in range(parts):
                        source = gmem[name].at[pl.ds(part * n + channel, rows)]
                        plgpu.copy_gmem_to_smem(source, smem[f"{name}_smem"].at[part], smem["extra"])

            def fetch_residual() -> None:
                source = gmem["residual"].at[pl.ds(0, tokens), pl.ds(channel, rows)]
                plgpu.copy_gmem_to_smem(source, smem["residual_smem"], smem["extra"])

            ring = jnp.minimum(count, stages)
            pl.loop(0, ring)(fetch_weight)
            if vectors:
                pl.loop(0, tiles)(fetch_norm)
            if channels:
                when_leader(fetch_channels)
            if tuning.overlap:
                plgpu.griddepcontrol_launch_dependents()
                plgpu.griddepcontrol_wait()
            if norm is None:
                pl.loop(0, ring)(fetch_x)
            else:
                pl.loop(0, tiles)(fetch_all_x)
            if "residual" in gmem:
                when_leader(fetch_residual)

            @pl.loop(ring, count)
            def _(i: Any) -> None:
                plgpu.barrier_wait(smem["empty"].at[lax.rem(i, stages)])
                fetch_weight(i)
                if norm is None:
                    fetch_x(i)

        def normalise_x(norm: InputNorm) -> None:
            """Normalise x in shared memory: the first consumer finds the sums over K, then each does its tiles."""

            def load(tile: Any) -> jax.Array:
                return plgpu.load(smem["x_smem"].at[tile].T, layout=TRANSPOSED).astype(jnp.float32)

            def vector(name: str, tile: Any) -> jax.Array:
                found = plgpu.load(smem[f"{name}_smem"].at[tile], layout=TRANSPOSED.reduce(1), optimized=False)
                return found.astype(jnp.float32)

            def across(column: jax.Array) -> jax.Array:
                return lax.broadcast_in_dim(column, (tile_k, tokens), (0,))

            plgpu.barrier_wait(smem["x_full"])

            @pl.when(worker == 0)
            def _() -> None:
                def add(tile: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                    value = load(tile)
                    return tuple(total + y for total, y in zip(sums, (value * value, value), strict=False))

                zero = plgpu.layout_cast(jnp.zeros((tile_k, tokens), jnp.float32), TRANSPOSED)
                sums = lax.fori_loop(0, tiles, add, (zero,) * (1 + (norm.kind == "layer")))
                square, *mean = (jnp.sum(total, axis=0) * (1.0 / k) for total in sums)
                if mean:
                    square = jnp.maximum(square - mean[0] * mean[0], 0.0)
                    smem["sum1_smem"][...] = mean[0]
                smem["sum0_smem"][...] = lax.rsqrt(square + norm.eps)
                plgpu.barrier_arrive(smem["summed"])

            plgpu.barrier_wait(smem["summed"])

            def of_token(i: int) -> jax.Array:
                row = plgpu.load(smem[f"sum{i}_smem"], layout=TRANSPOSED.reduce(0), optimized=False)
                return lax.broadcast_in_dim(row, (tile_k, tokens), (1,))

            size = of_token(0)
            mean = of_token(1) if norm.kind == "layer" else None

            @pl.loop(0, lax.div(tiles - worker + consumers - 1, consumers))
            def _(step: Any) -> None:
                tile = worker + step * consumers
                value = load(tile)
                value = (value if mean is None else value - mean) * size
                if "scale" in vectors:
                    scale = vector("scale", tile)
                    value = value * across(scale + 1.0 if norm.unit_offset else scale)
                if "shift" in vectors:
                    value = value + across(vector("shift", tile))
                smem["x_smem"].at[tile].T[...] = value.astype(dtype)

            plgpu.commit_smem()
            plgpu.barrier_arrive(smem["normed"])
            plgpu.barrier_wait(smem["normed"])

        def widened(value: jax.Array) -> jax.Array:
            if weight.dtype == jnp.float8_e4m3fn:
                # Hopper widens e4m3 to float16 only; by float32, each value is kept on its way to bfloat16.
                value = value.astype(jnp.float16)
                value = value if dtype == jnp.float16 else value.astype(jnp.float32)
            return value.astype(dtype)

        def multiply_tile(acc: Any, i: Any, slot: Any, part: int) -> None:
            """Add a tile's product to ``acc``; a quantized tile is widened on its way to the tensor cores."""
            tile, place = smem["weight_smem"].at[slot, part], slot if norm is None else first + i
            if not quantized:
                plgpu.wgmma(acc, tile, smem["x_smem"].at[place].T)
                return
            layout = plgpu.Layout.WGMMA_UPCAST_4X if weight.dtype == jnp.int4 else plgpu.Layout.WGMMA_UPCAST_2X
            packed = plgpu.layout_cast(plgpu.load(tile, layout=layout), ACC)
            # In pieces: while the tensor cores have one, the next is widened.
            for start in range(0, tile_k, 64):
                piece = widened(packed[:, start : start + 64])
                plgpu.wgmma(acc, piece, smem["x_smem"].at[place, :, pl.ds(start, 64)].T)
            plgpu.wgmma_wait(0)  # before the registers that it reads are used again

        def slot_of(step: Any) -> tuple[Any, Any]:
            i = worker + step * consumers
            return i, lax.rem(i, stages)

        def give_back(i: Any) -> None:
            @pl.when(i + stages < count)
            def _() -> None:
                plgpu.barrier_arrive(smem["empty"].at[lax.rem(i, stages)])

        steps = lax.div(count - worker + consumers - 1, consumers)
        # A consumer may give a tile back when it multiplies its next, where the ring has room for both.
        lag = not quantized and stages >= 2 * consumers
        accumulator = plgpu.WGMMAAccumulatorRef((rows, tokens), jnp.float32)

        def multiply(*accs: Any) -> tuple[jax.Array, ...]:
            """Keep the sums over this consumer's tiles in the accumulators of the tensor cores."""

            @pl.loop(0, steps)
            def _(step: Any) -> None:
                i, slot = slot_of(step)
                plgpu.barrier_wait(smem["full"].at[slot])
                for part in range(parts):
                    multiply_tile(accs[part], i, slot, part)
                if not lag:
                    plgpu.wgmma_wait(0)
                    give_back(i)
                    return
                plgpu.wgmma_wait(parts)  # these may still run, those of the tile before have ended
                pl.when(step > 0)(lambda: give_back(i - consumers))

            plgpu.wgmma_wait(0)
            return tuple(acc[...] for acc in accs)

        def multiply_groups() -> tuple[jax.Array, ...]:
            """A tile is a group: its product is scaled as a whole, one multiplication for ``tile_k`` of them."""

            def add(step: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                i, slot = slot_of(step)
                plgpu.barrier_wait(smem["full"].at[slot])
                found = []
                for part in range(parts):

                    def product(acc: Any, part: int = part) -> jax.Array:
                        multiply_tile(acc, i, slot, part)
                        return acc[...]

                    factor = plgpu.load(smem["group_smem"].at[slot, part], layout=ACC.reduce(1), optimized=False)
                    factor = lax.broadcast_in_dim(factor, (rows, tokens), (0,))
                    found.append(totals[part] + pl.run_scoped(product, accumulator) * factor)
                give_back(i)
                return tuple(found)

            zero = plgpu.layout_cast(jnp.zeros((rows, tokens), jnp.float32), ACC)
            return lax.fori_loop(0, steps, add, (zero,) * parts)

        def consume() -> None:
            if norm is not None:
                normalise_x(norm)
            values = multiply_groups() if grouped else pl.run_scoped(multiply, *[accumulator] * parts)
            if consumers == 1:
                finish_sums(list(values))
                return
            for consumer in range(1, consumers):

                @pl.when(worker == consumer)
                def _(consumer: int = consumer) -> None:
                    for part in range(parts):
                        held_in(part, consumer)[...] = values[part]
                    plgpu.barrier_arrive(smem["multiplied"])

            @pl.when(worker == 0)
            def _() -> None:
                plgpu.barrier_wait(smem["multiplied"])
                sums = list(values)
                for consumer in range(1, consumers):
                    sums = [y + plgpu.load(held_in(part, consumer), layout=ACC) for part, y in enumerate(sums)]
                finish_sums(sums)

        def held_in(part: int, consumer: int) -> Any:
            return smem[f"part{part}_smem" if consumer == 1 else f"part{part}_{consumer}_smem"]

        def finish_sums(values: list[jax.Array]) -> None:
            """Add up what the blocks of a split have found and do the epilogue; one consumer does this."""
            if in_memory:
                for part in range(parts):
                    smem["out_smem"][part] = values[part]
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(smem["out_smem"], gmem["out"].at[split, :, pl.ds(channel, rows)])
                plgpu.wait_smem_to_gmem(0)
                return
            if not in_cluster:
                finish_tile(values)
                return

            for part in range(parts):
                smem[f"part{part}_smem"][...] = values[part]
            plgpu.barrier_arrive(smem["cluster"].at[0])
            plgpu.barrier_wait(smem["cluster"].at[0])

            @pl.when(split == 0)
            def _() -> None:
                sums = values
                for other in range(1, splits):
                    for part in range(parts):
                        remote = plgpu.cluster_ref(smem[f"part{part}_smem"], {"split": jnp.int32(other)})
                        sums = [*sums[:part], sums[part] + plgpu.load(remote, layout=ACC), *sums[part + 1 :]]
                finish_tile(sums)

            # Nobody leaves before the first block has read what the others hold.
            plgpu.barrier_arrive(smem["cluster"].at[1])
            plgpu.barrier_wait(smem["cluster"].at[1])

        def across(name: str) -> list[jax.Array]:
            """A vector over the channels, for each part, at every token."""
            found = []
            for part in range(parts):
                column = plgpu.load(smem[f"{name}_smem"].at[part], layout=ACC.reduce(1), optimized=False)
                found.append(lax.broadcast_in_dim(column.astype(jnp.float32), (rows, tokens), (0,)))
            return found

        def finish_tile(sums: list[jax.Array]) -> None:
            if "extra" in smem:
                plgpu.barrier_wait(smem["extra"])
            if "factor" in gmem:
                sums = [y * factor for y, factor in zip(sums, across("factor"), strict=True)]
            y = epilogue(sums, across("bias") if "bias" in gmem else None, activation, None)
            if "residual" in gmem:
                y = plgpu.layout_cast(y, TRANSPOSED)
                y = y + plgpu.load(smem["residual_smem"].T, layout=TRANSPOSED).astype(jnp.float32)
                smem["out_smem"].T[...] = y.astype(dtype)
            else:
                smem["out_smem"].T[...] = plgpu.layout_cast(y.astype(dtype), TRANSPOSED)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem["out_smem"], gmem["out"].at[pl.ds(0, tokens), pl.ds(channel, rows)])
            plgpu.wait_smem_to_gmem(0)

        pl.when(worker == consumers)(produce)
        pl.when(worker < consumers)(consume)

    blocks = -(-n // rows)
    space: dict[str, Any] = {"grid": (blocks,), "grid_names": ("tile",)}
    if in_cluster:
        space |= {"cluster": (splits,), "cluster_names": ("split",)}
    elif in_memory:
        space = {"grid": (blocks, splits), "grid_names": ("tile", "split")}
    params = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True)
    kernel = plgpu.kernel(
        body,
        out_type=tuple(outs.values()),
        scratch_types=scratch,
        compiler_params=params,
        kernel_name="skinny_gemm",
        num_threads=consumers + 1,
        thread_name="worker",
        **space,
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )
    (out,) = kernel(*operands)
    if not in_memory:
        return out[:m]
    totals = jnp.sum(out, axis=0)
    if weight_scale is not None and not grouped:
        totals = totals * weight_scale.astype(jnp.float32).reshape(parts, n, 1)
    found = [part[:, :m].T for part in totals]
    columns = None if bias is None else list(bias.astype(jnp.float32).reshape(parts, n))
    return epilogue(found, columns, activation, residual).astype(dtype)
