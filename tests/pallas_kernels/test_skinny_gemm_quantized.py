"""Who gets the kernel for quantized weights. What ptxas says of it is in the tests of the other kernel."""

from __future__ import annotations

import jax
import pytest

from pallas_kernels.skinny_gemm import Tuning
from tests.pallas_kernels import skinny_gemm_cases

OWN = "skinny_gemm_quantized"


@pytest.mark.parametrize("weights", [{"int8": True}, {"int4": 64}, {"fp8": True}], ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", [1, 8])
def test_few_rows_with_a_quantized_weight_have_their_own_kernel(rows, dtype, weights):
    for gated, norm in ((True, "rms+scale"), (False, "layer+scale+bias")):
        run, shapes = skinny_gemm_cases.case(
            rows, 64, 512, gated=gated, norm=norm, bias=True, activation="silu", residual=True, dtype=dtype, **weights
        )
        jaxpr = jax.make_jaxpr(run)(*shapes)
        assert f"name={OWN}" in str(jaxpr)
        assert [(out.shape, out.dtype) for out in jaxpr.out_avals] == [((rows, 64), dtype)]


@pytest.mark.parametrize(
    "given",
    [{"m": 9, "int8": True}, {"m": 1}, {"m": 1, "int8": True, "tuning": Tuning()}, {"m": 1, "n": 8, "int8": True}],
    ids=str,
)
def test_more_rows_other_weights_and_a_tuning_keep_the_other(given):
    run, shapes = skinny_gemm_cases.case(**{"n": 64, "k": 512} | given)
    assert OWN not in str(jax.make_jaxpr(run)(*shapes))


def test_layers_of_a_model_share_one_kernel():
    run, shapes = skinny_gemm_cases.case(1, 512, 512, int8=True)
    lowered = jax.jit(lambda x, *rest: run(run(run(x, *rest), *rest), *rest)).trace(*shapes)
    inner = {id(e.params["jaxpr"]) for e in lowered.jaxpr.eqns if e.primitive.name in ("jit", "pjit")}
    assert len(inner) == 1
