"""The skinny GEMM as textbooks have it, in float64, to compare with."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def array(rng, *shape, dtype=jnp.bfloat16):
    return jnp.asarray(rng.standard_normal(shape), dtype)


def exact(x, weight, norm=None, bias=None, activation=None, residual=None, weight_scale=None):
    """The same product in float64 of numpy, by the textbook."""
    f = lambda a: np.asarray(jnp.asarray(a, jnp.float32), np.float64)  # noqa: E731
    h = f(x)
    if norm is not None:
        if norm.kind == "layer":
            h = h - h.mean(-1, keepdims=True)
        h = h / np.sqrt((h * h).mean(-1, keepdims=True) + norm.eps)
        h = h * (f(norm.scale) + norm.unit_offset) if norm.scale is not None else h
        h = h + f(norm.bias) if norm.bias is not None else h
    scale = None if weight_scale is None else f(weight_scale)[..., None]
    if weight.dtype == jnp.int4:  # [..., K / g, N] to [..., N, K]
        factors = np.moveaxis(f(weight_scale), -1, -2)
        scale = np.repeat(factors, weight.shape[-1] // factors.shape[-1], axis=-1)
    weight = f(weight) if scale is None else f(weight) * scale
    parts = [h @ w.T for w in (weight if weight.ndim == 3 else weight[None])]
    if bias is not None:
        parts = [p + b for p, b in zip(parts, f(bias).reshape(len(parts), -1), strict=True)]
    y = parts[0] if activation is None else f(ACTIVATIONS[activation](jnp.asarray(parts[0], jnp.float32)))
    y = y * parts[1] if len(parts) == 2 else y
    return y if residual is None else y + f(residual)
