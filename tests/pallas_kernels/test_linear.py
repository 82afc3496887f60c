"""Products with a weight against numpy in float64, and what the kernel is handed."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from jaxinfer.models.config import ACTIVATIONS as NAMES
from pallas_kernels.choices import FUSED_NORMS, Device, compiling_for
from pallas_kernels.linear import ACTIVATIONS, linear
from pallas_kernels.skinny_gemm import InputNorm
from tests.pallas_kernels.textbook import exact

HOPPER = Device("gpu", "9.0")
K = 128


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_those_of_torch(name):
    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    wanted = ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[NAMES[name]](jnp.asarray(x)), wanted, atol=2e-6, rtol=2e-6)


def test_a_name_leads_to_every_activation():
    assert set(NAMES.values()) == set(ACTIVATIONS)


# outputs, gated, dtype of a quantized weight, norm, bias, activation, residual
CASES: dict[str, tuple[tuple[int, ...], bool, str, str, bool, str | None, bool]] = {
    "plain": ((24,), False, "", "", False, None, False),
    "everything": ((24,), False, "", "layer", True, "gelu", True),
    "gated": ((24,), True, "", "rms", True, "silu", True),
    "gated without activation": ((24,), True, "", "", False, None, False),
    "several axes": ((2, 3, 4), False, "", "rms", True, None, True),
    "several axes, gated": ((2, 12), True, "", "rms", True, "gelu_tanh", True),
    "int8": ((24,), False, "int8", "rms", True, "relu", True),
    "int8 gated": ((24,), True, "int8", "", False, "silu", False),
    "int8, several axes": ((2, 3, 4), False, "int8", "layer", True, None, False),
    "fp8": ((24,), False, "float8_e4m3fn", "", True, None, True),
    "int4": ((24,), False, "int4", "rms", True, "relu", True),
    "int4 gated": ((24,), True, "int4", "", True, "quick_gelu", False),
    "int4, several axes": ((2, 3, 4), False, "int4", "layer", False, None, True),
}


def operands(case: str, lead: tuple[int, ...], dtype: Any) -> tuple[dict[str, Any], np.ndarray]:
    """Arguments of :func:`linear`, and its result in float64 from the very numbers, as ``dtype`` has them."""
    outputs, gated, quantized, kind, biased, activation, residual = CASES[case]
    rng, halves = np.random.default_rng(0), (2,) if gated else ()

    def normal(*shape: int, size: float = 1.0) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape) * size, dtype)

    given: dict[str, Any] = {"x": normal(*lead, K), "activation": activation}
    if quantized:
        top = {"int8": 127, "int4": 7}.get(quantized, 400)
        given["weight"] = jnp.asarray(rng.integers(-top, top + 1, (*halves, *outputs, K))).astype(quantized)
        groups = (K // 64,) if quantized == "int4" else ()
        factors = rng.uniform(0.5, 1, (*halves, *groups, *outputs)) / (top * K**0.5)
        given["scale"] = jnp.asarray(factors, jnp.float32)
    else:
        groups, given["weight"] = (), normal(*halves, *outputs, K, size=K**-0.5)
    if kind:
        given["norm"] = InputNorm(
            kind=kind,  # type: ignore[arg-type]
            eps=1e-3, scale=normal(K), bias=normal(K) if kind == "layer" else None, unit_offset=kind == "rms",
        )  # fmt: skip
    if biased:
        given["bias"] = normal(*halves, *outputs)
    if residual:
        given["residual"] = normal(*lead, *outputs)
    flat = {"bias": halves, "residual": (-1,), "scale": (*halves, *groups), "weight": halves}
    book = {name: array for name, array in given.items()}
    for name, axes in flat.items():
        if name in book:
            book[name] = book[name].reshape(*axes, 24, *((K,) if name == "weight" else ()))
    book["weight_scale"] = book.pop("scale", None)
    wanted = exact(**book | {"x": given["x"].reshape(-1, K)}).reshape(*lead, *outputs)
    return given | {"gated": gated}, wanted


def error(got: jax.Array, wanted: np.ndarray) -> float:
    """Root mean square, as a share of that of the result."""
    return float(np.sqrt(np.mean((np.asarray(got, np.float64) - wanted) ** 2) / np.mean(wanted**2)))


@pytest.mark.parametrize("lead", [(1,), (2, 3), (70,)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_formula(case, lead):
    given, wanted = operands(case, lead, jnp.float32)
    got = linear(**given)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("case", CASES)
def test_in_16_bits(case, dtype):
    given, wanted = operands(case, (5,), dtype)
    got = linear(**given)
    assert got.dtype == dtype
    assert error(got, wanted) < (1e-2 if dtype == jnp.bfloat16 else 1.5e-3)


@pytest.fixture
def handed(monkeypatch):
    """Have the kernel's reference run in its place, and see what the kernel is handed."""
    module = importlib.import_module("pallas_kernels.linear")
    real, calls = module.skinny_gemm, []

    def stand_in(x, weight, *, implementation, **rest):
        assert implementation == "mosaic"
        calls.append({"x": x.shape, "weight": weight.shape, **rest})
        with compiling_for(Device("cpu")):  # which has no products of 16-bit numbers
            return real(x, weight, implementation="reference", **rest)

    monkeypatch.setattr(module, "skinny_gemm", stand_in)
    return calls


@pytest.mark.parametrize("lead", [(1,), (2, 3)], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case != "fp8"])
def test_the_kernel_is_handed_rows_and_one_axis_of_outputs(case, lead, handed):
    given, wanted = operands(case, lead, jnp.bfloat16)
    with compiling_for(HOPPER):
        got = linear(**given)
    (call,) = handed
    assert call["weight"] == ((2, 24, K) if given["gated"] else (24, K))
    assert (call["norm"] is not None) == (CASES[case][3] in FUSED_NORMS)
    assert got.shape == wanted.shape
    assert error(got, wanted) < 1e-2


def test_many_rows_are_left_to_xla(handed):
    given, _ = operands("plain", (65,), jnp.bfloat16)
    with compiling_for(HOPPER):
        text = str(jax.make_jaxpr(lambda: linear(**given))())
    assert "dot_general" in text
    assert handed == []


def test_xla_is_given_the_weight_as_it_is_stored():
    given, _ = operands("gated", (3,), jnp.bfloat16)
    text = str(jax.make_jaxpr(lambda weight: linear(**given | {"weight": weight}))(given["weight"]))
    assert text.count("dot_general") == 1
    assert "bf16[2,24,128] = transpose" not in text


def test_operands_that_do_not_fit_and_unknown_names_are_refused():
    x, weight = jnp.zeros((2, 16)), jnp.zeros((3, 16))
    with pytest.raises(ValueError, match="different K"):
        linear(x, jnp.zeros((3, 8)))
    with pytest.raises(ValueError, match=r"must be \[2, \*N, K\], got \(3, 16\)"):
        linear(x, weight, gated=True)
    with pytest.raises(ValueError, match="must be 'mosaic', 'dot' or None, got 'fast'"):
        linear(x, weight, implementation="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cannot run x of float32"):
        linear(x, weight, implementation="mosaic")
