"""How a parameter is filled from the tensors of a checkpoint file.

A family names, for each parameter path, the pieces it is made of. A piece is a region of the parameter and a view of
one file tensor. Views are lazy (the file is mapped), so a reader can slice a piece down to one device's shard and touch
only the bytes of that shard.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

View = Callable[[np.ndarray], np.ndarray]


def _same(tensor: np.ndarray) -> np.ndarray:
    return tensor


@dataclass(frozen=True)
class Piece:
    """One region of a parameter, filled from one tensor of the file.

    Attributes:
        name: the tensor's name in the file.
        shape: the shape that the file must have for it.
        view: file tensor -> array with the region's shape, by reshape, transpose or slice only (no copies).
        region: where the piece lies in the parameter; None is all of it.
    """

    name: str
    shape: tuple[int, ...]
    view: View = _same
    region: tuple[slice, ...] | None = None


Sources = dict[str, tuple[Piece, ...]]
"""Parameter path -> pieces. What no piece covers is zero (padding of the vocabulary)."""
