"""The kernel of the skinny GEMM in which a warpgroup fetches: interpreted, compiled, and what it refuses."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.qkv_gemm import qkv_gemm
from pallas_kernels.skinny_gemm import (
    CONSUMERS,
    MAX_STREAMED_ROWS,
    SMEM_PER_SM,
    SMS,
    Tuning,
    shared_bytes,
    skinny_gemm,
    streamed_rows,
    streamed_tuning,
)
from tests import aot, interpreted
from tests.pallas_kernels import skinny_gemm_cases
from tests.pallas_kernels.test_skinny_gemm_mosaic import interpret

SMALL = {"tile_k": 64, "stages": 2, "consumers": 2}
# As for the other kernel. Channels for one warpgroup, for both of some blocks, and for more than two blocks that share
# x; interpret mode has no shared memory of other blocks, so K is never split.
INTERPRETED = {
    "plain": {"m": 8, "n": 128, "k": 256, "tuning": SMALL},
    "one of two": {"m": 17, "n": 64, "k": 128, "bias": True, "residual": True, "tuning": SMALL},
    "ragged": {"m": 24, "n": 200, "k": 208, "bias": True, "residual": True, "activation": "relu",
               "tuning": SMALL | {"stages": 3}},
    "long ring": {"m": 64, "n": 128, "k": 192, "norm": "layer", "shift": True, "tuning": SMALL | {"stages": 6}},
    "gated, shared": {"m": 40, "n": 256, "k": 320, "gated": True, "activation": "silu", "norm": "rms",
                      "tuning": SMALL | {"sharing": 2}},
    "shared by more than there are": {"m": 33, "n": 136, "k": 192, "residual": True, "tuning": SMALL | {"sharing": 4}},
    "most rows, float16": {"m": 128, "n": 72, "k": 128, "bias": True, "gated": True, "activation": "gelu",
                           "dtype": "float16", "tuning": SMALL},
}  # fmt: skip


def run_case(name: str) -> str:
    return str(interpret(**INTERPRETED[name]))


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernel_is_exact_to_rounding(name: str):
    assert float(interpreted.result(__name__, INTERPRETED, name)) < 2.0**-7


@pytest.fixture(scope="session")
def compiled() -> dict[str, aot.Report]:
    why = aot.missing()
    if why:
        pytest.skip(why)
    return aot.compile_cases("tests.pallas_kernels.skinny_gemm_cases", list(skinny_gemm_cases.STREAMED))


@pytest.mark.parametrize("name", skinny_gemm_cases.STREAMED)
def test_compiles_for_hopper_without_spills(name: str, compiled: dict[str, aot.Report]):
    report = compiled[name]
    assert report.error is None
    assert report.registers, "no kernel of ours was compiled"
    assert report.spilled == 0
    assert not report.serialized, "ptxas serialized the wgmma pipeline"


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("k", [64, 768, 4096, 16384])
@pytest.mark.parametrize("n", [64, 1000, 4096, 50272])
def test_tunings_fit_an_sm(n: int, k: int, gated: bool):
    for rows in (17, 64, 100, MAX_STREAMED_ROWS):
        tuning = streamed_tuning(rows, n, k, gated=gated)
        assert shared_bytes(tuning, rows, gated) <= SMEM_PER_SM - 1024
        assert tuning.stages >= 2
        assert tuning.splits <= -(-k // tuning.tile_k)
        assert tuning.splits * tuning.sharing <= 8
        assert tuning.splits == 1 or -(-n // (64 * CONSUMERS)) * tuning.splits <= SMS


def test_tokens_are_whole_tiles_for_every_split():
    for rows, splits in itertools.product(range(1, MAX_STREAMED_ROWS + 1), range(1, 5)):
        tokens = streamed_rows(rows, splits)
        assert rows <= tokens < rows + 8 * splits
        assert tokens % (8 * splits) == 0


@pytest.mark.parametrize(
    ("change", "rows", "dtype", "message"),
    [
        ({"consumers": 3}, 8, jnp.bfloat16, "consumers must be 1, or 2"),
        ({"consumers": 1, "sharing": 2}, 8, jnp.bfloat16, "consumers must be 1, or 2"),
        ({"rows": 128}, 8, jnp.bfloat16, "rows must be 64"),
        ({"splits": 4, "sharing": 4}, 8, jnp.bfloat16, "sharing at most 8 / splits"),
        ({"stages": 40}, 8, jnp.bfloat16, "more shared memory than an SM has"),
        ({}, 129, jnp.bfloat16, "it runs 1 to 128 rows"),
        ({}, 8, jnp.int8, "cannot run x of bfloat16 with a weight of int8"),
    ],
)
def test_what_it_cannot_run_is_refused(change: dict, rows: int, dtype: jnp.dtype, message: str):
    tuning = Tuning(**{"tile_k": 64, "stages": 2, "consumers": 2} | change)
    scale = jnp.ones(128, jnp.float32) if dtype == jnp.int8 else None
    run = functools.partial(skinny_gemm, implementation="mosaic", tuning=tuning)
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(
            lambda x, w: run(x, w, weight_scale=scale),
            jax.ShapeDtypeStruct((rows, 1024), jnp.bfloat16),
            jax.ShapeDtypeStruct((128, 1024), dtype),
        )


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        ({"splits": 2}, jnp.bfloat16, "with consumers K is not split"),
        ({"sharing": 16}, jnp.bfloat16, "sharing at most 8 / splits"),
        ({}, jnp.int8, "a weight of int8 has one consumer"),
    ],
)
def test_query_key_and_value_refuse_it_too(change: dict, dtype: jnp.dtype, message: str):
    tuning = Tuning(**{"tile_k": 64, "stages": 2, "consumers": 2} | change)
    blocks, ints = jax.ShapeDtypeStruct((3, 2, 64, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    scale = jnp.ones((2, 3, 128), jnp.float32) if dtype == jnp.int8 else None
    run = functools.partial(qkv_gemm, weight_scale=scale, implementation="mosaic", tuning=tuning)
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(
            lambda x, w, k, v, t, p: run(x, w, (k, v), t, p),
            jax.ShapeDtypeStruct((1, 1, 256), jnp.bfloat16), jax.ShapeDtypeStruct((2, 3, 128, 256), dtype),
            blocks, blocks, ints, ints,
        )  # fmt: skip
