"""The order of transfers: the next one before a layer computes, never more layers than slots, and starting over."""

from __future__ import annotations

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.errors import CheckpointError
from jaxinfer.models.parameter import ParameterInfo
from jaxinfer.paging.disk import Ring
from jaxinfer.paging.link import Link
from jaxinfer.paging.packing import Packing
from jaxinfer.paging.pager import Pager
from jaxinfer.paging.timeline import Timeline
from sharding import ShardingRules, TensorLimits, make_mesh

MESH = make_mesh({"tensor": 1}, TensorLimits(heads=2, kv_heads=2, intermediate=2))
INFOS = {"weight": ParameterInfo((16,), jnp.dtype(jnp.float32), (None,))}
PACKING = Packing.of(INFOS, ShardingRules(), dict(MESH.shape))


def write(layer, buffers):
    PACKING.views(buffers[0])["weight"][...] = layer


def buffer(layer=None):
    made = [np.zeros(PACKING.nbytes, np.uint8)]
    if layer is not None:
        write(layer, made)
    return made


class Watched(Link):
    """A link that notes what is sent."""

    def __init__(self, timeline):
        super().__init__(MESH, timeline)
        self.sent = []

    def send(self, layer, *rest):
        self.sent.append(layer)
        return super().send(layer, *rest)


def pager(layers, **options):
    timeline = Timeline()
    link = Watched(timeline)
    return Pager([PACKING] * layers, link, timeline, **options)


def run_pass(one, layers, log=None):
    for layer in range(layers):
        (segment,) = one.take(layer)
        values = np.asarray(segment)[:64].view(np.float32)
        assert np.all(values == layer)
        if log is not None:
            log.append((layer, list(one.link.sent)))
        one.done(layer, jnp.zeros(()) + layer)


@pytest.mark.parametrize("slots", [2, 3])
@pytest.mark.parametrize("layers", [2, 3, 5])
def test_the_next_layer_is_on_its_way_before_one_computes(layers, slots):
    one = pager(layers, slots=slots, host={i: buffer(i) for i in range(layers)})
    log = []
    for _ in range(3):
        run_pass(one, layers, log)
        assert len(one._held) <= slots
    expected = [i % layers for i in range(3 * layers + 1)]
    assert one.link.sent == expected  # also from the last layer of a pass to the first of the next
    for number, (_, sent) in enumerate(log):
        assert sent == expected[: number + 2]
    one.close()


def test_one_paged_layer_stays_where_it_is():
    one = pager(1, host={0: buffer(0)})
    for _ in range(3):
        run_pass(one, 1)
    assert one.link.sent == [0]
    one.close()


def test_layers_that_stay_are_never_sent():
    kept = {i: [jax.device_put(PACKING.arrays(buffer(i)[0])[0])] for i in (1, 3)}
    one = pager(5, resident=kept, host={i: buffer(i) for i in (0, 2, 4)})
    for _ in range(2):
        run_pass(one, 5)
    assert one.link.sent == [0, 2, 4, 0, 2, 4, 0]
    one.close()
    assert all(leaf.is_deleted() for leaves in kept.values() for leaf in leaves)


@pytest.mark.parametrize("ring_slots", [1, 2, 4])
def test_layers_on_disk_come_through_the_ring_in_order(ring_slots):
    read, lock = [], threading.Lock()

    def fill(layer, buffers):
        with lock:
            read.append(layer)
        time.sleep(0.001 * (layer % 3))
        write(layer, buffers)

    ring = Ring([1, 2, 4, 5], [buffer() for _ in range(ring_slots)], fill)
    one = pager(6, host={0: buffer(0), 3: buffer(3)}, ring=ring)
    for _ in range(4):
        run_pass(one, 6)
    one.close()
    assert len(read) >= 16
    assert all(read.count(layer) in (4, 5) for layer in (1, 2, 4, 5))


def test_a_pass_that_was_broken_off_begins_anew():
    ring = Ring([0, 1, 2, 3, 4], [buffer() for _ in range(3)], write)
    one = pager(5, ring=ring)
    run_pass(one, 5)
    for layer in range(2):
        one.take(layer)
        one.done(layer, jnp.zeros(()))
    one.reset()
    for _ in range(2):
        run_pass(one, 5)
    one.close()


def test_a_layer_that_cannot_be_read_is_an_error_and_is_tried_again():
    broken = {3}

    def fill(layer, buffers):
        if layer in broken:
            raise CheckpointError(f"layer {layer} is damaged")
        write(layer, buffers)

    one = pager(5, ring=Ring([0, 1, 2, 3, 4], [buffer() for _ in range(2)], fill))
    for _ in range(2):
        with pytest.raises(CheckpointError, match="layer 3 is damaged"):
            run_pass(one, 5)
        one.reset()
    broken.clear()
    for _ in range(3):
        run_pass(one, 5)
    one.close()


def test_waiting_is_noted_by_what_was_waited_for():
    def fill(layer, buffers):
        time.sleep(0.05)
        write(layer, buffers)

    one = pager(4, ring=Ring([0, 1, 2, 3], [buffer(), buffer()], fill))
    run_pass(one, 4)
    one.close()
    waited = one.timeline.waited
    assert waited["disk"] > 0.05
    assert waited["disk"] > 5 * waited["link"]
    assert [event.layer for event in one.timeline.events if event.kind == "compute"][:3] == [0, 1, 2]


def test_closing_while_reads_are_under_way_waits_for_them():
    running = []

    def fill(layer, buffers):
        running.append(layer)
        time.sleep(0.05)
        write(layer, buffers)
        running.remove(layer)

    one = pager(4, ring=Ring([0, 1, 2, 3], [buffer(), buffer()], fill))
    one.close()
    assert not running
    one.close()
