"""The feed-forward half of a layer, plain or gated."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

import pallas_kernels as ops
from jaxinfer.models.norm import Norm
from jaxinfer.models.parameter import array, parameter, weight
from jaxinfer.models.spec import ModelSpec
from jaxinfer.quantization import quantization
from sharding import linear_psum


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
        self.activation = spec.activation
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

    def __call__(
        self, x: jax.Array, norm: Norm | None = None, residual: jax.Array | None = None, *, gathered: bool = False
    ) -> jax.Array:
        """Transform [B, T, H] to [B, T, H], summed over the ``tensor`` axis.

        Args:
            x: hidden states.
            norm: of ``x``, before all else.
            residual: [B, T, H], added to the result.
            gathered: weights are whole on every device, so there is nothing to sum.
        """
        with jax.named_scope("mlp"):
            h = ops.linear(
                x, self.up[...], array(self.up_scale),
                norm=None if norm is None else norm.of_input(),
                bias=self.up_bias[...] if self.biased else None,
                activation=self.activation,
                gated=self.gated,
            )  # fmt: skip
            return linear_psum(
                h, self.down[...], array(self.down_scale),
                axis=None if gathered else "tensor",
                bias=self.down_bias[...] if self.biased else None,
                residual=residual,
            )  # fmt: skip
