"""Parameters: how a module declares one, and what a declared one says about its shape and placement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Axes = tuple[str | None, ...]


@dataclass(frozen=True)
class ParameterInfo:
    """A parameter's global shape, dtype and logical axes (see :class:`sharding.ShardingRules`)."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: Axes

    @property
    def nbytes(self) -> int:
        """Bytes of the whole parameter."""
        size = jnp.dtype(self.dtype).itemsize
        for dim in self.shape:
            size *= dim
        return size


def parameter(shape: Sequence[int], axes: Axes, dtype: Any) -> nnx.Param[jax.Array]:
    """Declare a parameter; modules are only ever built under ``nnx.eval_shape``, so nothing is allocated."""
    if len(shape) != len(axes):
        raise ValueError(f"a parameter of shape {tuple(shape)} needs {len(shape)} logical axes, got {axes}")
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


def factors(module: nnx.Module, name: str) -> jax.Array | None:
    """Return the factors of a quantized weight, the parameter ``<name>_scale``, or None where it is not quantized."""
    found = getattr(module, f"{name}_scale", None)
    return None if found is None else found[...]


def matmul(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Multiply ``x`` [..., in] with a weight stored as [out..., in], giving [..., out...] in the dtype of ``x``.

    The weight is used as the file stores it, with its rows contiguous along ``in``.
    """
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (weight.ndim - 1,)), ((), ())))
