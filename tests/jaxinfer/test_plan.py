from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxinfer
from jaxinfer.errors import CapacityError, ConfigError
from jaxinfer.hardware import Hardware, named
from jaxinfer.models.families import load_spec
from jaxinfer.plan import USABLE, make_plan
from jaxinfer.sizes import size
from sharding import MeshError, ShardingRules
from tests.cases import case
from tests.engines import LLAMA, tiny
from tests.modules import small_spec
from tests.oracle import checkpoint, shared_root

UNKNOWN = Hardware(kind="box", memory=None, bandwidth=None, matmul=None)
GB = 10**9


def box(memory: int | None = GB, bandwidth: float = 1e12, matmul: float = 1e14) -> Hardware:
    return Hardware(kind="box", memory=memory, bandwidth=bandwidth, matmul=matmul)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shared_root(tmp_path_factory)


@pytest.fixture(scope="module")
def folder(root):
    return checkpoint(case(LLAMA), root)


@pytest.fixture(scope="module")
def spec(folder):
    return load_spec(folder)


@pytest.mark.parametrize("name", [LLAMA, "gpt2-plain", "llama-multi-query"])
@pytest.mark.parametrize("mesh", [{"tensor": 1}, {"data": 2, "tensor": 4}], ids=str)
@pytest.mark.parametrize(("dtype", "kv_dtype"), [("float32", "auto"), ("bfloat16", "auto"), ("bfloat16", "int8")])
def test_planned_bytes_are_the_allocated_ones(root, name, mesh, dtype, kv_dtype):
    with tiny(root, name, mesh=mesh, dtype=dtype, kv_dtype=kv_dtype) as engine:
        plan = engine.plan
        for arrays, planned in (
            (engine.executor._leaves, plan.weight_bytes_per_device),
            ([array for layer in engine.executor.caches for array in layer], plan.cache_bytes_per_device),
        ):
            held: dict[Any, int] = {}
            for array in arrays:
                for shard in array.addressable_shards:
                    held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
            assert set(held.values()) == {planned}
            assert len(held) == plan.devices
        assert plan.weight_bytes == sum(leaf.nbytes for leaf in engine.executor._leaves)
        assert plan.num_blocks == plan.slots * 4 + 1  # four blocks of 64 hold the context of 256


def test_slots_and_lengths(spec):
    plan = make_plan(spec, {"data": 4}, "float32", UNKNOWN, max_batch=9, max_model_len=100, prefill_chunk=512)
    assert (plan.slots, plan.shards, plan.devices) == (3, 4, 4)
    assert plan.prefill_chunk == 100
    assert plan.num_blocks == 3 * 2 + 1
    assert plan.fits is None
    given = make_plan(spec, {"data": 4}, "float32", UNKNOWN, kv_blocks=5)
    assert given.num_blocks == 6  # and the null block


@given(memory=st.integers(10_000, 50_000_000))
@settings(max_examples=30)
def test_the_cache_takes_the_memory_there_is_and_no_more(spec, memory):
    def planned(**changes: Any) -> Any:
        return make_plan(
            spec, {"tensor": 2}, "float32", box(memory), max_batch=16, prefill_chunk=16, prefill_tokens=16, **changes
        )

    wanted = 16 * 4 + 1
    try:
        plan = planned()
    except CapacityError:
        plan = planned(must_fit=False)
        assert not plan.fits
        assert plan.num_blocks == 5  # one sequence of full length
        return
    assert plan.fits
    assert plan.total_bytes_per_device <= memory * USABLE
    assert 2 <= plan.num_blocks <= wanted
    assert plan.num_blocks == wanted or plan.total_bytes_per_device + plan.block_bytes_per_device > memory * USABLE


def test_blocks_that_were_asked_for_must_fit(spec):
    with pytest.raises(CapacityError, match=r"kv_blocks=100000, which are .* are more than the 1\.00 GB of one box"):
        make_plan(spec, {}, "float32", box(), kv_blocks=100_000)
    assert make_plan(spec, {}, "float32", box(), kv_blocks=100_000, must_fit=False).fits is False


def test_weights_that_do_not_fit_are_named(spec):
    with pytest.raises(CapacityError, match=r"196\.42 KB of weights .* leave no room for a KV cache .* more devices"):
        make_plan(spec, {}, "float32", box(1000))


