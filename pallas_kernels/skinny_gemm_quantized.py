"""The skinny GEMM for quantized weights and few rows: each thread loads what it multiplies, and waits for nobody.

A warp multiplies 16 channels with ``mma.m16n8k16``. Its fragments want a thread to hold single pairs of inputs of two
channels, which would take narrow loads or an exchange between threads. But the order in which K is added up is free: a
thread takes 16 consecutive bytes of a channel as the pairs of several products, and x is put into that order when a
block stages it in shared memory. So every byte of the weight is copied once to shared memory, by the very thread that
uses it (``cp.async``, 16 bytes, a ring for each thread), and read once, 16 bytes at a time; no barrier, no exchange.

The four warps of a block take its ``rows`` channels together and every fourth chunk of 64 bytes of K each; their sums
meet in shared memory. The blocks of a split of K are a cluster. x is normalised while it is staged.

Measured on an H200, a chain of 7B layers' four products, one row of bfloat16, microseconds a layer (in CUDA graphs)::

               this kernel  that for all weights  copy
    int8                74                    93    48
    int4                65                   102    24
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quantized_plan import WARPS, Plan
from pallas_kernels.quantized_threads import Fetch, Place, collect, entries, fill, multiply, stage_x
from pallas_kernels.skinny_gemm import Activation, InputNorm, epilogue

KINDS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


def result(plan: Plan) -> Any:
    """What a block has of a quantity [token, row], in registers."""
    layout = plgpu.Layout.WG_STRIDED((plan.tokens, plan.rows), vec_size=1)
    return plgpu.ShapeDtypeStruct((plan.tokens, plan.rows), jnp.float32, layout=layout)


# Jitted, so that the layers of a model trace, lower and compile one kernel, not one each.
@functools.partial(jax.jit, static_argnames=("activation", "plan", "overlap"))
def run(
    x: jax.Array,
    weight: jax.Array,
    *,
    norm: InputNorm | None,
    bias: jax.Array | None,
    activation: Activation | None,
    residual: jax.Array | None,
    weight_scale: jax.Array,
    plan: Plan,
    overlap: bool = True,
) -> jax.Array:
    """Run the kernel on operands that :func:`pallas_kernels.skinny_gemm` has checked.

    Args:
        x: [M, K].
        weight: [P, N, K], quantized.
        norm, bias, activation, residual: as in :func:`pallas_kernels.skinny_gemm`.
        weight_scale: of int4 [P, K / g, N], else [N] or [2, N].
        plan: of these operands, by :func:`pallas_kernels.quantized_plan.plan_for`.
        overlap: start to fetch the weight while the previous kernel still runs.

    Returns:
        [M, N] in the dtype of ``x``.
    """
    # Imported here, since it needs what only a GPU's JAX has to run, and takes a second.
    from pallas_kernels.registers import Registers

    given = {
        "x": x,
        "weight": weight,
        "factors": weight_scale.astype(jnp.float32),
        "scale": None if norm is None else norm.scale,
        "shift": None if norm is None else norm.bias,
        "bias": bias,
        "residual": residual,
    }
    operands = {name: array for name, array in given.items() if array is not None}
    scratch = {
        "ring": plgpu.SMEM((plan.stages * plan.stage,), jnp.int8),
        "staged": plgpu.SMEM((plan.m * plan.x_line,), jnp.int8),
        "sums": plgpu.SMEM((plan.sums,), jnp.int8),
    }
    if norm is not None:
        scratch["scratch"] = plgpu.SMEM((8 * WARPS * plan.m,), jnp.int8)

    def body(*refs: Any, **smem: Any) -> None:
        gmem = dict(zip([*operands, "out"], refs, strict=True))
        tile: Any = lax.axis_index("tile")
        split: Any = lax.axis_index("split") if plan.splits > 1 else jnp.int32(0)

        def threads(names: str, results: int, do: Any, *arrays: Any) -> Any:
            """Call ``do(registers, place, refs)`` for a thread: it returns ``results`` lists of registers."""
            used = {name: (gmem | smem)[name] for name in names.split() if name in gmem or name in smem}

            def inline(_: Any, tile: Any, split: Any, refs: list[Any], *arrays: Any) -> Any:
                o = Registers()
                place = Place.of(o, plan, o.scalar(tile), o.scalar(split))
                found = do(o, place, dict(zip(used, refs, strict=True)), *map(o.entries, arrays))
                return tuple(o.strided(values, (plan.tokens, plan.rows)) for values in found or ())

            scalar, array = plgpu.Layout.WG_SPLAT, result(plan)
            types = (scalar, scalar, [plgpu.RefType()] * len(used), *[array.layout] * len(arrays))
            call = plgpu.inline_mgpu(arg_types=types, return_type=(array,) * results)
            return call(inline)(tile, split, list(used.values()), *arrays)

        def fetch(o: Any, place: Place, ref: dict[str, Any]) -> Fetch:
            return Fetch(o, plan, place, ref["weight"], ref["factors"], ref["ring"])

        streamed = "weight factors ring "
        threads(streamed, 0, lambda o, place, ref: fill(o, fetch(o, place, ref)))

        def vector(name: str, kind: str) -> list[Any]:
            """A vector over the channels, for each part, at every token."""

            def load(o: Any, place: Place, ref: dict[str, Any]) -> list[list[Any]]:
                start, size = o.memory(ref[name]), 4 if kind == "f32" else 2
                rows = [o.wide(place.channel + row) * size for _, row in entries(o, plan)]
                found = []
                for part in range(plan.parts):
                    at = [start + row + part * plan.n * size for row in rows]
                    if kind == "f32":
                        found.append([o.float_of(o.load_memory(address)[0]) for address in at])
                    else:
                        found.append([o.load_half(kind, address) for address in at])
                return found

            return list(threads(name, plan.parts, load))

        # The epilogue's vectors are on their way while the product is made.
        factors = None if plan.group else vector("factors", "f32")
        biases = None if bias is None else vector("bias", KINDS[bias.dtype.name])
        if overlap:
            plgpu.griddepcontrol_launch_dependents()
            plgpu.griddepcontrol_wait()

        def stage(o: Any, place: Place, ref: dict[str, Any]) -> None:
            stage_x(
                o, plan, place, norm, ref["x"], ref.get("scale"), ref.get("shift"), ref["staged"], ref.get("scratch")
            )

        threads("x scale shift staged scratch", 0, stage)

        def load_residual(o: Any, place: Place, ref: dict[str, Any]) -> list[list[Any]]:
            found = []
            for token, row in entries(o, plan):
                inside = o.select(token < plan.m, token, plan.m - 1)
                at = (o.wide(inside) * plan.n + o.wide(place.channel + row)) * 2
                found.append(o.load_half(plan.kind, o.memory(ref["residual"]) + at))
            return [found]

        added = None if residual is None else threads("residual", 1, load_residual)[0]

        def products(o: Any, place: Place, ref: dict[str, Any]) -> None:
            o.sync()
            multiply(o, plan, fetch(o, place, ref), ref["staged"], ref["sums"])
            if plan.splits > 1:
                o.sync_cluster()
            else:
                o.sync()

        threads(streamed + "staged sums", 0, products)

        def finish() -> None:
            found = list(threads("sums", plan.parts, lambda o, _, ref: collect(o, plan, ref["sums"])))
            if factors is not None:
                found = [value * factor for value, factor in zip(found, factors, strict=True)]
            y = epilogue(found, biases, activation, added)

            def store(o: Any, place: Place, ref: dict[str, Any], values: list[Any]) -> None:
                for (token, row), value in zip(entries(o, plan), values, strict=True):
                    at = (o.wide(token) * plan.n + o.wide(place.channel + row)) * 2
                    o.store_half(plan.kind, o.memory(ref["out"]) + at, value, token < plan.m)

            threads("out", 0, store, y)

        if plan.splits == 1:
            finish()
            return
        pl.when(split == 0)(finish)
        # Nobody leaves before the first block has read what the others hold.
        threads("", 0, lambda o, place, ref: o.sync_cluster())

    space: dict[str, Any] = {"grid": (-(-plan.n // plan.rows),), "grid_names": ("tile",)}
    if plan.splits > 1:
        space |= {"cluster": (plan.splits,), "cluster_names": ("split",)}
    params = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((plan.m, plan.n), x.dtype),
        scratch_types=scratch,
        compiler_params=params,
        kernel_name="skinny_gemm_quantized",
        **space,
    )
    return kernel(*operands.values())
