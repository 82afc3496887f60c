"""Paged engines against resident ones: the same tokens, log-probabilities and logits, wherever the layers are."""

from __future__ import annotations

import contextlib
import gc

import jax
import numpy as np
import pytest

import jaxinfer
from jaxinfer import SamplingParams
from jaxinfer.checkpoints.convert import convert
from jaxinfer.models.families import FAMILIES
from jaxinfer.paging import tiers
from jaxinfer.paging.executor import PagedExecutor, frugal_options
from pallas_kernels import Device
from tests.cases import CASES, case
from tests.engines import of, tiny
from tests.oracle import checkpoint, prompts, rms, shared_root

GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
# Plain; learned positions and Conv1D; projected embeddings and post-norm; windows that alternate, so two kinds of
# layers; grouped heads.
THOROUGH = ["llama-plain", "gpt2-plain", "opt-projected-post-norm", "gemma2-plain", "falcon-grouped-one-norm"]
OTHERS = [
    next(one.name for one in CASES if one.family == family)
    for family in FAMILIES
    if family not in {case(name).family for name in THOROUGH}
]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shared_root(tmp_path_factory)


@pytest.fixture(scope="module")
def store_of(root, tmp_path_factory):
    """The store of a case, converted once."""
    places = {}

    def get(name, dtype=None):
        if (name, dtype) not in places:
            out = tmp_path_factory.mktemp("stores") / f"{name}-{dtype}"
            places[name, dtype] = convert(checkpoint(case(name), root), out, dtype, progress=False)
        return places[name, dtype]

    return get


def said(engine, asked, params=GREEDY):
    return [[output.token_ids for output in result.outputs] for result in engine.generate(asked, params)]


def held_by_layers(engine):
    return engine.executor.pager.device_bytes()


@pytest.mark.parametrize("name", THOROUGH)
def test_paged_tokens_scores_and_logits_are_those_of_the_resident_engine(name, root, store_of):
    asked = prompts(case(name), (5, 70))
    with tiny(root, name) as resident:
        tokens, scores, logits = said(resident, asked), resident.score(asked), resident.logits(asked)
    for folder, offload in ((checkpoint(case(name), root), "host"), (store_of(name), "disk")):
        with of(folder, offload=offload) as paged:
            assert isinstance(paged.executor, PagedExecutor)
            assert set(paged.plan.tiers.layers) == {offload}
            assert said(paged, asked) == tokens
            for got, expected in zip(paged.score(asked), scores, strict=True):
                np.testing.assert_allclose(got.logprobs[1:], expected.logprobs[1:], atol=1e-5)
            for got, expected in zip(paged.logits(asked), logits, strict=True):
                np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", OTHERS)
def test_every_other_family_too(name, store_of):
    (asked,) = prompts(case(name), (20,))
    with of(store_of(name)) as resident:
        tokens, (logits,) = said(resident, [asked]), resident.logits([asked])
    for offload in ("host", "disk"):
        with of(store_of(name), offload=offload) as paged:
            assert said(paged, [asked]) == tokens
            np.testing.assert_allclose(paged.logits([asked])[0], logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("offload", ["host", "disk"])
def test_sampling_penalties_and_log_probabilities_are_those_of_the_resident_engine(offload, root, store_of):
    asked = prompts(case("llama-plain"), (1, 5, 19, 70))
    params = SamplingParams(
        max_tokens=6, temperature=0.8, top_p=0.9, seed=3, n=2, presence_penalty=0.3, logprobs=2, ignore_eos=True
    )
    with tiny(root) as resident, of(store_of("llama-plain"), offload=offload) as paged:
        for got, expected in zip(paged.generate(asked, params), resident.generate(asked, params), strict=True):
            assert [o.token_ids for o in got.outputs] == [o.token_ids for o in expected.outputs]
            for one, other in zip(got.outputs, expected.outputs, strict=True):
                assert one.cumulative_logprob == pytest.approx(other.cumulative_logprob, abs=1e-4)


def test_longrope_takes_the_same_frequencies(root):
    asked = prompts(case("phi3-longrope"), (5, 40))
    with tiny(root, "phi3-longrope") as resident, tiny(root, "phi3-longrope", offload="host") as paged:
        assert said(paged, asked) == said(resident, asked)


@pytest.mark.parametrize("offload", ["host", "disk"])
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("llama-plain", {"data": 2, "tensor": 2}),
        ("gpt2-plain", {"data": 2, "tensor": 2}),
        ("llama-multi-query", {"tensor": 4}),
        ("opt-projected-post-norm", {"tensor": 2}),
    ],
    ids=str,
)
def test_a_mesh_gives_the_same_tokens(name, mesh, offload, root, store_of):
    asked = prompts(case(name), (3, 20, 41))
    with tiny(root, name) as resident:
        expected = said(resident, asked)
    with of(store_of(name), mesh=mesh, offload=offload) as paged:
        assert said(paged, asked) == expected


