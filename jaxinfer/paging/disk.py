"""Layers read from a store on disk into host buffers, ahead of their use.

Chunks are held against their digests when they are read first; after that TensorStore reads straight into the buffer.

A disk that never answers is an error after :data:`READ_SECONDS`. The system offers no way to end such a read, so that
it is left behind: what it may still write to stays allocated, and is used for nothing else, until it ends.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxinfer.checkpoints.boxes import Box, intersection, relative, size_of, view
from jaxinfer.checkpoints.manifest import WEIGHTS, StoredTensor
from jaxinfer.checkpoints.store import Store, staging, threads
from jaxinfer.errors import CheckpointError, ReadTimeoutError
from jaxinfer.models.relayout import Move
from jaxinfer.paging.packing import PAGE, Leaf, Packing
from jaxinfer.paging.timeline import Event, Timeline

READ_SECONDS = 120.0
"""How long a read may go on after the one before it has ended, and besides a second for each of its megabytes
(:data:`jaxinfer.checkpoints.store.SLOWEST`): at first of a chunk, which has at most 8 MiB, then of a tensor's part."""
PROBE_BYTES = 256 << 20
"""What :func:`measure` reads, at most."""


@dataclass(frozen=True)
class _Region:
    """A region of a stored tensor, and the view of a buffer that it fills."""

    source: Box
    target: np.ndarray


class DiskLayers:
    """Reads layers of a store into buffers laid out by a packing.

    Args:
        store: the store; it must stay open.
        moves: parameter path -> which region of the stored tensor fills which of the parameter.
        timeline: where reads are noted.

    Attributes:
        verified: layers of which every chunk has been held against its digest.
    """

    def __init__(self, store: Store, moves: Mapping[str, Sequence[Move]], timeline: Timeline) -> None:
        self.store, self.moves, self.timeline = store, moves, timeline
        self.verified: set[int] = set()
        self._local = threading.local()
        self._late: dict[int, list[Callable[..., None]]] = {}
        self._pool = ThreadPoolExecutor(threads(), "jaxinfer-verify")

    def read(self, layer: int, packing: Packing, buffers: Sequence[np.ndarray]) -> None:
        """Fill the buffers of a layer, one for each part along ``tensor``. Any number of threads may do so at once.

        Raises:
            CheckpointError: a file cannot be read or, the first time, a chunk is damaged; naming tensor and file.
            ReadTimeoutError: a read did not end in time, now or in an earlier call for the same buffers.
        """
        self._wait_for_late(buffers)
        start = time.perf_counter()
        views = [packing.views(buffer) for buffer in buffers]
        tensors = {leaf: self.store.tensors[f"layers.{layer}.{leaf.name}"] for leaf in packing.leaves}
        regions = {
            tensor.path: self._regions(tensor, leaf, [part[leaf.name] for part in views])
            for leaf, tensor in tensors.items()
        }
        if layer in self.verified:
            pending = [
                self.store.fetch(tensor, region.source, region.target)
                for tensor in tensors.values()
                for region in regions[tensor.path]
            ]
            errors: list[CheckpointError] = []
            late = self._late[_place(buffers)] = []
            for filled in pending:  # all of them, as below; but where the disk hangs one has waited for all
                try:
                    filled(*((0.0,) if late else ()))
                except CheckpointError as error:
                    errors.append(error)
                    if isinstance(error, ReadTimeoutError):
                        late.append(filled)
            if errors:
                raise errors[0]
        else:
            hangs = threading.Event()
            checks = [
                self._pool.submit(self._verify, tensor, index, box, regions[tensor.path], hangs)
                for tensor in tensors.values()
                for index, box in enumerate(tensor.boxes())
            ]
            wait(checks)  # all of them: none may write to a buffer that another layer has
            for check in checks:
                check.result()
            self.verified.add(layer)
        nbytes = sum(tensor.nbytes for tensor in tensors.values())
        self.timeline.add(Event("disk", layer, start, time.perf_counter(), nbytes))

    def stop(self) -> None:
        """Let nobody wait much longer for reads that are under way."""
        self.store.stop()

    def close(self) -> None:
        """Let no more be read. Reads that hang are left behind."""
        self.stop()
        self._pool.shutdown(cancel_futures=True)
        self.store.close()

    def _wait_for_late(self, buffers: Sequence[np.ndarray]) -> None:
        """Wait until reads that were given up can write to these buffers no more."""
        late = self._late.get(_place(buffers), [])
        while late:
            try:
                late[0]()
            except ReadTimeoutError:
                raise
            except CheckpointError:
                pass  # it has ended, and what it was for has failed long ago
            late.pop(0)

    def _verify(
        self, tensor: StoredTensor, index: int, box: Box, regions: Sequence[_Region], hangs: threading.Event
    ) -> None:
        if hangs.is_set():
            return  # another one has waited, and its error ends the whole
        values = staging(self._local, tensor, box)
        try:
            self.store.read(tensor, index, box, values)
        except ReadTimeoutError:
            hangs.set()
            del self._local.buffer  # which may be written to later
            raise
        for region in regions:
            common = intersection(box, region.source)
            if size_of(common):
                source, target = (
                    view(values, relative(common, box)),
                    view(region.target, relative(common, region.source)),
                )
                # As plain integers: numpy holds the interpreter lock while it copies bfloat16.
                unsigned = f"u{source.itemsize}"
                np.copyto(target.view(unsigned), source.view(unsigned))

    def _regions(self, tensor: StoredTensor, leaf: Leaf, targets: Sequence[np.ndarray]) -> list[_Region]:
        """Where each part of a parameter comes from."""
        found = []
        local = leaf.host_shape
        for part, target in enumerate(targets):
            box = tuple(
                slice(part * size, (part + 1) * size) if axis == leaf.axis else slice(0, size)
                for axis, size in enumerate(local)
            )
            for move in self.moves[tensor.path]:
                common = intersection(box, move.target)
                if size_of(common):
                    source = tuple(
                        slice(side.start - t.start + s.start, side.stop - t.start + s.start)
                        for side, t, s in zip(common, move.target, move.source, strict=True)
                    )
                    found.append(_Region(source, view(target, relative(common, box))))
        return found


