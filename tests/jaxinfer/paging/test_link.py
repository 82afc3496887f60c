"""Transfers to several devices: what arrives, when the host's buffer may be used again, and what is noted."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.parameter import ParameterInfo
from jaxinfer.paging import link as links
from jaxinfer.paging.link import Link, measure
from jaxinfer.paging.packing import Packing
from jaxinfer.paging.timeline import Timeline
from sharding import ShardingRules, TensorLimits, make_mesh


@pytest.fixture(params=[{"tensor": 1}, {"data": 2, "tensor": 2}], ids=str)
def mesh(request):
    return make_mesh(request.param, TensorLimits(heads=2, kv_heads=2, intermediate=2))


@pytest.fixture
def packing(mesh, monkeypatch):
    monkeypatch.setattr("jaxinfer.paging.packing.SMALL_BYTES", 1024)
    infos = {
        "up": ParameterInfo((64, 32), jnp.dtype(jnp.float32), ("mlp", "hidden")),
        "norm": ParameterInfo((32,), jnp.dtype(jnp.float32), ("hidden",)),
    }
    return Packing.of(infos, ShardingRules(), dict(mesh.shape))


def filled(packing, number):
    buffers = [np.zeros(packing.nbytes, np.uint8) for _ in range(packing.parts)]
    for part, buffer in enumerate(buffers):
        views = packing.views(buffer)
        views["up"][...] = 100 * number + part
        views["norm"][...] = number
    return buffers


def test_each_device_gets_its_part_and_keeps_it(mesh, packing):
    timeline = Timeline()
    link = Link(mesh, timeline)
    buffers, landed = filled(packing, 3), threading.Event()
    ticket = link.send(7, packing, buffers, landed.set)
    up, norm = ticket.arrays()
    assert ticket.landed.wait(10)
    assert landed.is_set()
    for buffer in buffers:
        buffer.fill(255)  # the host's memory is free for the next layer
    assert up.shape == (64, 32)
    for shard in up.addressable_shards:
        part = (shard.index[0].start or 0) // (64 // packing.parts)
        assert np.all(np.asarray(shard.data) == 300 + part)
    for shard in norm.addressable_shards:
        assert np.all(np.asarray(shard.data).view(np.float32) == 3)
    link.close()
    (event,) = timeline.events
    assert (event.kind, event.layer, event.nbytes) == ("link", 7, packing.moved_bytes * mesh.size)
    assert event.end >= event.start


def test_arrays_are_gone_once_they_are_dropped(mesh, packing):
    link = Link(mesh, Timeline())
    before = len(jax.live_arrays())
    ticket = link.send(0, packing, filled(packing, 1))
    ticket.arrays()
    ticket.landed.wait(10)
    assert len(jax.live_arrays()) == before + 2
    ticket.drop()
    link.close()
    assert len(jax.live_arrays()) == before


def test_a_transfer_that_fails_says_so_and_the_next_one_works(mesh, packing, monkeypatch):
    link = Link(mesh, Timeline())

    def broken(*_):
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(link, "_put", broken)
        ticket = link.send(0, packing, filled(packing, 1))
        with pytest.raises(RuntimeError, match="the device is gone"):
            ticket.arrays()
    assert ticket.landed.wait(10)
    assert len(link.send(0, packing, filled(packing, 1)).arrays()) == 2
    link.close()
    link.close()


def test_a_buffer_that_is_forgotten_is_nobodys(mesh, packing, monkeypatch):
    link = Link(mesh, Timeline())
    put = link._put
    # As on an accelerator, where a transfer is issued at once and its views are remembered for the next time.
    monkeypatch.setattr(link, "copies", False)
    monkeypatch.setattr(link, "_put", lambda layout, parts: put(layout, [[a.copy() for a in part] for part in parts]))
    buffers = filled(packing, 1)
    held = [weakref.ref(buffer) for buffer in buffers]
    assert link.send(0, packing, buffers).landed.wait(10)
    del buffers
    assert all(buffer() is not None for buffer in held)
    link.forget()
    deadline = time.monotonic() + 10  # the thread lets go of what it was given a moment after
    while any(buffer() is not None for buffer in held) and time.monotonic() < deadline:
        gc.collect()
    assert all(buffer() is None for buffer in held)
    link.close()


def test_the_rate_is_that_of_the_bytes(mesh, monkeypatch):
    monkeypatch.setitem(links.PROBE_BYTES, "cpu", 1 << 20)
    assert 1e6 < measure(list(mesh.devices.flat)) < 1e12
