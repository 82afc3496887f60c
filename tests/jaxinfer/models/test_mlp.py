from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.mlp import Mlp
from jaxinfer.models.norm import Norm
from jaxinfer.models.spec import Norm as NormSpec
from tests.modules import Built, normal, small_spec

X = normal(2, 3, 16)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_the_formula_on_one_device_and_split(gated, biased, tensor):
    spec = small_spec(gated_mlp=gated, mlp_bias=biased, activation="silu")
    built = Built(lambda: Mlp(spec, jnp.float32))
    w = {"up_bias": np.zeros((1, 1)), "down_bias": np.zeros(1)} | built.weights
    x = np.asarray(X, np.float64)
    if gated:
        gate, up = (x @ w["up"][i].T + w["up_bias"][min(i, len(w["up_bias"]) - 1)] for i in range(2))
    else:
        gate, up = x @ w["up"].T + w["up_bias"], 1.0
    wanted = (gate / (1 + np.exp(-gate)) * up) @ w["down"].T + w["down_bias"]
    got = built(lambda mlp: mlp(X)) if tensor == 1 else built.split(lambda mlp: mlp(X), tensor)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("biased", [False, True])
def test_norm_and_residual_are_those_around_it(biased, tensor):
    spec = small_spec(gated_mlp=True, mlp_bias=biased, activation="gelu_tanh")
    built = Built(lambda: Mlp(spec, jnp.float32))
    size = NormSpec(kind="rms", eps=1e-3, weight=False)

    def inside(mlp):
        return mlp(X, Norm(size, 16, jnp.float32), 3 * X)

    normed = X / jnp.sqrt(jnp.mean(X * X, axis=-1, keepdims=True) + 1e-3)
    wanted = built(lambda mlp: mlp(normed)) + 3 * X
    np.testing.assert_allclose(built(inside) if tensor == 1 else built.split(inside, tensor), wanted, atol=2e-5)
