"""How the kernel of quantized products divides its work."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.choices import MAX_QUANTIZED_ROWS
from pallas_kernels.quantized_plan import WARPS, plan_for
from pallas_kernels.skinny_gemm import SMEM_PER_SM, InputNorm


def planned(m, n, k, *, parts=1, weight="int8", group=0, dtype="bfloat16", **rest):
    f = jax.ShapeDtypeStruct
    factors = f((parts, k // group, n) if group else (parts, n), "float32")
    return plan_for(f((m, k), dtype), f((parts, n, k), weight), factors, **rest)


@pytest.mark.parametrize(
    ("rows", "n", "k", "parts", "weight", "wanted"),
    [
        (1, 12288, 4096, 1, "int8", (16, 6, 1)),
        (1, 4096, 4096, 1, "int8", (16, 16, 1)),
        (1, 11008, 4096, 2, "int8", (16, 6, 1)),
        (1, 4096, 11008, 1, "int8", (16, 16, 1)),
        (1, 12288, 4096, 1, "int4", (16, 6, 1)),
        (1, 11008, 4096, 2, "int4", (16, 6, 1)),
        (8, 12288, 4096, 1, "int8", (64, 3, 2)),
        (8, 4096, 4096, 1, "int8", (64, 3, 4)),
        (8, 11008, 4096, 2, "int8", (32, 3, 2)),
    ],
)
def test_a_7b_layer_is_divided_as_it_says(rows, n, k, parts, weight, wanted):
    plan = planned(rows, n, k, parts=parts, weight=weight, group=128 if weight == "int4" else 0)
    assert (plan.rows, plan.stages, plan.splits) == wanted


@given(
    st.integers(1, MAX_QUANTIZED_ROWS), st.integers(16, 40000), st.integers(1, 500), st.sampled_from([1, 2]),
    st.sampled_from(["int8", "int4", "float8_e4m3fn"]), st.sampled_from(["bfloat16", "float16"]),
)  # fmt: skip
def test_a_plan_fits_an_sm_and_covers_the_product(m, n, k, parts, weight, dtype):
    k *= 64 if weight == "int4" else 16
    plan = planned(m, n, k, parts=parts, weight=weight, group=64 if weight == "int4" else 0, dtype=dtype)
    if plan is None:
        assert k * m > 32768, "x alone does not fill an SM"
        return
    assert plan.shared <= SMEM_PER_SM - 1024
    assert plan.rows <= n
    assert plan.rows % 16 == 0
    assert plan.stages >= 1
    assert plan.tokens * plan.rows % 128 == 0
    assert plan.splits == 1 or plan.chunks >= WARPS * plan.splits
    assert plan.steps * WARPS * plan.splits >= plan.chunks


def test_what_the_kernel_does_not_run_has_no_plan():
    float32 = jnp.zeros(512, jnp.float32)
    assert planned(1, 64, 512) is not None
    assert planned(9, 64, 512) is None
    assert planned(0, 64, 512) is None
    assert planned(1, 8, 512) is None
    assert planned(1, 64, 512, weight="bfloat16") is None
    assert planned(1, 64, 512, dtype="float32") is None
    assert planned(1, 64, 520) is None, "a channel starts within 16 bytes"
    assert planned(1, 64, 512, norm=InputNorm(kind="rms", eps=1e-5, scale=float32)) is None
    assert planned(1, 512, 512, residual=float32[None]) is None
    assert planned(1, 512, 512, bias=float32) is not None
