"""The Hopper kernel behind :func:`pallas_kernels.skinny_gemm`; see that module for the idea."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.skinny_gemm import QUANTIZED, Activation, InputNorm, Tuning, epilogue, padded_rows, weight_bits

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


# Jitted, so that the layers of a model trace, lower and compile one kernel, not one each.
@functools.partial(jax.jit, static_argnames=("activation", "tuning", "interpret"))
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
    tokens = padded_rows(m, norm)
    rows, tile_k, stages, splits = tuning.rows, tuning.tile_k, tuning.stages, tuning.splits
    tiles = -(-k // tile_k)
    layer = norm is not None and norm.kind == "layer"
    scale = None if norm is None else norm.scale
    shift = None if norm is None else norm.bias
    grouped = weight_scale is not None and weight_scale.ndim == 3
    group = k // weight_scale.shape[1] if weight_scale is not None and grouped else tile_k
    groups = tile_k // group
    quantized = weight.dtype in QUANTIZED
    # What is loaded of a quantized tile at once: lines of 128 bytes.
    strip = min(tile_k, 8 * 128 // weight_bits(weight.dtype)) if quantized else tile_k
    # Vectors over K are matrices: a copy has at most 256 entries along each axis.
    line = 64 if k % 128 or tile_k % 128 else 128
    in_memory = splits > 1 and tuning.reduce == "memory"
    in_cluster = splits > 1 and not in_memory
    finish = not in_memory
    # Tiles have 8 rows: an array of fewer is one tile, of more must be whole tiles.
    held = m if m < 8 else -(-m // 8) * 8
    full_rows = ((0, held - m), (0, 0))
    x = jnp.pad(x, full_rows)
    if residual is not None and finish:
        residual = jnp.pad(residual, full_rows)

    names = ["x", "weight"]
    operands: list[jax.Array] = [x, weight]
    for name, array in (("scale", scale), ("shift", shift)):
        if array is not None:
            names.append(name)
            operands.append(array.reshape(-1, line))
    if weight_scale is not None and grouped:
        names.append("group")
        operands.append(weight_scale)
    if finish:
        channels = None if weight_scale is None or grouped else weight_scale.astype(jnp.float32)
        flat = {"bias": bias, "factor": channels}
        last = {name: array if array is None else array.reshape(-1) for name, array in flat.items()}
        for name, array in (*last.items(), ("residual", residual)):
            if array is not None:
                names.append(name)
                operands.append(array)

    arrivals = 2 + (scale is not None) + (shift is not None) + grouped
    scratch: dict[str, Any] = {
        "weight_smem": plgpu.SMEM(
            (stages, parts, rows, tile_k),
            weight.dtype,
            transforms=_tiled(strip, weight.dtype, k),
        ),
        "x_smem": plgpu.SMEM((stages, tokens, tile_k), dtype, transforms=_tiled(tile_k, dtype, k)),
        "full": plgpu.Barrier(num_arrivals=arrivals, num_barriers=stages),
    }
    if weight_scale is not None and grouped:
        scratch["group_smem"] = plgpu.SMEM((stages, parts, groups, rows), jnp.float32)
    if scale is not None:
        scratch["scale_smem"] = plgpu.SMEM((stages, tile_k // line, line), scale.dtype)
    if shift is not None:
        scratch["shift_smem"] = plgpu.SMEM((stages, tile_k // line, line), shift.dtype)
    if norm is not None:
        for i in range(1 + layer):
            scratch[f"sum{i}_smem"] = plgpu.SMEM((tokens,), jnp.float32)
    if in_memory:
        scratch["out_smem"] = plgpu.SMEM((parts, rows, tokens), jnp.float32, transforms=_tiled(tokens, jnp.float32))
    else:
        scratch["out_smem"] = plgpu.SMEM((tokens, rows), dtype, transforms=_tiled(rows, dtype, n))
        if bias is not None:
            scratch["bias_smem"] = plgpu.SMEM((parts, rows), bias.dtype)
        if "factor" in names:
            scratch["factor_smem"] = plgpu.SMEM((parts, rows), jnp.float32)
        if residual is not None:
            tiled = _tiled(rows, residual.dtype, n)
            scratch["residual_smem"] = plgpu.SMEM((tokens, rows), residual.dtype, transforms=tiled)
        extras = parts * ((bias is not None) + ("factor" in names)) + (residual is not None)
        if extras:
            scratch["extra"] = plgpu.Barrier(num_arrivals=extras)
    if in_cluster:
        tiled = _tiled(tokens, jnp.float32)
        # One array each: a slice of a remote array cannot be read.
        for part in range(parts):
            scratch[f"part{part}_smem"] = plgpu.SMEM((rows, tokens), jnp.float32, transforms=tiled)
        scratch["cluster"] = plgpu.ClusterBarrier(collective_axes=("split",), num_barriers=2)

    outs: dict[str, Any] = {}
    if in_memory:
        outs["out"] = jax.ShapeDtypeStruct((splits, parts, n, tokens), jnp.float32)
        if norm is not None:
            outs["sums"] = jax.ShapeDtypeStruct((splits, 1 + layer, tokens), jnp.float32)
    else:
        outs["out"] = jax.ShapeDtypeStruct((held, n), dtype)

    def body(*refs: Any, **smem: Any) -> None:
        gmem = dict(zip([*names, *outs], refs, strict=True))
        channel = lax.axis_index("tile") * rows
        split: Any = lax.axis_index("split") if splits > 1 else 0
        first, count = split * tiles // splits, tiles // splits
        if tiles % splits:
            count = (split + 1) * tiles // splits - first

        def fetch(i: Any, *names: str) -> None:
            """Fetch parts of a tile."""
            slot, own = lax.rem(i, stages), pl.ds(channel, rows)
            inputs, lines = (pl.ds((first + i) * size, size) for size in (tile_k, tile_k // line))
            sources = {
                "weight": lambda: gmem["weight"].at[:, own, inputs],
                "group": lambda: gmem["group"].at[:, pl.ds((first + i) * groups, groups), own],
                "x": lambda: gmem["x"].at[pl.ds(0, tokens), inputs],
                "scale": lambda: gmem["scale"].at[lines],
                "shift": lambda: gmem["shift"].at[lines],
            }
            for name in names:
                plgpu.copy_gmem_to_smem(sources[name](), smem[f"{name}_smem"].at[slot], smem["full"].at[slot])

        parameters = [name for name in ("weight", "group", "scale", "shift") if name in gmem]

        def when_leader(do: Any) -> None:
            if in_cluster:
                pl.when(split == 0)(do)
            else:
                do()

        vectors = [name for name in ("bias", "factor") if name in gmem]

        def fetch_vectors() -> None:
            for name in vectors:
                for part in range(parts):
                    source = gmem[name].at[pl.ds(part * n + channel, rows)]
                    plgpu.copy_gmem_to_smem(source, smem[f"{name}_smem"].at[part], smem["extra"])

        def fetch_residual() -> None:
            source = gmem["residual"].at[pl.ds(0, tokens), pl.ds(channel, rows)]
            plgpu.copy_gmem_to_smem(source, smem["residual_smem"], smem["extra"])

        ring = jnp.minimum(count, stages)
        pl.loop(0, ring)(lambda i: fetch(i, *parameters))
        if vectors:
            when_leader(fetch_vectors)
        if tuning.overlap:
            plgpu.griddepcontrol_launch_dependents()
            plgpu.griddepcontrol_wait()
        pl.loop(0, ring)(lambda i: fetch(i, "x"))
        if "residual" in gmem:
            when_leader(fetch_residual)

        def normed(slot: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            """Multiply a tile of x by the scale, in place, and add to the sums over K."""
            for start in range(0, tile_k, line):
                own = pl.ds(start, line)
                tile = smem["x_smem"].at[slot, :, own].T
                value = plgpu.load(tile, layout=TRANSPOSED).astype(jnp.float32)
                sums = tuple(total + y for total, y in zip(sums, (value * value, value), strict=False))

                def across(name: str, row: int = start // line) -> jax.Array:
                    source = smem[f"{name}_smem"].at[slot, row]
                    found = plgpu.load(source, layout=TRANSPOSED.reduce(1), optimized=False).astype(jnp.float32)
                    if name == "scale" and norm is not None and norm.unit_offset:
                        found = found + 1.0
                    return lax.broadcast_in_dim(found, (line, tokens), (0,))

                factor = across("scale") if scale is not None else None
                value = value if factor is None else value * factor
                if layer:
                    value = jnp.where(_token_of((line, tokens)) == m, 1.0 if factor is None else factor, value)
                if shift is not None:
                    value = jnp.where(_token_of((line, tokens)) == m + layer, across("shift"), value)
                tile[...] = value.astype(dtype)
            plgpu.commit_smem()
            return sums

        def widened(value: jax.Array) -> jax.Array:
            if weight.dtype == jnp.float8_e4m3fn:
                # Hopper widens e4m3 to float16 only; by float32, each value is kept on its way to bfloat16.
                value = value.astype(jnp.float16)
                value = value if dtype == jnp.float16 else value.astype(jnp.float32)
            return value.astype(dtype)

        def loaded(slot: Any, part: int, start: int) -> Any:
            """A strip of a quantized tile, in registers."""
            if not quantized:
                return None
            layout = plgpu.Layout.WGMMA_UPCAST_4X if weight.dtype == jnp.int4 else plgpu.Layout.WGMMA_UPCAST_2X
            tile = smem["weight_smem"].at[slot, part, :, pl.ds(start, strip)]
            return plgpu.layout_cast(plgpu.load(tile, layout=layout), ACC)

        def multiply_strip(acc: Any, slot: Any, part: int, start: int, packed: Any, offset: int, size: int) -> None:
            """Add the product of ``size`` inputs of the strip at ``start`` to ``acc``."""
            x_tile = smem["x_smem"].at[slot]
            if not quantized:
                inputs = pl.ds(start + offset, size)
                plgpu.wgmma(acc, smem["weight_smem"].at[slot, part, :, inputs], x_tile.at[:, inputs].T)
                return
            # While the tensor cores have one piece, the next is widened.
            for piece in range(offset, offset + size, 64):
                operand = widened(packed[:, piece : piece + 64])
                plgpu.wgmma(acc, operand, x_tile.at[:, pl.ds(start + piece, 64)].T)
                plgpu.wgmma_wait(1)  # of those before, the registers may be used again

        accumulator = plgpu.WGMMAAccumulatorRef((rows, tokens), jnp.float32)

        def arrived(i: Any, sums: tuple[jax.Array, ...]) -> tuple[Any, tuple[jax.Array, ...]]:
            slot = lax.rem(i, stages)
            plgpu.barrier_wait(smem["full"].at[slot])
            return slot, sums if norm is None else normed(slot, sums)

        def refill(i: Any) -> None:
            @pl.when(i + stages < count)
            def _() -> None:
                fetch(i + stages, *parameters, "x")

        def multiply(*accs: Any) -> tuple[jax.Array, ...]:
            """Keep the sums over all of K in the accumulators of the tensor cores."""

            def step(i: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                slot, sums = arrived(i, sums)
                for part in range(parts):
                    for start in range(0, tile_k, strip):
                        multiply_strip(accs[part], slot, part, start, loaded(slot, part, start), 0, strip)
                plgpu.wgmma_wait(0)
                refill(i)
                return sums

            sums = lax.fori_loop(0, count, step, no_sums)
            return (*(acc[...] for acc in accs), *sums)

        def multiply_groups() -> tuple[jax.Array, ...]:
            """A group's product is scaled as a whole: one multiplication for all its inputs."""

            def step(i: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                slot, sums = arrived(i, carry[parts:])
                totals = list(carry[:parts])
                for part, start in itertools.product(range(parts), range(0, tile_k, strip)):
                    packed = loaded(slot, part, start)
                    for offset in range(0, strip, group):

                        def product(
                            acc: Any, part: int = part, start: int = start, packed: Any = packed, offset: int = offset
                        ) -> jax.Array:
                            multiply_strip(acc, slot, part, start, packed, offset, group)
                            return acc[...]

                        source = smem["group_smem"].at[slot, part, (start + offset) // group]
                        factor = plgpu.load(source, layout=ACC.reduce(1), optimized=False)
                        factor = lax.broadcast_in_dim(factor, (rows, tokens), (0,))
                        totals[part] = totals[part] + pl.run_scoped(product, accumulator) * factor
                refill(i)
                return (*totals, *sums)

            zero = plgpu.layout_cast(jnp.zeros((rows, tokens), jnp.float32), ACC)
            return lax.fori_loop(0, count, step, ((zero,) * parts) + no_sums)

        zero = plgpu.layout_cast(jnp.zeros((line, tokens), jnp.float32), TRANSPOSED)
        no_sums = () if norm is None else (zero,) * (1 + layer)
        results = multiply_groups() if grouped else pl.run_scoped(multiply, *[accumulator] * parts)
        values, sums = list(results[:parts]), [jnp.sum(total, axis=0) for total in results[parts:]]
        for i, total in enumerate(sums):
            smem[f"sum{i}_smem"][...] = total

        if in_memory:
            for part in range(parts):
                smem["out_smem"][part] = values[part]
            plgpu.commit_smem()
            target = gmem["out"].at[split, :, pl.ds(channel, rows)]
            plgpu.copy_smem_to_gmem(smem["out_smem"], target)
            if norm is not None:

                @pl.when(lax.axis_index("tile") == 0)
                def _() -> None:
                    for i in range(1 + layer):
                        plgpu.copy_smem_to_gmem(smem[f"sum{i}_smem"], gmem["sums"].at[split, i])

            plgpu.wait_smem_to_gmem(0)
            return

        def read(ref: Any, other: int) -> Any:
            return plgpu.cluster_ref(ref, {"split": jnp.int32(other)}) if other else ref

        def across(name: str) -> list[jax.Array]:
            """A vector over the channels, for each part, at every token."""
            found = []
            for part in range(parts):
                column = plgpu.load(smem[f"{name}_smem"].at[part], layout=ACC.reduce(1), optimized=False)
                found.append(lax.broadcast_in_dim(column.astype(jnp.float32), (rows, tokens), (0,)))
            return found

        def finish_tile() -> None:
            others = range(1, splits) if in_cluster else ()
            found = values
            for other in others:
                for part in range(parts):
                    remote = read(smem[f"part{part}_smem"], other)
                    found = [*found[:part], found[part] + plgpu.load(remote, layout=ACC), *found[part + 1 :]]
            if "extra" in smem:
                plgpu.barrier_wait(smem["extra"])
            if "factor" in gmem:
                found = [part * factor for part, factor in zip(found, across("factor"), strict=True)]
            if norm is not None:
                totals = []
                for i in range(1 + layer):
                    total = plgpu.load(smem[f"sum{i}_smem"], layout=ACC.reduce(0), optimized=False)
                    for other in others:
                        remote = read(smem[f"sum{i}_smem"], other)
                        total = total + plgpu.load(remote, layout=ACC.reduce(0), optimized=False)
                    totals.append(total)
                found = _normed_product(found, totals, norm, m, k)
            y = epilogue(found, across("bias") if bias is not None else None, activation, None)
            if "residual" in gmem:
                y = plgpu.layout_cast(y, TRANSPOSED)
                y = y + plgpu.load(smem["residual_smem"].T, layout=TRANSPOSED).astype(jnp.float32)
                smem["out_smem"].T[...] = y.astype(dtype)
            else:
                smem["out_smem"].T[...] = plgpu.layout_cast(y.astype(dtype), TRANSPOSED)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(smem["out_smem"], gmem["out"].at[pl.ds(0, tokens), pl.ds(channel, rows)])
            plgpu.wait_smem_to_gmem(0)

        if not in_cluster:
            finish_tile()
            return
        for part in range(parts):
            smem[f"part{part}_smem"][...] = values[part]
        plgpu.barrier_arrive(smem["cluster"].at[0])
        plgpu.barrier_wait(smem["cluster"].at[0])
        when_leader(finish_tile)
        # Nobody leaves before the first block has read what the others hold.
        plgpu.barrier_arrive(smem["cluster"].at[1])
        plgpu.barrier_wait(smem["cluster"].at[1])

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
        **space,
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )
    out, *sums = kernel(*operands)
    if not in_memory:
        return out[:m]
    totals = jnp.sum(out, axis=0)
    if weight_scale is not None and not grouped:
        totals = totals * weight_scale.astype(jnp.float32).reshape(parts, n, 1)
    found = list(totals)
    if norm is not None:
        found = _normed_product(found, list(jnp.sum(sums[0], axis=0)), norm, m, k)
    found = [part[:, :m].T for part in found]
    columns = None if bias is None else list(bias.astype(jnp.float32).reshape(parts, n))
    return epilogue(found, columns, activation, residual).astype(dtype)


def _token_of(shape: tuple[int, ...]) -> jax.Array:
    """The token of each entry of an array [rows, tokens].

    By way of a vector: Mosaic GPU numbers the entries that a thread holds together along the last axis, in a matrix
    whose layout is transposed too, where they lie along the first one (``FragmentedArray.foreach``, JAX 0.11.2). To be
    called where the result is used: a layout that nothing asks for sends the inference of layouts on a long search.
    """
    return lax.broadcast_in_dim(lax.broadcasted_iota(jnp.int32, shape[1:], 0), shape, (1,))


def _normed_product(
    parts: list[jax.Array], totals: list[jax.Array], norm: InputNorm, m: int, k: int
) -> list[jax.Array]:
    """Turn ``W (x * scale)`` [rows, tokens] into ``W norm(x)``, given each token's sum of squares (and sum) over K.

    LayerNorm's tokens ``m`` and after are the scale and the bias themselves: ``W scale`` is what the mean is taken
    off with, ``W bias`` is what is added.
    """
    layer = norm.kind == "layer"
    shape = parts[0].shape
    square = totals[0] * (1.0 / k)
    mean = totals[1] * (1.0 / k) if layer else None
    if mean is not None:
        square = jnp.maximum(square - mean * mean, 0.0)
    size = lax.broadcast_in_dim(lax.rsqrt(square + norm.eps), shape, (1,))

    def column(part: jax.Array, at: int) -> jax.Array:
        return lax.broadcast_in_dim(jnp.sum(jnp.where(_token_of(shape) == at, part, 0.0), axis=1), shape, (0,))

    found = []
    for part in parts:
        y = part
        if mean is not None:
            y = y - lax.broadcast_in_dim(mean, shape, (1,)) * column(part, m)
        y = y * size
        if norm.bias is not None:
            y = y + column(part, m + layer)
        found.append(y)
    return found
