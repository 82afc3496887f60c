"""What x becomes in shared memory: of an emulated block."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.decoder_layers import plan_of
from pallas_kernels.layer_plan import OUT, QKV, THREADS, UP, places
from pallas_kernels.layer_staging import (
    LEAST,
    PLANE,
    _fixed,
    fetch,
    place_of,
    place_of_integers,
    stage,
    vectors_of_norm,
)
from pallas_kernels.layer_stream import Memory
from pallas_kernels.quantized_threads import run_order
from pallas_kernels.skinny_gemm import normalise
from tests.pallas_kernels.emulated import KINDS, Emulated
from tests.pallas_kernels.layer_cases import SMALL, operands, static


def staged(case, which):
    """The rows that are staged for a product, in their own order; what they should be; sums that undo offsets."""
    arguments, rotary = operands(case, layers=1)
    plan = dataclasses.replace(plan_of(*arguments[:4], rotary=rotary, **static(case)), blocks=1, stages=2)
    product, layer = plan.products[which], arguments[1][0]
    rng = np.random.default_rng(1)
    dtype = KINDS[plan.kind]
    x = (rng.standard_normal((plan.m, product.inputs)) + 0.3).astype(dtype)
    o = Emulated(1, plan.shared + 16384, THREADS)
    exchange = np.zeros(plan.exchange, np.int32)
    if which == QKV:
        given = x
    else:
        given = np.zeros_like(x)
        start, count = plan.packets[{OUT: "attended", UP: "middle"}[which]]
        packets = exchange.view(np.uint32).reshape(-1, 2)[start : start + plan.m * count]
        packets[:, 0] = x.reshape(-1).view(np.uint32)
        packets[:, 1] = 1
    ref = {"x": o.place(given), "exchange": o.place(exchange)}
    for name, norm in zip(("qkv", "up"), layer.norms, strict=True):
        vectors = {"scale": norm.scale, "shift": norm.bias}
        ref |= {f"{name}_{part}": [o.place(np.asarray(v))] for part, v in vectors.items() if v is not None}
    ref |= {name: [0] for name in plan.parameters if name not in ref}
    smem = places(o, plan, o.reserve(plan.shared))
    memory = Memory(o, plan, ref, smem)
    memory.epoch = o.constant(1)
    vectors = vectors_of_norm(o, plan, which, memory) if which in (QKV, UP) else []
    stage(o, plan, which, vectors, memory, smem)
    at, pitch = int(smem["work"][0, 0]), plan.x_line(which)
    lines = o.smem[0, at : at + plan.m * pitch].reshape(plan.m, pitch)
    found, steps = np.full((plan.m, product.staged), np.nan, np.float32), None
    for run in range(product.staged // 8):
        if plan.integer:
            place = int(place_of_integers(o, plan, o.constant(run))[0, 0])
            high, low = (lines[:, place + plane : place + plane + 8].view(np.int8) for plane in (0, PLANE))
            order = (0, 2, 4, 6, 1, 3, 5, 7) if plan.bits == 4 else range(8)
            found[:, [8 * run + i for i in order]] = high * 256.0 + low
        else:
            place = int(place_of(o, plan, product, o.constant(run))[0, 0])
            data = np.ascontiguousarray(lines[:, place : place + 16]).view(dtype).astype(np.float32)
            found[:, [8 * run + i for i in run_order(plan.bits)]] = data
    if plan.integer:
        count, at = product.staged // product.span, int(smem["units"][0, 0])
        units = o.smem[0, at : at + 4 * plan.m * count].view(np.float32).reshape(plan.m, count)
        steps = np.repeat(units * (16 if plan.bits == 4 else 1), product.span, axis=-1)
        found *= steps
    norm = {QKV: layer.norms[0], UP: layer.norms[1], OUT: None}[which]
    wanted = jnp.asarray(x) if norm is None else normalise(jnp.asarray(x), norm)
    return plan, product, found, np.asarray(wanted, np.float32), steps


@settings(max_examples=60)
@given(
    bits=st.sampled_from([4, 8]),
    values=st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20),
    power=st.integers(-20, 20),
    odd=st.sampled_from([None, None, np.nan, np.inf]),
)
def test_fixed_point_rounds_by_half_a_unit_at_most(bits, values, power, odd):
    """Of each chunk's own unit, and of a chunk that is not finite nothing finite comes."""
    plan = SimpleNamespace(bits=bits, runs=4 if bits == 4 else 2, kind="bf16")
    size, o = 32 * plan.runs, Emulated(1, 1024, 32)
    x = np.resize(np.asarray(values, np.float32) * np.float32(2.0**power), (32, 8))
    x[:1] *= 0
    if odd is not None:
        x[-1, 3] = odd
    with np.errstate(invalid="ignore", over="ignore"):
        high, low, unit = _fixed(o, plan, [x[None, :, i] for i in range(8)])
    found = [np.stack(words, -1).view(np.int8)[0].astype(np.float64) for words in (high, low)]
    whole = np.empty((32, 8))
    whole[:, (0, 2, 4, 6, 1, 3, 5, 7) if bits == 4 else range(8)] = found[0] * 256 + found[1]
    steps = unit[0].astype(np.float64)[:, None] * (16 if bits == 4 else 1)
    with np.errstate(invalid="ignore"):
        chunks = [array.reshape(-1, size) for array in (x.astype(np.float64), whole * steps, steps.repeat(8, -1))]
    for number, (wanted, got, step) in enumerate(zip(*chunks, strict=True)):
        assert (step == step[0]).all() or np.isnan(step).all()
        if odd is not None and number == len(chunks[0]) - 1:
            assert not np.isfinite(step[0])
        elif np.abs(wanted).max() > LEAST:
            assert np.abs(got - wanted).max() <= 0.501 * step[0]
            assert step[0] <= np.abs(wanted).max() / 32000
        else:
            np.testing.assert_array_equal(got, 0)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("which", [QKV, OUT, UP])
