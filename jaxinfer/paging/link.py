"""The way from host memory to the devices: transfers that run beside compute, and how fast they can be."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxinfer.checkpoints.boxes import aligned
from jaxinfer.paging.memory import HostBuffer
from jaxinfer.paging.packing import Packing
from jaxinfer.paging.timeline import Event, Timeline

PROBE_BYTES = {"cpu": 32 << 20}
"""What :func:`measure` moves at a time, by platform; elsewhere 256 MiB, which took 6 ms to an H200."""


class Ticket:
    """A layer on its way.

    Attributes:
        layer: its number.
        landed: set when every device has all of it, or the transfer failed.
    """

    def __init__(self, layer: int, nbytes: int) -> None:
        self.layer, self.nbytes = layer, nbytes
        self.landed = threading.Event()
        self.end = 0.0
        self._arrays: list[jax.Array] | None = None
        self._issued = threading.Event()
        self._error: BaseException | None = None

    def arrays(self) -> list[jax.Array]:
        """The layer's segments, to compute with: the device waits for what has not arrived."""
        self._issued.wait()
        if self._error is not None:
            raise self._error
        assert self._arrays is not None
        return self._arrays

    def drop(self) -> None:
        """Let go of the arrays."""
        self._arrays = None


class Link:
    """Moves layers to the devices of a mesh, one after the other.

    On an accelerator a transfer is issued at once and runs on a stream of its own; a thread notes when it has landed.
    A CPU has no copy engine, and would adopt the host's memory instead of copying it: there, that thread copies.

    Args:
        mesh: the devices.
        timeline: where transfers are noted.

    Attributes:
        copies: whether what is sent has to be copied first, as for a CPU.
    """

    def __init__(self, mesh: Mesh, timeline: Timeline) -> None:
        self.mesh, self.timeline = mesh, timeline
        # Parts of a layer differ along ``tensor``, the last axis of a mesh, only.
        self._devices = [(device, i % mesh.shape["tensor"]) for i, device in enumerate(mesh.devices.flat)]
        self.copies = self._devices[0][0].platform == "cpu"
        # Of buffers that stay: views and placements cost as much time as handing them over.
        self._known: dict[tuple[int, int], tuple[np.ndarray, list[np.ndarray]]] = {}
        self._shardings: dict[int, tuple[Packing, list[NamedSharding]]] = {}
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="jaxinfer-link", daemon=True)
        self._thread.start()

    def send(
        self, layer: int, packing: Packing, buffers: Sequence[np.ndarray], landed: Callable[[], None] | None = None
    ) -> Ticket:
        """Start moving a layer to the devices.

        Args:
            layer: its number.
            packing: its layout.
            buffers: for each part along ``tensor`` its bytes, which must stay as they are until the layer has landed.
            landed: called, in another thread, when it has.
        """

        def put() -> tuple[list[jax.Array], Any]:
            if self.copies:
                arrays = self._put(packing, [packing.arrays(copy(buffer)) for buffer in buffers])
            else:
                arrays = self._put(packing, [self._views(packing, buffer) for buffer in buffers])
            return arrays, arrays

        return self.carry(layer, packing.moved_bytes * len(self._devices), put, landed)

    def carry(
        self,
        layer: int,
        nbytes: int,
        put: Callable[[], tuple[list[jax.Array], Any]],
        landed: Callable[[], None] | None = None,
    ) -> Ticket:
        """Start a transfer that belongs to a layer.

        Args:
            layer: its number.
            nbytes: what is moved to all devices together.
            put: hands it to the devices; where :attr:`copies` is true it has to copy what it hands over. It returns
                the arrays, and those that are ready when all have landed: the same ones, unless they are given away
                to a computation before that.
            landed: as of :meth:`send`.
        """
        ticket = Ticket(layer, nbytes)
        issued = time.perf_counter()
        signal: Any = None
        if not self.copies:
            ticket._arrays, signal = put()
            ticket._issued.set()

        def finish() -> None:
            nonlocal signal
            start = max(issued, getattr(self, "_free_at", 0.0))
            try:
                if self.copies:
                    start = time.perf_counter()
                    arrays, signal = put()
                    jax.block_until_ready(signal)
                    ticket._arrays = arrays
                    del arrays
                else:
                    jax.block_until_ready(signal)
            except BaseException as error:
                ticket._error = error
            signal = None  # it may hold the arrays
            ticket.end = self._free_at = time.perf_counter()
            self.timeline.add(Event("link", layer, start, ticket.end, ticket.nbytes))
            if landed is not None:
                landed()
            ticket._issued.set()
            ticket.landed.set()

        self._queue.put(finish)
        return ticket

    def forget(self) -> None:
        """Keep no hold of buffers that were sent from; those that are sent again are remembered again."""
        self._known.clear()

    def close(self) -> None:
        """Wait for what is on its way."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._known.clear()

    def _views(self, packing: Packing, buffer: np.ndarray) -> list[np.ndarray]:
        """The segments in a buffer, remembered together with it."""
        key = (id(packing), id(buffer))
        if key not in self._known or self._known[key][0] is not buffer:
            self._known[key] = buffer, packing.arrays(buffer)
        return self._known[key][1]

    def _put(self, packing: Packing, parts: Sequence[list[np.ndarray]]) -> list[jax.Array]:
        """Hand a layer's segments to the devices; ``parts`` are those along ``tensor``."""
        if id(packing) not in self._shardings:
            placed = [NamedSharding(self.mesh, segment.spec) for segment in packing.segments]
            self._shardings[id(packing)] = packing, placed
        shardings = self._shardings[id(packing)][1]
        if len(self._devices) == 1:
            put: list[jax.Array] = jax.device_put(parts[0], shardings)
            return put
        single = [jax.device_put(parts[part], device) for device, part in self._devices]
        return [
            jax.make_array_from_single_device_arrays(segment.shape, sharding, [arrays[i] for arrays in single])
            for i, (segment, sharding) in enumerate(zip(packing.segments, shardings, strict=True))
        ]

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            job()
            del job  # it holds the arrays


def measure(devices: Sequence[jax.Device], most: int | None = None) -> float:
    """Bytes per second from host memory to each of several devices, all at once; takes some 50 ms on a GPU.

    Several transfers in a row, as layers come: one alone has a start and an end that show (46 GB/s of 52 to an H200).

    Args:
        devices: they.
        most: bytes of a device that may be used for it; None is as many as it takes.

    Raises:
        CapacityError: the driver does not register host memory.
    """
    platform = devices[0].platform
    nbytes = PROBE_BYTES.get(platform, 256 << 20)
    nbytes = nbytes if most is None else max(1, min(nbytes, most // 2))
    buffer = HostBuffer(nbytes, devices[0])
    try:
        buffer.array.fill(1)  # memory that was never touched is not there yet
        best = 0.0
        for _ in range(2):
            start = time.perf_counter()
            before: list[jax.Array] = []
            for _ in range(4):
                source = copy(buffer.array) if platform == "cpu" else buffer.array
                moved = [jax.device_put(source, device) for device in devices]
                jax.block_until_ready(before)
                before = moved
            jax.block_until_ready(before)
            best = max(best, 4 * nbytes / (time.perf_counter() - start))
        return best
    finally:
        buffer.close()


def copy(values: np.ndarray) -> np.ndarray:
    """A contiguous array in memory of its own, which a CPU's backend adopts as it is."""
    copied = aligned(values.nbytes)
    np.copyto(copied, values.reshape(-1).view(np.uint8))
    return copied.view(values.dtype).reshape(values.shape)