@pytest.mark.parametrize("offload", ["host", "disk"])
def test_micro_batches_change_nothing(offload, root, store_of, monkeypatch):
    """Passes of 128 tokens in micro-batches of 16: groups of rows, and pieces of the rows that are longer."""
    name = "gemma2-plain"
    asked = prompts(case(name), (1, 7, 33, 70, 16, 100))
    with tiny(root, name, max_batch=8) as resident:
        expected, scores = said(resident, asked), resident.score(asked)
    monkeypatch.setattr(tiers, "MICRO_TOKENS", 16)
    with of(store_of(name), offload=offload, max_batch=8, prefill_chunk=128, prefill_tokens=256) as paged:
        assert paged.plan.micro_tokens == 16
        seen = []
        split = paged.executor._split
        monkeypatch.setattr(paged.executor, "_split", lambda *a: (seen.append(split(*a)), seen[-1])[1])
        assert said(paged, asked) == expected
        assert max(groups for groups, _ in seen) > 1
        assert max(columns for _, columns in seen) > 1
        for got, one in zip(paged.score(asked), scores, strict=True):
            np.testing.assert_allclose(got.logprobs[1:], one.logprobs[1:], atol=1e-5)


@pytest.mark.parametrize("mesh", [{"tensor": 1}, {"data": 2, "tensor": 2}], ids=str)
def test_transfers_are_issued_as_an_accelerator_s_are(mesh, root, store_of, monkeypatch):
    """At once, in the caller's thread. A CPU adopts the host's bytes then, which is right while nobody reuses them."""
    asked = prompts(case("gpt2-plain"), (5, 40))
    with tiny(root, "gpt2-plain") as resident:
        expected = said(resident, asked)
    with of(store_of("gpt2-plain"), offload="host", mesh=mesh) as paged:
        monkeypatch.setattr(paged.executor.pager.link, "copies", False)
        assert said(paged, asked) == expected
        assert said(paged, asked) == expected


def test_streams_and_many_more_prompts_than_slots(root, store_of):
    asked = prompts(case("llama-plain"), tuple(range(2, 40, 3)))
    with tiny(root) as resident:
        expected = said(resident, asked)
        text = "".join(resident.stream(asked[3], GREEDY))
    with of(store_of("llama-plain"), offload="disk", max_batch=3, kv_blocks=6) as paged:
        assert said(paged, asked) == expected
        assert "".join(paged.stream(asked[3], GREEDY)) == text


@pytest.mark.parametrize("name", ["llama-plain", "gpt2-plain", "falcon-grouped-one-norm"])
@pytest.mark.parametrize("offload", ["host", "disk"])
def test_bfloat16_logits_are_those_of_the_resident_engine_but_for_rounding(name, offload, root, store_of):
    asked = prompts(case(name))
    store = store_of(name, "bfloat16")
    with of(store) as resident, of(store, dtype="float32") as exact:
        truth, expected = exact.logits(asked), resident.logits(asked)
    with of(store, offload=offload) as paged:
        got = paged.logits(asked)
    # Both round, each where its compiler does; neither may be farther from float32 than rounding explains.
    assert rms(got, truth) <= 1.25 * rms(expected, truth)


@pytest.mark.parametrize("offload", ["host", "disk"])
def test_devices_hold_the_slots_and_no_more(offload, root, store_of, monkeypatch):
    name = "gpt_neo-local"  # four layers, of two kinds
    asked = prompts(case(name), (5, 40))
    gc.collect()  # what other tests left may go at any time
    before = sum(array.nbytes for array in jax.live_arrays())
    with of(store_of(name), offload=offload) as paged:
        executor, plan = paged.executor, paged.plan
        paged.generate(asked, GREEDY)
        travels = {(one.shape, one.dtype) for packing in executor.pager.packings for one in packing.segments}
        layers, everything = [], []
        put = executor.pager.link._put

        def watched(*given):
            arrays = put(*given)  # a layer is on the device from here on
            live = jax.live_arrays()
            layers.append(sum(array.nbytes for array in live if (array.shape, array.dtype) in travels))
            everything.append(sum(array.nbytes for array in live))
            return arrays

        monkeypatch.setattr(executor.pager.link, "_put", watched)
        paged.generate(asked, GREEDY)
        assert len(layers) > 20
        assert max(layers) == plan.tiers.device_bytes == plan.tiers.slots * max(plan.tiers.layer_bytes)
        temporary = max(step.memory_analysis().temp_size_in_bytes for step in executor.compiled().values())
        assert max(everything) - before + temporary <= plan.total_bytes_per_device
        assert paged.offload_report()["device"]["used_bytes"] <= plan.total_bytes_per_device
    after = sum(array.nbytes for array in jax.live_arrays())
    assert after <= before + 1000


