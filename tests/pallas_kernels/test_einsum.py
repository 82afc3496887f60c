from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import einsum_f32


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_are_accumulated_and_returned_in_float32(dtype):
    rng = np.random.default_rng(3)
    a = jnp.asarray(rng.standard_normal((3, 500)), dtype)
    b = jnp.asarray(rng.standard_normal((2, 4, 500)), dtype)
    found = jax.jit(lambda a, b: einsum_f32("ik,gjk->gij", a, b))(a, b)
    assert found.dtype == jnp.float32
    exact = np.einsum("ik,gjk->gij", np.asarray(a, np.float64), np.asarray(b, np.float64))
    # 500 sums in float32; in bfloat16 they would be off by 0.1 and more.
    np.testing.assert_allclose(np.asarray(found), exact, atol=2e-4)
