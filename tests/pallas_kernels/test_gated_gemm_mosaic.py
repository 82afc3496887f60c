"""The Hopper kernel of gated products of many rows: interpreted on the CPU, and what ptxas says of it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_gemm import GatedConfig, gated_gemm
from tests import aot, interpreted
from tests.pallas_kernels import gated_gemm_cases
from tests.pallas_kernels.textbook import array, exact

# Rows, channels and inputs that fill no tile, rings longer and shorter than the loop, programs with several tiles.
INTERPRETED: dict[str, dict[str, Any]] = {
    "one tile": {"m": 128, "n": 128, "k": 128, "cluster": 1},
    "short ring": {"m": 256, "n": 64, "k": 320, "stages": 2, "activation": "gelu_tanh"},
    "ragged": {"m": 301, "n": 208, "k": 192, "programs": 1, "group": 1, "activation": "silu"},
    "narrow steps, one ahead": {
        "m": 520, "n": 272, "k": 128, "programs": 2, "group": 2, "lead": 1, "tile_k": 32, "stages": 3,
        "activation": "silu",
    },
    "fewer steps than stages": {"m": 9, "n": 16, "k": 64, "lead": 2, "activation": "relu"},
    "float16": {"m": 136, "n": 144, "k": 64, "dtype": "float16", "cluster": 1, "programs": 1, "activation": "silu"},
}  # fmt: skip


def interpret(m: int, n: int, k: int, activation: Any = None, dtype: str = "bfloat16", **config: Any) -> float:
    """The largest error of the interpreted kernel, in units of the largest result."""
    rng = np.random.default_rng(m * n + k)
    x = array(rng, m, k, dtype=jnp.dtype(dtype))
    weight = array(rng, 2, n, k, dtype=jnp.dtype(dtype)) * jnp.asarray(k**-0.5, dtype)
    y = gated_gemm(
        x, weight, activation=activation, implementation="mosaic", config=GatedConfig(**config), interpret=True
    )
    assert y.shape == (m, n)
    assert y.dtype == x.dtype
    z = exact(x, weight, activation=activation)
    return float(np.abs(np.asarray(y, np.float64) - z).max() / np.abs(z).max())


def run_case(name: str) -> str:
    return str(interpret(**INTERPRETED[name]))


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernel_is_exact_to_rounding(name: str):
    # The result is rounded once: bfloat16 has 8 bits.
    assert float(interpreted.result(__name__, INTERPRETED, name)) < 2.0**-8


@pytest.fixture(scope="session")
def compiled() -> dict[str, aot.Report]:
    why = aot.missing()
    if why:
        pytest.skip(why)
    return aot.compile_cases("tests.pallas_kernels.gated_gemm_cases", list(gated_gemm_cases.CASES))


@pytest.mark.parametrize("name", gated_gemm_cases.CASES)
def test_compiles_for_hopper_without_spills(name: str, compiled: dict[str, aot.Report]):
    report = compiled[name]
    assert report.error is None
    assert report.registers, "no kernel of ours was compiled"
    assert report.spilled == 0
    assert not report.serialized, "ptxas serialized the wgmma pipeline"
