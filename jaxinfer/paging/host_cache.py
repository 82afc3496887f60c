"""The KV cache in host memory: what a layer needs of it comes to the devices, and what is new goes back.

A layer is computed for one group of sequences after the other, while the keys and values of the next group arrive and
those of the group before leave. On the devices a group has a *window*: a cache like any other, in which block ``j`` of
row ``r`` is number ``j * rows + r``. In host memory a group of slots lies in the same order, so that as many blocks as
its longest sequence has are one piece of memory, and one transfer of each array.

A decode step sends back one row of keys and values for each sequence, a prefill step whole blocks.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxinfer.checkpoints.store import threads
from jaxinfer.errors import CapacityError
from jaxinfer.models.attention import LayerCache
from jaxinfer.paging.link import Link, Ticket, copy
from jaxinfer.paging.memory import HostBuffer
from jaxinfer.paging.tiers import KV_WINDOWS, kv_array_bytes
from jaxinfer.paging.timeline import Event
from jaxinfer.plan import Plan
from pallas_kernels import BLOCK_SIZE

AXES = ("blocks", "kv_heads", "block_tokens", "head_dim")


@dataclass(frozen=True)
class Advance:
    """A group of slots in a decode step.

    Attributes:
        group: which; it begins with slot ``group * rows`` of each data shard.
        width: blocks of the longest sequence, those that the step writes included.
        positions: int [shards * rows], of the token that each writes; negative where there is none.
    """

    group: int
    width: int
    positions: np.ndarray


@dataclass(frozen=True)
class SlotGroup:
    """Slots of a decode step whose cache travels together; ``tables`` are on the devices."""

    group: int
    width: int
    positions: np.ndarray
    steps: np.ndarray
    tables: Any

    def at(self, index: int) -> Advance | None:
        """The ``index``-th token of the step; None where no sequence has one."""
        positions = np.where(index < self.steps, self.positions + index, -1)
        return Advance(self.group, self.width, positions) if (positions >= 0).any() else None


@dataclass(frozen=True)
class Chunks:
    """A group of rows in a prefill step, of any slots.

    Attributes:
        width: blocks of the longest sequence, as far as these tokens see.
        slots: int [shards * rows], the slot of each row in its shard; negative for padding.
        starts, stops: int [shards * rows], the first new token of each row, and the one after its last.
    """

    width: int
    slots: np.ndarray
    starts: np.ndarray
    stops: np.ndarray

    @classmethod
    def of(cls, tables: np.ndarray, positions: np.ndarray, slot_blocks: int) -> Chunks:
        """From the block tables [B, W] and positions [B, T] of a prefill step; see `Scheduler` for ``slot_blocks``."""
        new = positions >= 0
        slots = np.where(new.any(axis=1), (tables[:, 0] - 1) // slot_blocks, -1)
        starts = np.where(new, positions, np.iinfo(np.int32).max).min(axis=1)
        return cls(tables.shape[1], slots, np.where(slots < 0, 0, starts), positions.max(axis=1, initial=-1) + 1)


Visit = Advance | Chunks
"""What a layer computes at once."""


def window_tables(rows: int, shards: int, width: int) -> np.ndarray:
    """Block tables int32 [shards * rows, width] of a window."""
    own = np.arange(width)[None, :] * rows + np.arange(rows)[:, None]
    return np.tile(own.astype(np.int32), (shards, 1))


@dataclass
class _Held:
    """A window on the devices."""

    layer: int
    index: int
    ticket: Ticket | None = None
    mark: Any = None
    left: Future[None] | None = None


@dataclass(frozen=True)
class _Part:
    """What differs in host memory: a data shard, and the key/value heads of it that some of the devices hold."""

    shard: int
    heads: int


@dataclass
class _Layer:
    """A layer's cache: for each part and group of slots its arrays [blocks, rows, kv_heads, 64(, head_dim)]."""

    buffer: HostBuffer
    arrays: dict[tuple[_Part, int], list[np.ndarray]] = field(default_factory=dict)


