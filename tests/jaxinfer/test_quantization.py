from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer import quantization
from jaxinfer.errors import ConfigError
from jaxinfer.quantization import Quantization, bits, check_method, dequantize, pack, quantize, unpack, wire_shape
from tests.wide import METHODS, rounded

FLOATS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def values_of(found: np.ndarray, method: str) -> np.ndarray:
    return np.asarray(unpack(jnp.asarray(found))) if method == "int4" else found


@given(
    method=st.sampled_from(METHODS),
    dtype=st.sampled_from(list(FLOATS)),
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    group=st.sampled_from([64, 128]),
    spread=st.integers(0, 6),
    seed=st.integers(0, 1 << 32),
)
@settings(max_examples=60)
def test_weights_come_back_as_a_float64_oracle_has_them(method, dtype, rows, groups, group, spread, seed):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((rows, groups * group)) * 2.0 ** rng.integers(-spread, spread + 1, (rows, 1))
    weight = weight.astype(FLOATS[dtype])
    size = group if method == "int4" else None
    found, scales = quantize(weight, method, size)
    assert found.shape == wire_shape(weight.shape, method)
    assert scales.dtype == np.float32
    how = Quantization(method, group=size)
    # Factors of rows [channels, groups] lie the other way round beside a weight.
    got = dequantize(values_of(found, method), scales.T if size else scales, how)
    np.testing.assert_allclose(got, rounded(weight, method, size), rtol=1e-6, atol=0)
    step = {"int8": 1 / 254, "int4": 1 / 14, "fp8": 16 / 448}[method]
    largest = np.abs(weight.astype(np.float64)).reshape(rows, -1, size or weight.shape[1]).max(-1, keepdims=True)
    error = np.abs(got - weight.astype(np.float64)).reshape(rows, -1, size or weight.shape[1])
    assert (error <= step * largest * (1 + 1e-5)).all()


def test_ties_go_to_even():
    row = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -126.5]], np.float32)
    assert quantize(row, "int8")[0].tolist() == [[127, 0, 2, 2, 0, -2, -126]]
    row = np.zeros((1, 64), np.float32)
    row[0, :5] = [7, 0.5, 1.5, -2.5, -6.5]
    assert values_of(quantize(row, "int4", 64)[0], "int4")[0, :5].astype(int).tolist() == [7, 0, 2, -2, -6]
    row = np.array([[448, 17, 19, -17, 2**-10, 3 * 2**-10]], np.float32)  # halfway, the last two between subnormals
    assert quantize(row, "fp8")[0].astype(float).tolist() == [[448, 16, 20, -16, 0, 2**-8]]


@given(st.lists(st.floats(-448, 448, width=32), min_size=1, max_size=200))
def test_fp8_rounds_as_ml_dtypes_does(numbers):
    values = np.array(numbers, np.float32)
    expected = values.astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(quantization._fp8(values).view(np.uint8), expected.view(np.uint8))


@pytest.mark.parametrize("method", METHODS)
def test_channels_of_zeros_and_of_the_smallest_numbers_stay_finite(method):
    rows = np.zeros((3, 64), np.float32)
    rows[1] = np.finfo(np.float32).smallest_subnormal
    rows[2] = np.finfo(np.float32).tiny
    found, scales = quantize(rows, method, 64 if method == "int4" else None)
    assert np.isfinite(scales).all()
    assert (scales >= np.finfo(np.float32).tiny).all()
    assert not values_of(found, method)[0].astype(np.float32).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_that_are_not_finite_are_refused(method, wrong, dtype):
    rows = np.ones((4, 128), FLOATS[dtype])
    rows[2, 77] = wrong
    with pytest.raises(ValueError, match="expected finite weights"):
        quantize(rows, method, 64 if method == "int4" else None)


@pytest.mark.parametrize("method", METHODS)
def test_a_channel_does_not_depend_on_those_beside_it(method, monkeypatch):
    rows = np.random.default_rng(0).standard_normal((33, 192)).astype(np.float32)
    group = 64 if method == "int4" else None
    together = quantize(rows, method, group)
    monkeypatch.setattr(quantization, "_BLOCK", 1)
    for got, expected in zip(quantize(rows, method, group), together, strict=True):
        np.testing.assert_array_equal(got.view(np.uint8), expected.view(np.uint8))


def test_packing():
    values = np.arange(-8, 8, dtype=np.int8).reshape(2, 8)
    packed = pack(values)
    assert packed[0].tolist() == [0x98, 0xBA, 0xDC, 0xFE]  # the even one in the low half
    assert np.asarray(unpack(jnp.asarray(packed))).astype(int).tolist() == values.tolist()
    assert jax.eval_shape(unpack, packed).dtype == jnp.int4


SHAPES = [
    # weight, lead, inputs, int4's group, factors of int8, factors of int4
    ((4, 4, 32, 256), 0, 1, 128, (4, 4, 32), (2, 4, 4, 32)),
    ((256, 4, 2, 64), 0, 3, 64, (256,), (4, 2, 256)),
    ((512, 256), 0, 1, 64, (512,), (4, 512)),
    ((2, 512, 256), 1, 1, 128, (2, 512), (2, 2, 512)),
]


@pytest.mark.parametrize(("shape", "lead", "inputs", "group", "channels", "groups"), SHAPES)
def test_shapes_of_factors_and_back(shape, lead, inputs, group, channels, groups):
    assert Quantization("int8", lead, inputs).scale_shape(shape) == channels
    how = Quantization("int4", lead, inputs, group)
    assert how.scale_shape(shape) == groups
    # With values of 1, every entry must be the factor of its own group: here, the number of its group.
    front = len(shape) - inputs
    numbers = np.arange(np.prod(shape) // group).reshape(*shape[:front], *how.groups(shape))
    behind = tuple(range(front, numbers.ndim))
    scales = numbers.transpose(*range(lead), *behind, *range(lead, front)).astype(np.float32)
    got = dequantize(np.ones(shape, np.int8), scales, how)
    np.testing.assert_array_equal(got.reshape(-1, group), np.repeat(numbers.reshape(-1, 1), group, 1))


def test_groups():
    def chosen(held):
        return quantization.quantization("int4", "mlp.down", held).group

    assert [chosen(held) for held in (128, 384, 64, 192, 11008)] == [128, 128, 64, 64, 128]
    with pytest.raises(ConfigError, match=r"mlp\.down: int4 has groups of 128 or 64 inputs, .* the 96 of each device"):
        chosen(96)
    with pytest.raises(ConfigError, match=r"attention\.out: .* the 32 of each key/value head on each device"):
        quantization.quantization("int4", "attention.out", 32, inputs=3)
    assert quantization.quantization("int8", "mlp.down", 97).group is None


def test_methods_and_bits():
    for method in (None, *METHODS):
        check_method(method)
    for wrong in ("int3", 8, "", ["int8"]):
        with pytest.raises(ConfigError, match="quantize: expected None or one of int8, int4, fp8, got"):
            check_method(wrong)
    assert [bits(quantization.DTYPES[method]) for method in METHODS] == [8, 4, 8]
    assert bits(jnp.bfloat16) == 16