@pytest.mark.parametrize("method", ["int8", "int4", "fp8"])
def test_quantized_layers_travel_as_they_are(method, tmp_path):
    asked, options = [[5, 17, 4], list(range(3, 60))], {"dtype": "float32", "max_model_len": 128}
    store = convert("demo", tmp_path / "store", "float32", quantize=method, progress=False)
    with of(store, **options) as resident:
        expected, logits = said(resident, asked), resident.logits(asked)
    for place, more in ((store, {"offload": "disk"}), ("demo", {"offload": "host", "quantize": method})):
        with of(place, **options, **more) as paged:
            assert said(paged, asked) == expected
            for got, one in zip(paged.logits(asked), logits, strict=True):
                np.testing.assert_allclose(got, one, atol=1e-3, rtol=1e-3)
            whole = sum(np.dtype(np.float32).itemsize * np.prod(info.shape) for path, info in plain(paged))
            assert sum(paged.plan.tiers.layer_bytes) < whole * (0.25 if method == "int4" else 0.35)


def plain(engine):
    """A model's layers as they were before they were quantized."""
    return [
        (path, info) for path, info in engine.plan.parameters.items() if path.startswith("layers.") and not info.factors
    ]


@pytest.mark.parametrize("kv_dtype", ["int8", "fp8"])
def test_caches_of_8_bits_are_those_of_the_resident_engine(kv_dtype, root):
    asked = prompts(case("llama-plain"), (5, 70))
    with tiny(root, kv_dtype=kv_dtype) as resident, tiny(root, kv_dtype=kv_dtype, offload="host") as paged:
        assert said(paged, asked) == said(resident, asked)
        for got, one in zip(paged.logits(asked), resident.logits(asked), strict=True):
            np.testing.assert_allclose(got, one, atol=1e-3, rtol=1e-3)


def test_some_layers_stay_and_the_others_are_paged(root, store_of, monkeypatch):
    monkeypatch.setattr(tiers, "RING_SLOTS", 1)
    name = "gemma2-plain"
    asked = prompts(case(name), (5, 40))
    with tiny(root, name) as resident:
        expected = said(resident, asked)
    store, shape = store_of(name), {"mesh": {"tensor": 1}, "max_batch": 4, "kv_blocks": 8, "prefill_tokens": 128}
    least = jaxinfer.plan(store, offload="disk", **shape)
    layer, one = max(least.tiers.layer_bytes), least.tiers.buffer_bytes[0]
    options = shape | {"offload": "auto", "host_memory": 2 * one}  # a layer, and the ring
    for cap in range(least.total_bytes_per_device // 8, least.total_bytes_per_device, layer // 2):
        with contextlib.suppress(jaxinfer.CapacityError):
            found = jaxinfer.plan(store, device_memory=cap, **options)
            if found.fits and "device" in found.tiers.layers:
                break
    assert sorted(found.tiers.layers) == ["device", "disk", "disk", "host"]
    with of(store, **options, device_memory=cap) as mixed:
        assert mixed.plan.tiers.layers == found.tiers.layers
        assert said(mixed, asked) == expected
        assert held_by_layers(mixed) <= (1 + mixed.plan.tiers.slots) * layer


def test_auto_keeps_a_model_that_fits_on_the_devices(root):
    with tiny(root, offload="auto") as engine:
        assert engine.plan.tiers is None
        assert engine.offload_report() is None


def test_each_step_is_a_pass_and_moves_every_layer_once(root, store_of):
    with of(store_of("gpt2-plain"), offload="host", decode_chunk=1) as paged:
        paged.generate(prompts(case("gpt2-plain"), (5,))[0], GREEDY)
        executor = paged.executor
        jax.block_until_ready(executor.caches)
        assert executor.passes == 6
        found = paged.offload_report()
        moved = executor.passes * paged.plan.tiers.moved_bytes
        assert moved <= found["link"]["bytes"] <= moved + 2 * max(paged.plan.tiers.layer_bytes)


def test_compiling_takes_no_memory_of_a_device_that_has_little():
    gpu, none = Device("gpu", "9.0"), {"xla_gpu_enable_triton_gemm": "False"}
    assert frugal_options(Device("cpu"), False) == {}
    assert frugal_options(gpu, True) == none
    assert frugal_options(gpu, False) == none | {"xla_gpu_autotune_level": "0"}
