"""Layers read from a store: the bytes that a load has, on one device and several; damage, gone files, slow disks."""

from __future__ import annotations

import concurrent.futures
import contextlib
import gc
import os
import shutil
import threading
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tensorstore

import jaxinfer
from jaxinfer import SamplingParams
from jaxinfer.checkpoints.store import Store
from jaxinfer.errors import CheckpointError, ReadTimeoutError
from jaxinfer.paging import disk
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
    gc.collect()  # an error that was caught keeps the frames it went through
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


@contextlib.contextmanager
def hanging(store, group):
    """A file of a group that whoever opens it waits for, as on a disk that never answers."""
    path = data_file(store, group)
    aside, pipe = store / "aside", store / "pipe"
    path.rename(aside)
    os.mkfifo(path)
    try:
        yield
    finally:
        path.rename(pipe)
        aside.rename(path)
        with contextlib.suppress(OSError):  # nobody waits any more
            while True:
                os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
                time.sleep(0.01)
        pipe.unlink()


NEVER = r"weights/layers\.1: tensor layers\.1\.[^:]+: expected \d+ bytes, which did not come in [\d.]+ seconds"


def test_a_read_that_never_ends_is_an_error_and_its_buffers_are_left_alone_until_it_has(good, tmp_path):
    place = copied(good, tmp_path / "store")
    with of(good, offload="disk") as engine:
        pager = engine.executor.pager
        packing = pager.packings[1]
        expected, buffers = ([np.zeros(packing.nbytes, np.uint8)] for _ in range(2))
        pager.disk.read(1, packing, expected)
        layers = DiskLayers(Store(place, seconds=0.4), pager.disk.moves, pager.timeline)
        for first in (True, False):
            with hanging(place, "layers.1"):
                for _ in range(2):
                    start = time.perf_counter()
                    with pytest.raises(ReadTimeoutError, match=NEVER):
                        layers.read(1, packing, buffers)
                    assert time.perf_counter() - start < 5
                assert layers.verified == (set() if first else {1})
            buffers[0][:] = 0
            layers.read(1, packing, buffers)
            np.testing.assert_array_equal(buffers[0], expected[0])
            assert not any(layers._late.values())
        layers.close()


def test_what_a_read_that_was_given_up_may_still_write_to_is_used_for_nothing_else(good, monkeypatch):
    begin, outs, hangs = tensorstore.array, [], [True]

    class Never:
        def result(self, timeout):
            time.sleep(timeout)
            if hangs[0]:
                raise TimeoutError

    def array(out):
        outs.append(out)
        return SimpleNamespace(write=lambda source: Never() if hangs[0] else begin(out).write(source))

    monkeypatch.setattr(disk, "threads", lambda: 1)
    with of(good, offload="disk") as engine:
        pager = engine.executor.pager
        packing = pager.packings[0]
        layers = DiskLayers(Store(good, seconds=0.1), pager.disk.moves, pager.timeline)
    monkeypatch.setattr(tensorstore, "array", array)
    buffers = [np.zeros(packing.nbytes, np.uint8)]
    with pytest.raises(ReadTimeoutError):
        layers.read(0, packing, buffers)
    (lost,) = outs  # one has waited, the other chunks were not begun
    hangs[0] = False
    layers.read(0, packing, buffers)
    assert not any(np.shares_memory(lost, out) for out in outs[1:])

    hangs[0] = True
    outs.clear()
    for _ in range(2):
        with pytest.raises(ReadTimeoutError):
            layers.read(0, packing, buffers)
        assert len(outs) == len(packing.leaves)  # nothing new is begun for these buffers
    with pytest.raises(ReadTimeoutError):
        layers.read(0, packing, [np.zeros(packing.nbytes, np.uint8)])
    assert len(outs) == 2 * len(packing.leaves)
    hangs[0] = False
    layers.read(0, packing, buffers)
    assert len(outs) == 3 * len(packing.leaves)
    layers.close()


def test_an_engine_goes_on_when_a_disk_that_hung_is_back(good, tmp_path, monkeypatch, expected):
    monkeypatch.setattr(disk, "READ_SECONDS", 0.4)
    place = copied(good, tmp_path / "store")
    with of(place, offload="disk") as engine:
        assert tokens(engine) == expected
        with hanging(place, "layers.1"), pytest.raises(ReadTimeoutError, match=NEVER):
            tokens(engine)
        assert tokens(engine) == expected


def test_closing_does_not_wait_for_a_disk_that_hangs(good, tmp_path):
    place = copied(good, tmp_path / "store")
    before, caught = len(jax.live_arrays()), []
    with of(place, offload="disk") as engine, hanging(place, "layers.1"):
        assert engine.executor.pager.disk.store.seconds == disk.READ_SECONDS

        def ask():
            try:
                tokens(engine)
            except Exception as error:
                caught.append(type(error))

        asking = threading.Thread(target=ask)
        asking.start()
        asking.join(3)
        assert asking.is_alive()
        start = time.perf_counter()
        engine.executor.pager.close()
        asking.join(10)
        assert time.perf_counter() - start < 10
        assert issubclass(caught[0], CheckpointError | concurrent.futures.CancelledError)
    gc.collect()  # an error that was caught keeps the frames it went through
    assert len(jax.live_arrays()) <= before + 1


def test_a_disk_that_is_slow_but_alive_is_no_error(good, monkeypatch):
    """One that serves a read after another: a layer takes longer than a read may."""
    ready, begin = [0.0], tensorstore.array

    class Slow:
        def __init__(self, future):
            self.future = future
            self.ready = ready[0] = max(ready[0], time.monotonic()) + 0.1

        def result(self, timeout):
            left = self.ready - time.monotonic()
            time.sleep(max(0.0, min(timeout, left)))
            if left > timeout:
                raise TimeoutError
            return self.future.result()

    def array(out):
        return SimpleNamespace(write=lambda source: Slow(begin(out).write(source)))

    monkeypatch.setattr(disk, "threads", lambda: 2)
    with of(good, offload="disk") as engine:
        pager = engine.executor.pager
        packing = pager.packings[0]
        expected = [np.zeros(packing.nbytes, np.uint8)]
        pager.disk.read(0, packing, expected)
        layers = DiskLayers(Store(good, seconds=0.5), pager.disk.moves, pager.timeline)
    monkeypatch.setattr(tensorstore, "array", array)
    for _ in ("verified", "as it is"):
        start, buffers = time.perf_counter(), [np.zeros(packing.nbytes, np.uint8)]
        layers.read(0, packing, buffers)
        assert time.perf_counter() - start > 0.6
        np.testing.assert_array_equal(buffers[0], expected[0])
    layers.close()


def test_a_disk_that_hangs_when_its_rate_is_measured_is_an_error(good, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "READ_SECONDS", 0.3)
    place = copied(good, tmp_path / "store")
    message = r"store/weights: no byte came from disk in 0\.3 seconds"
    with Store(place) as store, hanging(place, "layers.1"), pytest.raises(ReadTimeoutError, match=message):
        measure(store)


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
