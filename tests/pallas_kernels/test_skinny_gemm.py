"""The skinny GEMM: its reference, what it refuses, and how it divides the work."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.skinny_gemm import (
    SMEM_PER_SM,
    SMS,
    InputNorm,
    Tuning,
    activate,
    shared_bytes,
    skinny_gemm,
    tuning_for,
)
from tests.pallas_kernels.textbook import ACTIVATIONS, array, exact


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_jax(name):
    x = jnp.linspace(-12, 12, 4001)
    np.testing.assert_allclose(activate(x, name), ACTIVATIONS[name](x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", [None, "rms", "layer"])
def test_reference_is_the_textbook(gated, kind):
    rng = np.random.default_rng(0)
    x, weight = array(rng, 5, 48, dtype=jnp.float32), array(rng, *([2] if gated else []), 30, 48, dtype=jnp.float32)
    rest = {"bias": array(rng, *weight.shape[:-1], dtype=jnp.float32), "residual": array(rng, 5, 30, dtype=jnp.float32)}
    if kind:
        scale, bias = array(rng, 48, dtype=jnp.float32), array(rng, 48, dtype=jnp.float32)
        rest["norm"] = InputNorm(kind=kind, eps=1e-5, scale=scale, bias=bias, unit_offset=kind == "rms")
    y = skinny_gemm(x, weight, activation="gelu", **rest)
    np.testing.assert_allclose(y, exact(x, weight, activation="gelu", **rest), atol=2e-4, rtol=1e-4)


def refused(x, weight, match, **rest):
    with pytest.raises(ValueError, match=match):
        skinny_gemm(x, weight, **rest)


def test_operands_that_do_not_fit_are_refused():
    x, weight = jnp.zeros((2, 64)), jnp.zeros((32, 64))
    refused(x, jnp.zeros((3, 32, 64)), r"\[N, K\] or \[2, N, K\]")
    refused(x, jnp.zeros((32, 48)), "different K")
    refused(x, weight, r"bias must be \(32,\), got \(2, 32\)", bias=jnp.zeros((2, 32)))
    refused(x, weight, r"residual must be \(2, 32\)", residual=jnp.zeros((32, 2)))
    refused(x, weight, r"norm.scale must be \(64,\)", norm=InputNorm(kind="rms", eps=1e-5, scale=jnp.zeros(32)))


def test_a_scale_goes_with_a_quantized_weight():
    x, weight, scale = jnp.zeros((2, 128)), jnp.zeros((32, 128)), jnp.ones(32)
    refused(x, weight.astype(jnp.int8), "goes with a weight of int8, int4 or float8_e4m3fn; none with one of int8")
    refused(x, weight, "one with one of float32", weight_scale=scale)
    refused(x, weight.astype(jnp.int8), r"weight_scale must be \(32,\), got \(31,\)", weight_scale=scale[:31])
    int4 = weight.astype(jnp.int4)
    refused(x, int4, r"must be \(2, 32\) or \(1, 32\), got \(4, 32\)", weight_scale=jnp.ones((4, 32)))
    refused(x[:, :96], int4[:, :96], "groups of 64 or 128, which do not divide K", weight_scale=jnp.ones((3, 32)))
    half, two = x.astype(jnp.bfloat16), jnp.ones((2, 32))
    refused(half, int4, "group, 64", weight_scale=two, implementation="mosaic", tuning=Tuning(tile_k=32))


def test_what_the_kernel_cannot_run_is_refused_and_says_what_runs():
    half = jnp.zeros((2, 64), jnp.bfloat16)
    weight = jnp.zeros((32, 64), jnp.bfloat16)
    runs = "1 to 64 rows, K a multiple of 16, N of at least 8 and a multiple of 8 for a gated weight, x of bfloat16"
    refused(jnp.zeros((2, 64)), weight, f"'mosaic' cannot run x of float32.*{runs}", implementation="mosaic")
    refused(half, weight.astype(jnp.float16), f"weight of float16.*{runs}", implementation="mosaic")
    refused(jnp.zeros((65, 64), jnp.bfloat16), weight, rf"x \(65, 64\).*{runs}", implementation="mosaic")
    refused(half[:, :56], weight[:, :56], rf"x \(2, 56\).*{runs}", implementation="mosaic")
    refused(half, weight[:7], rf"weight \(7, 64\).*{runs}", implementation="mosaic")
    refused(half, jnp.stack([weight[:31]] * 2), rf"weight \(2, 31, 64\).*{runs}", implementation="mosaic")
    refused(half, weight, "'triton' is none of 'mosaic', 'reference'", implementation="triton")
    refused(half, weight, "multiples of 64", implementation="mosaic", tuning=Tuning(rows=96))
    refused(half, weight, "at most one for each tile", implementation="mosaic", tuning=Tuning(splits=4))
    refused(half, weight, "more shared memory", implementation="mosaic", tuning=Tuning(stages=40))


@pytest.mark.parametrize("halves", [(), (2,)])
@pytest.mark.parametrize("group", [None, 64, 128])
def test_reference_takes_quantized_weights(halves, group):
    rng = np.random.default_rng(0)
    x = array(rng, 5, 256, dtype=jnp.float32)
    kind, limit = (jnp.int4, 8) if group else (jnp.int8, 128)
    weight = jnp.asarray(rng.integers(-limit, limit, (*halves, 30, 256)), kind)
    scale = array(rng, *halves, *([256 // group] if group else []), 30, dtype=jnp.float32)
    y = skinny_gemm(x, weight, activation="silu", weight_scale=scale)
    wanted = exact(x, weight, activation="silu", weight_scale=scale)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("k", [64, 768, 1600, 4096, 11008])
@pytest.mark.parametrize("n", [64, 1000, 4096, 50272])
def test_tunings_fit_an_sm(n, k, gated):
    norm = InputNorm(kind="layer", eps=1e-5, bias=jnp.zeros(k))
    for rows, size in itertools.product((1, 8, 17, 64), (0.5, 1, 2)):
        tuning = tuning_for(rows, n, k, gated=gated, norm=norm, weight_bytes=size)
        alone = size == 2 and -(-n // tuning.rows) * tuning.splits <= SMS
        blocks = 1 if rows > 32 or alone else 2
        assert blocks * (shared_bytes(tuning, rows, gated, norm=norm, weight_bytes=size) + 1024) <= SMEM_PER_SM
        assert tuning.stages >= 2
        assert tuning.splits <= -(-k // tuning.tile_k)
