from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxinfer.models.parameter import ParameterInfo, matmul, parameter
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