BAD = [
    ({"max_batch": 0}, "max_batch: expected a positive integer, got 0"),
    ({"max_batch": True}, "max_batch: expected a positive integer, got True"),
    ({"max_batch": None}, "max_batch: expected a positive integer, got None"),
    ({"decode_chunk": 2.0}, r"decode_chunk: expected a positive integer, got 2\.0"),
    ({"prefill_chunk": -1}, "prefill_chunk: expected a positive integer, got -1"),
    ({"prefill_tokens": "9"}, "prefill_tokens: expected a positive integer, got '9'"),
    ({"kv_blocks": 0}, "kv_blocks: expected a positive integer, got 0"),
    ({"max_model_len": 0}, "max_model_len: expected a positive integer, got 0"),
    ({"max_model_len": 257}, "max_model_len: the model's context is 256 tokens, got 257"),
    ({"quantize": "int3"}, "quantize: expected None or one of int8, int4, fp8, got 'int3'"),
    ({"quantize": "int4"}, r"attention\.qkv: int4 has groups of 128 or 64 inputs"),
    ({"dtype": "int8"}, "dtype: expected one of float32, bfloat16, float16, got 'int8'"),
]


@pytest.mark.parametrize(("changes", "error"), BAD)
def test_bad_values_are_refused(spec, changes, error):
    with pytest.raises(ConfigError, match=error):
        make_plan(spec, {}, **({"dtype": "float32", "hardware": UNKNOWN} | changes))


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        ({"mlp": None}, "mlp"),
        ({"kv_heads": None}, "kv_heads"),
        ({"hidden": "data", "batch": None}, "hidden"),
        ({"blocks": None}, "blocks"),
        ({"vocab": "data"}, "vocab"),
    ],
)
def test_rules_that_a_step_does_not_follow_are_refused(spec, rules, name):
    with pytest.raises(MeshError, match=f"rule {name}="):
        make_plan(spec, {"data": 2, "tensor": 2}, "float32", UNKNOWN, rules=ShardingRules(**rules))
    make_plan(spec, {"data": 1, "tensor": 1}, "float32", UNKNOWN, rules=ShardingRules(**rules))


