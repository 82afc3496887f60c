from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinfer.models.parameter import ParameterInfo, array, matmul, parameter, weight
from jaxinfer.quantization import Quantization, dequantize
from pallas_kernels import linear
from tests.modules import normal


@pytest.mark.parametrize("shape", [(7, 5), (2, 7, 5), (2, 3, 4, 5)])
def test_matmul_contracts_the_last_axis_of_a_weight(shape):
    x, weight = normal(3, 4, 5), normal(*shape, seed=2)
    wanted = np.tensordot(np.asarray(x), np.asarray(weight), axes=(2, len(shape) - 1))
    np.testing.assert_allclose(matmul(x, weight), wanted, atol=1e-5)


def test_matmul_keeps_the_dtype_of_its_input():
    assert matmul(normal(2, 4).astype(jnp.bfloat16), normal(3, 4).astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_parameter_needs_a_logical_axis_for_each_of_its_own():
    with pytest.raises(ValueError, match="needs 2 logical axes"):
        parameter((3, 4), ("hidden",), jnp.float32)


def test_a_parameter_carries_its_axes_and_nothing_is_allocated():
    abstract = nnx.eval_shape(lambda: parameter((1 << 20, 1 << 20), ("vocab", "hidden"), jnp.bfloat16))
    assert abstract.axes == ("vocab", "hidden")
    assert abstract.get_value().shape == (1 << 20, 1 << 20)


def test_bytes_of_a_parameter():
    assert ParameterInfo((3, 5), jnp.dtype(jnp.bfloat16), (None, None)).nbytes == 30
    assert ParameterInfo((3, 6), jnp.dtype(jnp.int4), (None, None)).nbytes == 9


def test_a_quantized_weight_declares_its_factors():
    def declared(how):
        return nnx.eval_shape(
            lambda: weight((256, 4, 2, 64), ("hidden", "kv_heads", None, "head_dim"), jnp.float32, how)
        )

    plain, none = declared(None)
    assert (plain.get_value().dtype, none, array(none)) == (jnp.float32, None, None)
    how = Quantization("int4", inputs=3, group=64)
    values, scale = declared(how)
    assert (values.get_value().dtype, values.axes) == (jnp.int4, ("hidden", "kv_heads", None, "head_dim"))
    assert values.get_metadata()["quantization"] == how
    assert (scale.get_value().shape, scale.axes) == ((4, 2, 256), ("kv_heads", None, "hidden"))
    _, channels = declared(Quantization("fp8", inputs=3))
    assert (channels.get_value().shape, channels.axes) == ((256,), ("hidden",))
    with pytest.raises(ValueError, match="needs 2 logical axes"):
        weight((3, 4), ("hidden",), jnp.float32, Quantization("int8"))


@pytest.mark.parametrize("shape", [(6, 256), (2, 6, 256), (3, 4, 5, 256)])
@pytest.mark.parametrize(("method", "dtype"), [("int8", jnp.int8), ("int4", jnp.int4), ("fp8", jnp.float8_e4m3fn)])
def test_declared_factors_are_those_that_products_take(shape, method, dtype):
    gated = len(shape) == 3
    how = Quantization(method, lead=int(gated), group=64 if method == "int4" else None)
    values = (normal(*shape) * 2).astype(dtype)
    scale = jnp.abs(normal(*how.scale_shape(shape), seed=3))
    x = normal(2, 3, 256, seed=2)
    whole = dequantize(np.asarray(values), np.asarray(scale), how)
    wanted = np.tensordot(np.asarray(x), whole, axes=(2, len(shape) - 1))
    wanted = wanted[..., 0, :] * wanted[..., 1, :] if gated else wanted
    np.testing.assert_allclose(linear(x, values, scale, gated=gated), wanted, atol=1e-3, rtol=1e-4)
    assert linear(x.astype(jnp.bfloat16), values, scale, gated=gated).dtype == jnp.bfloat16
