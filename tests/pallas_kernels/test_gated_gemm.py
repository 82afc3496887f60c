"""The gated product of many rows: its reference, what it refuses, and where a model gets it."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.choices import MIN_GATED_ROWS, Device, compiling_for, gated_problem, linear_choice
from pallas_kernels.gated_gemm import GatedConfig, gated_gemm
from pallas_kernels.linear import linear
from pallas_kernels.skinny_gemm import InputNorm
from tests.pallas_kernels.textbook import array, exact

HOPPER = Device("gpu", "9.0")


@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh", "quick_gelu", "relu"])
def test_reference_is_the_textbook(activation: Any):
    rng = np.random.default_rng(0)
    x, weight = array(rng, 5, 24, dtype=jnp.float32), array(rng, 2, 7, 24, dtype=jnp.float32)
    wanted = exact(x, weight, activation=activation)
    np.testing.assert_allclose(gated_gemm(x, weight, activation=activation), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        ((8, 64), (64, 64), "weight [2, N, K]"),
        ((8, 64), (3, 64, 64), "weight [2, N, K]"),
        ((8, 64), (2, 64, 32), "(2, 64, 32)"),
        ((8, 96), (2, 64, 96), "96 inputs, which 64 does not divide"),
        ((8, 64), (2, 60, 64), "60 outputs, which 16 does not divide"),
        ((0, 64), (2, 64, 64), "0 rows"),
    ],
)
def test_what_does_not_fit_is_refused(x: Any, weight: Any, message: str):
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (x, weight)]
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(lambda *a: gated_gemm(*a, implementation="mosaic"), *operands)


@pytest.mark.parametrize(
    "change",
    [{"tile_k": 16}, {"cluster": 3}, {"stages": 1}, {"lead": 3}, {"group": 0}, {"programs": 0}, {"stages": 5}],
)
def test_a_configuration_without_a_kernel_is_refused(change: dict[str, int]):
    operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 64), (2, 64, 64))]
    with pytest.raises(ValueError, match=re.escape(repr(GatedConfig(**change)))):
        jax.eval_shape(lambda *a: gated_gemm(*a, implementation="mosaic", config=GatedConfig(**change)), *operands)


def test_the_exact_gelu_is_left_to_xla():
    asked = {"rows": MIN_GATED_ROWS, "inputs": 64, "outputs": 64, "dtype": "bfloat16", "weight_dtype": "bfloat16"}
    assert linear_choice(HOPPER, **asked, gated=True, activation="gelu_tanh").implementation == "mosaic"
    chosen = linear_choice(HOPPER, **asked, gated=True, activation="gelu")
    assert chosen.implementation == "dot"
    assert "exact GELU" in chosen.reason
    with pytest.raises(ValueError, match="exact GELU"):
        gated_gemm(
            jnp.ones((8, 64), jnp.bfloat16),
            jnp.ones((2, 64, 64), jnp.bfloat16),
            activation="gelu",
            implementation="mosaic",
        )


def test_an_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="implementation 'cublas' is none of"):
        gated_gemm(jnp.ones((1, 64)), jnp.ones((2, 8, 64)), implementation="cublas")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("on", "rows", "outputs", "weight", "gated", "biased", "expected"),
    [
        (HOPPER, MIN_GATED_ROWS, 11008, "bfloat16", True, False, "mosaic"),
        (HOPPER, MIN_GATED_ROWS - 1, 11008, "bfloat16", True, False, "dot"),
        (HOPPER, MIN_GATED_ROWS, 11008, "bfloat16", False, False, "dot"),
        (HOPPER, MIN_GATED_ROWS, 11008, "bfloat16", True, True, "dot"),
        (HOPPER, MIN_GATED_ROWS, 11000, "bfloat16", True, False, "dot"),
        (HOPPER, MIN_GATED_ROWS, 11008, "int8", True, False, "dot"),
        (Device("gpu", "8.0"), MIN_GATED_ROWS, 11008, "bfloat16", True, False, "dot"),
    ],
)
def test_it_is_chosen_for_many_rows_where_it_runs(on, rows, outputs, weight, gated, biased, expected):
    chosen = linear_choice(
        on, rows=rows, inputs=4096, outputs=outputs, dtype="bfloat16", weight_dtype=weight, gated=gated, biased=biased
    )
    assert chosen.implementation == expected
    problem = gated_problem("bfloat16", weight, inputs=4096, outputs=outputs, biased=biased)
    if gated and on == HOPPER and rows >= MIN_GATED_ROWS:
        assert (problem is None) == (expected == "mosaic")
        assert problem is None or problem in chosen.reason


def test_a_product_of_many_rows_is_handed_to_it():
    """With norm and residual around it, and nothing of it for fewer rows."""
    norm = InputNorm(kind="rms", eps=1e-5)

    def program(rows: int) -> str:
        x, weight = jnp.zeros((2, rows // 2, 64), jnp.bfloat16), jnp.zeros((2, 4, 16, 64), jnp.bfloat16)
        residual = jnp.zeros((2, rows // 2, 4, 16), jnp.bfloat16)
        with compiling_for(HOPPER):
            run = lambda *a: linear(*a[:2], norm=norm, activation="silu", gated=True, residual=a[2])  # noqa: E731
            return str(jax.make_jaxpr(run)(x, weight, residual))

    assert "gated_gemm" in program(MIN_GATED_ROWS)
    assert "gated_gemm" not in program(MIN_GATED_ROWS - 2)


def test_a_bias_with_many_rows_is_refused_by_name():
    x, weight, bias = jnp.zeros((80, 64)), jnp.zeros((2, 8, 64)), jnp.zeros((2, 8))
    with pytest.raises(ValueError, match="does not run a bias with more than 64 rows"):
        linear(x, weight, bias=bias, gated=True, implementation="mosaic")
