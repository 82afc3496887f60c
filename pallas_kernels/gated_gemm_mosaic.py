"""The Hopper kernel behind :func:`pallas_kernels.gated_gemm`, in Mosaic GPU.

A tile of the result is 128 rows by 128 columns. Two warpgroups compute 64 rows of it each, of the gate and of the
values at once: the 128 channels of G and the 128 of V that belong together lie one after the other in shared memory,
and are the 256 columns of one wgmma instruction, the widest there is. So what an activation joins is in the registers
of one thread. A third warpgroup keeps a ring of TMA copies in flight, across the ends of tiles: a program stays on its
SM.

The two blocks of a cluster work on neighbouring rows. They need the same channels of the weight at the same time: each
fetches half of them, for both.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gated_gemm import COLUMNS, ROWS, WARPGROUPS, GatedConfig
from pallas_kernels.skinny_gemm import SMS, Activation, activate


def _tiling(columns: int) -> tuple[Any, ...]:
    """Transforms of a matrix of 16-bit entries in tiles of 16, 32 or 64 columns, one swizzle wide."""
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(2 * columns)  # type: ignore[abstract]


# Jitted, so that the layers of a model trace, lower and compile one kernel, not one each.
@functools.partial(jax.jit, static_argnames=("activation", "config", "interpret"))
def run(
    x: jax.Array, weight: jax.Array, *, activation: Activation | None, config: GatedConfig, interpret: bool
) -> jax.Array:
    """Run the kernel on operands that :func:`pallas_kernels.gated_gemm` has checked: [M, K] and [2, N, K]."""
    given = x.shape[0]
    x = jnp.pad(x, ((0, -given % 8), (0, 0)))  # copies of x are of 8 rows
    (m, k), n, dtype = x.shape, weight.shape[1], x.dtype
    cluster, stages, tile_k = config.cluster, config.stages, config.tile_k
    block_rows = WARPGROUPS * ROWS
    stored = 64  # columns that are activated and leave at once
    down, across, steps = -(-m // (block_rows * cluster)), -(-n // COLUMNS), -(-k // tile_k)
    programs = min(config.programs or SMS // cluster, down * across)

    def body(
        x_gmem: Any, weight_gmem: Any, out_gmem: Any, x_smem: Any, weight_smem: Any, out_smem: Any, full: Any,
        empty: Any, ahead: Any,
    ) -> None:  # fmt: skip
        warpgroup, program = lax.axis_index("warpgroup"), lax.axis_index("program")
        count = lax.div(down * across - 1 - program, jnp.int32(programs)) + 1

        def place(index: Any) -> tuple[Any, Any]:
            """First row and column of this block's tile ``index``."""
            number = program + index * programs
            rest = lax.rem(number, jnp.int32(config.group * across))
            first = lax.div(number, jnp.int32(config.group * across)) * config.group
            width = jnp.minimum(config.group, down - first)
            row = (first + lax.rem(rest, width)) * cluster
            if cluster > 1:
                row = row + lax.axis_index("neighbour")
            return row * block_rows, lax.div(rest, width) * COLUMNS

        def produce() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def tile(index: Any, carry: Any) -> None:
                row, column = place(index)

                def step(i: Any, carry: Any) -> None:
                    number = index * steps + i
                    slot, inputs = lax.rem(number, jnp.int32(stages)), pl.ds(i * tile_k, tile_k)
                    pl.when(number >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                    plgpu.copy_gmem_to_smem(x_gmem.at[pl.ds(row, block_rows), inputs], x_smem.at[slot], full.at[slot])
                    for part in range(2):
                        plgpu.copy_gmem_to_smem(
                            weight_gmem.at[part, pl.ds(column, COLUMNS), inputs],
                            weight_smem.at[slot, pl.ds(part * COLUMNS, COLUMNS)],
                            full.at[slot],
                            collective_axes="neighbour" if cluster > 1 else None,
                        )

                lax.fori_loop(0, steps, step, None)

            lax.fori_loop(0, count, tile, None)
            # The neighbour says here that it has used a slot, and nobody may leave before it has said so.
            total = count * steps
            pl.loop(jnp.maximum(total - stages, 0), total)(
                lambda number: plgpu.barrier_wait(empty.at[lax.rem(number, jnp.int32(stages))])
            )

        def consume() -> None:
            plgpu.set_max_registers(232, action="increase")
            own = pl.ds(warpgroup * ROWS, ROWS)

            def tile(index: Any, carry: Any) -> None:
                row, column = place(index)

                def multiply(acc: Any) -> jax.Array:
                    def step(i: Any, carry: Any) -> None:
                        number = index * steps + i
                        slot = lax.rem(number, jnp.int32(stages))
                        plgpu.barrier_wait(full.at[slot])
                        plgpu.wgmma(acc, x_smem.at[slot, own], weight_smem.at[slot].T)
                        plgpu.wgmma_wait(1)

                        @pl.when(i > 0)
                        def _() -> None:
                            plgpu.barrier_arrive(empty.at[lax.rem(number + stages - 1, jnp.int32(stages))])

                        if config.lead:
                            pl.when((warpgroup == 0) & (i == min(config.lead, steps - 1)))(
                                lambda: plgpu.barrier_arrive(ahead)
                            )

                    if config.lead:
                        pl.when(warpgroup == 1)(lambda: plgpu.barrier_wait(ahead))
                    lax.fori_loop(0, steps, step, None)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(empty.at[lax.rem(index * steps + steps - 1, jnp.int32(stages))])
                    return acc[...]

                both = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, 2 * COLUMNS), jnp.float32))
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
                for piece in range(COLUMNS // stored):
                    start = piece * stored
                    gate = both[:, start : start + stored]
                    values = both[:, COLUMNS + start : COLUMNS + start + stored]
                    staged = out_smem.at[warpgroup, piece]
                    staged[...] = (activate(gate, activation) * values).astype(dtype)
                    plgpu.commit_smem()
                    target = out_gmem.at[pl.ds(row + warpgroup * ROWS, ROWS), pl.ds(column + start, stored)]
                    plgpu.copy_smem_to_gmem(staged, target)

            lax.fori_loop(0, count, tile, None)
            plgpu.wait_smem_to_gmem(0)

        pl.when(warpgroup == WARPGROUPS)(produce)
        pl.when(warpgroup < WARPGROUPS)(consume)

    used: Any = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
    space: dict[str, Any] = {"grid": (programs,), "grid_names": ("program",)}
    if cluster > 1:
        space |= {"cluster": (cluster,), "cluster_names": ("neighbour",)}
        used = plgpu.ClusterBarrier(collective_axes=("neighbour",), num_arrivals=WARPGROUPS, num_barriers=stages)
    out = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((m, n), dtype),
        scratch_types=[
            plgpu.SMEM((stages, block_rows, tile_k), dtype, transforms=_tiling(tile_k)),
            plgpu.SMEM((stages, 2 * COLUMNS, tile_k), dtype, transforms=_tiling(tile_k)),
            plgpu.SMEM(
                (WARPGROUPS, COLUMNS // stored, ROWS, stored),
                dtype,
                transforms=_tiling(next(w for w in (64, 32, 16) if n % w == 0 and stored % w == 0)),
            ),
            plgpu.Barrier(num_arrivals=3, num_barriers=stages),
            used,
            plgpu.Barrier() if config.lead else (),
        ],
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True),
        kernel_name="gated_gemm",
        **space,
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )(x, weight)
    return out[:given]
