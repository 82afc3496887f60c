"""Random parameters made on the devices, for a model of which only the configuration is at hand."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.checkpoints.loader import Target

DEVIATION = 0.02
"""Standard deviation of weights, transformers' usual ``initializer_range``: activations stay finite in float16."""

SCALE_SUFFIX = "_scale"
"""What the path of a quantized weight's factors has after that of the weight."""

# Of the integers and fp8 values that are drawn for a quantized weight: the bound of integers, or the deviation.
_BOUND = {"int8": 127, "int4": 7}
_FLOAT8_DEVIATION = 100.0


def dummy(targets: Mapping[str, Target], seed: int = 0) -> dict[str, jax.Array]:
    """Draw the parameters of a model on their devices.

    Weights and biases are normal with deviation :data:`DEVIATION`; the weights of norms are one. Quantized weights are
    uniform integers, or normal fp8 values, and their factors such that the product has that deviation too, give or take
    half of it from channel to channel. Values depend on the seed and on a parameter's path and shape, not on the mesh.

    Args:
        targets: parameter path -> shape, dtype and sharding.
        seed: of the draws.

    Returns:
        Parameter path -> array of the target's shape, dtype and sharding.
    """
    key = jax.random.key(seed)
    drawn = {}
    for path, target in targets.items():
        of = targets.get(path.removesuffix(SCALE_SUFFIX)) if path.endswith(SCALE_SUFFIX) else None
        mean = 0.0 if of is None else DEVIATION / _deviation(of.dtype)
        if path.endswith(".scale"):
            mean = 1.0
        kind = "factors" if of is not None else "ones" if mean else "weights"
        draw = _drawer(kind, target.shape, jnp.dtype(target.dtype), target.sharding)
        drawn[path] = draw(jax.random.fold_in(key, zlib.crc32(path.encode())), mean)
    return drawn


def _deviation(dtype: Any) -> float:
    """Deviation of the values that are drawn for a dtype, before factors."""
    bound = _BOUND.get(jnp.dtype(dtype).name)
    if bound is not None:
        return ((2 * bound + 1) ** 2 - 1) ** 0.5 / 12**0.5
    return _FLOAT8_DEVIATION if jnp.dtype(dtype).itemsize == 1 else DEVIATION


@functools.cache
def _drawer(kind: str, shape: tuple[int, ...], dtype: Any, sharding: Any) -> Any:
    """The compiled draw, one for all layers' parameters of a shape."""

    def draw(key: jax.Array, mean: jax.Array) -> jax.Array:
        if kind == "ones":
            return jnp.broadcast_to(mean, shape).astype(dtype)
        if kind == "factors":
            return (mean * jax.random.uniform(key, shape, jnp.float32, 0.5, 1.5)).astype(dtype)
        if dtype.name in _BOUND:
            bound = _BOUND[dtype.name]
            return jax.random.randint(key, shape, -bound, bound + 1, jnp.int8).astype(dtype)
        values = _deviation(dtype) * jax.random.normal(key, shape, jnp.bfloat16 if dtype.itemsize < 4 else dtype)
        limit = float(jnp.finfo(dtype).max)  # fp8 has no infinity: what is over its range becomes NaN
        return jnp.clip(values.astype(jnp.float32), -limit, limit).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)
