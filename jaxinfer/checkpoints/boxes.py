"""Boxes: regions of arrays as slices with a start and a stop on every axis, and the arithmetic of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

ALIGNMENT = 64
"""What the CPU backend wants of a buffer that it adopts instead of copying it."""

Box = tuple[slice, ...]


def concrete(index: Box, shape: tuple[int, ...]) -> Box:
    """An index with a start and a stop on every axis."""
    if len(index) > len(shape):
        raise ValueError(f"expected a region of {len(shape)} axes, got {index}")
    bounds = [side.indices(size) for side, size in zip(index, shape, strict=False)]
    if any(step != 1 for _, _, step in bounds):
        raise ValueError(f"expected a region with steps of 1, got {index}")
    bounds += [(0, size, 1) for size in shape[len(bounds) :]]
    return tuple(slice(start, max(start, stop)) for start, stop, _ in bounds)


def intersection(a: Box, b: Box) -> Box:
    """What two boxes share; of size 0 where that is nothing."""
    sides = ((max(p.start, q.start), min(p.stop, q.stop)) for p, q in zip(a, b, strict=True))
    return tuple(slice(start, max(start, stop)) for start, stop in sides)


def relative(box: Box, to: Box) -> Box:
    """A box in the coordinates of another that holds it."""
    return tuple(slice(p.start - q.start, p.stop - q.start) for p, q in zip(box, to, strict=True))


def view(array: np.ndarray, box: Box) -> np.ndarray:
    """The view of an array that a box is."""
    index: Any = (*box, ...)  # without the ellipsis a scalar would be copied
    return array[index]


def shape_of(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(side.stop - side.start for side in box)


def size_of(box: Box) -> int:
    """Elements of a box."""
    return math.prod(shape_of(box))


def nbytes_of(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Bytes of an array."""
    return math.prod(shape) * dtype.itemsize


def aligned(nbytes: int) -> np.ndarray:
    """Uninitialised bytes, aligned to `ALIGNMENT`."""
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes]
