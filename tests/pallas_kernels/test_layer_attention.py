"""Attention of the kernel of decoder layers: of an emulated grid, beside softmax in float64."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.decoder_layers import plan_of
from pallas_kernels.layer_attention import FETCHED, attend, fetch
from pallas_kernels.layer_plan import THREADS, WARPS, divided, places
from pallas_kernels.layer_stream import Memory
from tests.pallas_kernels.emulated import Emulated
from tests.pallas_kernels.layer_cases import Case, operands, static
from tests.pallas_kernels.test_decoder_layers import attended


def compare(case, splits, seed=0, gone=None):
    """Attend with random heads, keys and values; what is behind a sequence's end in its blocks is NaN.

    Behind its blocks, its table names such as there are not.
    """
    arguments, rotary = jax.eval_shape(lambda: operands(case, None, 1))
    plan = plan_of(*arguments[:4], rotary=rotary, **static(case))
    units = plan.m * plan.groups
    plan = divided(dataclasses.replace(plan, blocks=units * splits if splits > 1 else 3))
    plan = dataclasses.replace(plan, splits=splits, stages=2)
    rng = np.random.default_rng(seed)
    batch, width = len(case.lengths), case.width
    blocks = 1 + batch * width
    tables = 1 + rng.permutation(batch * width).reshape(batch, width).astype(np.int32)
    kind = jnp.bfloat16
    heads = rng.standard_normal((batch, case.groups, case.per_group + 2, case.dim)).astype(kind)
    cache = [rng.standard_normal((blocks, case.groups, 64, case.dim)).astype(kind) for _ in range(2)]
    whole = [blocks.copy() for blocks in cache]
    for row, length in enumerate(case.lengths):
        for place in range(max(0, length - 1), width * 64):
            for one in cache:  # the new token is not there yet either
                one[tables[row, place // 64], :, place % 64] = np.nan
        if length:
            for i, one in enumerate(whole):
                one[tables[row, (length - 1) // 64], :, (length - 1) % 64] = heads[row, :, case.per_group + i]
    plan = dataclasses.replace(plan, kv_blocks=blocks)
    used = -(-np.maximum(0, np.asarray(case.lengths) - 1) // 64)
    unread = np.arange(width) >= used[:, None]
    wild = np.where(unread, rng.choice([-1, blocks, 1 << 30], tables.shape), tables).astype(np.int32)
    if gone is not None:
        wild[:, gone] = -5
    o = Emulated(plan.blocks, plan.shared + 16384, THREADS)
    packets = np.zeros((plan.exchange // 2, 2), np.uint32)
    start, count = plan.packets["heads"]
    packets[start : start + batch * count] = np.stack(
        [heads.reshape(-1).view(np.uint32), np.full(batch * count, 1)], -1
    )
    exchange = o.place(packets)
    ref = {name: [0] for name in plan.parameters} | {"exchange": exchange, "tables": o.place(wild)}
    ref |= {"lengths": o.place(np.asarray(case.lengths, np.int32))}
    ref |= {"keys": [o.place(cache[0])], "values": [o.place(cache[1])]}
    smem = places(o, plan, o.reserve(plan.shared))
    memory = Memory(o, plan, ref, smem)
    memory.epoch = o.constant(1)
    with np.errstate(invalid="ignore"):
        attend(o, plan, memory, smem)
    start, count = plan.packets["attended"]
    found = o.gmem[exchange:][: packets.nbytes].view(np.uint32).reshape(-1, 2)[start : start + batch * count]
    assert (found[:, 1] == 1).all()
    got = np.ascontiguousarray(found[:, 0]).view(kind).astype(np.float64)
    got = got.reshape(batch, case.groups, case.per_group, case.dim)
    for row, length in enumerate(case.lengths):
        if length == 0:
            np.testing.assert_array_equal(got[row], 0)
            continue
        query = heads[row, :, : case.per_group].astype(np.float64)
        table = tables[row]
        if gone is not None:
            table, length = np.delete(table, gone), length - 64
        wanted = attended(query, *whole, table, length, case.dim**-0.5, case.window)
        np.testing.assert_allclose(got[row], wanted, atol=1e-2 * np.abs(wanted).max(), rtol=1e-2)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(
    "case",
    [
        Case(lengths=(200,), groups=1),
        Case(lengths=(1, 0, 64, 65), groups=1, per_group=2),
        Case(lengths=(130,), groups=1, per_group=5, dim=128),
        Case(lengths=(255, 18), groups=2, window=20),
        Case(lengths=(70,), groups=1, dim=256),
    ],
    ids=["one head", "lengths", "five query heads", "window", "heads of 256"],
)
def test_attention_is_softmax_over_the_keys_that_are_seen(case, splits):
    compare(case, splits)


def test_a_block_that_there_is_not_is_not_seen():
    """As if its keys were not there; nothing is read beyond the blocks, which the emulated memory would notice."""
    case = Case(lengths=(150,), groups=1)
    compare(case, 1, gone=1)


@settings(max_examples=6)
@given(
    lengths=st.lists(st.integers(0, 192), min_size=1, max_size=3),
    window=st.none() | st.integers(1, 200),
    splits=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_lengths_and_windows(lengths, window, splits, seed):
    compare(Case(lengths=tuple(lengths), groups=1, window=window, width=3), splits, seed)


@pytest.mark.parametrize("window", [None, 300])
def test_what_is_asked_for_early_are_the_first_keys_that_are_read(window):
    """Of sequences of any length, but for what lies behind the first steps of each warp, and for the new token's."""
    case = Case(lengths=(700, 65, 1, 0), groups=2, width=11, window=window)
    arguments, rotary = operands(case, layers=1)
    plan = plan_of(*arguments[:4], rotary=rotary, **static(case))
    plan = dataclasses.replace(plan, blocks=3, splits=1, stages=2)
    tables, positions, keys = arguments[3], np.asarray(arguments[4]), np.asarray(arguments[2][0][0])
    o = Emulated(plan.blocks, plan.shared + 16384, THREADS)
    given = {"tables": tables, "lengths": jnp.maximum(arguments[4] + 1, 0), "keys": [keys], "values": [keys]}
    ref = {
        name: [o.place(array) for array in value] if isinstance(value, list) else o.place(np.asarray(value))
        for name, value in given.items()
    }
    ref |= {name: [0] for name in plan.parameters if name not in ref}
    memory = Memory(o, plan, ref, places(o, plan, o.reserve(plan.shared)))
    asked = set()
    o.prefetch = lambda address: asked.update((address[o.active] // 16).tolist())
    fetch(o, plan, memory)
    rows, size = WARPS * FETCHED * plan.tokens, plan.dim * 2
    expected = set()
    for sequence, position in enumerate(positions):
        first = max(0, position + 1 - window) // plan.tokens * plan.tokens if window else 0
        last = -(-position // plan.tokens) * plan.tokens
        for group in range(plan.groups):
            for token in range(first, min(last, first + rows)):
                row = (int(tables[sequence, token // 64]) * plan.groups + group) * 64 + token % 64
                for name in ("keys", "values"):
                    expected.update(range((ref[name][0] + row * size) // 16, (ref[name][0] + (row + 1) * size) // 16))
    assert asked == expected
