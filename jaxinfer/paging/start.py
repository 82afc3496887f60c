"""From a checkpoint to a pager: host buffers filled, files open, resident layers in place."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding

from jaxinfer import progress as bars
from jaxinfer.checkpoints import Store, Target
from jaxinfer.checkpoints.manifest import WEIGHTS
from jaxinfer.checkpoints.store import threads
from jaxinfer.errors import ConfigError, listed
from jaxinfer.models.parameter import ParameterInfo
from jaxinfer.paging import disk
from jaxinfer.paging import link as links
from jaxinfer.paging.disk import DiskLayers, Ring
from jaxinfer.paging.link import Link
from jaxinfer.paging.memory import HostBuffer, available
from jaxinfer.paging.packing import Packing, two_to_a_byte
from jaxinfer.paging.pager import Pager
from jaxinfer.paging.tiers import layer_packings
from jaxinfer.paging.timeline import Timeline
from jaxinfer.plan import Plan
from jaxinfer.pretrained import Pretrained


def measured(plan: Plan, devices: Sequence[jax.Device], pretrained: Pretrained) -> Plan:
    """A plan with the rates of this machine: that of the link and, where it is used, of the disk."""
    tiers = plan.tiers
    if tiers is None:
        return plan
    if tiers.disk_bytes and isinstance(pretrained.checkpoint, Store):
        tiers = dataclasses.replace(tiers, disk=disk.measure(pretrained.checkpoint))
    return dataclasses.replace(
        plan,
        tiers=tiers,
        hardware=dataclasses.replace(plan.hardware, link=links.measure(devices, (tiers.device_memory or 1 << 40) // 8)),
    )


def open_pager(pretrained: Pretrained, plan: Plan, mesh: Mesh, *, progress: bool, seed: int = 0) -> Pager:
    """Put every layer of a plan where it says, and open what reads the rest.

    Host memory: what the plan says, and while it is filled one layer more.

    Args:
        pretrained: the checkpoint; it may be closed when this returns.
        plan: a plan with tiers.
        mesh: the devices.
        progress: show a bar.
        seed: of dummy weights.

    Raises:
        CheckpointError: files cannot be read, or are damaged.
        ConfigError: the store's dtype is not the plan's; bytes on disk are used as they are.
        CapacityError: host memory cannot be had.
    """
    tiers = plan.tiers
    assert tiers is not None
    timeline = Timeline()
    packings = layer_packings(plan.parameters, plan.spec.num_layers, plan.rules, plan.mesh)
    device = mesh.devices.flat[0]
    link = Link(mesh, timeline)
    opened = contextlib.ExitStack()
    buffers: list[HostBuffer] = []
    try:
        opened.callback(link.close)
        disk_layers = _disk_layers(pretrained, plan, packings, timeline)
        if disk_layers is not None:
            opened.callback(disk_layers.close)
        host: dict[int, list[np.ndarray]] = {}
        resident: dict[int, list[jax.Array]] = {}
        filler = _Filler(pretrained, plan, seed)
        total = sum(size for size, tier in zip(tiers.buffer_bytes, tiers.layers, strict=True) if tier != "disk")
        with bars.bar(progress, total=total, desc="loading layers", unit="B", unit_scale=True) as bar:
            for layer, tier in enumerate(tiers.layers):
                if tier == "disk":
                    continue
                packing = packings[layer]
                buffer = HostBuffer(packing.nbytes * packing.parts, device)
                buffers.append(buffer)
                parts = _parts(buffer, packing)
                filler.fill(layer, packing, parts)
                if tier == "host":
                    host[layer] = parts
                else:
                    ticket = link.send(layer, packing, parts)
                    resident[layer] = ticket.arrays()
                    ticket.landed.wait()
                    link.forget()  # or its views would keep the host's memory
                    del parts
                    buffers.pop().close()
                bar.update(tiers.buffer_bytes[layer])
        ring = None
        if disk_layers is not None:
            ring = _ring(disk_layers, plan, packings, device, buffers)
        timeline.clear()
        opened.pop_all()
    except BaseException:
        opened.close()
        for buffer in buffers:
            buffer.close()
        raise
    return Pager(
        packings, link, timeline, slots=tiers.slots, resident=resident, host=host, ring=ring, disk=disk_layers,
        buffers=buffers,
    )  # fmt: skip


def _parts(buffer: HostBuffer, packing: Packing) -> list[np.ndarray]:
    return [buffer.array[part * packing.nbytes : (part + 1) * packing.nbytes] for part in range(packing.parts)]


def _ring(
    layers: DiskLayers, plan: Plan, packings: list[Packing], device: jax.Device, buffers: list[HostBuffer]
) -> Ring:
    tiers = plan.tiers
    assert tiers is not None
    on_disk = tiers.of("disk")
    largest = max((packings[layer] for layer in on_disk), key=lambda packing: packing.nbytes)
    slots = []
    for _ in range(tiers.ring_slots):
        buffer = HostBuffer(largest.nbytes * largest.parts, device)
        buffers.append(buffer)
        slots.append(_parts(buffer, largest))
    return Ring(on_disk, slots, lambda layer, parts: layers.read(layer, packings[layer], parts))


def _disk_layers(pretrained: Pretrained, plan: Plan, packings: list[Packing], timeline: Timeline) -> DiskLayers | None:
    """The reader of the layers on disk, with a store of its own: the caller's is closed once all is loaded."""
    tiers = plan.tiers
    assert tiers is not None
    layers = tiers.of("disk")
    if not layers:
        return None
    if not isinstance(pretrained.checkpoint, Store):
        raise ConfigError(
            f"{pretrained.folder}: layers are read from disk at every step, and that needs a store: make one with "
            "`jaxinfer convert MODEL STORE`"
        )
    # What fits beside everything else is left to the page cache, which is faster than any disk.
    direct = tiers.disk_bytes > available() - tiers.host_bytes and _can_be_direct(pretrained.checkpoint)
    store = Store(pretrained.folder, direct=direct, seconds=disk.READ_SECONDS)
    moves, wrong = {}, []
    for layer in layers:
        for leaf in packings[layer].leaves:
            path = f"layers.{layer}.{leaf.name}"
            if store.tensors[path].dtype != leaf.host_dtype:
                wrong.append(f"{path} (expected {leaf.host_dtype}, got {store.tensors[path].dtype})")
            moves[path] = pretrained.moves(path, plan.parameters[path], plan.layout)
    if wrong:
        store.close()
        raise ConfigError(
            f"{pretrained.folder}: layers on disk are used as they are, and {len(wrong)} tensors have another dtype: "
            f"{listed(wrong, 3)}; give dtype={pretrained.dtype!r}, or convert with --dtype {plan.dtype}"
        )
    return DiskLayers(store, moves, timeline)


