"""From a store onto meshes: bit for bit what a load from the safetensors gives; what is read; what a fault does."""

from __future__ import annotations

import sys
import threading
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxinfer.checkpoints import restore as function
from jaxinfer.checkpoints.convert import convert
from jaxinfer.checkpoints.loader import Target
from jaxinfer.checkpoints.store import Store
from jaxinfer.errors import CheckpointError
from jaxinfer.executor import Executor
from jaxinfer.hardware import of
from jaxinfer.models.relayout import Move
from jaxinfer.plan import make_plan
from jaxinfer.pretrained import Pretrained
from sharding import make_mesh
from tests.cases import case
from tests.oracle import checkpoint, shared_root
from tests.stores import converted, copied, data_file, source


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return converted(tmp_path_factory)


def loaded(model, mesh, dtype=None):
    """All parameters on a mesh, as the engine has them loaded."""
    with Pretrained(model) as pretrained:
        devices = make_mesh(mesh, pretrained.limits)
        plan = make_plan(
            pretrained.spec, dict(devices.shape), dtype or pretrained.dtype, of(devices.devices.flat[0]), kv_blocks=2
        )
        places = Executor.placements(plan, devices)
        targets = {path: Target(info.shape, info.dtype, places[path]) for path, info in plan.parameters.items()}
        return pretrained.load(plan.layout, targets, progress=False)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert found[path].sharding == array.sharding
        assert found[path].dtype == array.dtype
        for got, want in zip(found[path].addressable_shards, array.addressable_shards, strict=True):
            assert got.device == want.device
            np.testing.assert_array_equal(np.asarray(got.data), np.asarray(want.data), err_msg=path)


@pytest.mark.parametrize("mesh", [{"tensor": 1}, {"tensor": 4}, {"data": 2, "tensor": 2}], ids=str)
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_a_store_loads_as_its_checkpoint_does(store, tmp_path_factory, mesh, dtype):
    """tensor=4: more devices than key/value heads, and a vocabulary of 101 that is padded."""
    assert_same(loaded(store, mesh, dtype), loaded(source(tmp_path_factory), mesh, dtype))


@pytest.mark.parametrize("name", ["gpt2-plain", "falcon-multi-query"])
def test_other_families(name, tmp_path_factory, tmp_path):
    folder = checkpoint(case(name), shared_root(tmp_path_factory))
    made = convert(folder, tmp_path / "store", "bfloat16", progress=False)
    assert_same(loaded(made, {"tensor": 2}), loaded(folder, {"tensor": 2}, "bfloat16"))


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """A store whose chunks have 512 bytes, so that shards and chunks cut across each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxinfer.checkpoints.convert.CHUNK_BYTES", 512)
        return converted(tmp_path_factory)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_chunks_that_shards_cut_across(cut, tmp_path_factory, dtype):
    with Store(cut) as opened:
        assert max(len(tensor.digests) for tensor in opened.tensors.values()) > 20
    for mesh in ({"tensor": 4}, {"data": 2, "tensor": 2}):
        assert_same(loaded(cut, mesh, dtype), loaded(source(tmp_path_factory), mesh, dtype))


class Recording(Store):
    """A store that remembers which chunks were read, and can be slow or broken."""

    def __init__(self, path, delay=0.0, broken=None):
        super().__init__(path)
        self.reads, self.delay, self.broken, self.lock = [], delay, broken, threading.Lock()

    def read(self, tensor, index, box, out):
        time.sleep(self.delay)
        if (tensor.path, index) == self.broken:
            raise CheckpointError("broken")
        super().read(tensor, index, box, out)
        with self.lock:
            self.reads.append((tensor.path, index))


def one(store, devices, spec, path="embed.tokens"):
    tensor = store.tensors[path]
    everything = tuple(slice(0, size) for size in tensor.shape)
    sharding = NamedSharding(Mesh(np.array(devices), ("x",)), spec)
    target = Target(tensor.shape, tensor.dtype, sharding)
    return function(store, {path: [Move(everything, everything)]}, {path: target})[path]


def test_each_chunk_is_read_once(cut):
    with Recording(cut) as opened:
        one(opened, jax.devices(), PartitionSpec(None, "x"))
        assert sorted(opened.reads) == [("embed.tokens", i) for i in range(len(opened.tensors["embed.tokens"].digests))]


def test_only_the_chunks_of_this_process_are_read(cut, monkeypatch):
    """Two of eight shards are taken to be this process's."""
    module = sys.modules["jaxinfer.checkpoints.restore"]  # the package has the function under this name
    tensor = Store(cut).tensors["layers.0.mlp.down"]
    whole = module.shards_of
    monkeypatch.setattr(module, "shards_of", lambda target: whole(target)[:2])
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", lambda *a, **k: a[2])
    with Recording(cut) as opened:
        arrays = one(opened, jax.devices(), PartitionSpec(None, "x"), tensor.path)
        columns = tensor.shape[1] // 4
        needed = [i for i, box in enumerate(tensor.boxes()) if box[1].start < columns]
        assert sorted(index for _, index in opened.reads) == needed
        assert len(needed) < len(tensor.digests)
    assert [array.shape for array in arrays] == [(tensor.shape[0], tensor.shape[1] // 8)] * 2


def test_arrays_outlive_the_store(store, tmp_path):
    folder = copied(store, tmp_path / "store")
    with Store(folder) as opened:
        array = one(opened, jax.devices()[:1], PartitionSpec())
    expected = np.asarray(array).copy()
    for file in folder.rglob("d/*"):
        file.write_bytes(bytes(file.stat().st_size))
    np.testing.assert_array_equal(np.asarray(array), expected)


def test_a_slow_disk_is_waited_for(cut):
    with Recording(cut, delay=0.002) as opened, Store(cut) as fast:
        slow = one(opened, jax.devices()[:2], PartitionSpec())
        np.testing.assert_array_equal(np.asarray(slow), np.asarray(one(fast, jax.devices()[:2], PartitionSpec())))


def test_a_fault_ends_a_slow_load_at_once(cut):
    with Recording(cut, delay=0.05, broken=("embed.tokens", 1)) as opened:
        start = time.monotonic()
        with pytest.raises(CheckpointError, match="broken"):
            one(opened, jax.devices()[:1], PartitionSpec())
        assert time.monotonic() - start < 2
        assert len(opened.reads) < len(opened.tensors["embed.tokens"].digests) // 2


def test_damage_is_an_error_and_gives_no_array(store, tmp_path):
    folder = copied(store, tmp_path / "store")
    file = data_file(folder, "layers.0")
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tensor layers\.0\..*damaged"):
        loaded(folder, {"tensor": 2})
