"""The kernel of decoder layers: every instruction of all threads of a grid of three blocks, in numpy."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import layer_threads
from pallas_kernels.decoder_layers import plan_of, reference
from pallas_kernels.layer_attention import attend
from pallas_kernels.layer_mosaic import parameters_of
from pallas_kernels.layer_plan import MARKS, THREADS, divided, places
from pallas_kernels.qkv_gemm import slots_of
from tests.pallas_kernels.emulated import Emulated
from tests.pallas_kernels.layer_cases import SMALL, Case, operands, static

BLOCKS = 3


def bits_of(array):
    """An array as its bytes lie on a GPU: two entries of 4 bits in one byte."""
    array = np.asarray(array)
    if array.dtype != ml_dtypes.int4:
        return array
    low, high = (array.astype(np.int8)[..., i::2].view(np.uint8) & 15 for i in range(2))
    return low | high << 4


def emulate(plan, arguments, rotary):
    """The layers' result, and the caches."""
    x, layers, caches, tables, positions = arguments
    o = Emulated(plan.blocks, plan.shared + 16384, THREADS)
    slots = slots_of(tables, positions[:, None], caches[0][0].shape[0])[:, 0]
    given = {"x": x, "tables": tables, "slots": slots, "lengths": jnp.maximum(positions + 1, 0)}
    if rotary is not None:
        given |= dict(zip(("cos", "sin"), rotary, strict=True))
    given |= {"result": np.full(x.shape, np.nan, np.asarray(x).dtype), "exchange": np.zeros(plan.exchange, np.int32)}
    ref = {name: o.place(bits_of(array)) for name, array in given.items()}
    own = [parameters_of(layer, plan) for layer in layers]
    own = [one | {"keys": cache[0], "values": cache[1]} for one, cache in zip(own, caches, strict=True)]
    ref |= {name: [o.place(bits_of(layer[name])) for layer in own] for name in plan.parameters}
    smem = places(o, plan, o.reserve(plan.shared))
    if plan.traced:
        ref["trace"] = o.place(np.zeros(plan.trace, np.uint32))
    with np.errstate(invalid="ignore", over="ignore"):
        layer_threads.run(o, plan, ref, smem, attend)
    assert not o.groups
    assert not o.open

    def read(at, array):
        array = np.asarray(array)
        return o.gmem[at : at + array.nbytes].view(array.dtype).reshape(array.shape)

    written = [[read(ref[name][i], layer[name]) for name in ("keys", "values")] for i, layer in enumerate(own)]
    noted = read(ref["trace"], np.zeros(plan.trace, np.uint32)) if plan.traced else None
    return read(ref["result"], given["result"]), written, noted


def plan_for(arguments, rotary, case, splits, blocks=BLOCKS):
    plan = plan_of(*arguments[:4], rotary=rotary, **static(case))
    blocks = max(blocks, plan.m * plan.groups * splits if splits > 1 else 1)
    return dataclasses.replace(divided(dataclasses.replace(plan, blocks=blocks)), stages=3, splits=splits)


@pytest.mark.parametrize("name", SMALL)
def test_threads_compute_the_layers(name):
    compute(SMALL[name], 1)


@pytest.mark.parametrize("name", ["plain", "exact gelu, window", "seven query heads a key"])
def test_splits_of_the_keys_come_together(name):
    compute(SMALL[name], 2)


def test_a_traced_kernel_notes_when_it_is_where():
    """In order; a block that attends to nothing has nothing to note of it."""
    case = SMALL["plain"]
    arguments, rotary = operands(case)
    plan = dataclasses.replace(plan_for(arguments, rotary, case, 1), traced=True)
    times = emulate(plan, arguments, rotary)[2]
    assert times.shape == (2, len(MARKS), BLOCKS, 2)
    for block in range(BLOCKS):
        attends = block < plan.m * plan.groups
        names = [name for name in MARKS if attends or name not in ("query", "keys", "attended")]
        noted = [times[layer, MARKS.index(name), block, 0] for layer in range(2) for name in names]
        assert noted == sorted(set(noted))
        assert (times[:, :, block, 0] == 0).sum() == 2 * (len(MARKS) - len(names))
    assert (times[..., 1] == 1000 * times[..., 0]).all()


def test_blocks_without_tiles_do_nothing():
    case = Case(hidden=64, groups=1, wide=64, lengths=(70,))
    plan = compute(case, 1, blocks=40)
    assert sum(product.tiles for product in plan.products) < 40


def compute(case, splits, blocks=BLOCKS, **changes):
    arguments, rotary = operands(case)
    plan = dataclasses.replace(plan_for(arguments, rotary, case, splits, blocks), **changes)
    assert plan.problem() is None
    got, caches, _ = emulate(plan, arguments, rotary)
    expected, written = reference(*arguments, rotary=rotary, **static(case))
    real = np.asarray(arguments[4]) >= 0
    tolerance = 2e-2 if case.dtype == "bfloat16" else 3e-3
    got, expected = got.astype(np.float32)[real], np.asarray(expected, np.float32)[real]
    np.testing.assert_allclose(got, expected, atol=tolerance * np.abs(expected).max(), rtol=0)
    for mine, theirs, before in zip(caches, written, arguments[2], strict=True):
        for one, other, old in zip(mine, theirs, before, strict=True):
            one, other, old = (np.asarray(array, np.float32) for array in (one, other, old))
            same = (other == old).all(-1)  # rows that are not written
            np.testing.assert_array_equal(one[same], other[same])
            np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max(), rtol=0)
    return plan