class Ring:
    """Host buffers that are filled with the layers of the disk tier, in the order of their use, round and round.

    Args:
        layers: the layers, in order.
        slots: for each slot its buffers, one for each part along ``tensor``; no more slots than layers.
        fill: reads a layer into the buffers of a slot.
    """

    def __init__(
        self,
        layers: Sequence[int],
        slots: Sequence[Sequence[np.ndarray]],
        fill: Callable[[int, Sequence[np.ndarray]], None],
    ) -> None:
        self._layers, self._slots, self._fill = list(layers), list(slots), fill
        self._change = threading.Condition()
        # Two at a time, so that the disk has something to do at a layer's end.
        self._pool = ThreadPoolExecutor(2, "jaxinfer-disk")
        self._filling: dict[int, _Filling] = {}
        self._next = self._taken = 0
        self._closed = False
        for slot in range(len(self._slots)):
            self._begin(slot)

    def take(self, layer: int) -> tuple[int, Sequence[np.ndarray]]:
        """The slot of a layer and its buffers, filled; the caller gives it back with :meth:`free`.

        Raises:
            CheckpointError: it could not be read; whoever asks next has it tried again.
        """
        with self._change:
            while layer not in self._filling:
                if self._taken:
                    self._change.wait()
                else:  # a pass was broken off, and this one begins elsewhere
                    self._seek(layer)
            filling = self._filling[layer]
            if filling.failed:
                filling = self._filling[layer] = _Filling(filling.slot, self._submit(layer, filling.slot))
        try:
            filling.future.result()
        except BaseException:
            filling.failed = True
            raise
        with self._change:
            del self._filling[layer]
            self._taken += 1
        return filling.slot, self._slots[filling.slot]

    def free(self, slot: int) -> None:
        """Fill a slot with the next layer."""
        with self._change:
            self._taken -= 1
            if not self._closed:
                self._begin(slot)
            self._change.notify_all()

    def close(self) -> None:
        """Wait for reads that are under way."""
        with self._change:
            self._closed = True
        self._pool.shutdown(cancel_futures=True)

    def _begin(self, slot: int) -> None:
        layer = self._layers[self._next % len(self._layers)]
        self._next += 1
        self._filling[layer] = _Filling(slot, self._submit(layer, slot))

    def _submit(self, layer: int, slot: int) -> Future[None]:
        return self._pool.submit(self._fill, layer, self._slots[slot])

    def _seek(self, layer: int) -> None:
        """Begin with another layer, in all slots."""
        left = list(self._filling.values())
        for filling in left:
            filling.future.cancel()
        wait([filling.future for filling in left])
        self._filling.clear()
        self._next = self._layers.index(layer)
        for filling in left:
            self._begin(filling.slot)


@dataclass
class _Filling:
    """A slot that is being filled, and whether that has failed and was said."""

    slot: int
    future: Future[None]
    failed: bool = False


def _place(buffers: Sequence[np.ndarray]) -> int:
    """Which memory it is."""
    return int(buffers[0].ctypes.data)


def measure(store: Store) -> float:
    """Bytes per second of a disk, read with O_DIRECT (or, where the file system has none, with cold pages), one thread.

    Raises:
        CheckpointError: the store cannot be read.
        ReadTimeoutError: nothing was read in :data:`READ_SECONDS`.
    """
    # A thread that hangs must not keep the program from its end, as one of a pool would.
    found: Future[float] = Future()
    read = [0]
    threading.Thread(target=_measure, args=(store, found, read), name="jaxinfer-probe", daemon=True).start()
    while True:
        before = read[0]
        try:
            return found.result(READ_SECONDS)
        except TimeoutError:
            if read[0] == before:
                folder = store.path / WEIGHTS
                raise ReadTimeoutError(f"{folder}: no byte came from disk in {READ_SECONDS:.3g} seconds") from None


def _measure(store: Store, found: Future[float], read: list[int]) -> None:
    try:
        found.set_result(_rate(store, read))
    except BaseException as error:
        found.set_exception(error)


def _rate(store: Store, read: list[int]) -> float:
    files = sorted((store.path / WEIGHTS).rglob("d/*"), key=lambda path: -path.stat().st_size)
    buffer = np.frombuffer(mmap.mmap(-1, 8 << 20), np.uint8)  # on a page's border, as O_DIRECT wants it
    done, seconds = 0, 0.0
    for path in files:
        count, took = _read_direct(path, buffer, PROBE_BYTES - done, read)
        done, seconds = done + count, seconds + took
        if done >= PROBE_BYTES:
            break
    if not done:
        raise CheckpointError(f"{store.path}: holds no data that could be read")
    return done / max(seconds, 1e-9)


def _read_direct(path: Path, buffer: np.ndarray, most: int, read: list[int]) -> tuple[int, float]:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        start, done = time.perf_counter(), 0
        while done < most and (count := os.preadv(handle, [buffer], done)):
            done += count
            read[0] += count
            if count % PAGE:  # the end of the file
                break
        return done, time.perf_counter() - start
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    finally:
        os.close(handle)
