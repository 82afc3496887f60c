"""Collectives that a module may call whether or not there is a mesh.

A module sees its local block of every array and calls these where the full result is needed. Inside ``jax.shard_map``
they communicate; where the axis is not bound (a module run bare on one device) or has size 1 they are the identity and
leave no trace in the compiled program. Which of the two holds is known when the function is traced.

Meant for ``jax.shard_map(..., check_vma=False)``: an identity on an axis of size 1 does not mark its result as equal on
all devices of that axis, as a real collective would.
"""

from __future__ import annotations

import jax

from sharding.mesh import AXES, MeshError


def axis_size(axis: str) -> int:
    """Return the number of devices along a mesh axis; 1 where the axis is not bound.

    Raises:
        MeshError: not the name of a mesh axis. (Without this a misspelt axis would be an identity in silence.)
    """
    if axis not in AXES:
        raise MeshError(f"unknown mesh axis {axis!r}, expected one of {', '.join(AXES)}")
    try:
        return jax.lax.axis_size(axis)
    except NameError:  # JAX's documented answer for an axis that no shard_map has bound
        return 1


def axis_index(axis: str) -> jax.Array | int:
    """Return this device's index along a mesh axis, an int32 scalar; 0 where the axis is not bound or has size 1.

    Raises:
        MeshError: not the name of a mesh axis.
    """
    return jax.lax.axis_index(axis) if axis_size(axis) > 1 else 0


def psum(x: jax.Array, axis: str) -> jax.Array:
    """Sum the local blocks along a mesh axis; every device gets the sum, in the shape and dtype of ``x``.

    Raises:
        MeshError: not the name of a mesh axis.
    """
    return jax.lax.psum(x, axis) if axis_size(axis) > 1 else x


def all_gather(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Concatenate the local blocks along dimension ``dim``, in the order of the mesh axis; every device gets the whole.

    Shapes: ``[..., n, ...] -> [..., n * axis_size(axis), ...]``.

    Raises:
        MeshError: not the name of a mesh axis, or ``dim`` is not a dimension of ``x``.
    """
    size = axis_size(axis)
    if not -x.ndim <= dim < x.ndim:
        raise MeshError(f"all_gather over {axis!r}: dim {dim} is not a dimension of an array of shape {x.shape}")
    return jax.lax.all_gather(x, axis, axis=dim % x.ndim, tiled=True) if size > 1 else x
