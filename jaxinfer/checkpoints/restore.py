"""From a store onto devices: worker threads read and verify chunks, and put each where its bytes belong.

A chunk is read once, however many shards have a part of it, and not at all where none of this process has.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

import jax
import numpy as np

from jaxinfer import progress as bars
from jaxinfer.checkpoints.boxes import Box, aligned, intersection, nbytes_of, relative, shape_of, size_of, view
from jaxinfer.checkpoints.loader import Target, cast, place, shards_of
from jaxinfer.checkpoints.manifest import StoredTensor
from jaxinfer.checkpoints.store import Store, staging, threads
from jaxinfer.errors import CheckpointError
from jaxinfer.models.relayout import Move

Moves = Mapping[str, Sequence[Move]]


def restore(
    store: Store, moves: Moves, targets: Mapping[str, Target], *, progress: bool = False
) -> dict[str, jax.Array]:
    """Read parameters from a store, each shard straight onto its devices; casts happen there.

    Host memory: the parameters themselves where the device is a CPU, and a chunk for each of at most 16 threads. Call
    :meth:`Store.check` first.

    Args:
        store: the open store.
        moves: parameter path -> which region of the stored tensor fills which of the parameter; the rest is zero.
        targets: parameter path -> shape, dtype and sharding; the paths to load.
        progress: whether to show a bar, in bytes read.

    Returns:
        Parameter path -> array of the target's shape, dtype and sharding.

    Raises:
        CheckpointError: a chunk cannot be read, or is damaged; then no array is given out.
    """
    shards = {
        path: [Assembly(box, devices, store.tensors[path].dtype, np.dtype(target.dtype), _covered(box, moves[path]))
               for box, devices in shards_of(target)]
        for path, target in targets.items()
    }  # fmt: skip
    tasks = [task for path in targets for task in _tasks(store.tensors[path], moves[path], shards[path])]
    total = sum(nbytes_of(shape_of(task.box), task.tensor.dtype) for task in tasks)
    bar = bars.bar(progress, total=total, desc="loading", unit="B", unit_scale=True, unit_divisor=1024)
    stopped, lock, local = threading.Event(), threading.Lock(), threading.local()

    def run(task: _Task) -> None:
        if stopped.is_set():
            raise CheckpointError("loading was stopped")
        values = staging(local, task.tensor, task.box)
        store.read(task.tensor, task.index, task.box, values)
        for shard, source, target in task.parts:
            shard.fill(view(values, source), target)
        with lock:
            bar.update(values.nbytes)

    with bar, ThreadPoolExecutor(threads(), "jaxinfer-restore") as pool:
        futures = [pool.submit(run, task) for task in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    return {
        path: jax.make_array_from_single_device_arrays(
            target.shape, target.sharding, [a for shard in shards[path] for a in shard.arrays()], dtype=target.dtype
        )
        for path, target in targets.items()
    }


class Assembly:
    """A shard that is being filled, from any thread.

    On a CPU it is assembled in its final place, which the array then adopts. On an accelerator, and where a cast is
    needed, parts are written into the array by donated updates.

    Args:
        box: the shard, in the parameter's coordinates.
        devices: those that hold it.
        stored: dtype of the parts.
        dtype: of the array.
        covered: whether parts will come for all of it; otherwise the rest is zero.
    """

    def __init__(
        self, box: Box, devices: tuple[jax.Device, ...], stored: np.dtype, dtype: np.dtype, covered: bool
    ) -> None:
        self.box, self.devices, self.dtype = box, devices, dtype
        self.on_host = devices[0].platform == "cpu" and stored == dtype
        self.covered = covered
        self._lock = threading.Lock()
        self._values: np.ndarray | None = None
        self._array: jax.Array | None = None

    def fill(self, part: np.ndarray, target: Box) -> None:
        """Copy a part to the region ``target``, in the shard's coordinates; ``part`` is free again afterwards."""
        if self.on_host:
            # As plain integers: numpy holds the interpreter lock while it copies bfloat16, and threads then queue.
            unsigned = f"u{part.itemsize}"
            np.copyto(view(self._buffer(), target).view(unsigned), part.view(unsigned))
            return
        moved = jax.device_put(np.ascontiguousarray(part), self.devices[0])
        with self._lock:
            if part.shape == shape_of(self.box):
                self._array = moved if moved.dtype == self.dtype else cast(moved, dtype=self.dtype)
            else:
                starts = tuple(np.int32(side.start) for side in target)
                self._array = place(self._zeros(), moved, starts)
            if self.devices[0].platform == "cpu":
                self._array.block_until_ready()  # there, what was moved may be the very bytes of `part`
        moved.block_until_ready()

    def arrays(self) -> list[jax.Array]:
        """The shard's array on each of its devices."""
        if self.on_host:
            return [jax.device_put(self._buffer(), device) for device in self.devices]
        array = self._zeros()
        return [array, *(jax.device_put(array, device) for device in self.devices[1:])]

    def _buffer(self) -> np.ndarray:
        with self._lock:
            if self._values is None:
                shape = shape_of(self.box)
                self._values = aligned(nbytes_of(shape, self.dtype)).view(self.dtype).reshape(shape)
                if not self.covered:
                    self._values.view(f"u{self.dtype.itemsize}").fill(0)
            return self._values

    def _zeros(self) -> jax.Array:
        if self._array is None:
            self._array = jax.numpy.zeros(shape_of(self.box), self.dtype, device=self.devices[0])
        return self._array


@dataclass(frozen=True)
class _Task:
    """A chunk to read, and its parts: the shard, the region of the chunk, the region of the shard."""

    tensor: StoredTensor
    index: int
    box: Box
    parts: tuple[tuple[Assembly, Box, Box], ...]


def _tasks(tensor: StoredTensor, moves: Sequence[Move], shards: Sequence[Assembly]) -> Iterator[_Task]:
    """The chunks of a tensor of which a shard has a part."""
    for index, chunk in enumerate(tensor.boxes()):
        parts = []
        for move in moves:
            source = intersection(chunk, move.source)
            if not size_of(source):
                continue
            target = _shifted(source, move.source, move.target)
            for shard in shards:
                common = intersection(target, shard.box)
                if size_of(common):
                    back = _shifted(common, move.target, move.source)
                    parts.append((shard, relative(back, chunk), relative(common, shard.box)))
        if parts:
            yield _Task(tensor, index, chunk, tuple(parts))


def _covered(box: Box, moves: Sequence[Move]) -> bool:
    return sum(size_of(intersection(box, move.target)) for move in moves) == size_of(box)


def _shifted(box: Box, origin: Box, to: Box) -> Box:
    """A box within one box, carried over to another of the same shape."""
    return tuple(
        slice(side.start - a.start + b.start, side.stop - a.start + b.start)
        for side, a, b in zip(box, origin, to, strict=True)
    )
