"""The Hopper kernel behind :func:`pallas_kernels.skinny_gemm` for more rows than a warpgroup can see to alone.

With 16 rows the warpgroup that multiplies also fetches and normalises, and several blocks on an SM make up for it. From
some rows on there is room for one block only, and the more x there is, the longer the weight stands still. Here a block
has three warpgroups: one keeps a ring of TMA copies in flight, two multiply 64 channels each with all tokens. A norm is
computed before.

Each block reads all of x beside its channels, from the L2 cache. The blocks of a cluster along the channels share it:
each fetches a part for all of them. The blocks of a cluster along K add their parts up through distributed shared
memory, each those of its share of the tokens.

It has not been timed, and nothing chooses it: it runs where a :class:`~pallas_kernels.skinny_gemm.Tuning` asks for it.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.gemm_channels import ACC, Channels, tiled
from pallas_kernels.registers import publish_to_cluster
from pallas_kernels.skinny_gemm import CONSUMERS, Tuning


def launch(
    x: jax.Array,
    weight: jax.Array,
    own: Channels,
    *,
    bias: jax.Array | None,
    tuning: Tuning,
    interpret: bool,
    name: str,
) -> Sequence[jax.Array]:
    """Multiply, and leave the sums to ``own``.

    Args:
        x: [M or more, K], of :func:`pallas_kernels.gemm_channels.whole_tiles`.
        weight: [L, C, K] in the dtype of x; a warpgroup takes ``parts`` times 64 of its channels.
        own: says which those are, and what becomes of their sums. Its tokens are those that a block finishes, all over
            ``tuning.splits``.
        bias: as ``own`` wants it, or None.
        tuning: how the work is divided; ``consumers`` is :data:`CONSUMERS`.
        interpret: run it on the CPU; without clusters.
        name: of the kernel.

    Returns:
        The results of ``own``.
    """
    k, parts, rows, dtype = x.shape[1], own.parts, own.rows, x.dtype
    tile_k, stages, splits, sharing = tuning.tile_k, tuning.stages, tuning.splits, tuning.sharing
    share, tokens = own.tokens, own.tokens * splits
    tiles = -(-k // tile_k)
    names = ["x", "weight", *(["bias"] if bias is not None else []), *own.operands]
    operands = [x, weight, *([bias.reshape(-1)] if bias is not None else []), *own.operands.values()]

    def each(array: Any) -> Any:
        """One for each of the warpgroups that multiply."""
        return plgpu.SMEM((CONSUMERS, *array.shape), array.dtype, transforms=array.transforms)

    kept = dict(own.scratch)
    if bias is not None:
        kept["bias_smem"] = plgpu.SMEM((parts, rows), bias.dtype)
    scratch: dict[str, Any] = {name: each(array) for name, array in kept.items()}
    scratch |= {
        "weight_smem": plgpu.SMEM(
            (stages, CONSUMERS, parts, rows, tile_k), dtype, transforms=tiled(tile_k, dtype, k)
        ),
        "x_smem": plgpu.SMEM((stages, tokens, tile_k), dtype, transforms=tiled(tile_k, dtype, k)),
        "full": plgpu.Barrier(num_arrivals=CONSUMERS * own.weight_copies + 1, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=stages),
    }  # fmt: skip
    if sharing > 1:
        scratch["empty"] = plgpu.ClusterBarrier(
            collective_axes=("neighbour",), num_arrivals=CONSUMERS, num_barriers=stages
        )
    extras = parts * own.pieces * (bias is not None) + len(own.fetched)
    if extras:
        scratch["extra"] = plgpu.Barrier(num_arrivals=extras, num_barriers=CONSUMERS)
    if splits > 1:
        # One array each: a slice of a remote array cannot be read.
        transforms = tiled(share, jnp.float32)
        for part, consumer, member in itertools.product(range(parts), range(CONSUMERS), range(splits)):
            scratch[f"part{part}{consumer}{member}"] = plgpu.SMEM((rows, share), jnp.float32, transforms=transforms)
        scratch["cluster"] = plgpu.ClusterBarrier(collective_axes=("split",), num_arrivals=CONSUMERS, num_barriers=2)

    def body(*refs: Any, **smem: Any) -> None:
        gmem = dict(zip([*names, *own.outs], refs, strict=True))
        warpgroup, pair, split = lax.axis_index("warpgroup"), lax.axis_index("tile"), jnp.int32(0)
        if sharing > 1:
            pair = pair * sharing + lax.axis_index("neighbour")
        if splits > 1:
            split = lax.axis_index("split")
        first = lax.div(split * tiles, jnp.int32(splits))
        count = lax.div((split + 1) * tiles, jnp.int32(splits)) - first

        def produce() -> None:
            plgpu.set_max_registers(40, action="decrease")

            @pl.loop(0, count)
            def _(i: Any) -> None:
                slot, inputs = lax.rem(i, jnp.int32(stages)), pl.ds((first + i) * tile_k, tile_k)
                full = smem["full"].at[slot]
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(smem["empty"].at[slot]))
                for consumer in range(CONSUMERS):
                    target = smem["weight_smem"].at[slot, consumer]
                    for source, to in own.weight(gmem["weight"], target, pair * CONSUMERS + consumer, inputs):
                        plgpu.copy_gmem_to_smem(source, to, full)
                plgpu.copy_gmem_to_smem(
                    gmem["x"].at[pl.ds(0, tokens), inputs], smem["x_smem"].at[slot], full,
                    collective_axes="neighbour" if sharing > 1 else None,
                )  # fmt: skip

            # A neighbour says here that it has used a slot, and nobody may leave before it has said so.
            pl.loop(jnp.maximum(count - stages, 0), count)(
                lambda i: plgpu.barrier_wait(smem["empty"].at[lax.rem(i, jnp.int32(stages))])
            )

        def smem_of(consumer: Any) -> dict[str, Any]:
            """What a warpgroup has of shared memory, under the names that ``own`` knows."""
            found = {name: smem[name].at[consumer] for name in kept}
            return found | ({"extra": smem["extra"].at[consumer]} if extras else {})

        def begin(mine: Channels) -> None:
            """Fetch what the results need."""
            here, channels = smem_of(warpgroup), pair * CONSUMERS + warpgroup
            for part in range(parts if bias is not None else 0):
                for source, to in mine.vector(gmem["bias"], here["bias_smem"].at[part], channels, part):
                    plgpu.copy_gmem_to_smem(source, to, here["extra"])
            if mine.fetched:
                mine.fetch(gmem, here, channels)

        def finish(found: list[jax.Array], mine: Channels, consumer: int, member: int) -> None:
            here = smem_of(consumer)
            if splits > 1:
                found = []
                for part in range(parts):
                    array = smem[f"part{part}{consumer}{member}"]
                    values = []
                    for other in range(splits):  # in this order whoever adds
                        there = array if other == member else plgpu.cluster_ref(array, {"split": jnp.int32(other)})
                        values.append(plgpu.load(there, layout=ACC))
                    found.append(functools.reduce(operator.add, values))
            if extras:
                plgpu.barrier_wait(here["extra"])
            columns = None
            if bias is not None:
                columns = []
                for part in range(parts):
                    vector = plgpu.load(here["bias_smem"].at[part], layout=ACC.reduce(1), optimized=False)
                    columns.append(lax.broadcast_in_dim(vector.astype(jnp.float32), (rows, share), (0,)))
            mine.finish(found, columns, gmem, here, pair * CONSUMERS + consumer)

        def consume() -> None:
            plgpu.set_max_registers(232, action="increase")
            mine = own if splits == 1 else own.of_tokens(split * share)
            if extras:
                pl.when(pair * CONSUMERS + warpgroup < own.blocks)(functools.partial(begin, mine))

            def multiply(*accs: Any) -> list[jax.Array]:
                def step(i: Any, carry: Any) -> None:
                    slot = lax.rem(i, jnp.int32(stages))
                    plgpu.barrier_wait(smem["full"].at[slot])
                    for part, acc in enumerate(accs):
                        plgpu.wgmma(acc, smem["weight_smem"].at[slot, warpgroup, part], smem["x_smem"].at[slot].T)
                    plgpu.wgmma_wait(parts)

                    @pl.when(i > 0)
                    def _() -> None:
                        plgpu.barrier_arrive(smem["empty"].at[lax.rem(i + stages - 1, jnp.int32(stages))])

                lax.fori_loop(0, count, step, None)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(smem["empty"].at[lax.rem(count + stages - 1, jnp.int32(stages))])
                return [acc[...] for acc in accs]

            accumulator = plgpu.WGMMAAccumulatorRef((rows, tokens), jnp.float32)
            found = pl.run_scoped(multiply, *[accumulator] * parts)

            def hand_over(consumer: int) -> None:
                for part, member in itertools.product(range(parts), range(splits)):
                    values = found[part][:, member * share : (member + 1) * share]
                    smem[f"part{part}{consumer}{member}"][...] = values

            if splits > 1:
                for consumer in range(CONSUMERS):
                    pl.when(warpgroup == consumer)(functools.partial(hand_over, consumer))
                publish_to_cluster()
                plgpu.barrier_arrive(smem["cluster"].at[0])
                plgpu.barrier_wait(smem["cluster"].at[0])
            for consumer, member in itertools.product(range(CONSUMERS), range(splits)):
                there = (warpgroup == consumer) & (split == member) & (pair * CONSUMERS + consumer < own.blocks)
                pl.when(there)(functools.partial(finish, found, mine, consumer, member))
            if splits > 1:
                # Nobody leaves before the others have read what it holds.
                plgpu.barrier_arrive(smem["cluster"].at[1])
                plgpu.barrier_wait(smem["cluster"].at[1])

        pl.when(warpgroup == CONSUMERS)(produce)
        pl.when(warpgroup < CONSUMERS)(consume)

    clusters = {"neighbour": sharing, "split": splits}
    clusters = {axis: size for axis, size in clusters.items() if size > 1}
    space: dict[str, Any] = {"grid": (-(-own.blocks // (CONSUMERS * sharing)),), "grid_names": ("tile",)}
    if clusters:
        space |= {"cluster": tuple(clusters.values()), "cluster_names": tuple(clusters)}
    assert math.prod(clusters.values()) <= 8
    kernel = plgpu.kernel(
        body,
        out_type=tuple(own.outs.values()),
        scratch_types=scratch,
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True),
        kernel_name=name,
        **space,
        interpret=plgpu.InterpretGPUParams() if interpret else False,
    )
    return kernel(*operands)
