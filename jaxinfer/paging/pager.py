"""Which layer is where, and the order in which layers come: what the executor takes weights from.

The transfer of the next paged layer is issued before a layer computes: a fresh device buffer waits for all that was
handed to the device before it was allocated, so that one issued after the layer would start when the layer ends.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxinfer.paging.disk import DiskLayers, Ring
from jaxinfer.paging.link import Link, Ticket
from jaxinfer.paging.memory import HostBuffer
from jaxinfer.paging.packing import Packing
from jaxinfer.paging.timeline import Event, Timeline


@dataclass
class _Held:
    """A paged layer on the devices: its transfer, and what is ready when it has been computed with."""

    layer: int
    ticket: Ticket
    mark: jax.Array | None = None
    issued: float = 0.0


class Pager:
    """Streams the paged layers of a model through a few slots on the devices, in order, round and round.

    Args:
        packings: the layout of every layer.
        link: the way to the devices.
        timeline: where everything is noted.
        slots: paged layers that the devices hold at once; at least 2.
        resident: layers that stay on the devices -> their segments.
        host: layers in host memory -> their buffers, one for each part along ``tensor``.
        ring: buffers of the layers on disk, or None.
        disk: what the ring reads from, to be closed with it.
        buffers: host memory to give back at the end.
    """

    def __init__(
        self,
        packings: Sequence[Packing],
        link: Link,
        timeline: Timeline,
        *,
        slots: int = 2,
        resident: Mapping[int, list[jax.Array]] | None = None,
        host: Mapping[int, Sequence[np.ndarray]] | None = None,
        ring: Ring | None = None,
        disk: DiskLayers | None = None,
        buffers: Sequence[HostBuffer] = (),
    ) -> None:
        self.packings, self.link, self.timeline, self.slots = packings, link, timeline, slots
        self.resident, self.host = dict(resident or {}), dict(host or {})
        self.ring, self.disk, self._buffers = ring, disk, list(buffers)
        self._paged = [layer for layer in range(len(packings)) if layer not in self.resident]
        self._following = dict(zip(self._paged, [*self._paged[1:], *self._paged[:1]], strict=True))
        self._held: deque[_Held] = deque()
        self._computed = 0.0

    def take(self, layer: int) -> list[jax.Array]:
        """The segments of a layer, to compute with now; the next paged layer is on its way when this returns.

        Raises:
            CheckpointError: a layer on disk cannot be read, or is damaged.
        """
        if layer in self.resident:
            return self.resident[layer]
        held = next((held for held in self._held if held.layer == layer and held.mark is None), None)
        if held is None:
            self._drain()  # of another place: the first pass, or one after an error
            held = self._send(layer)
        following = self._following[layer]
        # A single paged layer is its own successor, and stays.
        if following != layer and all(other.layer != following or other.mark is not None for other in self._held):
            self._send(following)
        arrays = held.ticket.arrays()
        held.issued = time.perf_counter()
        return arrays

    def done(self, layer: int, mark: jax.Array) -> None:
        """Say what will be ready once a layer has been computed, so that its slot can be used again."""
        for held in self._held:
            if held.layer == layer and held.mark is None:
                if len(self._paged) > 1:
                    held.mark = mark
                return

    def device_bytes(self) -> int:
        """Bytes that layers take on all devices now."""
        arrays = [leaf for held in self._held for leaf in held.ticket._arrays or ()]
        arrays += [leaf for leaves in self.resident.values() for leaf in leaves]
        return sum(shard.data.nbytes for leaf in arrays for shard in leaf.addressable_shards)

    def reset(self) -> None:
        """Begin anew, after an error."""
        self._drain()

    def close(self) -> None:
        """Wait for what is under way, and give memory on host and devices back.

        Of reads from disk only those that end soon: where a disk hangs, a read keeps its memory until it ends.
        """
        if self.disk is not None:
            self.disk.stop()
        if self.ring is not None:
            self.ring.close()
        self.link.close()
        with contextlib.suppress(Exception):
            self._drain()
        if self.disk is not None:
            self.disk.close()
        for leaves in self.resident.values():
            for leaf in leaves:
                leaf.delete()
        self.resident.clear()
        self.host.clear()
        self.ring = None
        for buffer in self._buffers:
            buffer.close()
        self._buffers.clear()

    def _send(self, layer: int) -> _Held:
        while len(self._held) >= self.slots:
            self._release()
        landed: Any = None
        if layer in self.host:
            buffers = self.host[layer]
        else:
            ring = self.ring
            assert ring is not None
            start = time.perf_counter()
            slot, buffers = ring.take(layer)
            self.timeline.wait("disk", time.perf_counter() - start)

            def landed() -> None:
                ring.free(slot)

        held = _Held(layer, self.link.send(layer, self.packings[layer], buffers, landed))
        self._held.append(held)
        return held

    def _release(self) -> None:
        """Wait until the oldest layer has been computed with, and let go of it."""
        held = self._held.popleft()
        start = time.perf_counter()
        held.ticket.landed.wait()
        arrived = time.perf_counter()
        self.timeline.wait("link", arrived - start)
        if held.mark is not None:
            jax.block_until_ready(held.mark)
            now = time.perf_counter()
            self.timeline.wait("compute", now - arrived)
            begin = max(held.ticket.end, held.issued, self._computed)
            self._computed = now
            self.timeline.add(Event("compute", held.layer, min(begin, now), now))
        held.ticket.drop()

    def _drain(self) -> None:
        while self._held:
            self._release()
