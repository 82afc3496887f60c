"""Layers read from a store: the bytes that a load has, on one device and several; damage, gone files, slow disks."""

from __future__ import annotations

import os
import shutil
import time

import jax
import numpy as np
import pytest

import jaxinfer
from jaxinfer import SamplingParams
from jaxinfer.checkpoints.store import Store
from jaxinfer.errors import CheckpointError
from jaxinfer.paging.disk import DiskLayers, measure
from tests.engines import of
from tests.stores import converted, copied, data_file

GREEDY = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
PROMPT = [5, 17, 4]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return converted(tmp_path_factory)


@pytest.fixture(scope="module")
def expected(good):
    with of(good) as engine:
        return engine.generate(PROMPT, GREEDY).outputs[0].token_ids


def tokens(engine):
    return engine.generate(PROMPT, GREEDY).outputs[0].token_ids


def flip(store, group):
    path = data_file(store, group)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("mesh", [{"tensor": 1}, {"tensor": 4}], ids=str)
@pytest.mark.parametrize("direct", [False, True])
def test_both_ways_of_reading_give_the_bytes_of_a_load(good, mesh, direct):
    with of(good, mesh=mesh) as resident, of(good, mesh=mesh, offload="disk") as paged:
        pager = paged.executor.pager
        source = pager.disk
        layers = DiskLayers(Store(good, direct=direct), source.moves, pager.timeline)
        for attempt in ("verified", "as it is"):
            for layer in range(2):
                packing = pager.packings[layer]
                buffers = [np.full(packing.nbytes, 255, np.uint8) for _ in range(packing.parts)]
                layers.read(layer, packing, buffers)
                assert layer in layers.verified
                for leaf in packing.leaves:
                    whole = resident.executor.parameters[f"layers.{layer}.{leaf.name}"]
                    for shard in whole.addressable_shards:
                        part = 0 if leaf.axis is None else (shard.index[leaf.axis].start or 0) // leaf.shape[leaf.axis]
                        got = packing.views(buffers[part])[leaf.name]
                        np.testing.assert_array_equal(got, np.asarray(shard.data), f"{attempt}: {leaf.name}")
        layers.close()


def test_a_flipped_bit_is_found_before_it_is_computed_with(good, tmp_path, expected):
    store = copied(good, tmp_path / "store")
    flip(store, "layers.1")
    with of(store, offload="disk") as engine:
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"weights/layers\.1: tensor layers\.1\.\S+, chunk .* damaged"):
                tokens(engine)
        assert engine.executor.passes == 0
        shutil.copy(data_file(good, "layers.1"), data_file(store, "layers.1"))
        assert tokens(engine) == expected


@pytest.mark.parametrize("offload", ["host", "auto"])
def test_a_flipped_bit_is_found_when_host_memory_is_filled(good, tmp_path, offload):
    store = copied(good, tmp_path / "store")
    flip(store, "layers.0")
    options = {"device_memory": "100MB", "max_model_len": 64} if offload == "auto" else {}
    with pytest.raises(CheckpointError, match=r"layers\.0: tensor layers\.0\.\S+, chunk .* damaged"):
        of(store, offload=offload, **options)


@pytest.mark.parametrize("fault", ["gone", "truncated"])
def test_a_file_that_goes_while_it_is_used_is_an_error_that_names_it(good, tmp_path, fault, expected):
    store = copied(good, tmp_path / "store")
    with of(store, offload="disk") as engine:
        assert tokens(engine) == expected
        path = data_file(store, "layers.1")
        if fault == "gone":
            path.rename(tmp_path / "elsewhere")
        else:
            shutil.copy(path, tmp_path / "elsewhere")
            os.truncate(path, 1000)
        message = r"layers\.1: tensor layers\.1\.\S+: expected \d+ bytes, cannot be read"
        with pytest.raises(CheckpointError, match=message):
            tokens(engine)  # what was read ahead is still good, and there is no more than a pass of that
        shutil.copy(tmp_path / "elsewhere", path)
        assert tokens(engine) == expected


def test_an_engine_whose_files_are_gone_can_be_closed(good, tmp_path):
    store = copied(good, tmp_path / "store")
    before = len(jax.live_arrays())
    with of(store, offload="disk") as engine:
        shutil.rmtree(store)
        with pytest.raises(CheckpointError):
            tokens(engine)
    assert len(jax.live_arrays()) <= before + 1


def test_a_slow_disk_is_only_slow_and_is_reported(good, expected, monkeypatch):
    fetch = Store.fetch

    def slow(self, tensor, box, out):
        wait = fetch(self, tensor, box, out)
        return lambda: (time.sleep(0.01), wait())[1]

    with of(good, offload="disk") as engine:
        assert tokens(engine) == expected
        engine.executor.pager.timeline.clear()
        monkeypatch.setattr(Store, "fetch", slow)
        assert tokens(engine) == expected
        found = engine.offload_report()
    waited = found["waited_seconds"]
    assert waited["disk"] > 0.1
    assert waited["disk"] > waited["link"] + waited["compute"]


def test_a_folder_cannot_be_read_at_every_step(good, tmp_path_factory):
    from tests.stores import source

    with pytest.raises(jaxinfer.ConfigError, match="jaxinfer convert"):
        of(source(tmp_path_factory), offload="disk")


def test_a_store_of_another_dtype_is_refused(good):
    with pytest.raises(jaxinfer.ConfigError, match=r"another dtype: layers\.0\.\S+ \(expected bfloat16, got float32\)"):
        of(good, offload="disk", dtype="bfloat16")
    with of(good, offload="host", dtype="bfloat16") as engine:  # casts happen while host memory is filled
        assert len(tokens(engine)) == 4


def test_the_disk_s_rate_is_measured(good):
    with Store(good) as store:
        assert 1e4 < measure(store) < 1e12