def test_bounds_are_bytes_and_operations_at_the_devices_rates(spec):
    plan = make_plan(spec, {"tensor": 2}, "float32", box(bandwidth=2e9, matmul=3e9), max_batch=4)
    hidden, width, rows, heads = 48, 88, 102, 4 * 12
    # Of each layer: queries, keys, values, the output, the MLP; and two norms that every device has whole.
    layer = (hidden * (heads + 2 * 24) + heads * hidden + 3 * hidden * width) // 2
    weights = 4 * (2 * (layer + 2 * hidden) + hidden + rows * hidden // 2)
    assert plan.step_bytes_per_device == weights  # the head, but no embedding
    assert plan.weight_bytes_per_device == weights + 4 * rows * hidden // 2
    keys = 2 * 2 * 1 * 12 * 4  # keys and values, layers, the device's head, its entries, bytes
    assert plan.step_bytes(3, 100) == weights + 3 * 100 * keys
    assert plan.step_milliseconds(3, 100) == pytest.approx(1e3 * (weights + 300 * keys) / 2e9)
    products = 2 * (70 * 2 * layer + hidden * rows // 2)
    attention = 2 * 70 * 70 * 2 * 4 * 12 // 2
    assert plan.prefill_flops(1, 70) == products + attention
    assert plan.prefill_milliseconds(1, 70) == pytest.approx(1e3 * (products + attention) / 3e9)
    assert plan.prefill_milliseconds(1, 1) == pytest.approx(1e3 * weights / 2e9)  # a read of the weights bounds it


def test_a_cache_of_8_bits_holds_more_tokens(spec):
    kinds = {
        kind: make_plan(spec, {}, "bfloat16", UNKNOWN, kv_blocks=7, kv_dtype=kind) for kind in ("auto", "int8", "fp8")
    }
    # Two layers, keys and values of two heads: 12 entries of each token, and a float32 factor.
    rows = 2 * 2 * 2 * 64
    assert {kind: plan.block_bytes_per_device for kind, plan in kinds.items()} == {
        "auto": rows * 24, "int8": rows * 16, "fp8": rows * 16,
    }  # fmt: skip
    assert [plan.to_dict()["kv_dtype"] for plan in kinds.values()] == ["bfloat16", "int8", "float8_e4m3fn"]
    assert "tokens a shard, float8_e4m3fn" in str(kinds["fp8"])
    with pytest.raises(ConfigError, match="kv_dtype: expected one of auto, int8, fp8, got 'int2'"):
        make_plan(spec, {}, "bfloat16", UNKNOWN, kv_dtype="int2")


def test_a_plan_says_what_serves_the_model_there(spec):
    def served(kind, dtype, op="products of up to 16 rows", **options):
        plan = make_plan(spec, {}, dtype, named(kind), **options)
        assert all(str(choice) in str(plan) for choice in plan.implementations)
        said = plan.to_dict()["implementations"]
        return {choice["op"]: choice["implementation"] for choice in said}[op]

    spec = spec.replace(hidden=64, head_dim=64, intermediate=128)
    assert served("H200", "bfloat16") == "mosaic"
    assert served("H200", "float32") == served("L40S", "bfloat16") == "dot"
    assert served("H200", "bfloat16", "prefill attention") == "mosaic"
    assert served("H200", "bfloat16", "prefill attention", kv_dtype="int8") == "dot"
    whole, turned = "whole layers of up to 2 rows and 4096 tokens", spec.layers
    assert served("H200", "bfloat16", whole, quantize="int8") == "apart", "6 pairs of 64 entries are rotated"
    spec = spec.replace(layers=tuple(dataclasses.replace(layer, rotary=None) for layer in turned))
    assert served("H200", "bfloat16", whole, quantize="int8") == "mosaic"
    assert served("H200", "bfloat16", whole) == "mosaic"
    assert served("L40S", "bfloat16", whole, quantize="int8") == served("H200", "float32", whole) == "apart"
    assert served("H200", "bfloat16", whole, quantize="int8", offload="host") == "apart"


def test_a_plan_shows_itself(spec):
    plan = make_plan(spec, {"data": 2, "tensor": 2}, "bfloat16", box(), max_batch=4)
    text, page, values = str(plan), plan._repr_html_(), json.loads(json.dumps(plan.to_dict()))
    for part in ("llama", "bfloat16", "data=2 tensor=2", "4 x box", size(plan.weight_bytes_per_device), "yes"):
        assert part in text
        assert part in page
    assert values["parameters"] == sum(math.prod(info.shape) for info in plan.parameters.values())
    assert values["per_device"]["total_bytes"] == plan.total_bytes_per_device
    assert values["tiers"] == {"device": 4 * plan.total_bytes_per_device, "host": 0, "disk": 0}
    assert values["fits"] is True
    unknown = make_plan(spec, {}, "bfloat16", UNKNOWN)
    assert unknown.step_milliseconds() is unknown.prefill_milliseconds(1, 5) is None
    assert "unknown" in str(unknown)
    evil = make_plan(spec, {}, "bfloat16", Hardware(kind="<b>", memory=GB, bandwidth=None, matmul=None))
    assert "<b>" not in evil._repr_html_()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 KB"), (123_456, "123.46 KB"), (2.5e9, "2.50 GB"), (7e15, "7000.00 TB")],
)
def test_sizes_are_written_for_people(count, text):
    assert size(count) == text


def test_a_model_is_planned_without_loading_it(folder, monkeypatch):
    monkeypatch.setattr("jaxinfer.checkpoints.load", lambda *_, **__: pytest.fail("loaded"))
    plan = jaxinfer.plan(folder, mesh={"data": 4, "tensor": 2}, device="H200", dtype="bfloat16")
    assert plan.hardware.kind == "H200"
    assert plan.mesh["data"] * plan.mesh["tensor"] == 8
    assert plan.fits
    assert jaxinfer.plan(folder, mesh={"tensor": 4}, device="h200").devices == 4
    assert jaxinfer.plan(folder, device="H200").devices == 1
    here = jaxinfer.plan(folder)
    assert here.hardware.kind == "cpu"
    assert here.devices == 8
    assert here.dtype == "float32"
    small = jaxinfer.plan(folder, mesh={"tensor": 1}, device=box(1000))
    assert small.fits is False
    with pytest.raises(ConfigError, match="device 'H9000' is not known"):
        jaxinfer.plan(folder, device="H9000")
    with pytest.raises(MeshError):
        jaxinfer.plan(folder, mesh={"tensor": 3}, device="H200")


@pytest.mark.parametrize(("method", "bits"), [("int8", 8), ("fp8", 8), ("int4", 4)])
def test_quantized_weights_are_counted_as_they_lie(method, bits):
    spec = small_spec(hidden=256, intermediate=512, heads=4, kv_heads=4, head_dim=64, gated_mlp=True)
    plain = make_plan(spec, {"tensor": 2}, "bfloat16", UNKNOWN)
    plan = make_plan(spec, {"tensor": 2}, "bfloat16", UNKNOWN, quantize=method)
    weights = 2 * (6 * 256 * 256 - 2 * 256 * 256 + 3 * 256 * 512)  # qkv, out, gate, up and down of two layers
    factors = 2 * (3 * 256 + 256 + 2 * 512 + 256)
    if method == "int4":
        factors = weights // 128 + 2 * 256 * 256 // 128  # those of `out` have groups of 64
    assert plain.weight_bytes - plan.weight_bytes == weights * (16 - bits) // 8 - 4 * factors
    assert plan.parameter_count == plain.parameter_count
    assert plan.prefill_flops(1, 64) == plain.prefill_flops(1, 64)
    assert plan.to_dict()["quantize"] == method
    groups = " in groups of 128 and 64" if method == "int4" else ""
    assert f"bfloat16, weights {method}{groups}" in str(plan)
    # Factors of channels whose inputs are divided lie whole on each device.
    whole = 0 if method == "int4" else 2 * (256 + 256) * 4
    norms = sum(info.nbytes for path, info in plan.parameters.items() if "norm" in path or path == "embed.positions")
    assert plan.weight_bytes_per_device == (plan.weight_bytes + whole + norms) // 2