def test_rows_are_normalised_and_filled_up_with_zeros(name, which):
    plan, product, found, wanted, steps = staged(SMALL[name], which)
    np.testing.assert_array_equal(found[:, product.inputs :], 0)
    # One unit in the last place: the mean square is summed in another order. Of fixed point half of one of its own.
    step = 2.0 ** (-7 if plan.kind == "bf16" else -10)
    most = 1e-6 if steps is None else 0.51 * steps[:, : product.inputs].max()
    np.testing.assert_allclose(found[:, : product.inputs], wanted, rtol=step, atol=most)


@pytest.mark.parametrize("name", ["plain", "layer norms, biases, no rotation"])
@pytest.mark.parametrize("blocks", [1, 3, 40])
def test_the_vectors_of_the_next_norms_are_asked_for_once(name, blocks):
    """Of this layer's second half and the next layer's first; the last layer, which has none, asks for its own."""
    arguments, rotary = operands(SMALL[name], layers=2)
    plan = dataclasses.replace(plan_of(*arguments[:4], rotary=rotary, **static(SMALL[name])), blocks=blocks)
    o = Emulated(blocks, plan.shared + 16384, THREADS)
    ref = {parameter: [0, 0] for parameter in plan.parameters}
    vectors = [parameter for parameter in plan.parameters if parameter.endswith(("_scale", "_shift"))]
    for parameter in vectors:
        ref[parameter] = [o.place(np.zeros(plan.hidden, np.uint16)) for _ in range(2)]
    memory = Memory(o, plan, ref, places(o, plan, o.reserve(plan.shared)))
    for layer in range(2):
        asked = []
        o.prefetch = lambda address, asked=asked: asked.extend(address[o.active].tolist())
        memory.layer = o.constant(layer)
        fetch(o, plan, memory)
        starts = [ref[parameter][layer if parameter.startswith("up") else 1] for parameter in vectors]
        assert sorted(asked) == sorted(start + byte for start in starts for byte in range(0, 2 * plan.hidden, 128))
