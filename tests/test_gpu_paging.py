"""Paging on the GPU: the tokens of the resident engine in float32, its accuracy in bfloat16, and bounded memory.

Host memory is registered with the driver there, and transfers run beside compute, so that a buffer that is used again
too early would show here and nowhere else. With two GPUs the same, where each fetches its part over its own link.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import jaxinfer
from jaxinfer import SamplingParams
from jaxinfer.paging import tiers
from tests.cases import case
from tests.oracle import checkpoint, prompts, rms, shared_root
from tests.test_gpu import WIDE

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
NAMES = ["llama-plain", "gpt2-plain", "opt-projected-post-norm", "gemma2-plain", "falcon-grouped-one-norm"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shared_root(tmp_path_factory)


@pytest.fixture
def two():
    """A mesh of two GPUs."""
    if (count := len(jax.devices())) < 2:
        pytest.skip(f"needs two GPUs, there is {count}")
    return {"tensor": 2}


def engine(place, dtype, **options):
    shape = {"mesh": {"tensor": 1}, "max_batch": 4, "max_model_len": 256, "progress": False}
    return jaxinfer.init_inference(place, dtype=dtype, **(shape | options))


def prefill(model, way):
    """Have prefill gather the weights of a layer, or not, whatever was planned."""
    own = model.executor.tiers
    gathering = dataclasses.replace(own.gathering, tokens=1 if way == "gathered" else None, widened=False)
    model.executor.tiers = dataclasses.replace(own, gathering=gathering)


def gathers(model):
    return any(key[0] == "gather" for key in model.executor._compiled)


def said(model, asked):
    return [output.outputs[0].token_ids for output in model.generate(asked, GREEDY)]


@pytest.mark.parametrize("name", NAMES)
def test_float32_tokens_are_those_of_the_resident_engine(name, root, tmp_path):
    folder, asked = checkpoint(case(name), root), prompts(case(name))
    store = jaxinfer.convert(folder, tmp_path / "store", progress=False)
    with engine(folder, "float32") as resident:
        expected, logits = said(resident, asked), resident.logits(asked)
    for place, offload in ((folder, "host"), (store, "disk")):
        with engine(place, "float32", offload=offload) as paged:
            for _ in range(3):  # buffers and slots are used again and again
                assert said(paged, asked) == expected
            for got, one in zip(paged.logits(asked), logits, strict=True):
                np.testing.assert_allclose(got, one, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_bfloat16_is_as_near_to_float32_as_the_resident_engine(name, quantize, root):
    folder, asked = checkpoint(case(name), root), prompts(case(name))
    with engine(folder, "float32", quantize=quantize) as exact, engine(folder, "bfloat16", quantize=quantize) as rough:
        truth, near = exact.logits(asked), rough.logits(asked)
    with engine(folder, "bfloat16", quantize=quantize, offload="host") as paged:
        assert rms(paged.logits(asked), truth) <= 1.25 * rms(near, truth)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_a_cache_in_host_memory_gives_the_tokens_of_the_resident_engine(name, kv_dtype, root, monkeypatch):
    monkeypatch.setattr(tiers, "KV_WINDOW_BYTES", 1)  # a sequence at a time: as many windows as there can be
    folder, asked = checkpoint(case(name), root), prompts(case(name))
    with engine(folder, "float32", kv_dtype=kv_dtype) as resident:
        expected = said(resident, asked)
    with engine(folder, "float32", kv_dtype=kv_dtype, offload="host", kv_offload="host", prefill_chunk=48) as paged:
        for _ in range(3):
            assert said(paged, asked) == expected


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_the_demo_in_a_store_gives_its_tokens(quantize, tmp_path):
    asked = ["The captain of the ship", "My dear sister,"]
    store = jaxinfer.convert("demo", tmp_path / "store", "float32", quantize=quantize, progress=False)
    with engine(store, "float32") as resident, engine(store, "float32", offload="disk") as paged:
        assert said(paged, asked) == said(resident, asked)


def test_memory_is_what_the_plan_says(root):
    """Of the device while the engine is there, and afterwards."""
    device = jax.local_devices()[0]
    with engine("demo", "float32") as warm:  # cuBLAS and the like take what they take
        said(warm, ["Once"])
    before = device.memory_stats()["bytes_in_use"]
    with engine("demo", "float32", offload="host") as paged:
        said(paged, ["Once upon a time"])
        used = device.memory_stats()["bytes_in_use"] - before
        assert used <= paged.plan.total_bytes_per_device
        assert paged.executor.pager.device_bytes() <= paged.plan.tiers.device_bytes
    assert device.memory_stats()["bytes_in_use"] - before < 1 << 20


@pytest.mark.parametrize("name", ["llama-plain", "gemma2-plain", "falcon-grouped-one-norm"])
@pytest.mark.parametrize("offload", ["host", "disk"])
def test_two_gpus_give_the_tokens_of_the_resident_engine(name, offload, two, root, tmp_path):
    place, asked = checkpoint(case(name), root), prompts(case(name))
    if offload == "disk":
        place = jaxinfer.convert(place, tmp_path / "store", progress=False)
    with engine(place, "float32", mesh=two) as resident:
        expected, logits = said(resident, asked), resident.logits(asked)
    with engine(place, "float32", mesh=two, offload=offload) as paged:
        for way in ("sharded", "gathered", "sharded", "gathered"):
            prefill(paged, way)
            for _ in range(3):
                assert said(paged, asked) == expected
            for got, one in zip(paged.logits(asked), logits, strict=True):
                np.testing.assert_allclose(got, one, atol=1e-4, rtol=1e-4)
            assert gathers(paged) or way == "sharded"
        assert paged.executor.pager.device_bytes() <= 2 * paged.plan.tiers.device_bytes


@pytest.mark.parametrize("offload", ["host", "disk"])
def test_two_gpus_with_a_share_of_the_sequences_each(offload, two, root, tmp_path):
    """Every GPU fetches whole layers."""
    name = "gpt2-plain"
    place, asked = checkpoint(case(name), root), prompts(case(name))
    if offload == "disk":
        place = jaxinfer.convert(place, tmp_path / "store", progress=False)
    with engine(place, "float32", mesh={"data": 2}) as resident:
        expected = said(resident, asked)
    with engine(place, "float32", mesh={"data": 2}, offload=offload) as paged:
        for _ in range(3):
            assert said(paged, asked) == expected


@pytest.mark.parametrize("mesh", [{"tensor": 2}, {"data": 2}], ids=str)
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_two_gpus_with_the_cache_in_host_memory(kv_dtype, mesh, two, root, monkeypatch):
    monkeypatch.setattr(tiers, "KV_WINDOW_BYTES", 1)
    name = "gemma2-plain"
    folder, asked = checkpoint(case(name), root), prompts(case(name))
    shape = {"mesh": mesh, "kv_dtype": kv_dtype, "prefill_chunk": 48}
    with engine(folder, "float32", **shape) as resident:
        expected = said(resident, asked)
    with engine(folder, "float32", offload="host", kv_offload="host", **shape) as paged:
        for way in ("sharded", "gathered") if mesh == two else ("sharded",):
            prefill(paged, way)
            for _ in range(3):
                assert said(paged, asked) == expected


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_two_gpus_in_bfloat16_are_as_near_to_float32_as_the_resident_engine(quantize, two, root):
    """Of a size that the kernels serve, and in decode as well: no token that float32 finds clearly worse."""
    wide = WIDE[0]
    folder, asked = checkpoint(wide, root), prompts(wide)
    shape = {"mesh": two, "quantize": quantize}
    with engine(folder, "float32", **shape) as exact:
        truth = exact.logits(asked)
        with engine(folder, "bfloat16", **shape) as rough:
            near = rms(rough.logits(asked), truth)
            assert worse(exact, asked, said(rough, asked)) <= 6 * near
        with engine(folder, "bfloat16", offload="host", **shape) as paged:
            for way in ("sharded", "gathered"):
                prefill(paged, way)
                assert rms(paged.logits(asked), truth) <= 1.25 * near
                assert worse(exact, asked, said(paged, asked)) <= 6 * near


def worse(exact, asked, tokens):
    """By how much a model's best logit exceeds that of a token that was said, at most."""
    logits = exact.logits([prompt + own[:-1] for prompt, own in zip(asked, tokens, strict=True)])
    rows = [one[len(prompt) - 1 :] for one, prompt in zip(logits, asked, strict=True)]
    return max((row.max(-1) - row[np.arange(len(own)), own]).max() for row, own in zip(rows, tokens, strict=True))


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_two_gpus_gather_quantized_weights_as_they_are(quantize, two):
    asked = ["The captain of the ship, who had been below all morning, came up", "My dear sister,"]
    options = {"quantize": quantize, "mesh": two}
    with engine("demo", "float32", **options) as resident:
        expected = said(resident, asked)
    with engine("demo", "float32", offload="host", **options) as paged:
        for way in ("sharded", "gathered"):
            prefill(paged, way)
            assert said(paged, asked) == expected


def test_memory_of_two_gpus_is_what_the_plan_says(two):
    """With gathered weights, many passes and nothing that waits between them."""
    asked = [list(range(3, 200))] * 4
    devices = jax.devices()[:2]
    with engine("demo", "float32", mesh=two) as warm:
        said(warm, asked)
    before = [device.memory_stats()["bytes_in_use"] for device in devices]
    with engine("demo", "float32", mesh=two, offload="host", prefill_tokens=8192) as paged:
        assert paged.plan.tiers.gathering.nbytes
        prefill(paged, "gathered")
        said(paged, asked)
        for device, was in zip(devices, before, strict=True):
            assert device.memory_stats()["bytes_in_use"] - was <= paged.plan.total_bytes_per_device
    for device, was in zip(devices, before, strict=True):
        assert device.memory_stats()["bytes_in_use"] - was < 4 << 20  # beside the model, some for communication
