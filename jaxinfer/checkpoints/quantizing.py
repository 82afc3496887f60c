"""From checkpoint files onto devices as quantized weights: no device ever holds the weight as the file has it.

Worker threads read rows, whole channels of a weight over all devices, and quantize them on the host. So factors are the
same on every mesh, also where a channel's inputs are divided among devices.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait

import jax
import numpy as np

from jaxinfer import progress as bars
from jaxinfer.checkpoints.boxes import Box, aligned, intersection, nbytes_of, relative, shape_of, size_of, view
from jaxinfer.checkpoints.folder import Checkpoint
from jaxinfer.checkpoints.loader import CHUNK_BYTES, MAX_THREADS, Target, cut, fill, open_parts, shards_of
from jaxinfer.checkpoints.restore import Assembly
from jaxinfer.errors import CheckpointError
from jaxinfer.models.sources import Sources
from jaxinfer.quantization import Quantization, quantize, unpack, wire_dtype, wire_shape


def load_quantized(
    checkpoint: Checkpoint, sources: Sources, targets: Mapping[str, Target], *, progress: bool = False
) -> dict[str, jax.Array]:
    """Read weights from a checkpoint and quantize them on their way; as :func:`jaxinfer.checkpoints.load` otherwise.

    Host memory: the quantized weights where the device is a CPU, and for each of at most 16 threads 16 MiB of a weight
    and what becomes of it. A process reads the channels of which it holds a part, whole.

    Args:
        checkpoint: the open checkpoint.
        sources: parameter path -> the pieces it is made of.
        targets: the quantized weights, and for each its factors, of the same path with ``_scale``.
        progress: whether to show a bar, in bytes read.

    Raises:
        CheckpointError: a file cannot be read, or a weight is not finite.
    """
    weights = {
        path: _Weight(checkpoint, path, sources, target, targets[f"{path}_scale"])
        for path, target in targets.items()
        if target.quantization is not None
    }
    tasks = [(weight, box) for weight in weights.values() for box in weight.boxes()]
    total = sum(nbytes_of(shape_of(box), weight.staged) for weight, box in tasks)
    stopped, lock, local = threading.Event(), threading.Lock(), threading.local()

    def run(weight: _Weight, box: Box) -> None:
        if stopped.is_set():
            raise CheckpointError("loading was stopped")
        nbytes = nbytes_of(shape_of(box), weight.staged)
        if getattr(local, "buffer", np.empty(0, np.uint8)).nbytes < nbytes:
            local.buffer = aligned(max(nbytes, CHUNK_BYTES))
        weight.rows(box, local.buffer[:nbytes])
        with lock:
            bar.update(nbytes)

    threads = min(MAX_THREADS, len(os.sched_getaffinity(0)), max(1, len(tasks)))
    bar = bars.bar(progress, total=total, desc="quantizing", unit="B", unit_scale=True, unit_divisor=1024)
    with bar, ThreadPoolExecutor(threads, "jaxinfer-quantize") as pool:
        futures = [pool.submit(run, weight, box) for weight, box in tasks]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(cancel_futures=True)
            raise
    return {path: array for weight in weights.values() for path, array in weight.arrays().items()}


def packed(target: Target) -> Target:
    """A target with the shape and dtype in which its values are stored and travel: int4 two to a byte."""
    how = target.quantization
    if how is None:
        return target
    return Target(wire_shape(target.shape, how.method), wire_dtype(how.method), target.sharding, how)


def unpacked(array: jax.Array, target: Target) -> jax.Array:
    """What arrived for :func:`packed`, with the target's own shape and dtype; the array is used up."""
    if array.dtype == target.dtype:
        return array
    found = jax.jit(unpack, out_shardings=target.sharding)(array).block_until_ready()
    array.delete()
    return found


