"""From checkpoints to host buffers: the bytes that a resident engine holds, in any tier and dtype."""

from __future__ import annotations

import numpy as np
import pytest

from jaxinfer.checkpoints import Store
from jaxinfer.errors import CapacityError
from jaxinfer.paging import start
from jaxinfer.paging.memory import HostBuffer
from tests.engines import of
from tests.stores import converted, copied, source


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return converted(tmp_path_factory)


@pytest.mark.parametrize("mesh", [{"tensor": 1}, {"data": 2, "tensor": 4}], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_host_memory_holds_the_bytes_of_a_resident_engine(good, tmp_path_factory, mesh, dtype):
    for place in (good, source(tmp_path_factory)):
        with of(place, mesh=mesh, dtype=dtype) as resident, of(place, mesh=mesh, dtype=dtype, offload="host") as paged:
            pager = paged.executor.pager
            for layer, parts in pager.host.items():
                packing = pager.packings[layer]
                assert len(parts) == mesh["tensor"]
                for leaf in packing.leaves:
                    for shard in resident.executor.parameters[f"layers.{layer}.{leaf.name}"].addressable_shards:
                        part = 0 if leaf.axis is None else (shard.index[leaf.axis].start or 0) // leaf.shape[leaf.axis]
                        got = packing.views(parts[part])[leaf.name]
                        unsigned = f"u{got.itemsize}"
                        np.testing.assert_array_equal(got.view(unsigned), np.asarray(shard.data).view(unsigned))


def test_rates_are_measured_where_they_bound(good):
    with of(good, offload="host") as host, of(good, offload="disk") as disk:
        assert host.plan.hardware.link > 0
        assert host.plan.tiers.disk is None
        assert disk.plan.tiers.disk > 0
        assert disk.plan.tiers.ring_slots == 2  # no more than layers


def test_the_page_cache_is_passed_by_where_it_cannot_hold_the_layers(good, monkeypatch):
    modes = []
    opened = Store.__init__

    def watched(self, path, *, direct=False, **more):
        modes.append(direct)
        opened(self, path, direct=direct, **more)

    monkeypatch.setattr(Store, "__init__", watched)
    for free in (1 << 40, 0):
        monkeypatch.setattr(start, "available", lambda free=free: free)
        with of(good, offload="disk", host_memory="1GB") as engine:
            assert len(engine.generate([3, 4, 5]).outputs[0].token_ids) > 0
    assert modes == [False, False, False, True]  # the checkpoint, then the layers; twice


def test_what_was_opened_is_closed_when_something_fails(good, tmp_path, monkeypatch):
    closed = []
    close = HostBuffer.close
    monkeypatch.setattr(HostBuffer, "close", lambda self: (closed.append(self), close(self))[1])
    made = []
    register = HostBuffer.__init__

    def limited(self, nbytes, device):
        made.append(self)
        if len(made) > 2:
            raise CapacityError("host memory: no more")
        register(self, nbytes, device)

    monkeypatch.setattr(HostBuffer, "__init__", limited)
    with pytest.raises(CapacityError, match="no more"):
        of(copied(good, tmp_path / "store"), offload="host")
    assert len(closed) == 2
