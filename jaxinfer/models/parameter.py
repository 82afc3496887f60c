"""Parameters: how a module declares one, and what a declared one says about its shape and placement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.quantization import Quantization, bits

Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter's global shape, dtype and logical axes (see :class:`sharding.ShardingRules`).

    Attributes:
        shape, dtype, axes: as it is declared.
        quantization: how a quantized weight is; its factors are the parameter of the same path with ``_scale`` added.
        factors: whether it is the factors of a quantized weight.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: Axes
    quantization: Quantization | None = None
    factors: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the whole parameter on a device, where int4 takes half a byte."""
        return math.prod(self.shape) * bits(self.dtype) // 8


def parameter(shape: Sequence[int], axes: Axes, dtype: Any) -> nnx.Param[jax.Array]:
    """Declare a parameter; modules are only ever built under ``nnx.eval_shape``, so nothing is allocated."""
    if len(shape) != len(axes):
        raise ValueError(f"a parameter of shape {tuple(shape)} needs {len(shape)} logical axes, got {axes}")
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


def weight(
    shape: Sequence[int], axes: Axes, dtype: Any, how: Quantization | None
) -> tuple[nnx.Param[jax.Array], nnx.Param[jax.Array] | None]:
    """Declare a weight ``[lead..., channels..., inputs...]`` and, where it is quantized, its factors.

    A module calls the factors as it calls the weight, with ``_scale`` added.

    Args:
        shape, axes, dtype: of the weight, were it not quantized.
        how: how it is quantized; None where it is not.
    """
    if how is None:
        return parameter(shape, axes, dtype), None
    if len(shape) != len(axes):
        raise ValueError(f"a parameter of shape {tuple(shape)} needs {len(shape)} logical axes, got {axes}")
    groups = axes[len(axes) - how.inputs :]
    # Of inputs [G, R, D], in groups [G, R * D / g], only the first axis is ever divided.
    kept: Axes = () if how.group is None else groups if how.inputs == 1 else (groups[0], None)
    scale_axes = (*axes[: how.lead], *kept, *axes[how.lead : len(axes) - how.inputs])
    scale = jnp.zeros(how.scale_shape(shape), jnp.float32)
    return (
        nnx.Param(jnp.zeros(shape, how.dtype), axes=axes, quantization=how),
        nnx.Param(scale, axes=scale_axes, factors=True),
    )


def array(declared: nnx.Param[jax.Array] | None) -> jax.Array | None:
    """The array of a parameter that a module may lack."""
    return None if declared is None else declared[...]


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiply ``x`` [..., in] with a weight stored as [out..., in], giving [..., out...] in the dtype of ``x``.

    The weight is used as the file stores it, with its rows contiguous along ``in``.
    """
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (weight.ndim - 1,)), ((), ())))
