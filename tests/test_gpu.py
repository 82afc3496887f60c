"""Every family on the GPU, through the engine, against transformers on torch on the same GPU.

bfloat16 has 8 bits of mantissa, so two correct implementations that add in different orders differ by about 1 % of a
logit's size. The bound therefore is torch's own: measured against torch in float32, our bfloat16 logits may be off by
at most 1.3 times what torch's bfloat16 logits are off by (root mean square over all positions), and a greedy token may
only differ from float32's where that finds the two nearer than six times the error of torch, which is 4.2 standard
deviations of the difference between two logits: of some thousand tokens compared, 3.2 has been seen.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxinfer
from pallas_kernels import Device, qkv_gemm
from pallas_kernels.choices import MAX_LINEAR_ROWS
from pallas_kernels.qkv_gemm import tuning_for_heads
from tests.bare import steady
from tests.cases import CASES, Case, case
from tests.oracle import checkpoint, prompts, rms, shared_root, torch_logits, torch_model

pytestmark = pytest.mark.gpu
STEPS = 32
PLACE = "cuda"


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return shared_root(tmp_path_factory)


@pytest.mark.parametrize("chosen", CASES, ids=lambda chosen: chosen.name)
def test_bfloat16_is_as_near_to_float32_as_that_of_torch(chosen, root):
    folder, asked = checkpoint(chosen, root), prompts(chosen)
    exact_model = torch_model(folder, chosen, device="cuda")
    rough_model = torch_model(folder, chosen, torch.bfloat16, device="cuda")
    with jaxinfer.init_inference(folder, mesh={"tensor": 1}, dtype="bfloat16", max_batch=4, decode_chunk=8) as engine:
        ours = engine.logits(asked)
        greedy = jaxinfer.SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True)
        continued = steady(folder, asked, STEPS)
        said = [output.outputs[0].token_ids for output in engine.generate(continued, greedy)]
    exact = [torch_logits(exact_model, prompt) for prompt in asked]
    rough = [torch_logits(rough_model, prompt) for prompt in asked]
    error, allowed = rms(ours, exact), rms(rough, exact)
    assert error <= 1.3 * allowed, (error, allowed)
    for prompt, tokens in zip(continued, said, strict=True):
        logits = torch_logits(exact_model, prompt + tokens[:-1])[len(prompt) - 1 :]
        best = logits.max(axis=-1)
        chosen_logits = logits[np.arange(STEPS), tokens]
        assert np.all(best - chosen_logits <= 6 * allowed), "a token that float32 finds clearly worse"


@pytest.mark.parametrize("chosen", CASES[::4], ids=lambda chosen: chosen.name)
def test_float32_is_that_of_torch(chosen, root):
    folder, asked = checkpoint(chosen, root), prompts(chosen)
    exact = torch_model(folder, chosen, device="cuda")
    with jaxinfer.init_inference(folder, mesh={"tensor": 1}, dtype="float32", max_batch=4, decode_chunk=8) as engine:
        for got, prompt in zip(engine.logits(asked), asked, strict=True):
            np.testing.assert_allclose(got, torch_logits(exact, prompt), atol=2e-4, rtol=1e-3)


def _wide(name: str, **changes: Any) -> Case:
    """A case in sizes that the kernels run: heads of 64, and rows of which 16 divides."""
    chosen = case(name)
    return dataclasses.replace(chosen, name=f"{chosen.name}-wide", options={**chosen.options, **changes})


_SIZES = {"hidden_size": 256, "num_attention_heads": 4}
WIDE = [
    _wide("llama-plain", **_SIZES, num_key_value_heads=2, intermediate_size=704),
    _wide("gpt2-plain", n_embd=256, n_head=4),
    _wide("gpt_neox-parallel", **_SIZES, intermediate_size=512),
    _wide("gemma2-plain", **_SIZES, num_key_value_heads=1, head_dim=64, intermediate_size=512),
    _wide("falcon-multi-query", **_SIZES),
    _wide("falcon-alibi", **_SIZES),
    _wide("qwen3-plain", hidden_size=512, num_attention_heads=4, num_key_value_heads=4, head_dim=128),
]


@pytest.mark.parametrize("kv_dtype", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("chosen", WIDE, ids=lambda chosen: chosen.name)
def test_decode_by_the_kernels_is_as_near_to_float32_as_prefill_of_torch(chosen, kv_dtype, root):
    """Log-probabilities of the tokens that decode said, step by step, against one forward over them all."""
    folder = checkpoint(chosen, root)
    asked = steady(folder, prompts(chosen), STEPS)
    sampling = jaxinfer.SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True, logprobs=0)
    with jaxinfer.init_inference(
        folder, mesh={"tensor": 1}, dtype="bfloat16", max_batch=4, decode_chunk=8, kv_dtype=kv_dtype
    ) as engine:
        serving = {choice.op: choice.implementation for choice in engine.implementations}
        outputs = [output.outputs[0] for output in engine.generate(asked, sampling)]
    if Device.of(jax.devices()[0]).hopper:
        assert serving["decode attention"] == serving[f"products of up to {MAX_LINEAR_ROWS} rows"] == "mosaic"
    found = [
        np.array([entry[token].logprob for token, entry in zip(o.token_ids, o.logprobs, strict=True)]) for o in outputs
    ]

    def theirs(dtype: torch.dtype) -> list[np.ndarray]:
        model = torch_model(folder, chosen, dtype, device=PLACE)
        rows = []
        for prompt, output in zip(asked, outputs, strict=True):
            logits = torch_logits(model, prompt + output.token_ids[:-1])[len(prompt) - 1 :]
            rows.append(torch.log_softmax(torch.tensor(logits), -1).numpy()[np.arange(STEPS), output.token_ids])
        return rows

    exact = theirs(torch.float32)
    error, allowed = rms(found, exact), rms(theirs(torch.bfloat16), exact)
    # 8 bits of a cache are rounded once more, e4m3 to 4 bits of mantissa where bfloat16 has 8.
    assert error <= {"auto": 1.5, "int8": 2.0, "fp8": 8.0}[kv_dtype] * allowed, (error, allowed)


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_blocks_of_a_cluster_read_sums_that_are_complete(rows):
    """Launch after launch with other inputs: each result must be, in bits, that of a launch with nothing around it."""
    heads, dim, k = 32, 128, 4096
    assert tuning_for_heads(16, heads * 3, dim, k, parts=2).splits > 1, "no cluster is tried"
    weight = jax.random.normal(jax.random.key(0), (heads, 3, dim, k), jnp.bfloat16) * k**-0.5
    cache = (jnp.zeros((rows, heads, 64, dim), jnp.bfloat16),) * 2
    tables, positions = jnp.arange(rows, dtype=jnp.int32)[:, None], jnp.zeros((rows, 1), jnp.int32)
    rotary = (jnp.full((rows, 1, dim // 2), 0.8), jnp.full((rows, 1, dim // 2), 0.6))

    @jax.jit
    def run(x: jax.Array, weight: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(qkv_gemm(x, weight, cache, tables, positions, rotary=rotary))

    inputs = [jax.random.normal(jax.random.key(seed), (rows, 1, k), jnp.bfloat16) for seed in range(8)]
    alone = [[np.asarray(part) for part in jax.block_until_ready(run(x, weight))] for x in inputs]
    for _ in range(20):
        for got, wanted in zip([run(x, weight) for x in inputs], alone, strict=True):
            for part, want in zip(got, wanted, strict=True):
                np.testing.assert_array_equal(np.asarray(part).view(np.uint16), want.view(np.uint16))
