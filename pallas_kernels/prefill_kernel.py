"""The Hopper kernel of :func:`pallas_kernels.prefill_attention.prefill_attention`, in Mosaic GPU.

How the kernel works: a tile is 128 query tokens of one head. Two warpgroups compute 64 of them each, a third keeps a
ring of TMA copies of keys and values in flight, found through the block table. The two take turns: while one has the
tensor cores, the other does its softmax (FlashAttention-3, arXiv:2407.08608, section 3.1), whose weights stay in
registers as the left operand of the second product. A program stays on its SM and works through a list of tiles, so
that the copies of the next tile begin while the last one is still being computed.

The lists are made when the kernel is traced, as if every chunk started halfway to where its table leaves it room: tiles
are handed out in order, each to the program that would be free first. Within a span of heads, whose keys and values fit
the L2 cache together, the tiles with the most keys come first.
"""

from __future__ import annotations

import functools
import heapq
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.attention import BLOCK_SIZE, Bias
from pallas_kernels.decode_kernel import LOG2E, NEVER

ROWS = 64
"""Query tokens of a warpgroup: the rows of wgmma."""
TILE = 2 * ROWS
"""Query tokens of a tile."""
UNSEEN = 1e-5 * NEVER
"""The maximum before the first key that is seen: above a hidden key's score, so that hidden keys weigh nothing even
where there is no other yet. Were the two the same, a fused multiply-add would make of their difference the rounding
error of a product: a weight that is infinite, or zero, by chance."""
SPAN_BYTES = 16 << 20
"""Keys and values that a span of heads may have, a third of an H200's L2 cache."""
TILE_COST = 0.3 * TILE
"""What a tile costs beside its steps, in key positions: how the lists are balanced. Derived, not measured."""
PIECE = 8
"""Query tokens of a piece of a TMA copy: the hardware finds the sequence's end in whole pieces."""


@dataclass(frozen=True, kw_only=True)
class PrefillConfig:
    """How the kernel divides its work.

    Attributes:
        keys: key positions of a step, a multiple of the 64 of a block.
        stages: steps whose keys and values are in flight.
        programs: programs that share the tiles; None is one program for each tile.
        turns: whether the two warpgroups take turns at the tensor cores.
        staged: whether results leave from shared memory of their own. Else from the query's, which takes half the
            memory, and leaves no room for another tile's query: ``programs`` must be None.
        registers: whether weights go to the second product from registers. Interpret mode cannot run that; without it
            they go through shared memory.
    """

    keys: int = 128
    stages: int = 2
    programs: int | None = None
    turns: bool = True
    staged: bool = True
    registers: bool = True

    def shared_bytes(self, head_dim: int) -> int:
        """Shared memory that the kernel takes, 16-bit entries; without barriers."""
        per_row = head_dim * (2 if self.staged else 1) + (0 if self.registers else self.keys)
        return 2 * (TILE * per_row + 2 * self.stages * self.keys * head_dim)


