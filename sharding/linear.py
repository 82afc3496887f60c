"""Products whose inputs are split over a mesh axis."""

from __future__ import annotations

import jax

from pallas_kernels import linear
from sharding.collectives import axis_size, psum


def linear_psum(
    x: jax.Array,
    weight: jax.Array,
    scale: jax.Array | None = None,
    *,
    axis: str | None,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Compute ``x W^T``, summed over a mesh axis that splits its inputs, plus bias and residual, which are whole.

    Args:
        x: [..., K], this device's inputs.
        weight, scale: [N, K] and its factors, as :func:`pallas_kernels.linear` takes them.
        axis: the mesh axis; None where inputs and weight are whole. There, and where it has size 1 or is not bound, all
            is one call of :func:`pallas_kernels.linear`.
        bias: [N].
        residual: [..., N].

    Returns:
        [..., N] in the dtype of ``x``, the same on every device of the axis if there is one.

    Raises:
        MeshError: not the name of a mesh axis.
    """
    if axis is None or axis_size(axis) == 1:
        return linear(x, weight, scale, bias=bias, residual=residual)
    y = psum(linear(x, weight, scale), axis)
    y = y if bias is None else y + bias
    return y if residual is None else residual + y
