"""The skinny GEMM: its reference, its refusals, the kernel in interpret mode, and what ptxas says of it."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.skinny_gemm import (
    SMEM_PER_SM,
    InputNorm,
    Tuning,
    activate,
    shared_bytes,
    skinny_gemm,
    tuning_for,
)
from tests import aot
from tests.pallas_kernels import skinny_gemm_cases

ROOT = Path(__file__).resolve().parents[2]


def array(rng, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def exact(x, weight, norm=None, bias=None, activation=None, residual=None, weight_scale=None):
    """The same product in float64 of numpy, by the textbook."""
    f = lambda a: np.asarray(a, np.float64)  # noqa: E731
    h = f(x)
    if norm is not None:
        if norm.kind == "layer":
            h = h - h.mean(-1, keepdims=True)
        h = h / np.sqrt((h * h).mean(-1, keepdims=True) + norm.eps)
        h = h * (f(norm.scale) + norm.unit_offset) if norm.scale is not None else h
        h = h + f(norm.bias) if norm.bias is not None else h
    weight = f(weight) if weight_scale is None else f(weight) * f(weight_scale)[..., None]
    parts = [h @ w.T for w in (weight if weight.ndim == 3 else weight[None])]
    if bias is not None:
        parts = [p + b for p, b in zip(parts, f(bias).reshape(len(parts), -1), strict=True)]
    y = parts[0] if activation is None else f(ACTIVATIONS[activation](jnp.asarray(parts[0], jnp.float32)))
    y = y * parts[1] if len(parts) == 2 else y
    return y if residual is None else y + f(residual)


ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


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


def test_a_scale_goes_with_int8():
    x, weight, scale = jnp.zeros((2, 64)), jnp.zeros((32, 64)), jnp.ones(32)
    refused(x, weight.astype(jnp.int8), "goes with a weight of int8; none with one of int8")
    refused(x, weight, "one with one of float32", weight_scale=scale)
    refused(x, weight.astype(jnp.int8), r"weight_scale must be \(32,\)", weight_scale=scale[:31])


def test_what_the_kernel_cannot_run_is_refused_and_says_what_runs():
    half = jnp.zeros((2, 64), jnp.bfloat16)
    weight = jnp.zeros((32, 64), jnp.bfloat16)
    runs = "1 to 64 rows, K a multiple of 16 .32 for int8., N of 8, x of bfloat16 or float16"
    refused(jnp.zeros((2, 64)), weight, f"'mosaic' cannot run x of float32.*{runs}", implementation="mosaic")
    refused(half, weight.astype(jnp.float16), f"weight of float16.*{runs}", implementation="mosaic")
    refused(jnp.zeros((65, 64), jnp.bfloat16), weight, rf"x \(65, 64\).*{runs}", implementation="mosaic")
    refused(half[:, :56], weight[:, :56], rf"x \(2, 56\).*{runs}", implementation="mosaic")
    refused(half, weight[:31], rf"weight \(31, 64\).*{runs}", implementation="mosaic")
    refused(half, weight, "'triton' is none of 'mosaic', 'reference'", implementation="triton")
    refused(half, weight, "multiples of 64", implementation="mosaic", tuning=Tuning(rows=96))
    refused(half, weight, "at most one for each tile", implementation="mosaic", tuning=Tuning(splits=4))
    refused(half, weight, "more shared memory", implementation="mosaic", tuning=Tuning(stages=40))


def test_reference_takes_int8():
    rng = np.random.default_rng(0)
    x, scale = array(rng, 5, 48, dtype=jnp.float32), array(rng, 2, 30, dtype=jnp.float32)
    weight = jnp.asarray(rng.integers(-127, 128, (2, 30, 48)), jnp.int8)
    y = skinny_gemm(x, weight, activation="silu", weight_scale=scale)
    wanted = exact(x, weight, activation="silu", weight_scale=scale)
    np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("k", [64, 768, 1600, 4096, 11008])
@pytest.mark.parametrize("n", [64, 1000, 4096, 50272])
def test_tunings_fit_an_sm(n, k, gated):
    norm = InputNorm(kind="layer", eps=1e-5, bias=jnp.zeros(k))
    for rows, size in itertools.product((1, 8, 17, 64), (1, 2)):
        tuning = tuning_for(rows, n, k, gated=gated, norm=norm, weight_bytes=size)
        blocks = 1 if rows > 32 else 2
        assert blocks * (shared_bytes(tuning, rows, gated, norm=norm, weight_bytes=size) + 1024) <= SMEM_PER_SM
        assert tuning.stages >= 2
        assert tuning.splits <= -(-k // tuning.tile_k)


# Small, since interpret mode takes a fraction of a second a tile. Rows and channels that fill no tile, K that ends in
# the middle of one, splits that get different numbers of tiles, rings longer and shorter than the loop.
INTERPRETED = {
    "plain": {"m": 8, "n": 64, "k": 256, "tuning": {"tile_k": 64, "stages": 2}},
    "ragged": {"m": 3, "n": 72, "k": 144, "tuning": {"tile_k": 64, "stages": 4}, "bias": True, "residual": True},
    "narrow": {"m": 1, "n": 56, "k": 32, "tuning": {"stages": 2}, "bias": True, "residual": True, "activation": "relu"},
    "rms": {"m": 5, "n": 64, "k": 192, "norm": "rms", "tuning": {"tile_k": 64, "stages": 2}},
    "offset": {"m": 11, "n": 64, "k": 192, "norm": "rms", "unit_offset": True, "tuning": {"tile_k": 64, "stages": 3}},
    "bare layer": {"m": 2, "n": 64, "k": 192, "norm": "layer", "scale": False, "tuning": {"tile_k": 64, "stages": 3}},
    "layer": {"m": 8, "n": 128, "k": 208, "norm": "layer", "shift": True, "bias": True, "activation": "gelu_tanh",
              "tuning": {"rows": 128, "tile_k": 64, "stages": 2}},
    "gated": {"m": 16, "n": 72, "k": 192, "norm": "rms", "gated": True, "activation": "silu",
              "tuning": {"tile_k": 64, "stages": 2}},
    "gated all": {"m": 4, "n": 64, "k": 128, "norm": "layer", "shift": True, "gated": True, "activation": "gelu",
                  "bias": True, "residual": True, "tuning": {"tile_k": 64, "stages": 2}},
    "split": {"m": 8, "n": 72, "k": 320, "bias": True, "residual": True, "activation": "quick_gelu",
              "tuning": {"tile_k": 64, "stages": 2, "splits": 2}},
    "split layer": {"m": 2, "n": 64, "k": 208, "norm": "layer", "shift": True, "gated": True, "activation": "silu",
                    "tuning": {"tile_k": 64, "stages": 2, "splits": 3}},
    "float16": {"m": 4, "n": 64, "k": 128, "norm": "rms", "dtype": "float16", "tuning": {"tile_k": 64, "stages": 2}},
    "int8": {"m": 4, "n": 72, "k": 160, "norm": "layer", "shift": True, "gated": True, "bias": True, "int8": True,
             "activation": "silu", "tuning": {"tile_k": 64, "stages": 2}},
    "int8 split": {"m": 4, "n": 64, "k": 256, "norm": "rms", "int8": True, "residual": True,
                   "tuning": {"tile_k": 64, "stages": 2, "splits": 2}},
    "64 rows": {"m": 64, "n": 64, "k": 128, "norm": "rms", "residual": True, "tuning": {"tile_k": 64, "stages": 2}},
}  # fmt: skip


def interpret(m, n, k, *, tuning, gated=False, norm=None, scale=True, shift=False, unit_offset=False, bias=False,
              activation=None, residual=False, int8=False, dtype="bfloat16"):  # fmt: skip
    """The largest error of the interpreted kernel, in units of the largest result."""
    rng = np.random.default_rng(m * n + k)
    dtype = jnp.dtype(dtype)
    x = array(rng, m, k, dtype=dtype) + jnp.asarray(0.5, dtype)
    weight = array(rng, *([2] if gated else []), n, k, dtype=dtype) * jnp.asarray(k**-0.5, dtype)
    rest = {"activation": activation}
    if int8:
        weight = jnp.asarray(rng.integers(-127, 128, weight.shape), jnp.int8)
        rest["weight_scale"] = jnp.asarray(rng.uniform(0.5, 1.5, weight.shape[:-1]) / 1000, jnp.float32)
    if norm:
        rest["norm"] = InputNorm(
            kind=norm, eps=1e-5, unit_offset=unit_offset, scale=array(rng, k, dtype=dtype) if scale else None,
            bias=array(rng, k, dtype=dtype) if shift else None,
        )  # fmt: skip
    if bias:
        rest["bias"] = array(rng, *weight.shape[:-1], dtype=dtype)
    if residual:
        rest["residual"] = array(rng, m, n, dtype=dtype)
    y = skinny_gemm(x, weight, implementation="mosaic", interpret=True, tuning=Tuning(**tuning), **rest)
    assert y.shape == (m, n)
    assert y.dtype == dtype
    z = exact(x, weight, **rest)
    return float(np.abs(np.asarray(y, np.float64) - z).max() / np.abs(z).max())


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernel_is_exact_to_rounding(name):
    # In a process of its own: a thread of interpret mode that fails can leave the others waiting for ever.
    code = "import json, sys; from tests.pallas_kernels.test_skinny_gemm import *; "
    code += "print('error', interpret(**INTERPRETED[sys.argv[1]]))"
    ran = subprocess.run(
        [sys.executable, "-c", code, name], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr[-4000:]
    # The result is rounded once, x once before the product: bfloat16 has 8 bits.
    assert float(ran.stdout.split("error")[1]) < 2.0**-7, json.dumps(INTERPRETED[name])


@pytest.fixture(scope="session")
def compiled():
    why = aot.missing()
    if why:
        pytest.skip(why)
    return aot.compile_cases("tests.pallas_kernels.skinny_gemm_cases", list(skinny_gemm_cases.CASES))


@pytest.mark.parametrize("name", skinny_gemm_cases.CASES)
def test_compiles_for_hopper_without_spills(name, compiled):
    report = compiled[name]
    assert report.error is None
    assert report.registers, "no kernel of ours was compiled"
    assert report.spilled == 0
    assert not report.serialized, "ptxas serialized the wgmma pipeline"
