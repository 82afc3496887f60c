"""The device mesh: which axes it has, which sizes are allowed, and what to use when the caller says nothing.

A mesh always has all four axes, so that a PartitionSpec or a collective never has to ask which ones exist; an axis that
is not used has size 1. Axis types are Auto: a step's body is manual through ``jax.shard_map``, and what lies outside of
it is left to the partitioner.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

# Outermost first: neighbouring devices share a tensor group, whose all-reduces are the most frequent traffic.
AXES = ("data", "pipe", "expert", "tensor")

# Axes whose schedules do not exist yet. A size above 1 would only hold idle copies of the model.
_UNSUPPORTED = ("pipe", "expert")


class MeshError(ValueError):
    """A mesh, or a use of its axes, that cannot work; raised before anything is compiled."""


@dataclass(frozen=True, kw_only=True)
class TensorLimits:
    """What a model allows the ``tensor`` axis to be.

    Attributes:
        heads: number of query heads.
        kv_heads: number of key and value heads.
        intermediate: width of the MLP.
    """

    heads: int
    kv_heads: int
    intermediate: int

    def problem(self, tensor: int) -> str | None:
        """Say why the model cannot be split over ``tensor`` devices; None if it can.

        Query heads and the MLP are divided evenly. Key and value heads are either divided evenly or, when there are
        fewer of them than devices, replicated evenly, so that no device needs a part of two.
        """
        if self.heads % tensor:
            return f"{self.heads} heads cannot be divided by tensor={tensor}"
        if self.kv_heads % tensor and tensor % self.kv_heads:
            return f"{self.kv_heads} kv_heads can be neither divided nor replicated evenly over tensor={tensor}"
        if self.intermediate % tensor:
            return f"an intermediate size of {self.intermediate} cannot be divided by tensor={tensor}"
        return None


def make_mesh(
    mesh: Mapping[str, int] | Mesh | None,
    limits: TensorLimits,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Build the mesh a model runs on, with the axes ``data, pipe, expert, tensor``, all of type Auto.

    Args:
        mesh: axis sizes, such as ``{"data": 2, "tensor": 4}`` (an axis left out is 1; fewer devices than there are
            uses the first ones); or a ``jax.sharding.Mesh`` whose axis names are among the four, which keeps its
            devices; or None for all devices: ``tensor`` as large as ``limits`` allow, the rest ``data``.
        limits: what the model allows ``tensor`` to be.
        devices: devices to use in place of this process's; not together with a ``jax.sharding.Mesh``.

    Raises:
        MeshError: a wrong axis name or size, more devices than there are, a number of devices that does not divide
            theirs, or a ``tensor`` that ``limits`` forbid. The message names the nearest mesh that works.
    """
    if isinstance(mesh, Mesh):
        if devices is not None:
            raise MeshError("devices cannot be given together with a jax.sharding.Mesh, which has its own")
        return _extend(mesh, limits)
    if mesh is not None and not isinstance(mesh, Mapping):
        raise MeshError(
            f'mesh: expected axis sizes such as {{"data": 2, "tensor": 4}}, a jax.sharding.Mesh or None, '
            f"got {type(mesh).__name__}"
        )
    devices = list(jax.local_devices() if devices is None else devices)
    if not devices:
        raise MeshError("devices: expected at least one, got none")
    if mesh is None:
        tensor = max(t for t in _divisors(len(devices)) if limits.problem(t) is None)
        sizes = {"data": len(devices) // tensor, "tensor": tensor}
    else:
        sizes = _checked_sizes(mesh, limits, len(devices))
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    grid = np.asarray(devices[: math.prod(shape)], dtype=object).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(mesh: Mapping[str, int], limits: TensorLimits, device_count: int | None = None) -> dict[str, int]:
    """Check the sizes of a mesh whose devices need not be here, and complete them to all four axes.

    Args:
        mesh, limits: as in :func:`make_mesh`.
        device_count: how many devices there would be; None is as many as the mesh asks for.

    Raises:
        MeshError: as in :func:`make_mesh`.
    """
    if device_count is None:
        asked = [size for size in mesh.values() if isinstance(size, int | np.integer) and size > 0]
        device_count = math.prod(int(size) for size in asked)
    sizes = _checked_sizes(mesh, limits, device_count)
    return {axis: sizes.get(axis, 1) for axis in AXES}


def describe(mesh: Mesh) -> str:
    """Say in a few words what a mesh is, such as ``data=2 tensor=4 on 8 cpu devices``; axes of size 1 are left out."""
    kinds = sorted({device.device_kind for device in mesh.devices.flat})
    where = f"{mesh.size} {' and '.join(kinds)} device{'s' if mesh.size > 1 else ''}"
    sizes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    return f"{sizes} on {where}" if sizes else where


def _extend(mesh: Mesh, limits: TensorLimits) -> Mesh:
    """Put a caller's mesh into our axis order, with the axes it lacks added at size 1."""
    sizes = _checked_sizes(dict(mesh.shape), limits, mesh.size)
    order = [mesh.axis_names.index(axis) for axis in AXES if axis in mesh.axis_names]
    grid = mesh.devices.transpose(order).reshape(tuple(sizes.get(axis, 1) for axis in AXES))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _checked_sizes(mesh: Mapping[str, int], limits: TensorLimits, device_count: int) -> dict[str, int]:
    """Return the axis sizes as ints, or raise MeshError with every problem found and the nearest mesh that works."""
    sizes: dict[str, int] = {}
    problems: list[str] = []
    misnamed = 1  # devices asked for under names that do not exist: they still say how many are wanted
    for axis, size in mesh.items():
        # bool is an int to Python, and {"tensor": True} is a mistake.
        value = 0 if isinstance(size, bool | np.bool_) or not hasattr(size, "__index__") else operator.index(size)
        if axis not in AXES:
            problems.append(f"unknown axis {axis!r} (the axes are {', '.join(AXES)})")
            misnamed *= max(value, 1)
            continue
        if value < 1:
            problems.append(f"{axis}: expected a positive int, got {size!r}")
            continue
        sizes[axis] = value
        if value > 1 and axis in _UNSUPPORTED:
            problems.append(f"{axis}={value} is not supported yet, only {axis}=1")
    used = math.prod(sizes.values())
    present = f"{device_count} device{'s' if device_count > 1 else ''}"
    if used > device_count:
        problems.append(f"it needs {used} devices, and there are {device_count}")
    elif device_count % used:
        problems.append(f"it uses {used} of {present}, which leaves a remainder")
    if problem := limits.problem(sizes.get("tensor", 1)):
        problems.append(problem)
    if problems:
        asked = ", ".join(f"{axis!r}: {size!r}" for axis, size in mesh.items())
        raise MeshError(
            f"mesh {{{asked}}} cannot be used on {present}: {'; '.join(problems)}. "
            f"The nearest mesh that works is {_nearest(sizes, used * misnamed, limits, device_count)}"
        )
    return sizes


def _nearest(wanted: Mapping[str, int], total: int, limits: TensorLimits, device_count: int) -> dict[str, int]:
    """Return the valid mesh the fewest factors of two away from the wanted sizes and from the wanted total."""

    def distance(tensor: int, data: int) -> tuple[float, int, int]:
        offered = {"data": data, "tensor": tensor}
        steps = sum(abs(math.log2(wanted.get(axis, 1)) - math.log2(offered.get(axis, 1))) for axis in AXES)
        steps += abs(math.log2(total) - math.log2(data * tensor))
        # Rounded so that equal distances stay equal in floating point; then more devices, then more tensor.
        return round(steps, 6), -data * tensor, -tensor

    allowed = [t for t in _divisors(device_count) if limits.problem(t) is None]
    pairs = [(tensor, data) for tensor in allowed for data in _divisors(device_count // tensor)]
    tensor, data = min(pairs, key=lambda pair: distance(*pair))
    return {"data": data, "tensor": tensor}


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
