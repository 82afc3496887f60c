"""From checkpoint files onto devices: each shard is filled with just the bytes that it needs, by worker threads.

On a CPU a shard is assembled in its final place, which the array then adopts. On an accelerator, and where a cast is
needed, it goes chunk by chunk through the threads' staging buffers; casts happen on the device.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, SingleDeviceSharding

from jaxinfer import progress as bars
from jaxinfer.checkpoints.boxes import (
    Box,
    aligned,
    concrete,
    intersection,
    nbytes_of,
    relative,
    shape_of,
    size_of,
    view,
)  # fmt: skip
from jaxinfer.checkpoints.folder import Checkpoint
from jaxinfer.errors import CheckpointError
from jaxinfer.models.sources import Piece, Sources
from jaxinfer.quantization import Quantization

# Staging is all the host memory that loading to an accelerator holds: 16 threads with 16 MiB each, and as much again in
# XLA. From page cache to an H200, 16 cores: 13.6 GB/s, and 11.8 with buffers registered with the driver (`dma_map`),
# since so many threads hide XLA's own staging and registration takes time.
MAX_THREADS = 16
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class Target:
    """What a parameter shall be: its global shape, its dtype, and where it lies.

    ``quantization`` says how a quantized weight is; the factors then are a target of the same path with ``_scale``.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding | SingleDeviceSharding
    quantization: Quantization | None = None


@dataclass(frozen=True)
class Part:
    """A piece, opened: its region of the parameter, and the view of the file that fills it."""

    name: str
    region: Box
    values: np.ndarray


@dataclass(frozen=True)
class _Shard:
    """One distinct shard of a parameter and the devices of this process that hold it."""

    path: str
    box: Box  # in the parameter's coordinates
    devices: tuple[jax.Device, ...]
    parts: tuple[Part, ...]
    staged: np.dtype  # what travels to the device: the file's dtype
    dtype: np.dtype  # what the parameter has

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.box)


def load(
    checkpoint: Checkpoint, sources: Sources, targets: Mapping[str, Target], *, progress: bool = False
) -> dict[str, jax.Array]:
    """Read parameters from a checkpoint, each shard straight onto its devices.

    A process reads only the bytes of its own shards, and those of a replicated shard once. Host memory: the parameters
    themselves where the device is a CPU, and at most 512 MiB. Casts are exact or rounded to nearest even. `check` the
    checkpoint against ``sources`` first.

    Arguments:
        checkpoint: the open checkpoint; it may be closed, and its files deleted, when the call returns.
        sources: parameter path -> the pieces it is made of; what no piece covers is zero.
        targets: parameter path -> shape, dtype and sharding; the paths to load.
        progress: whether to show a bar, in bytes read.

    Returns:
        Parameter path -> array of the target's shape, dtype and sharding.

    Raises:
        CheckpointError: a file cannot be read, or no longer has the size it had when it was opened.
        ValueError: the pieces do not fit the parameter, or are copies rather than views.
    """
    shards = [shard for path, target in targets.items() for shard in _shards(checkpoint, path, sources[path], target)]
    shards.sort(key=lambda shard: -math.prod(shard.shape))  # no large one is left to a single thread at the end
    total = sum(nbytes_of(shard.shape, shard.staged) for shard in shards)
    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)), max(1, len(shards)))
    bar = bars.bar(progress, total=total, desc="loading", unit="B", unit_scale=True, unit_divisor=1024)
    with bar, ThreadPoolExecutor(threads, "jaxinfer-load") as pool:
        loader = _Loader(checkpoint, bar)
        futures = [pool.submit(loader.shard, shard) for shard in shards]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            loader.stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    placed: dict[str, list[jax.Array]] = {path: [] for path in targets}
    for shard, future in zip(shards, futures, strict=True):
        placed[shard.path] += future.result()
    return {
        path: jax.make_array_from_single_device_arrays(target.shape, target.sharding, placed[path], dtype=target.dtype)
        for path, target in targets.items()
    }


class _Loader:
    """Fills shards; the methods run in worker threads."""

    def __init__(self, checkpoint: Checkpoint, bar: Any) -> None:
        self.checkpoint = checkpoint
        self.bar = bar
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        self._local = threading.local()

    def shard(self, shard: _Shard) -> list[jax.Array]:
        """The shard's array on each of its devices."""
        first, *rest = shard.devices
        if first.platform == "cpu" and shard.staged == shard.dtype:
            values = self._in_place(shard)
            return [jax.device_put(values, device) for device in shard.devices]
        array = self._through_staging(shard, first)
        return [array, *(jax.device_put(array, device) for device in rest)]

    def _in_place(self, shard: _Shard) -> np.ndarray:
        # device_put adopts a buffer of this alignment instead of copying it, and no one else holds it.
        values = aligned(nbytes_of(shard.shape, shard.dtype)).view(shard.dtype).reshape(shard.shape)
        for box in cut(shard.shape, shard.dtype.itemsize):
            self._fill(shard, box, view(values, box))
        return values

    def _through_staging(self, shard: _Shard, device: jax.Device) -> jax.Array:
        boxes = list(cut(shard.shape, shard.staged.itemsize))
        array = None
        if len(boxes) > 1:
            # Chunks are written into the array by a donated update: putting 16 of them together at the end would take
            # the shard's size twice, on a device that the model may nearly fill.
            array = jax.numpy.zeros(shard.shape, shard.dtype, device=device)
        for box in boxes:
            shape = shape_of(box)
            chunk = self._staging()[: nbytes_of(shape, shard.staged)].view(shard.staged).reshape(shape)
            self._fill(shard, box, chunk)
            moved = jax.device_put(chunk, device)
            if array is not None:
                array = place(array, moved, tuple(np.int32(part.start) for part in box))
            else:
                array = moved if shard.staged == shard.dtype else cast(moved, dtype=shard.dtype)
            array.block_until_ready()  # only now may the staging buffer be filled again
        assert array is not None
        return array

    def _staging(self) -> np.ndarray:
        """This thread's staging buffer: `CHUNK_BYTES` bytes."""
        if not hasattr(self._local, "buffer"):
            self._local.buffer = aligned(CHUNK_BYTES)
        return self._local.buffer

    def _fill(self, shard: _Shard, box: Box, out: np.ndarray) -> None:
        """Fill ``out`` with the box ``box``, in the shard's coordinates."""
        if self.stopped.is_set():
            raise CheckpointError("loading was stopped")
        origin = [part.start for part in shard.box]
        wanted = tuple(slice(a.start + o, a.stop + o) for a, o in zip(box, origin, strict=True))
        fill(self.checkpoint, shard.parts, wanted, out)
        with self._lock:
            self.bar.update(out.nbytes)


