"""The kernel of a decoder layer: every instruction of all threads of a grid of three blocks, in numpy."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import layer_threads
from pallas_kernels.decoder_layer import plan_of, reference, workspace
from pallas_kernels.layer_attention import attend
from pallas_kernels.layer_plan import THREADS, divided
from pallas_kernels.layer_threads import NAMES
from pallas_kernels.qkv_gemm import slots_of
from tests.pallas_kernels.emulated import Emulated
from tests.pallas_kernels.layer_cases import SMALL, operands, static

BLOCKS = 3


def bits_of(array):
    """An array as its bytes lie on a GPU: two entries of 4 bits in one byte."""
    array = np.asarray(array)
    if array.dtype != ml_dtypes.int4:
        return array
    low, high = (array.astype(np.int8)[..., i::2].view(np.uint8) & 15 for i in range(2))
    return low | high << 4


def emulate(plan, arguments, rotary, counters):
    """The layer's result, and the cache."""
    x, layer, cache, tables, positions = arguments
    o = Emulated(plan.blocks, plan.shared + 16384, THREADS)
    slots = slots_of(tables, positions[:, None], cache[0].shape[0])[:, 0]
    given = {"x": x, "tables": tables, "slots": slots, "lengths": jnp.maximum(positions + 1, 0)}
    given |= {"keys": cache[0], "values": cache[1], "counters": counters}
    if rotary is not None:
        given |= dict(zip(("cos", "sin"), rotary, strict=True))
    for which, name in enumerate(NAMES):
        given |= {name: layer.weights[which], f"{name}_factors": layer.scales[which]}
        given[f"{name}_bias"] = layer.biases[which]
    for name, norm in zip(("qkv", "up"), layer.norms, strict=True):
        given |= {f"{name}_scale": norm.scale, f"{name}_shift": norm.bias}
    inner = plan.groups * plan.per_group * plan.dim
    heads = plan.m * plan.groups * plan.splits * plan.per_group
    kind = np.asarray(x).dtype
    empty = {"result": plan.hidden, "query": inner, "attended": inner, "middle": plan.hidden}
    empty |= {"between": plan.products[-1].inputs}
    given |= {name: np.full((plan.m, size), np.nan, kind) for name, size in empty.items()}
    given |= {"partial": np.full((heads, plan.dim), np.nan, np.float32)}
    given |= {"partial_sizes": np.full((heads, 2), np.nan, np.float32)}
    ref = {name: o.place(bits_of(array)) for name, array in given.items() if array is not None}
    sizes = {"ring": plan.stages * plan.stage, "staged": plan.staging, "sums": plan.sums}
    sizes |= {"table": plan.table, "scratch": plan.scratch}
    smem = {name: o.reserve(size) for name, size in sizes.items()}
    with np.errstate(invalid="ignore", over="ignore"):
        layer_threads.run(o, plan, ref, smem, attend)
    assert not o.groups and not o.open

    def read(name):
        array = np.asarray(given[name])
        return o.gmem[ref[name] : ref[name] + array.nbytes].view(array.dtype).reshape(array.shape)

    return read("result"), (read("keys"), read("values")), read("counters")


def plan_for(arguments, rotary, case, **changes):
    x, layer, cache, tables, _ = arguments
    plan = plan_of(x, layer, cache, tables, rotary=rotary, **static(case))
    plan = divided(dataclasses.replace(plan, blocks=BLOCKS))
    return dataclasses.replace(plan, stages=5, **changes)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("splits", [1, 2])
def test_threads_compute_the_layer(name, splits):
    case = SMALL[name]
    arguments, rotary = operands(case)
    plan = plan_for(arguments, rotary, case, splits=splits)
    assert plan.problem() is None
    counters = workspace(len(case.lengths), case.groups)
    got, cache, counted = emulate(plan, arguments, rotary, counters)
    wide = [jnp.asarray(array, jnp.float32) for array in (arguments[0], *arguments[2])]
    del wide
    expected, written = reference(*arguments, rotary=rotary, **static(case))
    real = np.asarray(arguments[4]) >= 0
    scale = np.abs(np.asarray(expected, np.float32)[real]).max()
    tolerance = 2e-2 if case.dtype == "bfloat16" else 3e-3
    np.testing.assert_allclose(
        got.astype(np.float32)[real], np.asarray(expected, np.float32)[real], atol=tolerance * scale, rtol=0
    )
    for mine, theirs, before in zip(cache, written, arguments[2], strict=True):
        changed = np.asarray(theirs, np.float32) != np.asarray(before, np.float32)
        mine, theirs = mine.astype(np.float32), np.asarray(theirs, np.float32)
        np.testing.assert_array_equal(mine[~changed], theirs[~changed])
        np.testing.assert_allclose(mine, theirs, atol=2e-2 * np.abs(theirs).max(), rtol=0)
    assert counted[0] == 4 * BLOCKS
    # The next layer is given the counters as they are.
    again, _, _ = emulate(plan, arguments, rotary, jnp.asarray(counted))
    np.testing.assert_array_equal(again.view(np.uint16), got.view(np.uint16))