def quantize_box(path: str, values: np.ndarray, how: Quantization) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a region of a weight that holds whole channels.

    Args:
        path: the weight's, for the error.
        values: [lead..., channels..., inputs...]
        how: how it is quantized.

    Returns:
        Values as they travel, and factors in the order of :meth:`Quantization.scale_shape`.

    Raises:
        CheckpointError: a weight is not finite.
    """
    shape = values.shape
    inner = shape[len(shape) - how.inputs :]
    try:
        found, scales = quantize(values.reshape(-1, math.prod(inner)), how.method, how.group)
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be quantized to {how.method}: {error}") from None
    groups = how.groups(shape)
    scales = scales.reshape(*shape[: len(shape) - how.inputs], *groups)
    front = len(shape) - how.inputs
    order = (*range(how.lead), *range(front, front + len(groups)), *range(how.lead, front))
    return found.reshape(wire_shape(shape, how.method)), scales.transpose(order)


def scale_box(box: Box, shape: Sequence[int], how: Quantization) -> Box:
    """Where the factors of such a region lie among the weight's."""
    groups = tuple(slice(0, size) for size in how.groups(shape))
    return (*box[: how.lead], *groups, *box[how.lead : len(shape) - how.inputs])


class _Weight:
    """One weight that is being quantized, from any thread."""

    def __init__(self, checkpoint: Checkpoint, path: str, sources: Sources, target: Target, scale: Target) -> None:
        assert target.quantization is not None
        self.path, self.how, self.checkpoint = path, target.quantization, checkpoint
        self.shape, self.target, self.scale = target.shape, target, scale
        self.parts, staged = open_parts(checkpoint, path, sources[path], target)
        self.staged = staged or np.dtype(np.float32)
        self.wire = packed(target)
        self.values, self.scales = _assemblies(self.wire), _assemblies(scale)

    def boxes(self) -> list[Box]:
        """Regions of whole channels, of some 16 MiB each."""
        inner = self.shape[len(self.shape) - self.how.inputs :]
        channels = self.shape[: len(self.shape) - self.how.inputs]
        rest = tuple(slice(0, size) for size in inner)
        found = [(*box, *rest) for box in cut(channels, math.prod(inner) * self.staged.itemsize)]
        return [box for box in found if any(size_of(intersection(self._wired(box), s.box)) for s in self.values)]

    def rows(self, box: Box, buffer: np.ndarray) -> None:
        """Read a region and quantize it; ``buffer`` has as many bytes as it needs."""
        values = buffer.view(self.staged).reshape(shape_of(box))
        fill(self.checkpoint, self.parts, box, values)
        found, scales = quantize_box(self.path, values, self.how)
        _hand_out(found, self._wired(box), self.values)
        _hand_out(scales, scale_box(box, self.shape, self.how), self.scales)

    def arrays(self) -> dict[str, jax.Array]:
        """The weight and its factors."""
        values = _array(self.wire, self.values)
        return {self.path: unpacked(values, self.target), f"{self.path}_scale": _array(self.scale, self.scales)}

    def _wired(self, box: Box) -> Box:
        """A region of whole channels where values are as they travel."""
        return (*box[:-1], slice(0, self.wire.shape[-1]))


def _assemblies(target: Target) -> list[Assembly]:
    dtype = np.dtype(target.dtype)
    return [Assembly(box, devices, dtype, dtype, covered=True) for box, devices in shards_of(target)]


def _array(target: Target, shards: Sequence[Assembly]) -> jax.Array:
    arrays = [array for shard in shards for array in shard.arrays()]
    return jax.make_array_from_single_device_arrays(target.shape, target.sharding, arrays, dtype=target.dtype)


def _hand_out(values: np.ndarray, box: Box, shards: Sequence[Assembly]) -> None:
    """Put a region of a parameter into those shards that have a part of it."""
    for shard in shards:
        common = intersection(box, shard.box)
        if size_of(common):
            shard.fill(view(values, relative(common, box)), relative(common, shard.box))
