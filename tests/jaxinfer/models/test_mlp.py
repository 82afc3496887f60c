from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.activations import ACT2FN

from jaxinfer.models.config import ACTIVATIONS as NAMES
from jaxinfer.models.mlp import ACTIVATIONS, Mlp
from tests.modules import Built, normal, small_spec

X = normal(2, 3, 16)


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_those_of_torch(name):
    x = np.linspace(-12, 12, 4001, dtype=np.float32)
    wanted = ACT2FN[name](torch.tensor(x)).numpy()
    np.testing.assert_allclose(ACTIVATIONS[NAMES[name]](jnp.asarray(x)), wanted, atol=2e-6, rtol=2e-6)


def test_a_name_leads_to_every_activation():
    assert set(NAMES.values()) == set(ACTIVATIONS)


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
