"""Paging on the GPU: the tokens of the resident engine in float32, its accuracy in bfloat16, and bounded memory.

Host memory is registered with the driver there, and transfers run beside compute, so that a buffer that is used again
too early would show here and nowhere else.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest

import jaxinfer
from jaxinfer import SamplingParams
from jaxinfer.paging import tiers
from tests.cases import case
from tests.oracle import checkpoint, prompts, rms, shared_root

pytestmark = pytest.mark.gpu
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
NAMES = ["llama-plain", "gpt2-plain", "opt-projected-post-norm", "gemma2-plain", "falcon-grouped-one-norm"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return shared_root(tmp_path_factory)


def engine(place, dtype, **options):
    shape = {"mesh": {"tensor": 1}, "max_batch": 4, "max_model_len": 256, "progress": False}
    return jaxinfer.init_inference(place, dtype=dtype, **shape, **options)


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
