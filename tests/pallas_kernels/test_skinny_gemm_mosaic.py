"""The Hopper kernel of the skinny GEMM: interpreted on the CPU, and what ptxas says of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.skinny_gemm import InputNorm, Tuning, skinny_gemm
from tests import aot, interpreted
from tests.pallas_kernels import skinny_gemm_cases
from tests.pallas_kernels.textbook import array, exact

# Small, since interpret mode takes a fraction of a second a tile. Rows and channels that fill no tile, K that ends in
# the middle of one, splits that get different numbers of tiles, rings longer and shorter than the loop.
INTERPRETED = {
    "plain": {"m": 8, "n": 64, "k": 256, "tuning": {"tile_k": 64, "stages": 2}},
    "short ring": {"m": 8, "n": 64, "k": 320, "tuning": {"tile_k": 64, "stages": 2}},
    "long ring": {"m": 8, "n": 64, "k": 576, "norm": "layer", "shift": True, "residual": True,
                        "tuning": {"tile_k": 64, "stages": 6}},
    "ragged": {"m": 3, "n": 72, "k": 144, "tuning": {"tile_k": 64, "stages": 4}, "bias": True, "residual": True},
    "narrow": {"m": 1, "n": 56, "k": 32, "tuning": {"stages": 2}, "bias": True, "residual": True, "activation": "relu"},
    "odd": {"m": 3, "n": 75, "k": 128, "norm": "rms", "bias": True, "residual": True, "activation": "silu",
            "tuning": {"tile_k": 64, "stages": 2}},
    "odd int8": {"m": 1, "n": 69, "k": 144, "int8": True, "tuning": {"tile_k": 64, "stages": 2}},
    "odd int4": {"m": 1, "n": 69, "k": 128, "int4": 64, "bias": True, "tuning": {"tile_k": 64, "stages": 2}},
    "rms": {"m": 5, "n": 64, "k": 192, "norm": "rms", "tuning": {"tile_k": 64, "stages": 2}},
    "offset": {"m": 11, "n": 64, "k": 192, "norm": "rms", "unit_offset": True, "tuning": {"tile_k": 64, "stages": 4}},
    "bare layer": {"m": 2, "n": 64, "k": 192, "norm": "layer", "scale": False, "tuning": {"tile_k": 64, "stages": 4}},
    "layer": {"m": 8, "n": 128, "k": 320, "norm": "layer", "shift": True, "bias": True, "activation": "gelu_tanh",
              "tuning": {"rows": 128, "tile_k": 64, "stages": 2}},
    "norm apart": {"m": 8, "n": 64, "k": 208, "norm": "layer", "shift": True, "tuning": {"tile_k": 128, "stages": 2}},
    "large tiles": {"m": 2, "n": 64, "k": 640, "norm": "layer", "shift": True, "gated": True, "activation": "silu",
                    "tuning": {"tile_k": 256, "stages": 2}},
    "gated": {"m": 16, "n": 72, "k": 192, "norm": "rms", "gated": True, "activation": "silu",
              "tuning": {"tile_k": 64, "stages": 2}},
    "gated all": {"m": 4, "n": 64, "k": 128, "norm": "layer", "shift": True, "gated": True, "activation": "gelu",
                  "bias": True, "residual": True, "tuning": {"tile_k": 64, "stages": 2}},
    "split": {"m": 8, "n": 72, "k": 320, "bias": True, "residual": True, "activation": "quick_gelu",
              "tuning": {"tile_k": 64, "stages": 2, "splits": 2}},
    "split layer": {"m": 2, "n": 64, "k": 448, "norm": "layer", "shift": True, "gated": True, "activation": "silu",
                    "tuning": {"tile_k": 64, "stages": 2, "splits": 3}},
    "float16": {"m": 4, "n": 64, "k": 128, "norm": "rms", "dtype": "float16", "tuning": {"tile_k": 64, "stages": 2}},
    "int8": {"m": 4, "n": 72, "k": 160, "norm": "layer", "shift": True, "gated": True, "bias": True, "int8": True,
             "activation": "silu", "tuning": {"tile_k": 64, "stages": 2}},
    "int8 split": {"m": 4, "n": 64, "k": 256, "norm": "rms", "int8": True, "residual": True,
                   "tuning": {"tile_k": 64, "stages": 2, "splits": 2}},
    "fp8": {"m": 4, "n": 72, "k": 160, "norm": "rms", "gated": True, "bias": True, "fp8": True,
            "activation": "silu", "tuning": {"tile_k": 64, "stages": 2}},
    "int4": {"m": 4, "n": 72, "k": 192, "norm": "layer", "shift": True, "gated": True, "bias": True, "int4": 64,
             "activation": "silu", "tuning": {"tile_k": 64, "stages": 2}},
    "two groups a tile": {"m": 2, "n": 72, "k": 320, "int4": 64, "gated": True, "activation": "silu",
                          "tuning": {"tile_k": 128, "stages": 2}},
    "int4 split": {"m": 1, "n": 64, "k": 256, "norm": "rms", "int4": 64, "residual": True,
                   "tuning": {"tile_k": 64, "stages": 2, "splits": 2}},
    "64 rows": {"m": 64, "n": 64, "k": 128, "norm": "rms", "residual": True, "tuning": {"tile_k": 64, "stages": 2}},
}  # fmt: skip


def interpret(m, n, k, *, tuning, gated=False, norm=None, scale=True, shift=False, unit_offset=False, bias=False,
              activation=None, residual=False, int8=False, fp8=False, int4=0, dtype="bfloat16"):  # fmt: skip
    """The largest error of the interpreted kernel, in units of the largest result."""
    rng = np.random.default_rng(m * n + k)
    dtype = jnp.dtype(dtype)
    x = array(rng, m, k, dtype=dtype) + jnp.asarray(0.5, dtype)
    weight = array(rng, *([2] if gated else []), n, k, dtype=dtype) * jnp.asarray(k**-0.5, dtype)
    rest = {"activation": activation}
    if int8:
        weight = jnp.asarray(rng.integers(-127, 128, weight.shape), jnp.int8)
        rest["weight_scale"] = jnp.asarray(rng.uniform(0.5, 1.5, weight.shape[:-1]) / 1000, jnp.float32)
    if fp8:
        weight = (448 * jnp.asarray(rng.uniform(-1, 1, weight.shape), jnp.float32)).astype(jnp.float8_e4m3fn)
        rest["weight_scale"] = jnp.asarray(rng.uniform(0.5, 1.5, weight.shape[:-1]) / 3000, jnp.float32)
    if int4:
        weight = jnp.asarray(rng.integers(-8, 8, weight.shape), jnp.int4)
        scales = (*weight.shape[:-2], k // int4, n)
        rest["weight_scale"] = jnp.asarray(rng.uniform(0.5, 1.5, scales) / 60, jnp.float32)
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


def run_case(name):
    return str(interpret(**INTERPRETED[name]))


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernel_is_exact_to_rounding(name):
    # The result is rounded once, x once before the product: bfloat16 has 8 bits.
    assert float(interpreted.result(__name__, INTERPRETED, name)) < 2.0**-7


def equations(jaxpr):
    """The equations of a program and of the programs in it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "jaxpr") or hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_tokens_are_numbered_by_vectors():
    # Mosaic GPU numbers a matrix of a transposed layout wrongly, which interpret mode does not show.
    run, shapes = skinny_gemm_cases.CASES["gpt2-xl qkv"]()
    found = [e.params["shape"] for e in equations(jax.make_jaxpr(run)(*shapes).jaxpr) if e.primitive.name == "iota"]
    assert found
    assert {len(shape) for shape in found} == {1}


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