def tile_steps(tokens: int, width: int, keys: int, window: int | None) -> tuple[int, ...]:
    """Steps of each tile of a chunk that starts halfway between 0 and the last place where its table has room for it.

    Lists made for one start are not balanced for another: those for 0 give the last of four chunks of 512 tokens to
    programs of which the slowest has 1.34 times the mean; those for halfway 1.04 times, and the first chunk 1.11 times.

    Args:
        tokens: query tokens of a chunk.
        width: blocks of a table row.
        keys: key positions of a step.
        window: as in :func:`tiled_attention`.
    """
    room = width * BLOCK_SIZE
    start = max(room - tokens, 0) // 2
    found = []
    for row in range(0, tokens, TILE):
        stop = min(start + row + TILE, room)
        first = 0 if window is None else max(start + row - (window - 1), 0) // keys
        found.append(max(-(-stop // keys) - first, 0) if start + row < room else 0)
    return tuple(found)


@functools.lru_cache(maxsize=64)
def schedule(pairs: int, steps: tuple[int, ...], span: int, programs: int | None, tile_cost: float) -> np.ndarray:
    """Which program computes which tiles, in which order.

    Args:
        pairs: sequences times query heads.
        steps: steps of each tile of a pair.
        span: pairs that are worked on together.
        programs: programs, or None for one a tile.
        tile_cost: what a tile costs beside its steps, in steps.

    Returns:
        int32 [programs, 1 + most tiles of a program]: how many tiles a program has, then their numbers, which are
        ``pair * tiles + tile``.
    """
    tiles = len(steps)
    order = [
        pair * tiles + tile
        for first in range(0, pairs, span)
        for tile in reversed(range(tiles))
        for pair in range(first, min(first + span, pairs))
    ]
    if programs is None or programs >= len(order):
        return np.stack([np.ones(len(order), np.int32), np.asarray(order, np.int32)], axis=1)
    lists: list[list[int]] = [[] for _ in range(programs)]
    free = [(0.0, program) for program in range(programs)]
    for number in order:
        until, program = free[0]
        lists[program].append(number)
        heapq.heapreplace(free, (until + steps[number % tiles] + tile_cost, program))
    table = np.zeros((programs, 1 + max(map(len, lists))), np.int32)
    for row, numbers in zip(table, lists, strict=True):
        row[: 1 + len(numbers)] = len(numbers), *numbers
    return table


def _transforms(columns: int) -> tuple[int, tuple[Any, ...]]:
    """How a matrix of 16-bit entries lies in shared memory: in tiles as wide as the widest swizzle that divides it."""
    tile = next(tile for tile in (64, 32, 16) if columns % tile == 0)
    return tile, (plgpu.TilingTransform((8, tile)), plgpu.SwizzleTransform(2 * tile))  # type: ignore[abstract]


def _div(a: Any, b: int) -> Any:
    return lax.div(a, jnp.int32(b))


def _rem(a: Any, b: int) -> Any:
    return lax.rem(a, jnp.int32(b))


# Jitted, so that the layers of a model trace, lower and compile one kernel, not one each.
@functools.partial(jax.jit, static_argnames=("config", "scale", "softcap", "window"))
def tiled_attention(
    query: jax.Array,
    key_blocks: jax.Array,
    value_blocks: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
    lengths: jax.Array,
    config: PrefillConfig,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    bias: Bias | None,
    sinks: jax.Array | None,
) -> jax.Array:
    """Run the kernel on arguments that :func:`pallas_kernels.prefill_attention.prefill_attention` has checked.

    Args:
        query: [B, T, G, R, D].
        key_blocks, value_blocks, tables: the cache, as there.
        starts: int32 [B], position of each sequence's first query.
        lengths: int32 [B], queries of each sequence; rows after them are zero in the result.
        config: how to divide the work.
        scale, softcap, window, bias, sinks: as there.

    Returns:
        [B, T, G, R, D].
    """
    given = query.shape
    query = jnp.pad(query, ((0, 0), (0, -given[1] % PIECE), (0, 0), (0, 0), (0, 0)))
    batch, tokens, groups, per_key, dim = query.shape
    heads, width, num_blocks, dtype = groups * per_key, tables.shape[1], key_blocks.shape[0], query.dtype
    keys, stages = config.keys, config.stages
    blocks_a_step, tiles = keys // BLOCK_SIZE, -(-tokens // TILE)
    scores_shape, layout = (ROWS, keys), plgpu.Layout.WGMMA
    if window is not None:
        window = min(window, width * BLOCK_SIZE + TILE)  # so that sums with it stay far from int32's end
    # Scores that are only scaled are scaled inside the exponent, where it costs nothing.
    linear = softcap is None and bias is None and scale > 0
    unit = scale * LOG2E if linear else 1.0
    pair_bytes = 4 * width * BLOCK_SIZE * dim / per_key
    span, steps = max(per_key, int(SPAN_BYTES // pair_bytes)), tile_steps(tokens, width, keys, window)
    table = schedule(batch * heads, steps, span, config.programs, TILE_COST / keys)
    rows: dict[str, jax.Array] = {}
    if bias is not None:
        slopes = bias.slopes.astype(jnp.float32).reshape(heads)
        rows["slopes"] = lax.reduce_precision(slopes, 8, 7) if bias.bfloat16 else slopes
    if sinks is not None:
        rows["sinks"] = sinks.astype(jnp.float32).reshape(heads) * LOG2E

    def down(column: Any, columns: int) -> Any:
        return lax.broadcast_in_dim(column, (ROWS, columns), [0])

    def prefill_attention_kernel(
        query_gmem: Any, keys_gmem: Any, values_gmem: Any, tables_gmem: Any, starts_gmem: Any, lengths_gmem: Any,
        order_gmem: Any, rows_gmem: Any, out_gmem: Any, query_smem: Any, keys_smem: Any, values_smem: Any,
        out_smem: Any, weights_smem: Any, query_ready: Any, query_used: Any, keys_ready: Any, keys_used: Any,
        values_ready: Any, values_used: Any, edge_ready: Any, turn: Any,
    ) -> None:  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")

        def number_of(index: Any) -> Any:
            return order_gmem[lax.axis_index("program"), jnp.minimum(1 + index, table.shape[1] - 1)]

        def extent_of(number: Any) -> tuple[Any, Any]:
            sequence = _div(number, tiles * heads)
            return starts_gmem[sequence], lengths_gmem[sequence]

        def tile_at(number: Any, start: Any, length: Any) -> tuple[Any, ...]:
            """Sequence, head, first query, its position, queries of the sequence, first step and the step after."""
            pair, row = _div(number, tiles), _rem(number, tiles) * TILE
            sequence, head = _div(pair, heads), _rem(pair, heads)
            stop = jnp.minimum(start + jnp.minimum(row + TILE, length), width * BLOCK_SIZE)
            stop = jnp.where(row < length, stop, 0)
            last = _div(stop + (keys - 1), keys)
            first = jnp.int32(0)
            if window is not None:
                first = jnp.minimum(_div(jnp.maximum(start + row - (window - 1), 0), keys), last)
            return sequence, head, row, start, length, first, last

        def work_through(tile: Any) -> Any:
            """Run ``tile`` for each tile of the program: given it and the steps so far, it returns those after it."""
            number = number_of(jnp.int32(0))
            if table.shape[1] == 2:
                return tile(tile_at(number, *extent_of(number)), jnp.int32(0))

            def one(index: Any, carry: Any) -> Any:
                # Each is a read of GMEM: asked for a tile before it is used, and one after the other.
                number, start, length, following, done = carry
                ahead = extent_of(following), number_of(index + 2)
                done = tile(tile_at(number, start, length), done)
                return following, *ahead[0], ahead[1], done

            first = number, *extent_of(number), number_of(jnp.int32(1)), jnp.int32(0)
            return lax.fori_loop(0, order_gmem[lax.axis_index("program"), 0], one, first)[-1]

        def produce() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def copy_blocks(source: Any, target: Any, barrier: Any, sequence: Any, group: Any, step: Any) -> None:
                for part in range(blocks_a_step):
                    entry = tables_gmem[sequence, jnp.minimum(step * blocks_a_step + part, width - 1)]
                    block = jnp.clip(entry, 0, num_blocks - 1)  # in bounds whatever the table says
                    plgpu.copy_gmem_to_smem(
                        source.at[block, group], target.at[pl.ds(part * BLOCK_SIZE, BLOCK_SIZE)], barrier
                    )

            def clear(values: Any, first: Any) -> None:
                """Zero the rows that no sequence has: zero times what lies there would be NaN if that is."""
                tile, _ = _transforms(dim)
                for part in range(blocks_a_step):
                    for column in range(0, dim, tile):
                        piece = values.at[pl.ds(part * BLOCK_SIZE, BLOCK_SIZE), pl.ds(column, tile)]
                        places = plgpu.broadcasted_iota(jnp.int32, (BLOCK_SIZE, tile), 0, layout=layout)
                        held = plgpu.load(piece, layout=layout)
                        piece[...] = jnp.where(places + part * BLOCK_SIZE < first, held, jnp.zeros_like(held))
                plgpu.commit_smem()

            def tile(found: Any, done: Any) -> Any:
                sequence, head, row, start, length, first, last = found
                group, stop, behind = _div(head, per_key), start + length, done - first

                def fetch_keys(step: Any) -> None:
                    number = behind + step
                    slot = _rem(number, stages)
                    pl.when(number >= stages)(lambda: plgpu.barrier_wait(keys_used.at[slot]))
                    copy_blocks(keys_gmem, keys_smem.at[slot], keys_ready.at[slot], sequence, group, step)

                def fetch_values(step: Any) -> None:
                    number = behind + step
                    slot = _rem(number, stages)
                    pl.when(number >= stages)(lambda: plgpu.barrier_wait(values_used.at[slot]))
                    edge = (step + 1) * keys > stop

                    @pl.when(jnp.logical_not(edge))
                    def _() -> None:
                        copy_blocks(values_gmem, values_smem.at[slot], values_ready.at[slot], sequence, group, step)

                    @pl.when(edge)
                    def _() -> None:
                        copy_blocks(values_gmem, values_smem.at[slot], edge_ready, sequence, group, step)
                        plgpu.barrier_wait(edge_ready)
                        clear(values_smem.at[slot], stop - step * keys)
                        for _ in range(blocks_a_step):  # in place of the copies
                            plgpu.barrier_arrive(values_ready.at[slot])

                # The order matters: the second warpgroup ends a tile only when the first has begun its next, for which
                # these keys and the first query must be here. For the same reason tiles without steps take no query.
                @pl.when(last > first)
                def _() -> None:
                    fetch_keys(first)
                    for half in range(2):
                        if config.staged:
                            pl.when(done > 0)(functools.partial(plgpu.barrier_wait, query_used.at[half]))
                        at = pl.multiple_of(row + half * ROWS, ROWS)
                        plgpu.copy_gmem_to_smem(
                            query_gmem.at[sequence, pl.ds(at, ROWS), head], query_smem.at[half], query_ready.at[half]
                        )
                    fetch_values(first)

                def fetch(step: Any, carry: None) -> None:
                    fetch_keys(step)
                    fetch_values(step)

                lax.fori_loop(first + 1, last, fetch, None)
                return behind + last

            total = work_through(tile)
            # Nothing is left that nobody has waited for.
            for half in range(2 if config.staged else 0):
                pl.when(total > 0)(functools.partial(plgpu.barrier_wait, query_used.at[half]))
            for slot in range(stages):

                @pl.when(slot < total)
                def _(slot: int = slot) -> None:
                    plgpu.barrier_wait(keys_used.at[slot])
                    plgpu.barrier_wait(values_used.at[slot])

        def take_turn() -> None:
            if config.turns:
                plgpu.barrier_arrive(turn)
                plgpu.barrier_wait(turn)

        def shaped(scores: Any, positions: Any, head: Any) -> Any:
            """Scores in units of log2, with cap and bias; ``positions`` of their keys."""
            if linear:
                return scores
            alibi = None
            if bias is not None:
                places = positions.astype(jnp.float32)
                if bias.bfloat16:
                    places = places.astype(jnp.bfloat16).astype(jnp.float32)
                alibi = places * rows_gmem["slopes"][head]
                if bias.bfloat16:
                    alibi = alibi.astype(jnp.bfloat16).astype(jnp.float32)
                if bias.scaled:
                    scores = scores + alibi
            if softcap is not None:
                # tanh(x) = 1 - 2 / (1 + exp(2x)): the hardware's own tanh has 11 bits, too few to be scaled by a cap.
                cap = softcap * LOG2E
                scores = cap - (2 * cap) / (1 + jnp.exp2(scores * (2 * LOG2E * scale / softcap)))
            else:
                scores = scores * (scale * LOG2E)
            if alibi is not None and bias is not None and not bias.scaled:
                scores = scores + alibi * LOG2E
            return scores

        def consume() -> None:
            plgpu.set_max_registers(232, action="increase")
            mine = query_smem.at[warpgroup]
            pl.when(warpgroup == 1)(take_turn)  # half a step behind the other from here on

            def tile(found: Any, done: Any) -> Any:
                sequence, head, row, start, length, first, last = found
                row = pl.multiple_of(row + warpgroup * ROWS, ROWS)
                top = start + row  # position of this warpgroup's first query
                behind = done - first

                def step(number: Any, carry: Any, *, masked: bool) -> Any:
                    out, maximum, total = carry
                    slot = _rem(behind + number, stages)
                    plgpu.barrier_wait(keys_ready.at[slot])

                    def multiply_keys(acc: Any) -> Any:
                        plgpu.wgmma(acc, mine, keys_smem.at[slot].T)
                        take_turn()
                        return acc[...]

                    scores = pl.run_scoped(multiply_keys, plgpu.WGMMAAccumulatorRef(scores_shape, jnp.float32))
                    plgpu.barrier_arrive(keys_used.at[slot])
                    if config.staged:
                        pl.when(number == last - 1)(lambda: plgpu.barrier_arrive(query_used.at[warpgroup]))
                    base = number * keys
                    columns = plgpu.broadcasted_iota(jnp.int32, scores_shape, 1, layout=layout)
                    scores = shaped(scores, columns + base, head)
                    if masked:
                        distance = plgpu.broadcasted_iota(jnp.int32, scores_shape, 0, layout=layout) - columns
                        visible = distance >= base - top
                        if window is not None:
                            visible &= distance < base - top + window
                        scores = jnp.where(visible, scores, NEVER)
                    raised = jnp.maximum(maximum, scores.max(axis=1))
                    fade = jnp.exp2((maximum - raised) * unit)
                    weights = jnp.exp2(scores * unit - down(raised * unit, keys))
                    total = total * fade + weights.sum(axis=1)
                    out = out * down(fade, dim)
                    weights = weights.astype(dtype)
                    if config.registers:
                        # All of the softmax before the turn is given back, not moved past it by the compiler.
                        out, total, raised, weights = lax.optimization_barrier((out, total, raised, weights))
                    else:
                        weights_smem[warpgroup] = weights
                        plgpu.commit_smem()
                    if config.turns:
                        plgpu.barrier_arrive(turn)
                    plgpu.barrier_wait(values_ready.at[slot])
                    if config.turns:
                        plgpu.barrier_wait(turn)
                    values = values_smem.at[slot]
                    if config.registers:
                        acc = plgpu.WGMMAAccumulatorRef.init(out)
                        out = pl.run_state(lambda acc: plgpu.wgmma(acc, weights, values))(acc)
                    else:

                        def multiply_values(acc: Any) -> Any:
                            plgpu.wgmma(acc, weights_smem.at[warpgroup], values)
                            return acc[...]

                        # Into a fresh accumulator, since interpret mode cannot start one from registers.
                        acc = plgpu.WGMMAAccumulatorRef((ROWS, dim), jnp.float32)
                        out = out + pl.run_scoped(multiply_values, acc)
                    plgpu.barrier_arrive(values_used.at[slot])
                    return out, raised, total

                out = plgpu.layout_cast(jnp.zeros((ROWS, dim), jnp.float32), layout)
                maximum = plgpu.layout_cast(jnp.full((ROWS,), UNSEEN, jnp.float32), layout.reduce(1))
                total = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1))
                # Steps whose keys all queries see need no mask; those before lie partly before a window.
                seen = jnp.clip(_div(top + 1, keys), first, last)
                begin = first
                carry = out, maximum, total
                pl.when(last > first)(lambda: plgpu.barrier_wait(query_ready.at[warpgroup]))
                if window is not None:
                    begin = jnp.clip(_div(jnp.maximum(top + ROWS - window, 0) + (keys - 1), keys), first, seen)
                    carry = lax.fori_loop(first, begin, functools.partial(step, masked=True), carry)
                carry = lax.fori_loop(begin, seen, functools.partial(step, masked=False), carry)
                out, maximum, total = lax.fori_loop(seen, last, functools.partial(step, masked=True), carry)
                if "sinks" in rows:
                    sink = rows_gmem["sinks"][head]
                    place = maximum * unit
                    raised = jnp.maximum(place, sink)
                    fade = jnp.exp2(place - raised)
                    factor = fade / (total * fade + jnp.exp2(sink - raised))
                else:
                    factor = jnp.where(total > 0, 1 / total, 0.0)
                own = plgpu.broadcasted_iota(jnp.int32, (ROWS, dim), 0, layout=layout) < length - row
                out = jnp.where(own, out * down(factor, dim), 0.0).astype(dtype)
                target = out_gmem.at[sequence, pl.ds(row, ROWS), head]
                if config.staged:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
                staged = out_smem.at[warpgroup] if config.staged else mine
                staged[...] = out
                plgpu.commit_smem()
                pl.when(row < tokens)(lambda: plgpu.copy_smem_to_gmem(staged, target))
                return behind + last

            work_through(tile)
            pl.when(warpgroup == 0)(take_turn)
            plgpu.wait_smem_to_gmem(0)

        pl.when(warpgroup == 2)(produce)
        pl.when(warpgroup < 2)(consume)

    _, tiling = _transforms(dim)
    matrix = plgpu.SMEM((2, ROWS, dim), dtype, transforms=tiling)
    ring = plgpu.SMEM((stages, keys, dim), dtype, transforms=tiling)
    out = plgpu.kernel(
        prefill_attention_kernel,
        out_type=jax.ShapeDtypeStruct((batch, tokens, heads, dim), dtype),
        scratch_types=[
            matrix,
            ring,
            ring,
            matrix if config.staged else (),
            () if config.registers else plgpu.SMEM((2, ROWS, keys), dtype, transforms=tiling),
            plgpu.Barrier(num_barriers=2),
            plgpu.Barrier(num_barriers=2) if config.staged else (),
            plgpu.Barrier(num_arrivals=blocks_a_step, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=blocks_a_step, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=blocks_a_step),
            plgpu.Barrier(num_arrivals=2) if config.turns else (),
        ],
        grid=(table.shape[0],),
        grid_names=("program",),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True),
    )(
        query.reshape(batch, tokens, heads, dim), key_blocks, value_blocks, tables, starts, lengths,
        jnp.asarray(table), rows,
    )  # fmt: skip
    return out[:, : given[1]].reshape(given)