def fill(checkpoint: Checkpoint, parts: Sequence[Part], wanted: Box, out: np.ndarray) -> None:
    """Fill ``out`` with the region ``wanted`` of a parameter; what no part covers is zero."""
    overlaps = [(part, intersection(wanted, part.region)) for part in parts]
    if sum(size_of(overlap) for _, overlap in overlaps) < out.size:
        out.view(f"u{out.itemsize}").fill(0)
    for part, overlap in overlaps:
        if size_of(overlap) == 0 and out.size:
            continue
        source = view(part.values, relative(overlap, part.region))
        target = view(out, relative(overlap, wanted))
        if source.dtype == target.dtype:
            # As plain integers: numpy holds the interpreter lock while it copies bfloat16, and threads then queue.
            source, target = (array.view(f"u{array.itemsize}") for array in (source, target))
        checkpoint.read(part.name, source, target)


@partial(jax.jit, donate_argnums=0)
def place(array: jax.Array, chunk: jax.Array, starts: tuple[jax.Array, ...]) -> jax.Array:
    """Write a chunk into an array, which is used up, with a cast to its dtype."""
    return jax.lax.dynamic_update_slice(array, chunk.astype(array.dtype), starts)


@partial(jax.jit, static_argnames="dtype")
def cast(chunk: jax.Array, dtype: np.dtype) -> jax.Array:
    """Cast an array where it lies."""
    return chunk.astype(dtype)


def _shards(checkpoint: Checkpoint, path: str, pieces: tuple[Piece, ...], target: Target) -> list[_Shard]:
    parts, staged = open_parts(checkpoint, path, pieces, target)
    dtype = np.dtype(target.dtype)
    return [_Shard(path, box, devices, parts, staged or dtype, dtype) for box, devices in shards_of(target)]


def open_parts(
    checkpoint: Checkpoint, path: str, pieces: tuple[Piece, ...], target: Target
) -> tuple[tuple[Part, ...], np.dtype | None]:
    """The parts that fill a parameter, and the dtype that they travel in; None where there are none."""
    parts = tuple(_part(checkpoint, path, piece, target) for piece in pieces)
    if sum(size_of(part.region) for part in parts) > math.prod(target.shape):
        raise ValueError(f"{path}: its pieces overlap; together they are larger than {target.shape}")
    found = {part.values.dtype for part in parts}
    staged = found.pop() if len(found) == 1 else np.dtype(np.float32) if found else None
    if staged == np.float64:
        staged = np.dtype(np.float32)  # JAX has no float64 unless asked; to bfloat16 by way of float32, as torch does
    return parts, staged


def shards_of(target: Target) -> list[tuple[Box, tuple[jax.Device, ...]]]:
    """The distinct shards of a parameter on this process, and the devices that hold each."""
    placements: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in target.sharding.addressable_devices_indices_map(target.shape).items():
        box = concrete(index or (), target.shape)
        placements.setdefault(tuple((side.start, side.stop) for side in box), []).append(device)
    return [(tuple(slice(*side) for side in sides), tuple(devices)) for sides, devices in placements.items()]


def _part(checkpoint: Checkpoint, path: str, piece: Piece, target: Target) -> Part:
    region = concrete(piece.region or (), target.shape)
    values = piece.view(checkpoint.tensor(piece.name))
    if values.shape != shape_of(region):
        raise ValueError(f"{path}: {piece.name} has shape {values.shape} after its view, its region {shape_of(region)}")
    return Part(piece.name, region, values)


def cut(shape: tuple[int, ...], itemsize: int) -> Iterator[Box]:
    """Cut a shape into boxes of at most `CHUNK_BYTES`, contiguous in C order, of equal size where that costs little."""
    inner = itemsize
    axis = len(shape)
    while axis > 0 and inner * shape[axis - 1] <= CHUNK_BYTES:
        axis -= 1
        inner *= shape[axis]
    if axis == 0 or math.prod(shape) == 0:
        yield tuple(slice(0, size) for size in shape)
        return
    axis -= 1
    rows = shape[axis]
    least = -(-rows * inner // CHUNK_BYTES)
    # Each box shape compiles an update of its own, so avoid a smaller last one: 11008 rows of 8 KiB go as 8 x 1376.
    count = next((count for count in range(least, 2 * least + 1) if rows % count == 0), least)
    step = min(-(-rows // count), CHUNK_BYTES // inner)
    for lead in np.ndindex(*shape[:axis]):
        for start in range(0, rows, step):
            yield (
                *(slice(i, i + 1) for i in lead),
                slice(start, min(start + step, rows)),
                *(slice(0, size) for size in shape[axis + 1 :]),
            )
