"""Where layers are put, against what is counted by hand; and what that bounds."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import jaxinfer
from jaxinfer.errors import CapacityError, ConfigError
from jaxinfer.hardware import KNOWN, Hardware
from jaxinfer.models.families import load_spec
from jaxinfer.paging.tiers import Tiers, bounds, layer_packings, rows
from jaxinfer.plan import USABLE, make_plan
from tests.cases import case
from tests.oracle import checkpoint, shared_root

DEVICE = Hardware(kind="GPU", memory=1 << 40, bandwidth=4e12, matmul=8e14, link=5e10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoint(case("gemma2-plain"), shared_root(tmp_path_factory))


@pytest.fixture(scope="module")
def spec(folder):
    return load_spec(folder)


def planned(spec, offload, **options):
    return make_plan(spec, {"tensor": 1}, "float32", DEVICE, max_batch=4, offload=offload, **options)


def test_bytes_are_those_of_the_parameters(spec):
    plan = planned(spec, "host")
    tiers = plan.tiers
    own = [
        sum(info.nbytes for path, info in plan.parameters.items() if path.startswith(f"layers.{layer}."))
        for layer in range(4)
    ]
    ends = sum(info.nbytes for path, info in plan.parameters.items() if not path.startswith("layers."))
    for got, expected in zip(tiers.layer_bytes, own, strict=True):
        assert expected <= got <= expected + 64 * 12  # each small one begins at a multiple of 64
    assert tiers.layers == ("host",) * 4
    assert tiers.device_bytes == tiers.slots * max(tiers.layer_bytes)
    assert plan.weight_bytes_per_device == ends + tiers.device_bytes
    assert tiers.host_bytes == sum(tiers.buffer_bytes)
    assert tiers.moved_bytes == sum(tiers.layer_bytes)
    assert (tiers.disk_bytes, tiers.ring_slots) == (0, 0)


def test_parts_of_several_devices_add_up_on_the_host(spec):
    one, two = (make_plan(spec, {"tensor": n}, "float32", DEVICE, offload="disk") for n in (1, 2))
    assert max(two.tiers.layer_bytes) < 0.6 * max(one.tiers.layer_bytes)
    assert two.tiers.disk_bytes >= one.tiers.disk_bytes
    assert two.tiers.ring_slots == 4
    assert two.tiers.host_bytes == 4 * max(two.tiers.buffer_bytes)
    beside = {what: rest for what, _, rest in rows(two)}
    assert beside["host"] == "for all devices, 4 buffers for disk"
    assert beside["disk"] == "for all devices, read at every pass"
    assert "for all devices" not in str(one)


@given(st.integers(1, 60), st.integers(0, 12))
def test_auto_keeps_within_both_memories(spec, device, host):
    whole = planned(spec, "host", kv_blocks=8, prefill_tokens=128)
    layer, buffer = max(whole.tiers.layer_bytes), max(whole.tiers.buffer_bytes)
    cap, room = device * layer, max(1, host * buffer)
    try:
        plan = planned(spec, "auto", kv_blocks=8, prefill_tokens=128, device_memory=cap, host_memory=room)
    except CapacityError:
        with pytest.raises(CapacityError):  # what is asked for least does not fit either
            planned(spec, "disk", kv_blocks=8, prefill_tokens=128, device_memory=cap, host_memory=room)
        return
    assert plan.total_bytes_per_device <= cap
    assert plan.fits
    assume(plan.tiers is not None)
    assert plan.tiers.host_bytes <= room
    kept = len(plan.tiers.of("device"))
    if kept < 4:  # one more would not have fitted
        assert plan.total_bytes_per_device + layer > cap or plan.tiers.device_bytes == 4 * layer
    if plan.tiers.of("disk"):
        assert plan.tiers.host_bytes + buffer > room or plan.tiers.ring_slots > 0


def test_what_stays_is_spread(spec):
    plan = planned(spec, "host", kv_blocks=8, prefill_tokens=128)
    layer, needed = max(plan.tiers.layer_bytes), plan.total_bytes_per_device
    found = set()
    for cap in range(needed // 4, needed, layer // 2):
        try:
            tiers = planned(spec, "auto", kv_blocks=8, prefill_tokens=128, device_memory=cap).tiers
        except CapacityError:
            continue
        if tiers is not None:
            found.add("".join(tier[0] for tier in tiers.layers))
    assert {"hhhh", "hhhd", "hdhd", "hddd"} <= found


def test_too_little_memory_is_said_in_numbers(spec):
    with pytest.raises(CapacityError, match=r"device memory: paging needs .* at least \(2 layers of .*got 1\.00 KB"):
        planned(spec, "disk", device_memory=1000)
    with pytest.raises(CapacityError, match=r"host memory: 4 layers need .*offload='auto' keeps the rest on disk"):
        planned(spec, "host", host_memory="1KB")
    with pytest.raises(CapacityError, match="4 buffers, through which layers come from disk, need"):
        planned(spec, "disk", host_memory="1KB")
    with pytest.raises(ConfigError, match="jaxinfer convert"):
        planned(spec, "disk", on_disk=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "gpu"}, "offload: expected None or one of host, disk, auto, got 'gpu'"),
        ({"offload": None, "host_memory": 5}, "host_memory: only with offload"),
        ({"kv_offload": "host", "offload": None}, "kv_offload: only with offload"),
        ({"kv_offload": "disk", "offload": "host"}, "kv_offload: expected None or one of host, auto, got 'disk'"),
        ({"kv_offload": "auto", "offload": "host", "kv_blocks": 5}, "kv_blocks: not with kv_offload"),
        ({"offload": "host", "device_memory": "lots"}, "device_memory: expected bytes"),
    ],
)
def test_wrong_options_are_refused_by_name(spec, options, message):
    with pytest.raises(ConfigError, match=message):
        planned(spec, **options)


def test_a_cache_in_host_memory_is_counted_there_and_its_windows_on_the_device(spec):
    longest = 200  # 4 blocks
    shape = {"max_model_len": longest, "prefill_tokens": 128}
    here, there = planned(spec, "host", **shape), planned(spec, "host", kv_offload="host", **shape)
    tiers = there.tiers
    assert (here.tiers.kv_rows, here.tiers.kv_bytes, here.slot_blocks) == (None, 0, None)
    assert tiers.kv_rows == there.slots == 4  # all of them fit into a window
    assert there.slot_blocks == 4
    block = here.block_bytes_per_device
    assert tiers.kv_bytes >= 4 * 4 * block
    assert tiers.kv_bytes <= 4 * 4 * block + 2 * 4 * 4096 * 4  # whole pages
    assert tiers.host_bytes == here.tiers.host_bytes + tiers.kv_bytes
    blocks = max(4 * 4, there.micro_blocks)
    assert there.cache_bytes_per_device == 2 * blocks * block // spec.num_layers
    found = bounds(there)
    assert found.link_ms == pytest.approx(1e3 * (tiers.moved_bytes + 4 * 4 * block) / 5e10)
    assert there.step_milliseconds(1, 64) == pytest.approx(1e3 * (tiers.moved_bytes + 4 * block) / 5e10)
    assert bounds(here).link_ms == pytest.approx(1e3 * tiers.moved_bytes / 5e10)
    text = str(there)
    assert "KV cache in host memory" in text
    assert "1 x 4 sequences a shard" in text
    assert there.to_dict()["paging"]["kv"]["tier"] == "host"
    assert here.to_dict()["paging"]["kv"]["tier"] == "device"


def test_groups_divide_the_slots_and_windows_stay_within_their_share(spec, monkeypatch):
    for slots in (6, 7, 12):
        plan = planned_for(spec, slots, kv_offload="host")
        row = plan.longest_blocks * plan.block_bytes_per_device // spec.num_layers
        monkeypatch.setattr("jaxinfer.paging.tiers.KV_WINDOW_BYTES", 4 * row)
        rows = planned_for(spec, slots, kv_offload="host").tiers.kv_rows
        assert rows == {6: 3, 7: 1, 12: 4}[slots]
        monkeypatch.undo()


def planned_for(spec, slots, **options):
    return make_plan(spec, {"tensor": 1}, "float32", DEVICE, max_batch=slots, offload="host", **options)


def test_auto_moves_the_cache_where_that_gives_more_tokens_a_second(spec):
    """Of 8 slots, as many as fit on the device share a pass of the layers; all of them share a longer one."""
    shape = {"max_model_len": 200, "prefill_tokens": 128}
    whole = planned_for(spec, 8, **shape)
    each = whole.longest_blocks * whole.block_bytes_per_device
    layers = sum(whole.tiers.layer_bytes)
    fixed = whole.total_bytes_per_device - whole.cache_bytes_per_device
    seen = set()
    for cap in range(fixed // 8, fixed + 9 * each, each // 2):
        try:
            here = planned_for(spec, 8, device_memory=cap, **shape)
        except CapacityError:
            continue
        fitting = (here.num_blocks - 1) // 4
        found = planned_for(spec, 8, kv_offload="auto", device_memory=cap, **shape)
        better = fitting < 8 and 8 / (layers + 8 * each) > fitting / layers
        assert found.tiers.kv_rows is None or better
        if found.tiers.kv_rows is None and better:
            windows = 2 * max(4, here.micro_blocks) * here.block_bytes_per_device // spec.num_layers
            assert here.total_bytes_per_device - here.cache_bytes_per_device + windows > cap
            continue
        assert found.fits
        assert found.total_bytes_per_device <= cap
        seen.add(better)
    assert seen == {True, False}


def test_a_cache_that_no_memory_holds_is_said_in_numbers(spec):
    with pytest.raises(CapacityError, match=r"device memory: .* 2 windows of the KV cache of .*got 1\.00 KB"):
        planned(spec, "host", kv_offload="host", device_memory=1000)
    with pytest.raises(CapacityError, match="host memory: 4 layers and the KV cache need"):
        planned(spec, "host", kv_offload="host", host_memory="1KB")
    with pytest.raises(CapacityError, match=r"host memory: the KV cache of .* and 4 buffers, through which"):
        planned(spec, "disk", kv_offload="host", host_memory="1KB")


def test_the_slowest_link_bounds_a_step(spec):
    plan = planned(spec, "disk", prefill_tokens=128)
    tiers = dataclasses.replace(plan.tiers, disk=1e9)
    slow = dataclasses.replace(plan, tiers=tiers)
    found = bounds(slow)
    assert found.by == "disk"
    assert found.disk_ms == pytest.approx(1e3 * tiers.disk_bytes / 1e9)
    assert found.link_ms == pytest.approx(1e3 * tiers.moved_bytes / 5e10)
    assert found.step_ms == found.disk_ms == slow.step_milliseconds(1, 64)
    flops = slow.prefill_flops(1, 1)
    assert found.hidden_from * flops / 8e14 == pytest.approx(found.disk_ms / 1e3, rel=1e-3)
    assert bounds(plan).by is None  # the disk's rate is not known
    fast = dataclasses.replace(plan, tiers=dataclasses.replace(plan.tiers, disk=1e13))
    assert bounds(fast).by == "link"


def test_a_paged_plan_is_shown_and_written(folder):
    plan = jaxinfer.plan(folder, offload="host", device="H200", host_memory="1GB")
    text = str(plan)
    assert "0 stay, 4 in host memory, 0 on disk" in text
    assert "53 GB/s" in text
    assert "ms a decode step" in text
    written = json.loads(json.dumps(plan.to_dict()))
    assert written["paging"]["layers"] == {"device": [], "host": [0, 1, 2, 3], "disk": []}
    assert written["tiers"]["host"] == plan.tiers.host_bytes
    assert written["paging"]["bounds"]["by"] == "link"


def test_passes_are_long_and_steps_short_where_layers_are_paged(spec):
    paged, plain = planned(spec, "host"), planned(spec, None)
    assert (plain.decode_chunk, plain.prefill_tokens, plain.micro_tokens) == (16, 2048, 2048)
    assert (paged.decode_chunk, paged.prefill_tokens, paged.micro_tokens) == (1, 32768, 4096)
    assert paged.prefill_chunk == min(32768, paged.max_model_len)
    small = planned(spec, "host", device_memory="6MB")
    assert small.prefill_tokens * spec.hidden * 4 <= 600_000
    assert small.total_bytes_per_device <= 6_000_000


def test_a_third_slot_is_taken_where_a_layer_is_a_small_part_of_the_memory(spec):
    layer = max(planned(spec, "host").tiers.layer_bytes)
    for cap, slots in ((16 * layer, 3), (16 * layer - 1, 2)):
        plan = make_plan(spec, {"tensor": 1}, "float32", DEVICE, offload="host", device_memory=cap, must_fit=False)
        assert plan.tiers.slots == slots
        assert plan.tiers.device_bytes == slots * layer


def test_every_layer_has_its_parameters_in_the_order_of_the_leaves(spec):
    plan = planned(spec, "host")
    packings = layer_packings(plan.parameters, 4, plan.rules, plan.mesh)
    for layer, packing in enumerate(packings):
        names = [path.split(".", 2)[2] for path in plan.parameters if path.startswith(f"layers.{layer}.")]
        assert [leaf.name for leaf in packing.leaves] == names


def test_the_default_of_a_device_is_what_it_can_use(spec):
    assert planned(spec, "host").tiers.device_memory == int(DEVICE.memory * USABLE)
    assert KNOWN["H200"].link == 5.3e10
    assert Tiers(offload="host", layers=("device",), layer_bytes=(5,), buffer_bytes=(6,)).device_bytes == 5
