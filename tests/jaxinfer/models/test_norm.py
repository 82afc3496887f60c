from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxinfer.models.norm import Norm
from jaxinfer.models.spec import Norm as NormSpec
from tests.modules import Built, normal

X = 3 * normal(4, 5, 16) + 1.5


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm_is_that_of_torch(weight, bias):
    built = Built(lambda: Norm(NormSpec(kind="layer", eps=1e-2, weight=weight, bias=bias), 16, jnp.float32))
    assert built.weights.keys() == {name for name, used in (("scale", weight), ("bias", bias)) if used}
    tensors = {name: torch.tensor(value) for name, value in built.weights.items()}
    wanted = torch.nn.functional.layer_norm(
        torch.tensor(np.asarray(X)), (16,), tensors.get("scale"), tensors.get("bias"), 1e-2
    )
    np.testing.assert_allclose(built(lambda norm: norm(X)), wanted, atol=1e-5)


@pytest.mark.parametrize("offset", [False, True])
def test_rms_norm(offset):
    built = Built(lambda: Norm(NormSpec(kind="rms", eps=1e-2, unit_offset=offset), 16, jnp.float32))
    weight = built.weights["scale"] + (1.0 if offset else 0.0)
    x = np.asarray(X, np.float64)
    wanted = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-2) * weight
    np.testing.assert_allclose(built(lambda norm: norm(X)), wanted, atol=1e-5)


def test_it_is_computed_in_float32_and_rounded_once():
    spec = NormSpec(kind="rms", eps=1e-6)
    x = X.astype(jnp.bfloat16)
    half = Built(lambda: Norm(spec, 16, jnp.bfloat16), dtype=jnp.bfloat16)
    full = Built(lambda: Norm(spec, 16, jnp.float32))
    full.state = half.state  # the same rounded weights, widened inside
    wanted = full(lambda norm: norm(x.astype(jnp.float32)))
    got = half(lambda norm: norm(x))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, wanted.astype(jnp.bfloat16))