class HostCache:
    """Keys and values of every slot and layer, in registered host memory.

    Args:
        plan: a plan with its KV cache in host memory.
        mesh: the devices.
        link: the way to them.

    Raises:
        CapacityError: the memory cannot be had.
    """

    def __init__(self, plan: Plan, mesh: Mesh, link: Link) -> None:
        assert plan.tiers is not None and plan.tiers.kv_rows is not None
        self.plan, self.mesh, self.link, self.timeline = plan, mesh, link, link.timeline
        self.rows, self.blocks = plan.tiers.kv_rows, plan.longest_blocks
        self.shards, self.groups = plan.shards, plan.slots // self.rows
        self._held: deque[_Held] = deque()
        self._visits: Sequence[Visit] = ()
        self._leaving: dict[tuple[int, int], list[Future[None]]] = {}  # (layer, group) -> what writes it
        # One thread, so that what is written comes in the order in which it was computed: a slot may be another
        # sequence's before the last rows of the one before it are here.
        self._writer = ThreadPoolExecutor(1, "jaxinfer-kv")
        self._copiers = ThreadPoolExecutor(threads(), "jaxinfer-kv-copy")
        self._layers: list[_Layer] = []
        self._shardings, self._dtypes, self._tails = [], [], []
        for shape, dtype in plan.cache_arrays:
            spec = plan.rules.spec(AXES[: len(shape)])
            self._shardings.append(NamedSharding(mesh, spec))
            self._dtypes.append(np.dtype(jnp.dtype(dtype)))
            self._tails.append(shape[1:])
        # One block a shard: the index of a device says which shard and which heads it holds.
        where = self._shardings[0].addressable_devices_indices_map((self.shards, *self._tails[0]))
        self._parts: dict[Any, _Part] = {
            device: _Part(index[0].start or 0, index[1].start or 0) for device, index in where.items() if index
        }
        self._local_heads = self._shardings[0].shard_shape((self.shards, *self._tails[0]))[1]
        sizes = kv_array_bytes(plan, self.rows)
        parts = sorted(set(self._parts.values()), key=lambda part: (part.shard, part.heads))
        try:
            for _ in range(plan.spec.num_layers):
                buffer = HostBuffer(len(parts) * self.groups * sum(sizes), mesh.devices.flat[0])
                self._layers.append(_Layer(buffer))
                at = 0
                for part in parts:
                    for group in range(self.groups):
                        found = self._layers[-1].arrays[part, group] = []
                        for size, kind, tail in zip(sizes, self._dtypes, self._tails, strict=True):
                            own = (self.blocks, self.rows, self._local_heads, *tail[1:])
                            count = math.prod(own) * kind.itemsize
                            found.append(buffer.array[at : at + count].view(kind).reshape(own))
                            at += size
        except CapacityError:
            self.close()
            raise

    def begin(self, visits: Sequence[Visit]) -> None:
        """Say what the next pass computes in each layer, in order."""
        self._visits = visits

    def ahead(self, layer: int, index: int) -> None:
        """Have the window of a visit arrive; nothing happens where it does already, or where it starts out empty."""
        visit = self._visits[index]
        if isinstance(visit, Advance) and self._find(layer, index) is None:
            self._room()
            self._held.append(_Held(layer, index, ticket=self._fetch(layer, visit)))

    def take(self, layer: int, index: int) -> LayerCache:
        """The window of a visit, to compute with now and to be given away; the next one is on its way by then.

        Raises:
            CapacityError, RuntimeError: what came before could not be written to host memory.
        """
        visit = self._visits[index]
        if isinstance(visit, Chunks):
            self._room()
            self._held.append(_Held(layer, index))
            arrays = self._context(layer, visit)
        else:
            self.ahead(layer, index)
            held = self._find(layer, index)
            # Before the computation that is handed out now: a fresh buffer waits for all that was handed out before.
            following = (layer, index + 1) if index + 1 < len(self._visits) else (layer + 1, 0)
            if following[0] < self.plan.spec.num_layers:
                self.ahead(*following)
            assert held is not None and held.ticket is not None
            arrays = tuple(held.ticket.arrays())
            held.ticket.drop()
        return arrays

    def done(self, layer: int, index: int, window: LayerCache, newest: LayerCache, mark: jax.Array) -> None:
        """Send what a visit has written to host memory.

        Args:
            layer, index: the visit.
            window: its window, written.
            newest: of a decode step, what each row has written: [shards * rows, 1, kv_heads(, head_dim)].
            mark: ready when the visit has been computed.
        """
        held, visit = self._find(layer, index), self._visits[index]
        assert held is not None
        issued = time.perf_counter()
        if isinstance(visit, Advance):
            for leaf in newest:
                leaf.copy_to_host_async()
            job = partial(self._write_rows, layer, visit, newest, issued)
            self._leave(layer, visit.group, self._writer.submit(job))
        else:
            if not self.link.copies:
                # By way of the driver's memory, which is page-locked: an array of numpy's is not.
                there = [sharding.with_memory_kind("pinned_host") for sharding in self._shardings]
                window = tuple(jax.device_put(list(window), there))
            held.left = Future()
            future = self._writer.submit(partial(self._write_blocks, layer, visit, [window], issued, held.left))
            for group in set((visit.slots[visit.slots >= 0] // self.rows).tolist()):
                self._leave(layer, group, future)
        held.mark = mark

    def device_bytes(self) -> int:
        """Bytes of windows on all devices that wait to be computed with."""
        arrays = [leaf for held in self._held if held.ticket is not None for leaf in held.ticket._arrays or ()]
        return sum(shard.data.nbytes for leaf in arrays for shard in leaf.addressable_shards)

    def settle(self) -> None:
        """Wait until all that was handed out has come to host memory.

        Raises:
            RuntimeError: a step failed.
        """
        leaving = [future for futures in self._leaving.values() for future in futures]
        self._leaving.clear()
        for future in leaving:
            future.result()

    def reset(self) -> None:
        """Begin anew, after an error: what slots hold is not to be used again."""
        with contextlib.suppress(Exception):
            self.settle()
        while self._held:
            held = self._held.popleft()
            if held.ticket is not None:
                held.ticket.landed.wait()
                held.ticket.drop()

    def close(self) -> None:
        """Wait for what is under way, and give the memory back. The link must still be open."""
        self.reset()
        self._writer.shutdown()
        self._copiers.shutdown()
        for layer in self._layers:
            layer.arrays.clear()
            layer.buffer.close()
        self._layers.clear()

    def _find(self, layer: int, index: int) -> _Held | None:
        return next((h for h in self._held if (h.layer, h.index) == (layer, index) and h.mark is None), None)

    def _leave(self, layer: int, group: int, future: Future[None]) -> None:
        """Note what writes a group of slots. One that failed is kept until somebody wants what it had to write."""
        before = self._leaving.get((layer, group), [])
        pending = [one for one in before if not one.done() or one.exception() is not None]
        self._leaving[layer, group] = [*pending, future]

    def _arrived(self, layer: int, group: int) -> None:
        """Wait until what was computed of a group of slots has come to host memory."""
        for future in self._leaving.pop((layer, group), []):
            future.result()

    def _room(self) -> None:
        """Wait until there are fewer windows than the devices may hold."""
        while len(self._held) >= KV_WINDOWS:
            held = self._held.popleft()
            start = time.perf_counter()
            if held.ticket is not None:
                held.ticket.landed.wait()
            arrived = time.perf_counter()
            self.timeline.wait("link", arrived - start)
            jax.block_until_ready(held.mark)
            computed = time.perf_counter()
            self.timeline.wait("compute", computed - arrived)
            if held.left is not None:
                held.left.result()
                self.timeline.wait("kv_out", time.perf_counter() - computed)

    def _fetch(self, layer: int, visit: Advance) -> Ticket:
        """Have a group's blocks travel."""
        start = time.perf_counter()
        self._arrived(layer, visit.group)
        self.timeline.wait("kv_out", time.perf_counter() - start)
        parts = {
            part: [values[: visit.width].reshape(-1, *values.shape[2:]) for values in arrays]
            for (part, group), arrays in self._layers[layer].arrays.items()
            if group == visit.group
        }
        nbytes = sum(view.nbytes for part in self._parts.values() for view in parts[part])
        return self.link.carry(layer, nbytes, lambda: self._put(parts))

    def _put(self, parts: dict[_Part, list[np.ndarray]]) -> tuple[list[jax.Array], Any]:
        """Hand windows to the devices; ``parts`` have the arrays [blocks, kv_heads, 64(, head_dim)] of each.

        Returns the windows, and what is ready when they are there.
        """
        if self.link.copies:
            parts = {part: [copy(view) for view in views] for part, views in parts.items()}
            put = self._placed(parts)
            return put, put
        put = self._placed(parts)
        # The windows are given away before they are there. What comes last on its way tells that they are.
        last = [jax.device_put(parts[part][-1][-1:, :1, :1], device) for device, part in self._parts.items()]
        return put, last

    def _placed(self, parts: dict[_Part, list[np.ndarray]]) -> list[jax.Array]:
        if len(self._parts) == 1:
            put: list[jax.Array] = jax.device_put(next(iter(parts.values())), self._shardings)
            return put
        single = {device: jax.device_put(parts[part], device) for device, part in self._parts.items()}
        made: list[jax.Array] = []
        for i, (sharding, tail) in enumerate(zip(self._shardings, self._tails, strict=True)):
            count = self.shards * next(iter(parts.values()))[i].shape[0]
            arrays = [single[device][i] for device in self._parts]
            made.append(jax.make_array_from_single_device_arrays((count, *tail), sharding, arrays))
        return made

    def _context(self, layer: int, visit: Chunks) -> LayerCache:
        """The window of rows in prefill: empty, or with the blocks before the first new token."""
        rows = len(visit.slots) // self.shards
        if not visit.starts.any():
            shapes = tuple((self.shards * visit.width * rows, *tail) for tail in self._tails)
            return _empty(shapes, tuple(dtype.name for dtype in self._dtypes), tuple(self._shardings))
        # Prompts that are longer than a step. What they had before is put together here, row by row, and travels
        # while nothing else is done: a step of thousands of tokens computes for much longer.
        for group in set((visit.slots[visit.slots >= 0] // self.rows).tolist()):
            self._arrived(layer, group)
        parts: dict[_Part, list[np.ndarray]] = {}
        for part in set(self._parts.values()):
            shapes_ = [(visit.width, rows, self._local_heads, *tail[1:]) for tail in self._tails]
            views = [np.zeros(shape, dtype) for shape, dtype in zip(shapes_, self._dtypes, strict=True)]
            for row, slot, start in self._rows_of(part, visit.slots, visit.starts):
                known = -(-start // BLOCK_SIZE)
                for view, values in zip(views, self._of(layer, part, slot), strict=True):
                    view[:known, row] = values[:known, slot % self.rows]
            parts[part] = [view.reshape(-1, *view.shape[2:]) for view in views]
        nbytes = sum(view.nbytes for part in self._parts.values() for view in parts[part])
        begin = time.perf_counter()
        put = jax.block_until_ready(self._placed(parts))
        self.timeline.add(Event("link", layer, begin, time.perf_counter(), nbytes))
        return tuple(put)

    def _of(self, layer: int, part: _Part, slot: int) -> list[np.ndarray]:
        return self._layers[layer].arrays[part, slot // self.rows]

    def _rows_of(self, part: _Part, slots: np.ndarray, *beside: np.ndarray) -> list[tuple[int, ...]]:
        """(row of its shard, slot, ...) of the rows of a part that have a slot."""
        rows = len(slots) // self.shards
        own = slice(part.shard * rows, (part.shard + 1) * rows)
        columns = [values[own].tolist() for values in (slots, *beside)]
        return [(row, *rest) for row, rest in enumerate(zip(*columns, strict=True)) if rest[0] >= 0]

    def _write_rows(self, layer: int, visit: Advance, newest: LayerCache, issued: float) -> None:
        """Put a decode step's keys and values where they belong."""
        nbytes = 0
        for i, leaf in enumerate(newest):
            for part, values in self._distinct(leaf):
                positions = visit.positions[part.shard * self.rows : (part.shard + 1) * self.rows]
                (rows,) = np.nonzero(positions >= 0)
                block, offset = np.divmod(positions[rows], BLOCK_SIZE)
                target = self._layers[layer].arrays[part, visit.group][i]
                unsigned = f"u{target.itemsize}"
                target.view(unsigned)[block, rows, :, offset] = values.view(unsigned)[rows, 0]
                nbytes += values.nbytes
        self.timeline.add(Event("kv_out", layer, issued, time.perf_counter(), nbytes))

    def _write_blocks(
        self, layer: int, visit: Chunks, windows: list[LayerCache], issued: float, left: Future[None]
    ) -> None:
        """Put a prefill step's blocks where they belong; ``left`` is done when the devices have their window back."""
        try:
            found = [self._distinct(leaf) for leaf in windows.pop()]
            if not self.link.copies:
                left.set_result(None)  # what was found lies in host memory
            jobs = self._jobs(layer, visit, found)
            for _ in self._copiers.map(lambda job: np.copyto(*job), jobs):
                pass
            nbytes = sum(values.nbytes for leaf in found for _, values in leaf)
            del found, jobs
            if self.link.copies:
                left.set_result(None)
        except BaseException as error:
            if not left.done():
                left.set_exception(error)  # whoever waits for room is told
            raise
        self.timeline.add(Event("kv_out", layer, issued, time.perf_counter(), nbytes))

    def _jobs(
        self, layer: int, visit: Chunks, found: list[list[tuple[_Part, np.ndarray]]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(target, source) of the blocks that rows of a window have written."""
        rows, jobs = len(visit.slots) // self.shards, []
        for i, leaf in enumerate(found):
            for part, values in leaf:
                blocks = values.reshape(visit.width, rows, *values.shape[1:])
                for row, slot, start, stop in self._rows_of(part, visit.slots, visit.starts, visit.stops):
                    target, own = self._of(layer, part, slot)[i], slice(start // BLOCK_SIZE, -(-stop // BLOCK_SIZE))
                    # As plain integers: numpy holds the interpreter lock while it copies bfloat16.
                    unsigned = f"u{target.itemsize}"
                    jobs.append((target.view(unsigned)[own, slot % self.rows], blocks.view(unsigned)[own, row]))
        return jobs

    def _distinct(self, leaf: jax.Array) -> list[tuple[_Part, np.ndarray]]:
        """What each part of an array is, of devices that hold the same of one of them; waits until it is there."""
        if len(self._parts) == 1:  # by the array's own copy, which is on its way
            return [(next(iter(self._parts.values())), np.asarray(leaf))]
        found: dict[_Part, np.ndarray] = {}
        for shard in leaf.addressable_shards:
            part = self._parts[shard.device]
            if part not in found:
                found[part] = np.asarray(shard.data)
        return list(found.items())


def newest(cache: LayerCache, tables: jax.Array, positions: jax.Array) -> LayerCache:
    """What a decode step has written into a cache, as int32 [B, W] tables and [B, 1] positions say: [B, 1, G(, D)]."""
    safe = jnp.maximum(positions, 0)
    blocks = jnp.take_along_axis(tables, safe // BLOCK_SIZE, axis=1, mode="clip")
    return tuple(leaf[blocks, :, safe % BLOCK_SIZE] for leaf in cache)


def _empty(shapes: Any, dtypes: Any, shardings: Any) -> LayerCache:
    return tuple(jnp.zeros(shape, dtype, device=to) for shape, dtype, to in zip(shapes, dtypes, shardings, strict=True))
