"""RMSNorm and LayerNorm over the hidden axis, or over each head."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

import pallas_kernels as ops
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
            return ops.normalise(x, self.of_input())

    def of_input(self) -> ops.InputNorm:
        """The norm for an operation that normalises its input itself, as :func:`pallas_kernels.linear` does."""
        return ops.InputNorm(
            kind=self.norm.kind,
            eps=self.norm.eps,
            scale=self.scale[...] if self.norm.weight else None,
            bias=self.bias[...] if self.norm.bias else None,
            unit_offset=self.norm.unit_offset,
        )
