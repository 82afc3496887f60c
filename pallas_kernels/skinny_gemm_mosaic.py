"""The Hopper kernel behind :func:`pallas_kernels.skinny_gemm`; see that module for the idea."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gemm_channels import ACC, TRANSPOSED, Channels, Matrix, tiled, whole_tiles
from pallas_kernels.registers import publish_to_cluster
from pallas_kernels.skinny_gemm import QUANTIZED, Activation, InputNorm, Tuning, epilogue, padded_rows, weight_bits


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
    x = whole_tiles(x)
    in_memory = tuning.splits > 1 and tuning.reduce == "memory"
    added = None if in_memory or residual is None else whole_tiles(residual)
    own = Matrix(
        parts, n, rows=tuning.rows, tokens=padded_rows(m, norm), held=x.shape[0], dtype=dtype, activation=activation,
        residual=added,
    )  # fmt: skip
    rest: dict[str, Any] = {"norm": norm, "bias": bias, "weight_scale": weight_scale}
    out, *sums = launch(x, weight, own, m=m, **rest, tuning=tuning, interpret=interpret, name="skinny_gemm")
    if not in_memory:
        return out[:m]
    totals = jnp.sum(out, axis=0)
    if weight_scale is not None and weight_scale.ndim < 3:
        totals = totals * weight_scale.astype(jnp.float32).reshape(parts, n, 1)
    found = list(totals)
    if norm is not None:
        found = _normed_product(found, list(jnp.sum(sums[0], axis=0)), norm, m, k)
    found = [part[:, :m].T for part in found]
    columns = None if bias is None else list(bias.astype(jnp.float32).reshape(parts, n))
    return epilogue(found, columns, activation, residual).astype(dtype)


def launch(
    x: jax.Array,
    weight: jax.Array,
    own: Channels,
    *,
    m: int,
    norm: InputNorm | None,
    bias: jax.Array | None,
    weight_scale: jax.Array | None,
    tuning: Tuning,
    interpret: bool,
    name: str,
) -> Sequence[jax.Array]:
    """Multiply, and leave the sums to ``own``.

    Args:
        x: [M or more, K], of :func:`whole_tiles`.
        weight: [L, C, K]; a block takes ``parts`` times ``rows`` of its channels.
        own: says which those are, and what becomes of their sums.
        m: M.
        norm, bias, weight_scale: as in :func:`run`, but factors of groups are as ``own`` wants them.
        tuning, interpret: as in :func:`run`.
        name: of the kernel.

    Returns:
        The results of ``own``, or with parts of K left in memory, sums float32 [S, P, N, tokens] and the norm's.
    """
    k, parts, dtype = x.shape[1], own.parts, x.dtype
    n = math.prod(weight.shape[:2]) // parts
    tokens = padded_rows(m, norm)
    rows, tile_k, stages, splits = tuning.rows, tuning.tile_k, tuning.stages, tuning.splits
    tiles = -(-k // tile_k)
    layer = norm is not None and norm.kind == "layer"
    scale = None if norm is None else norm.scale
    shift = None if norm is None else norm.bias
    grouped = weight_scale is not None and weight_scale.ndim == 3
    group = k // weight_scale.shape[own.groups_axis] if weight_scale is not None and grouped else tile_k
    groups = tile_k // group
    quantized = weight.dtype in QUANTIZED
    # What is loaded of a quantized tile at once: lines of 128 bytes.
    strip = min(tile_k, 8 * 128 // weight_bits(weight.dtype)) if quantized else tile_k
    # Vectors over K are matrices: a copy has at most 256 entries along each axis.
    line = 64 if k % 128 or tile_k % 128 else 128
    in_memory = splits > 1 and tuning.reduce == "memory"
    in_cluster = splits > 1 and not in_memory
    names = ["x", "weight"]
    operands: list[jax.Array] = [x, weight]
    for key, array in (("scale", scale), ("shift", shift)):
        if array is not None:
            names.append(key)
            operands.append(array.reshape(-1, line))
    if weight_scale is not None and grouped:
        names.append("group")
        operands.append(weight_scale)
    if not in_memory:
        each = None if weight_scale is None or grouped else weight_scale.astype(jnp.float32)
        flat = {"bias": bias, "factor": each}
        for key, array in flat.items():
            if array is not None:
                names.append(key)
                operands.append(array.reshape(-1))
        names += own.operands
        operands += own.operands.values()

    arrivals = own.weight_copies + 1 + (scale is not None) + (shift is not None) + grouped * own.factor_copies
    scratch: dict[str, Any] = {
        "weight_smem": plgpu.SMEM(
            (stages, parts, rows, tile_k),
            weight.dtype,
            transforms=tiled(strip, weight.dtype, k),
        ),
        "x_smem": plgpu.SMEM((stages, tokens, tile_k), dtype, transforms=tiled(tile_k, dtype, k)),
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
        scratch["out_smem"] = plgpu.SMEM((parts, rows, tokens), jnp.float32, transforms=tiled(tokens, jnp.float32))
    else:
        scratch |= own.scratch
        if bias is not None:
            scratch["bias_smem"] = plgpu.SMEM((parts, rows), bias.dtype)
        if "factor" in names:
            scratch["factor_smem"] = plgpu.SMEM((parts, rows), jnp.float32)
        extras = parts * own.pieces * ((bias is not None) + ("factor" in names)) + len(own.fetched)
        if extras:
            scratch["extra"] = plgpu.Barrier(num_arrivals=extras)
    if in_cluster:
        transforms = tiled(tokens, jnp.float32)
        # One array each: a slice of a remote array cannot be read.
        for part in range(parts):
            scratch[f"part{part}_smem"] = plgpu.SMEM((rows, tokens), jnp.float32, transforms=transforms)
        scratch["cluster"] = plgpu.ClusterBarrier(collective_axes=("split",), num_barriers=2)

    outs: dict[str, Any] = {}
    if in_memory:
        outs["out"] = jax.ShapeDtypeStruct((splits, parts, n, tokens), jnp.float32)
        if norm is not None:
            outs["sums"] = jax.ShapeDtypeStruct((splits, 1 + layer, tokens), jnp.float32)
    else:
        outs |= own.outs

    def body(*refs: Any, **smem: Any) -> None:
        gmem = dict(zip([*names, *outs], refs, strict=True))
        tile = lax.axis_index("tile")
        split: Any = lax.axis_index("split") if splits > 1 else 0
        first, count = split * tiles // splits, tiles // splits
        if tiles % splits:
            count = (split + 1) * tiles // splits - first

        def fetch(i: Any, *names: str) -> None:
            """Fetch parts of a tile."""
            slot = lax.rem(i, stages)
            inputs, some, lines = (pl.ds((first + i) * size, size) for size in (tile_k, groups, tile_k // line))
            sources = {
                "weight": lambda ref, to: own.weight(ref, to, tile, inputs),
                "group": lambda ref, to: own.factors(ref, to, tile, some),
                "x": lambda ref, to: [(ref.at[pl.ds(0, tokens), inputs], to)],
                "scale": lambda ref, to: [(ref.at[lines], to)],
                "shift": lambda ref, to: [(ref.at[lines], to)],
            }
            for name in names:
                for source, target in sources[name](gmem[name], smem[f"{name}_smem"].at[slot]):
                    plgpu.copy_gmem_to_smem(source, target, smem["full"].at[slot])

        parameters = [name for name in ("weight", "group", "scale", "shift") if name in gmem]

        def when_leader(do: Any) -> None:
            if in_cluster:
                pl.when(split == 0)(do)
            else:
                do()

        vectors = [name for name in ("bias", "factor") if name in gmem]

        def fetch_vectors() -> None:
            for name, part in itertools.product(vectors, range(parts)):
                for source, target in own.vector(gmem[name], smem[f"{name}_smem"].at[part], tile, part):
                    plgpu.copy_gmem_to_smem(source, target, smem["extra"])

        ring = jnp.minimum(count, stages)
        pl.loop(0, ring)(lambda i: fetch(i, *parameters))
        if vectors:
            when_leader(fetch_vectors)
        if tuning.overlap:
            plgpu.griddepcontrol_launch_dependents()
            plgpu.griddepcontrol_wait()
        pl.loop(0, ring)(lambda i: fetch(i, "x"))
        if own.fetched and not in_memory:
            when_leader(lambda: own.fetch(gmem, smem, tile))

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
            target = gmem["out"].at[split, :, pl.ds(tile * rows, rows)]
            plgpu.copy_smem_to_gmem(smem["out_smem"], target)
            if norm is not None:

                @pl.when(tile == 0)
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
            own.finish(found, across("bias") if bias is not None else None, gmem, smem, tile)

        if not in_cluster:
            finish_tile()
            return
        for part in range(parts):
            smem[f"part{part}_smem"][...] = values[part]
        publish_to_cluster()
        plgpu.barrier_arrive(smem["cluster"].at[0])
        plgpu.barrier_wait(smem["cluster"].at[0])
        when_leader(finish_tile)
        # Nobody leaves before the first block has read what the others hold.
        plgpu.barrier_arrive(smem["cluster"].at[1])
        plgpu.barrier_wait(smem["cluster"].at[1])

    space: dict[str, Any] = {"grid": (own.blocks,), "grid_names": ("tile",)}
    if in_cluster:
        space |= {"cluster": (splits,), "cluster_names": ("split",)}
    elif in_memory:
        space = {"grid": (own.blocks, splits), "grid_names": ("tile", "split")}
    params = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True)
    kernel = plgpu.kernel(
        body,
        out_type=tuple(outs.values()),
        scratch_types=scratch,
        compiler_params=params,
        kernel_name=name,
        **space,
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )
    return kernel(*operands)


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