def _can_be_direct(store: Store) -> bool:
    path = next(iter((store.path / WEIGHTS).rglob("d/*")), None)
    if path is None:
        return False
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


class _Filler:
    """Fills host buffers with layers of any checkpoint, by way of arrays on the CPU."""

    def __init__(self, pretrained: Pretrained, plan: Plan, seed: int) -> None:
        self.pretrained, self.plan, self.seed = pretrained, plan, seed
        try:
            self.cpu = jax.local_devices(backend="cpu")[0]
        except RuntimeError as error:
            raise ConfigError(
                f"offload: host memory is filled by JAX's CPU backend, which is not there ({error}); "
                "set JAX_PLATFORMS=cuda,cpu, or leave it unset"
            ) from None

    def fill(self, layer: int, packing: Packing, parts: list[np.ndarray]) -> None:
        sharding = SingleDeviceSharding(self.cpu)
        infos = {leaf.name: self.plan.parameters[f"layers.{layer}.{leaf.name}"] for leaf in packing.leaves}
        targets = {f"layers.{layer}.{name}": _target(info, sharding) for name, info in infos.items()}
        loaded = self.pretrained.load(self.plan.layout, targets, progress=False, seed=self.seed)
        views = [packing.views(part) for part in parts]
        jobs = []
        for leaf in packing.leaves:
            values = np.asarray(loaded[f"layers.{layer}.{leaf.name}"])
            for part, view in enumerate(views):
                index = [slice(None)] * values.ndim
                if leaf.axis is not None:
                    size = leaf.shape[leaf.axis]
                    index[leaf.axis] = slice(part * size, (part + 1) * size)
                jobs.append(partial(_copy, values[tuple(index)], view[leaf.name]))
        with ThreadPoolExecutor(threads(), "jaxinfer-pack") as pool:
            for _ in pool.map(lambda job: job(), jobs):
                pass


def _target(info: ParameterInfo, sharding: Any) -> Target:
    return Target(info.shape, info.dtype, sharding, info.quantization)


def _copy(values: np.ndarray, out: np.ndarray) -> None:
    if values.dtype != out.dtype:
        two_to_a_byte(values, out)
        return
    # As plain integers: numpy holds the interpreter lock while it copies bfloat16.
    unsigned = f"u{out.itemsize}"
    np.copyto(out.view(unsigned), values.view(unsigned))
