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


def own_part(x: jax.Array, axis: str, dim: int) -> jax.Array:
    """Return what of ``x``, which every device has, is this device's along ``dim``: :func:`all_gather` undoes it.

    Shapes: ``[..., n * axis_size(axis), ...] -> [..., n, ...]``.

    Raises:
        MeshError: not the name of a mesh axis, ``dim`` is not a dimension of ``x``, or the devices do not divide it.
    """
    size = axis_size(axis)
    if not -x.ndim <= dim < x.ndim or x.shape[dim] % size:
        raise MeshError(f"own_part of {axis!r}: {size} devices do not divide dim {dim} of an array of shape {x.shape}")
    count = x.shape[dim] // size
    return jax.lax.dynamic_slice_in_dim(x, axis_index(axis) * count, count, dim % x.ndim) if size > 1 else x


def all_to_all(x: jax.Array, axis: str, split: int, concat: int) -> jax.Array:
    """Divide dimension ``split`` among the devices of a mesh axis that had divided dimension ``concat``.

    Every device sends each of the others a part; part ``i`` along ``split`` goes to device ``i``, and what it gets lies
    along ``concat`` in the order of the mesh axis.

    Shapes: with n devices ``[..., n * s, ..., c, ...] -> [..., s, ..., n * c, ...]``.

    Raises:
        MeshError: not the name of a mesh axis; ``split`` or ``concat`` is not a dimension of ``x``, both are the same,
            or n does not divide ``split``.
    """
    size = axis_size(axis)
    for dim in (split, concat):
        if not -x.ndim <= dim < x.ndim:
            raise MeshError(f"all_to_all over {axis!r}: dim {dim} is not a dimension of an array of shape {x.shape}")
    split, concat = split % x.ndim, concat % x.ndim
    if split == concat:
        raise MeshError(f"all_to_all over {axis!r}: dim {split} is both split and concatenated, of shape {x.shape}")
    if x.shape[split] % size:
        raise MeshError(f"all_to_all over {axis!r}: {size} devices do not divide dim {split} of shape {x.shape}")
    return jax.lax.all_to_all(x, axis, split, concat, tiled=True) if size > 1 else x
