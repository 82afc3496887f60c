"""What a block's ring holds, and in which order: of an emulated grid."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from pallas_kernels.decoder_layers import plan_of
from pallas_kernels.layer_plan import LAG, NAMES, PAIRS, PIECES, ROW, ROW_PITCH, THREADS, places
from pallas_kernels.layer_stream import Memory, Stream, channel_of, tiles_of
from tests.pallas_kernels.emulated import Emulated
from tests.pallas_kernels.layer_cases import SMALL, Case, operands, static

CASES = {
    "plain": Case(hidden=64, groups=1, wide=64, lengths=(3,)),
    "not gated": Case(hidden=96, groups=1, wide=80, gated=False, lengths=(3,)),
    "longer than a row": Case(hidden=1104, groups=1, wide=48, lengths=(3,)),
    "int8": Case(hidden=64, groups=1, wide=64, weight="int8", lengths=(3,)),
}


def plan_for(case, layers, blocks):
    arguments, rotary = jax.eval_shape(lambda: operands(case, None, layers))
    found = plan_of(*arguments[:4], rotary=rotary, **static(case))
    return dataclasses.replace(found, blocks=blocks, stages=3)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("blocks", [1, 3])
def test_every_byte_of_a_block_comes_in_order(name, blocks):
    case, layers = CASES[name], 2
    plan = plan_for(case, layers, blocks)
    (_, parameters, _, _, _), _ = operands(case, 0, layers)
    weights = [[np.asarray(w).reshape(-1, w.shape[-1]) for w in layer.weights] for layer in parameters]
    o = Emulated(blocks, plan.shared + 16384, THREADS)
    held = [[o.place(weight) for weight in layer] for layer in weights]
    ref = {name: [layer[i] for layer in held] for i, name in enumerate(NAMES)}
    ref |= {name: [0] * layers for name in plan.parameters if name not in ref}
    smem = places(o, plan, o.reserve(plan.shared))
    stream = Stream(o, plan, Memory(o, plan, ref, smem), smem)
    stream.fill()
    ring, step = int(smem["ring"][0, 0]), 0
    expected = [list(wanted(plan, block, weights)) for block in range(blocks)]
    for number in range(max(map(len, expected))):
        slot, parity = o.constant(number % plan.stages), o.constant(number // plan.stages % 2)
        stream.await_full(slot, parity)
        for block in range(blocks):
            if number < len(expected[block]):
                for row, data in enumerate(expected[block][number]):
                    at = ring + number % plan.stages * plan.stage + row * ROW_PITCH
                    np.testing.assert_array_equal(o.smem[block, at : at + len(data)], data)
        stream.release(slot, parity)
        step += 1
    assert step > plan.stages > LAG
    assert not any(size for _, _, _, size, _ in o.rows)  # all that was asked for has come


def wanted(plan, block, weights):
    """For each step of a block the bytes of its 16 rows."""
    for layer in weights:
        for which, product in enumerate(plan.products):
            data = layer[which].view(np.uint8).reshape(product.channels, -1)
            for tile in range(*plan.share(which, block)):
                low = [channel_of(product, tile) + pair for pair in range(PAIRS)]
                for start in range(0, product.line, ROW):
                    yield data[[*low, *(channel + product.apart for channel in low)], start : start + ROW]


def test_shares_are_the_plans():
    plan = plan_for(SMALL["plain"], 1, 7)
    o = Emulated(7, 1024, 32)
    for which in range(4):
        first, count = tiles_of(o, plan, which)
        shares = [plan.share(which, block) for block in range(7)]
        assert list(zip(first[:, 0], (first + count)[:, 0], strict=True)) == shares


@pytest.mark.parametrize("name", SMALL)
def test_tiles_have_every_channel_once(name):
    plan = plan_for(SMALL[name], 1, 3)
    for product in plan.products:
        low = [channel_of(product, tile) + pair for tile in range(product.tiles) for pair in range(PAIRS)]
        assert sorted([*low, *(channel + product.apart for channel in low)]) == list(range(product.channels))
    assert ROW == PIECES * 1024
