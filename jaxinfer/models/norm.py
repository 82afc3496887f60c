"""RMSNorm and LayerNorm over the hidden axis, or over each head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.models import spec as specs
from jaxinfer.models.parameter import parameter


class Norm(nnx.Module):
    """A normalisation of the last axis: [..., size] to [..., size], computed in float32."""

    def __init__(self, norm: specs.Norm, size: int, dtype: jnp.dtype) -> None:
        """Declare the weight and bias, each of ``size`` entries, that ``norm`` has."""
        self.norm = norm
        if norm.weight:
            self.scale = parameter((size,), (None,), dtype)
        if norm.bias:
            self.bias = parameter((size,), (None,), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise; the result has the dtype of ``x``."""
        with jax.named_scope("norm"):
            y = x.astype(jnp.float32)
            if self.norm.kind == "layer":
                y = y - jnp.mean(y, axis=-1, keepdims=True)
            y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.norm.eps)
            if self.norm.weight:
                scale = self.scale[...].astype(jnp.float32)
                y = y * (1.0 + scale if self.norm.unit_offset else scale)
            if self.norm.bias:
                y = y + self.bias[...].astype(jnp.float32)
            return y.astype(x.dtype)
