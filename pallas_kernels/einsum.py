"""Products of 16-bit arrays with a float32 result."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.choices import device


def einsum_f32(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply as ``jnp.einsum`` does, accumulating and returning float32.

    On a GPU the tensor cores take 16-bit operands as they are. XLA's CPU backend has no such product and refuses it
    when it runs ("Unsupported element type for DotThunk"), so there the operands are widened first.
    """
    if device().platform == "cpu":
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
