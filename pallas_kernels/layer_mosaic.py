"""The Hopper kernel behind :func:`pallas_kernels.decoder_layer`; see that module for the idea."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import layer_threads
from pallas_kernels.decoder_layer import LayerOperands
from pallas_kernels.layer_attention import attend
from pallas_kernels.layer_plan import THREADS, LayerPlan
from pallas_kernels.layer_threads import NAMES


# Jitted, so that the layers of a model trace, lower and compile one kernel, not one each.
@functools.partial(jax.jit, static_argnames=("plan",))
def run(
    x: jax.Array,
    layer: LayerOperands,
    keys: jax.Array,
    values: jax.Array,
    tables: jax.Array,
    slots: jax.Array,
    lengths: jax.Array,
    counters: jax.Array,
    rotary: tuple[jax.Array, jax.Array] | None,
    *,
    plan: LayerPlan,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Run the kernel on operands that :func:`pallas_kernels.decoder_layer` has checked.

    Args:
        x: [M, H].
        layer: parameters.
        keys, values: blocks [N, G, 64, D], written in place where the caller has no more use for them.
        tables: int32 [M, W].
        slots: int32 [M], the row of the blocks, ``block * 64 + row``, for each token; negative for none.
        lengths: int32 [M], keys of each sequence, the new one included.
        counters: int32, also written in place.
        rotary: cos and sin, float32 [M, D / 2] each.
        plan: of these operands.

    Returns:
        [M, H], the blocks, and the counters.
    """
    # Imported here, since it needs what only a GPU's JAX has to run, and takes a second.
    from pallas_kernels.registers import Registers

    given: dict[str, Any] = {"x": x, "tables": tables, "slots": slots, "lengths": lengths}
    if rotary is not None:
        given |= {"cos": rotary[0].astype(jnp.float32), "sin": rotary[1].astype(jnp.float32)}
    for which, name in enumerate(NAMES):
        factors = layer.scales[which]
        given[name] = layer.weights[which]
        given[f"{name}_factors"] = None if factors is None else factors.astype(jnp.float32)
        given[f"{name}_bias"] = layer.biases[which]
    for name, norm in zip(("qkv", "up"), layer.norms, strict=True):
        given |= {f"{name}_scale": norm.scale, f"{name}_shift": norm.bias}
    operands = {name: array for name, array in given.items() if array is not None}
    # References that the kernel closes over are aliased: what it does not write is left as it is.
    written = {"keys": jax.new_ref(keys), "values": jax.new_ref(values), "counters": jax.new_ref(counters)}

    def array(*shape: int, dtype: Any = x.dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype)

    inner, between = plan.groups * plan.per_group * plan.dim, plan.products[layer_threads.DOWN].inputs
    outs = {
        "result": array(plan.m, plan.hidden),
        "query": array(plan.m, inner),
        "attended": array(plan.m, inner),
        "middle": array(plan.m, plan.hidden),
        "between": array(plan.m, between),
    }
    if plan.splits > 1:
        heads = plan.m * plan.groups * plan.splits * plan.per_group
        outs |= {
            "partial": array(heads, plan.dim, dtype=jnp.float32),
            "partial_sizes": array(heads, 2, dtype=jnp.float32),
        }
    scratch = {
        "ring": plgpu.SMEM((plan.stages * plan.stage,), jnp.int8),
        "staged": plgpu.SMEM((plan.staging,), jnp.int8),
        "sums": plgpu.SMEM((plan.sums,), jnp.int8),
        "table": plgpu.SMEM((plan.table,), jnp.int8),
        "scratch": plgpu.SMEM((plan.scratch,), jnp.int8),
    }

    def body(*refs: Any, **smem: Any) -> None:
        names = [*operands, *outs, *written]
        memory = [*refs, *written.values()]

        def inline(_: Any, memory: list[Any], shared: list[Any]) -> None:
            layer_threads.run(
                Registers(THREADS), plan, dict(zip(names, memory, strict=True)), dict(zip(smem, shared, strict=True)),
                attend,
            )  # fmt: skip

        types = ([plgpu.RefType()] * len(memory), [plgpu.RefType()] * len(smem))
        plgpu.inline_mgpu(arg_types=types)(inline)(memory, list(smem.values()))

    kernel = plgpu.kernel(
        body,
        out_type=list(outs.values()),
        scratch_types=scratch,
        grid=(plan.blocks,),
        grid_names=("block",),
        num_threads=THREADS // 128,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
        ),
        kernel_name="decoder_layer",
    )
    y, *_ = kernel(*operands.values())
    return y, *(jax.freeze(reference) for reference in written.values())
