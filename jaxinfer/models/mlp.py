"""The feed-forward half of a layer, plain or gated."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.models.parameter import matmul, parameter
from jaxinfer.models.spec import ModelSpec
from sharding import psum

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": lambda x: jnp.maximum(x, 0),
    "silu": jax.nn.silu,
}


class Mlp(nnx.Module):
    """``down(act(up(x)))``, or ``down(act(gate(x)) * up(x))`` with gate and up stored as one [2, F, H] weight."""

    def __init__(self, spec: ModelSpec, dtype: jnp.dtype) -> None:
        """Declare the weights: ``up`` [F, H] or [2, F, H], ``down`` [H, F], split over F."""
        self.gated = spec.gated_mlp
        self.activation = ACTIVATIONS[spec.activation]
        lead, lead_axes = ((2,), (None,)) if spec.gated_mlp else ((), ())
        self.up = parameter((*lead, spec.intermediate, spec.hidden), (*lead_axes, "mlp", "hidden"), dtype)
        self.down = parameter((spec.hidden, spec.intermediate), ("hidden", "mlp"), dtype)
        self.biased = spec.mlp_bias
        if spec.mlp_bias:
            self.up_bias = parameter((*lead, spec.intermediate), (*lead_axes, "mlp"), dtype)
            self.down_bias = parameter((spec.hidden,), ("hidden",), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Transform [B, T, H] to [B, T, H], summed over the ``tensor`` axis."""
        with jax.named_scope("mlp"):
            h = matmul(x, self.up[...])
            if self.biased:
                h = h + self.up_bias[...]
            h = h.astype(jnp.float32)
            h = self.activation(h[..., 0, :]) * h[..., 1, :] if self.gated else self.activation(h)
            y = psum(matmul(h.astype(x.dtype), self.down[...]), "tensor")
            return y + self.down_bias[...] if self.biased else y
