"""Measurements: that they measure what they say, on a tiny model, not how fast it is."""

from __future__ import annotations

import json
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxinfer
from jaxinfer.bench import Limits, bench, measure_limits, time_chain
from jaxinfer.hardware import Hardware
from tests.cases import case
from tests.oracle import checkpoint, shared_root

LIMITS = Limits(device="cpu", devices=2, dtype="float32", bandwidth=1e10, matmul=1e11)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = checkpoint(case("llama-plain"), shared_root(tmp_path_factory))
    with jaxinfer.init_inference(folder, {"data": 2}, max_batch=4, decode_chunk=4, progress=False) as made:
        yield made


def test_limits_are_of_all_devices_at_once():
    found = measure_limits(jax.local_devices()[:2])
    assert (found.devices, found.dtype) == (2, "float32")
    assert 1e7 < found.bandwidth < 1e13
    assert 1e7 < found.matmul < 1e15
    known = Hardware(kind="cpu", memory=5, bandwidth=None, matmul=None)
    assert found.hardware(known) == Hardware(
        kind="cpu", memory=5, bandwidth=found.bandwidth, matmul=found.matmul, measured=True
    )


def test_a_chain_is_timed_without_its_first_call():
    calls = []

    def step(state):
        calls.append(state)
        time.sleep(0.2 if len(calls) == 1 else 0.02)
        return state + 1

    seconds = time_chain(step, jnp.zeros(()), repeats=3)
    assert 0.02 <= seconds < 0.15
    assert [int(state) for state in calls] == list(range(len(calls)))


def test_a_bench_measures_whole_chunks_at_each_batch(engine):
    found = bench(engine, batches=(1, 4), prompt_tokens=70, decode_tokens=10, repeats=2, limits=LIMITS)
    assert [p.batch for p in found.prefill] == [d.batch for d in found.decode] == [1, 4]
    for d in found.decode:
        assert (d.steps, d.context) == (12, 76)
        assert d.ms > 0
        assert 0 <= d.host_share < 1
        assert d.tokens_per_second == pytest.approx(1e3 * d.batch / d.ms)
        assert d.bandwidth_share == pytest.approx(d.bound_ms / d.ms)
    for p in found.prefill:
        assert p.ms > 0
        assert p.first_token_ms > 0
        assert p.tokens_per_second == pytest.approx(1e3 * p.batch * 70 / p.ms)
    # Two shards: one sequence is one on its device, four are two.
    bytes_of = engine.plan.step_bytes
    assert found.decode[0].bound_ms == pytest.approx(1e3 * bytes_of(1, 76) / LIMITS.bandwidth)
    assert found.decode[1].bound_ms == pytest.approx(1e3 * bytes_of(2, 76) / LIMITS.bandwidth)


def test_the_engine_is_as_it_was_after_a_bench(engine):
    params = jaxinfer.SamplingParams(temperature=0, max_tokens=9)
    before = engine.generate([5, 6, 7], params).outputs[0].token_ids
    bench(engine, batches=(2,), prompt_tokens=8, decode_tokens=4, repeats=1, limits=LIMITS)
    assert engine.executor.trace is None
    assert engine.generate([5, 6, 7], params).outputs[0].token_ids == before


def test_a_result_is_json_text_and_html(engine):
    found = bench(engine, batches=(1,), prompt_tokens=8, decode_tokens=4, repeats=1, limits=LIMITS)
    document = json.loads(json.dumps(found.to_dict()))
    assert document["limits"]["bandwidth"] == 1e10
    assert document["decode"][0]["batch"] == 1
    assert "ms/step" in str(found)
    assert "data=2 on 2 cpu devices" in str(found)
    assert found._repr_html_().count("<table>") == 2


def test_a_result_says_how_weights_and_cache_are_kept():
    limits = {"max_batch": 2, "max_model_len": 64}
    with jaxinfer.init_inference("demo", quantize="int4", kv_dtype="int8", mesh={"tensor": 1}, **limits) as quantized:
        found = bench(quantized, batches=(1,), prompt_tokens=8, decode_tokens=4, repeats=1, limits=LIMITS)
    assert re.search(r", weights int4 in groups of (128|64|128 and 64), cache int8, ", str(found))
    assert (found.to_dict()["weights"], found.to_dict()["kv_dtype"]) == (quantized.plan.weights, "int8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": ()}, "batches: expected at least one"),
        ({"batches": (0,)}, "batches: expected a positive integer, got 0"),
        ({"batches": (5,)}, "5 sequences, and the engine has 4 slots"),
        ({"prompt_tokens": 0}, "prompt_tokens: expected a positive integer"),
        ({"decode_tokens": 0}, "decode_tokens: expected a positive integer"),
        ({"repeats": 0}, "repeats: expected a positive integer"),
        ({"prompt_tokens": 252}, "the context length is 256"),
    ],
)
def test_what_cannot_be_measured_is_refused(engine, arguments, message):
    with pytest.raises(ValueError, match=message):
        bench(engine, **{"batches": (1,), "prompt_tokens": 8, "decode_tokens": 4, "limits": LIMITS} | arguments)


def test_flops_of_prefill_are_those_that_xla_counts(engine):
    """Against XLA's own count of a plain forward pass, which also has the head at every position."""
    from flax import nnx

    from jaxinfer.models.attention import Batch
    from jaxinfer.models.decoder import abstract

    plan, tokens = engine.plan, 96
    graph, state = nnx.split(abstract(plan.spec, plan.layout, jnp.float32))
    batch = Batch(jnp.zeros((1, tokens), jnp.int32), jnp.arange(tokens, dtype=jnp.int32)[None])
    forward = jax.jit(lambda state, batch: nnx.merge(graph, state)(batch)[0])
    counted = forward.lower(state, batch).compile().cost_analysis()["flops"]
    head = 2 * plan.spec.hidden * plan.spec.vocab_size
    causal = (
        2 * tokens * tokens * plan.spec.num_layers * plan.spec.heads * plan.spec.head_dim
    )  # XLA computes both halves
    expected = plan.prefill_flops(1, tokens) + (tokens - 1) * head + causal
    np.testing.assert_allclose(counted, expected, rtol=0.1)  # norms, softmax and rotations are the rest
