"""Memory that the engines of a measurement share, and layers that are drawn once: neither is what is measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np

from jaxinfer.paging import start
from jaxinfer.paging.memory import HostBuffer

PIECE = 32 << 20


class Arena:
    """Registered memory that one engine after another is given: to get it takes longer than to measure with it.

    Attributes:
        holds: address -> the packing of the layer that lies there.
    """

    def __init__(self, chunk: int) -> None:
        self.chunk, self.chunks, self.holds = chunk, [], {}
        self.begin()

    def begin(self) -> None:
        """Give everything out again."""
        self.used = [0] * len(self.chunks)

    def buffer(self, nbytes: int, device: jax.Device) -> Any:
        """What stands for a HostBuffer."""
        size = -(-nbytes // 4096) * 4096
        at = next((i for i, chunk in enumerate(self.chunks) if self.used[i] + size <= len(chunk.array)), None)
        if at is None:
            at = len(self.chunks)
            self.chunks.append(HostBuffer(max(size, self.chunk), device))
            self.used.append(0)
        start = self.used[at]
        self.used[at] += size
        return SimpleNamespace(array=self.chunks[at].array[start : start + nbytes], close=lambda: None)

    def empty(self, nbytes: int, device: jax.Device) -> Any:
        """The same for a cache, which begins with zeros and not with what was a layer's."""
        found = self.buffer(nbytes, device)
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda at: found.array[at : at + PIECE].fill(0), range(0, nbytes, PIECE)))
        return found


@contextlib.contextmanager
def same_layers(arena: Arena) -> Iterator[None]:
    """Draw one layer, and copy it for the others: the processor draws slowly. What an arena holds is left there."""
    fill, drawn = start._Filler.fill, {}

    def faster(self: Any, layer: int, packing: Any, parts: list[np.ndarray]) -> None:
        place = parts[0].ctypes.data
        if arena.holds.get(place) == packing:
            drawn.setdefault(packing, parts)
            return
        if packing not in drawn:
            arena.holds.clear()  # of another packing, over which these are written
            fill(self, layer, packing, parts)
            drawn[packing] = parts
        else:
            jobs = [
                (target[at : at + PIECE], source[at : at + PIECE])
                for target, source in zip(parts, drawn[packing], strict=True)
                for at in range(0, len(target), PIECE)
            ]
            with ThreadPoolExecutor(16) as pool:
                list(pool.map(lambda job: np.copyto(*job), jobs))
        arena.holds[place] = packing

    start._Filler.fill = faster
    try:
        yield
    finally:
        start._Filler.fill = fill
