"""The feed-forward half of a layer, plain or gated."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.models.parameter import array, matmul, parameter, weight
from jaxinfer.models.spec import ModelSpec
from jaxinfer.quantization import quantization
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

    def __init__(self, spec: ModelSpec, dtype: jnp.dtype, quantize: str | None = None, tensor: int = 1) -> None:
        """Declare the weights: ``up`` [F, H] or [2, F, H], ``down`` [H, F], split over F among ``tensor`` devices.

        Quantized, there are factors too: ``up_scale`` [F] or [2, F] and ``down_scale`` [H], or of int4 [H / g, F] or
        [2, H / g, F], and [F / g, H].

        Raises:
            ConfigError: int4, and no group divides the inputs of one device.
        """
        self.gated = spec.gated_mlp
        self.activation = ACTIVATIONS[spec.activation]
        lead, lead_axes = ((2,), (None,)) if spec.gated_mlp else ((), ())
        up = down = None
        if quantize is not None:
            up = quantization(quantize, "mlp.up", spec.hidden, lead=len(lead))
            down = quantization(quantize, "mlp.down", spec.intermediate // tensor)
        shape = (*lead, spec.intermediate, spec.hidden)
        self.up, self.up_scale = weight(shape, (*lead_axes, "mlp", "hidden"), dtype, up)
        self.down, self.down_scale = weight((spec.hidden, spec.intermediate), ("hidden", "mlp"), dtype, down)
        self.biased = spec.mlp_bias
        if spec.mlp_bias:
            self.up_bias = parameter((*lead, spec.intermediate), (*lead_axes, "mlp"), dtype)
            self.down_bias = parameter((spec.hidden,), ("hidden",), dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Transform [B, T, H] to [B, T, H], summed over the ``tensor`` axis."""
        with jax.named_scope("mlp"):
            h = matmul(x, self.up[...], array(self.up_scale))
            if self.biased:
                h = h + self.up_bias[...]
            h = h.astype(jnp.float32)
            h = self.activation(h[..., 0, :]) * h[..., 1, :] if self.gated else self.activation(h)
            y = psum(matmul(h.astype(x.dtype), self.down[...], array(self.down_scale)), "tensor")
            return y + self.down_bias[...] if self.biased else y
