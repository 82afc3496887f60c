"""The Hopper kernel of query, key and value: interpreted on the CPU, and what ptxas says of it."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pallas_kernels.qkv_gemm import Tuning, qkv_gemm
from pallas_kernels.skinny_gemm import InputNorm
from tests import aot, interpreted
from tests.pallas_kernels import qkv_gemm_cases
from tests.pallas_kernels.test_qkv_gemm import angles, exact, operands
from tests.pallas_kernels.textbook import array

SMALL = {"tile_k": 64, "stages": 2}

# batch, tokens, groups, query heads of each, head size, K
INTERPRETED = {
    "one row": {"sizes": (1, 1, 2, 1, 128, 128), "rotary": True, "norm": "rms"},
    "several query heads": {"sizes": (3, 1, 2, 3, 128, 192), "rotary": True, "norm": "rms"},
    "several tokens": {"sizes": (2, 3, 1, 2, 128, 128), "rotary": True},
    "heads of 256": {"sizes": (9, 1, 1, 1, 256, 128), "rotary": True, "norm": "rms", "bias": True},
    "whole heads of 256": {"sizes": (2, 1, 1, 1, 256, 128), "tuning": {"rows": 128}, "rotary": True},
    "not rotated": {"sizes": (4, 1, 3, 1, 128, 128), "norm": "layer", "bias": True},
    "not rotated, wide": {"sizes": (4, 1, 1, 2, 128, 128), "tuning": {"rows": 128}, "bias": True},
    "heads of 64": {"sizes": (5, 1, 3, 2, 64, 192), "norm": "layer", "bias": True},
    "norm apart": {"sizes": (4, 1, 1, 1, 128, 144), "norm": "layer", "rotary": True},
    "int8": {"sizes": (2, 1, 2, 2, 128, 160), "norm": "rms", "rotary": True, "bias": True, "weight": "int8"},
    "fp8": {"sizes": (2, 1, 2, 2, 64, 128), "weight": "fp8"},
    "int4": {"sizes": (2, 1, 1, 2, 128, 256), "norm": "rms", "rotary": True, "weight": "int4"},
    "int4, heads of 256": {"sizes": (2, 1, 1, 1, 256, 256), "rotary": True, "weight": "int4",
                           "tuning": {"tile_k": 128}},
    "float16": {"sizes": (4, 1, 1, 1, 128, 128), "norm": "rms", "rotary": True, "dtype": "float16"},
    "64 rows": {"sizes": (64, 1, 1, 1, 128, 128), "norm": "rms", "rotary": True},
}  # fmt: skip


def compare(given_, rest, tuning):
    """Errors of the interpreted kernel, relative to the largest entry; fails where an entry of another row changed."""
    query, cache = qkv_gemm(**given_, **rest, implementation="mosaic", interpret=True, tuning=tuning)
    wanted, blocks = exact(**given_, **rest)
    assert query.dtype == given_["x"].dtype
    errors = [np.abs(np.asarray(query, np.float64) - wanted).max() / np.abs(wanted).max()]
    for found, want, before in zip(cache, blocks, given_["cache"], strict=True):
        found, before = (np.asarray(a.astype(jnp.float32), np.float64) for a in (found, before))
        # Written rows are whole rows of heads that differ from the pattern everywhere that matters.
        written = np.zeros(before.shape[:3], bool)
        for row, places in zip(given_["tables"], given_["positions"], strict=True):
            for place in (int(p) for p in places if p >= 0):
                written[int(row[place // 64]), :, place % 64] = True
        np.testing.assert_array_equal(found[~written], before[~written])
        if written.any():
            errors.append(np.abs(found[written] - want[written]).max() / np.abs(want[written]).max())
    return max(errors)


def interpret(sizes, *, tuning=None, norm=None, rotary=False, bias=False, weight=None, dtype="bfloat16"):
    """The largest error of a case."""
    rng = np.random.default_rng(sum(sizes))
    batch, tokens, groups, per_group, dim, k = sizes
    given_, rest = operands(rng, *sizes, dtype=jnp.dtype(dtype)), {}
    if batch > 1:
        given_["positions"] = given_["positions"].at[1].set(-1)
    channels = (groups, per_group + 2, dim)
    if weight:
        top = {"int4": 7, "int8": 127, "fp8": 448}[weight]
        kept = qkv_gemm_cases.NARROW[weight]
        given_["weight"] = jnp.asarray(rng.uniform(-top, top, (*channels, k)), jnp.float32).astype(kept)
        scale = ((k // 64,) if weight == "int4" else ()) + channels
        rest["weight_scale"] = jnp.asarray(rng.uniform(0.5, 1.5, scale) / (6 * top), jnp.float32)
    if norm:
        scale, shift = (array(rng, k, dtype=jnp.dtype(dtype)) for _ in range(2))
        rest["norm"] = InputNorm(kind=norm, eps=1e-5, scale=scale, bias=shift if norm == "layer" else None)
    if bias:
        rest["bias"] = array(rng, *channels, dtype=jnp.dtype(dtype))
    if rotary:
        rest["rotary"] = angles(rng, batch, tokens, dim)
    return compare(given_, rest, Tuning(**SMALL | (tuning or {})))


# Few, since each is a second; every shape is compiled once.
@settings(max_examples=12, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**32 - 1),
    places=st.lists(st.one_of(st.just(-1), st.integers(0, 191)), min_size=5, max_size=5),
    rotary=st.booleans(),
)
def fuzz(seed, places, rotary):
    rng = np.random.default_rng(seed)
    given_ = operands(rng, 5, 1, 2, 1, 128, 64, dtype=jnp.bfloat16, width=3, blocks=17)
    given_["positions"] = jnp.asarray(places, jnp.int32)[:, None]
    rest = {"rotary": angles(rng, 5, 1, 128)} if rotary else {}
    assert compare(given_, rest, Tuning(**SMALL)) < 2.0**-7


def run_case(name):
    return fuzz() or "held" if name == "fuzz" else str(interpret(**INTERPRETED[name]))


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernel_is_exact_to_rounding(name):
    # The result is rounded once, x once before the product: bfloat16 has 8 bits.
    assert float(interpreted.result(__name__, INTERPRETED, name)) < 2.0**-7


def test_a_token_is_written_to_its_own_row_and_nowhere_else():
    assert interpreted.result(__name__, ["fuzz"], "fuzz") == "held"


@pytest.fixture(scope="session")
def compiled():
    why = aot.missing()
    if why:
        pytest.skip(why)
    return aot.compile_cases("tests.pallas_kernels.qkv_gemm_cases", list(qkv_gemm_cases.CASES))


@pytest.mark.parametrize("name", qkv_gemm_cases.CASES)
def test_compiles_for_hopper_without_spills(name, compiled):
    report = compiled[name]
    assert report.error is None
    assert report.registers, "no kernel of ours was compiled"
    assert report.spilled == 0
    assert not report.serialized, "ptxas serialized the wgmma pipeline"
