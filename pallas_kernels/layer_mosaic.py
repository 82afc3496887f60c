"""The Hopper kernel behind :func:`pallas_kernels.decoder_layers`; see that module for the idea."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import layer_threads
from pallas_kernels.decoder_layers import Cache, LayerOperands
from pallas_kernels.layer_attention import attend
from pallas_kernels.layer_plan import NAMES, THREADS, LayerPlan, places


def parameters_of(layer: LayerOperands, plan: LayerPlan) -> dict[str, jax.Array]:
    """The arrays of a layer by the names of ``plan.parameters``, but for its cache."""
    given: dict[str, jax.Array | None] = {}
    for which, name in enumerate(NAMES):
        factors = layer.scales[which]
        given[name] = layer.weights[which]
        given[f"{name}_factors"] = None if factors is None else factors.astype(jnp.float32)
        given[f"{name}_bias"] = layer.biases[which]
    for name, norm in zip((NAMES[0], NAMES[2]), layer.norms, strict=True):
        given |= {f"{name}_scale": norm.scale, f"{name}_shift": norm.bias}
    found = {name: array for name, array in given.items() if array is not None}
    assert {*found, "keys", "values"} == set(plan.parameters)
    return found


# Jitted, so that steps of one shape trace and lower it once.
@functools.partial(jax.jit, static_argnames=("plan",))
def run(
    x: jax.Array,
    layers: tuple[LayerOperands, ...],
    caches: tuple[Cache, ...],
    tables: jax.Array,
    slots: jax.Array,
    lengths: jax.Array,
    rotary: tuple[jax.Array, jax.Array] | None,
    *,
    plan: LayerPlan,
) -> tuple[jax.Array, tuple[Cache, ...], jax.Array | None]:
    """Run the kernel on operands that :func:`pallas_kernels.decoder_layers` has checked.

    Args:
        x: [M, H].
        layers: parameters.
        caches: key and value blocks [N, G, 64, D], written in place where the caller has no more use for them.
        tables: int32 [M, W].
        slots: int32 [M], the row of the blocks, ``block * 64 + row``, for each token; negative for none.
        lengths: int32 [M], keys of each sequence, the new one included.
        rotary: cos and sin, float32 [M, D / 2] each.
        plan: of these operands.

    Returns:
        [M, H], the caches, and of a traced plan int32 [layers, marks, blocks, 2]: see ``LayerPlan.trace``.
    """
    # Imported here, since it needs what only a GPU's JAX has to run, and takes a second.
    from pallas_kernels.registers import Registers

    operands = {"x": x, "tables": tables, "slots": slots, "lengths": lengths}
    if rotary is not None:
        operands |= {"cos": rotary[0].astype(jnp.float32), "sin": rotary[1].astype(jnp.float32)}
    own = [parameters_of(layer, plan) for layer in layers]
    # References that the kernel closes over are aliased: what it does not write is left as it is.
    blocks = [[jax.new_ref(array) for array in cache] for cache in caches]
    exchanged = {"exchange": jax.new_ref(jnp.zeros(plan.exchange, jnp.int32))}
    if plan.traced:
        exchanged["trace"] = jax.new_ref(jnp.zeros(plan.trace, jnp.int32))
    names = [*operands, "result", *exchanged]
    each = len(own[0])

    def body(*refs: Any, shared: Any) -> None:
        def inline(_: Any, memory: list[Any], layers: list[Any], blocks: list[list[Any]], shared: Any) -> None:
            ref: dict[str, Any] = dict(zip(names, memory, strict=True))
            for name in plan.parameters:
                at = list(own[0]).index(name) if name in own[0] else None
                ref[name] = (
                    [layer[at] for layer in layers] if at is not None else [both[name == "values"] for both in blocks]
                )
            o = Registers(THREADS)
            layer_threads.run(o, plan, ref, places(o, plan, shared), attend)

        memory = [*refs[: len(operands)], refs[-1], *exchanged.values()]
        layers = [list(refs[len(operands) + i * each : len(operands) + (i + 1) * each]) for i in range(plan.layers)]
        kind = plgpu.RefType
        types = [kind()] * len(names), [[kind()] * each for _ in layers], [[kind()] * 2 for _ in layers], kind()
        plgpu.inline_mgpu(arg_types=types)(inline)(memory, layers, blocks, shared)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        scratch_types={"shared": plgpu.SMEM((plan.shared,), jnp.int8)},
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=THREADS // 128,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True),
        kernel_name="decoder_layers",
    )
    y = kernel(*operands.values(), *(array for layer in own for array in layer.values()))
    written = tuple((jax.freeze(keys), jax.freeze(values)) for keys, values in blocks)
    return y, written, jax.freeze(exchanged["trace"]) if plan.traced else None
