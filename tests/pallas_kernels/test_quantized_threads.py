"""The kernel for quantized weights: every instruction of a thread, in numpy."""

from __future__ import annotations

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.quantized_plan import Plan
from pallas_kernels.quantized_threads import Fetch, Place, collect, entries, fill, multiply, stage_x
from pallas_kernels.skinny_gemm import InputNorm, normalise
from tests.pallas_kernels.emulated import KINDS, Emulated

EMULATED = {
    "int8": {"m": 1, "n": 32, "k": 512},
    "int8, ragged": {"m": 3, "n": 40, "k": 1104, "rows": 32, "stages": 3},
    "int8, float16": {"m": 2, "n": 16, "k": 1056, "kind": "f16", "norm": "rms"},
    "int8, split": {"m": 8, "n": 64, "k": 1616, "rows": 64, "splits": 4, "norm": "layer"},
    "int8, gated": {"m": 11, "n": 32, "k": 320, "parts": 2, "rows": 16, "norm": "rms"},
    "fp8": {"m": 1, "n": 32, "k": 272, "weight": "float8_e4m3fn", "norm": "rms"},
    "fp8, float16": {"m": 5, "n": 32, "k": 256, "weight": "float8_e4m3fn", "kind": "f16"},
    "int4": {"m": 1, "n": 32, "k": 1024, "weight": "int4", "group": 128, "norm": "rms"},
    "int4, groups of 64": {"m": 9, "n": 48, "k": 832, "weight": "int4", "group": 64, "rows": 32, "splits": 2},
    "int4, gated": {"m": 4, "n": 24, "k": 640, "weight": "int4", "group": 128, "parts": 2, "norm": "layer"},
    "int4, float16": {"m": 2, "n": 16, "k": 384, "weight": "int4", "group": 64, "kind": "f16"},
}  # fmt: skip


def emulate(plan, norm, x, weight, factors):
    """The product [parts, m, n] before its factors of channels, in float32."""
    out = np.full((plan.parts, plan.m, plan.n), np.nan, np.float32)
    for tile in range(-(-plan.n // plan.rows)):
        o = Emulated(plan.splits, 2 * plan.shared + 16384)
        bits = np.asarray(weight)
        if plan.bits == 4:
            low, high = (bits.astype(np.int8)[..., i::2].view(np.uint8) & 15 for i in range(2))
            bits = low | high << 4
        ring, staged, sums, scratch = map(
            o.reserve, (plan.stages * plan.stage, plan.m * plan.x_line, plan.sums, 8 * 4 * plan.m)
        )
        x_at, weight_at, factors_at = o.place(x), o.place(bits), o.place(np.asarray(factors))
        vectors = [
            None if norm is None or array is None else o.place(np.asarray(array))
            for array in (getattr(norm, "scale", None), getattr(norm, "bias", None))
        ]
        split = o.constant(0) + np.arange(plan.splits, dtype=np.uint32)[:, None]
        place = Place.of(o, plan, o.constant(tile), split)
        fetch = Fetch(o, plan, place, weight_at, factors_at, ring)
        fill(o, fetch)
        stage_x(o, plan, place, norm, x_at, *vectors, staged, scratch)
        multiply(o, plan, fetch, staged, sums)
        for part, values in enumerate(collect(o, plan, sums)):
            for (token, row), value in zip(entries(o, plan), values, strict=True):
                own = token[0] < plan.m
                out[part, token[0][own], (place.channel + row)[0][own]] = value[0][own]
    return out


@pytest.mark.parametrize("name", EMULATED)
def test_threads_compute_the_product(name):
    given = {"parts": 1, "weight": "int8", "kind": "bf16", "group": 0, "rows": 16, "stages": 2, "splits": 1}
    given |= EMULATED[name]
    kind = given.pop("norm", None)
    plan = Plan(**given)
    rng = np.random.default_rng(plan.k)
    dtype = KINDS[plan.kind]
    x = (rng.standard_normal((plan.m, plan.k)) + 0.5).astype(dtype)
    shape = (plan.parts, plan.n, plan.k)
    if plan.bits == 4:
        weight = rng.integers(-8, 8, shape).astype(ml_dtypes.int4)
    elif plan.weight == "int8":
        weight = rng.integers(-128, 128, shape).astype(np.int8)
    else:
        weight = rng.integers(0, 256, shape).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
        weight = np.where(np.isnan(weight.astype(np.float32)), np.zeros((), weight.dtype), weight)
    factors = rng.uniform(0.5, 1.5, (plan.parts, plan.k // plan.group, plan.n) if plan.group else (1,))
    norm, h = None, x
    if kind:
        scale, shift = (rng.standard_normal(plan.k).astype(dtype) for _ in range(2))
        norm = InputNorm(kind=kind, eps=1e-5, scale=jnp.asarray(scale), unit_offset=kind == "rms",
                         bias=jnp.asarray(shift) if kind == "layer" else None)  # fmt: skip
        h = np.asarray(normalise(jnp.asarray(x), norm))
    got = emulate(plan, norm, x, weight, factors.astype(np.float32))
    wide = weight.astype(np.float64)
    if plan.group:
        wide = wide * np.repeat(np.moveaxis(factors, 1, 2), plan.group, axis=2)
    wanted = np.einsum("mk,pnk->pmn", h.astype(np.float64), wide)
    # Sums are float32; a normalised value may be rounded the other way.
    bound = 1e-6 if norm is None else 2e-3
    assert np.abs(got - wanted).max() < bound * np.abs(wanted).max()
