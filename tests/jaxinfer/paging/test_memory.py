"""Host buffers; that of a driver is stood in for by a client that notes what is asked of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxinfer.errors import CapacityError
from jaxinfer.paging import memory
from jaxinfer.paging.memory import HostBuffer, available, usable_host
from jaxinfer.paging.packing import PAGE


class Client:
    def __init__(self, fail=False):
        self.mapped, self.fail = {}, fail

    def dma_map(self, address, nbytes):
        if self.fail:
            raise RuntimeError("cuMemHostRegister failed:\n out of memory")
        self.mapped[address] = nbytes

    def dma_unmap(self, address):
        del self.mapped[address]


def test_a_buffer_starts_on_a_page_and_is_writable():
    buffer = HostBuffer(10_001, jax.devices()[0])
    assert buffer.array.shape == (10_001,)
    assert buffer.array.ctypes.data % PAGE == 0
    buffer.array.fill(7)
    buffer.close()
    buffer.close()
    assert buffer.array.size == 0


def test_a_buffer_of_an_accelerator_is_registered_once_at_its_exact_size():
    client = Client()
    buffer = HostBuffer(12_345, SimpleNamespace(platform="gpu", client=client))
    assert client.mapped == {buffer.array.ctypes.data: 12_345}
    buffer.close()
    assert client.mapped == {}
    buffer.close()


def test_memory_is_there_before_it_is_registered():
    """The driver would have its pages one by one."""
    found = []

    class Watching(Client):
        def dma_map(self, address, nbytes):
            lines = iter(Path("/proc/self/smaps").read_text(encoding="ascii").splitlines())
            span = next(line for line in lines if line.startswith(f"{address:x}-"))
            found.append(next(int(line.split()[1]) << 10 for line in lines if line.startswith("Rss:")))
            assert int(span.split()[0].split("-")[1], 16) - address >= nbytes

    size = (64 << 20) + 3 * PAGE
    HostBuffer(size, SimpleNamespace(platform="gpu", client=Watching()))
    assert found == [size]


def test_what_the_driver_refuses_is_an_error_of_one_line():
    with pytest.raises(CapacityError, match=r"12 bytes cannot be registered with the driver: cuMem.* out of memory"):
        HostBuffer(12, SimpleNamespace(platform="gpu", client=Client(fail=True)))


def test_more_than_there_is_is_an_error():
    with pytest.raises(CapacityError, match="bytes cannot be had"):
        HostBuffer(1 << 60, jax.devices()[0])


def test_what_is_free_is_less_than_all_there_is():
    import psutil

    assert 0 < available() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("offload", "given", "expected"), [(None, None, None), ("host", 5, 5), ("auto", None, 80), ("disk", "2GB", "2GB")]
)
def test_a_share_of_what_is_free_is_used_where_nobody_says(offload, given, expected, monkeypatch):
    monkeypatch.setattr(memory, "available", lambda: 100)
    assert usable_host(offload, given) == expected


def test_views_keep_the_memory():
    buffer = HostBuffer(4096, jax.devices()[0])
    buffer.array[:] = np.arange(4096) % 251
    view = buffer.array[100:200]
    buffer.close()
    np.testing.assert_array_equal(view, np.arange(100, 200) % 251)
