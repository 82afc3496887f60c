"""The feed-forward half of a layer, plain or gated."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

import pallas_kernels as ops
from jaxinfer.models.norm import Norm
from jaxinfer.models.parameter import factors, parameter
from jaxinfer.models.spec import ModelSpec
from sharding import linear_psum


class Mlp(nnx.Module):
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))`` with gate and up stored as one [2, F, H] weight."""

    def __init__(self, spec: ModelSpec, dtype: jnp.dtype) -> None:
        """Declare the weights: ``up`` [F, H] or [2, F, H], ``down`` [H, F], split over F."""
        self.gated = spec.gated_mlp
        self.activation = spec.activation
        lead, lead_axes = ((2,), (None,)) if spec.gated_mlp else ((), ())
        self.up = parameter((*lead, spec.intermediate, spec.hidden), (*lead_axes, "mlp", "hidden"), dtype)
        self.down = parameter((spec.hidden, spec.intermediate), ("hidden", "mlp"), dtype)
        self.biased = spec.mlp_bias
        if spec.mlp_bias:
            self.up_bias = parameter((*lead, spec.intermediate), (*lead_axes, "mlp"), dtype)
            self.down_bias = parameter((spec.hidden,), ("hidden",), dtype)

    def __call__(self, x: jax.Array, norm: Norm | None = None, residual: jax.Array | None = None) -> jax.Array:
        """Transform [B, T, H] to [B, T, H], summed over the ``tensor`` axis.

        Args:
            x: hidden states.
            norm: of ``x``, before all else.
            residual: [B, T, H], added to the result.
        """
        with jax.named_scope("mlp"):
            h = ops.linear(
                x, self.up[...], factors(self, "up"),
                norm=None if norm is None else norm.of_input(),
                bias=self.up_bias[...] if self.biased else None,
                activation=self.activation,
                gated=self.gated,
            )  # fmt: skip
            return linear_psum(
                h, self.down[...], factors(self, "down"),
                axis="tensor", bias=self.down_bias[...] if self.biased else None, residual=residual,
            )  # fmt: skip
