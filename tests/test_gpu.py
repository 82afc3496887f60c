"""Every family on the GPU, through the engine, against transformers on torch on the same GPU.

bfloat16 has 8 bits of mantissa, so two correct implementations that add in different orders differ by about 1 % of a
logit's size. The bound therefore is torch's own: measured against torch in float32, our bfloat16 logits may be off by
at most 1.3 times what torch's bfloat16 logits are off by (root mean square over all positions), and a greedy token may
only differ from float32's where that finds the two nearer than six times the error of torch, which is 4.2 standard
deviations of the difference between two logits: of some thousand tokens compared, 3.2 has been seen.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxinfer
from pallas_kernels import MAX_LAYER_ROWS, Device, qkv_gemm
from pallas_kernels.choices import MAX_LINEAR_ROWS
from pallas_kernels.skinny_gemm import Tuning
from tests.bare import steady
from tests.cases import CASES, Case, case
from tests.oracle import checkpoint, prompts, rms, shared_root, torch_logits, torch_model
from tests.wide import METHODS, dequantized, wide

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


def _logits(folder: Path, chosen: Case, dtype: torch.dtype, asked: Any, outputs: Any) -> list[np.ndarray]:
    """What torch has where each token of the outputs was drawn, float32 [tokens, V]."""
    model = torch_model(folder, chosen, dtype, device=PLACE)
    return [
        torch_logits(model, prompt + output.token_ids[:-1])[len(prompt) - 1 :]
        for prompt, output in zip(asked, outputs, strict=True)
    ]


def _said(logits: list[np.ndarray], outputs: Any) -> list[np.ndarray]:
    """The log-probabilities that logits give the tokens of the outputs."""
    return [
        torch.log_softmax(torch.tensor(rows), -1).numpy()[np.arange(len(rows)), output.token_ids]
        for rows, output in zip(logits, outputs, strict=True)
    ]


def _logprobs(outputs: Any) -> list[np.ndarray]:
    """The log-probabilities that came with the outputs' tokens."""
    return [
        np.array([entry[token].logprob for token, entry in zip(o.token_ids, o.logprobs, strict=True)]) for o in outputs
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
    exact = _said(_logits(folder, chosen, torch.float32, asked, outputs), outputs)
    rough = _said(_logits(folder, chosen, torch.bfloat16, asked, outputs), outputs)
    error, allowed = rms(_logprobs(outputs), exact), rms(rough, exact)
    # 8 bits of a cache are rounded once more, e4m3 to 4 bits of mantissa where bfloat16 has 8.
    assert error <= {"auto": 1.5, "int8": 2.0, "fp8": 8.0}[kv_dtype] * allowed, (error, allowed)


# Heads of 64, and inputs that groups of int4 divide.
WHOLE = [
    dataclasses.replace(wide(family), name=f"{family}-whole", options={**wide(family).options, **changes})
    for family, changes in {
        "llama": {"num_attention_heads": 4}, "mistral": {"num_attention_heads": 4, "sliding_window": 40}, "opt": {},
        "gpt2": {},
    }.items()
]  # fmt: skip


@pytest.mark.parametrize("rows", range(1, MAX_LAYER_ROWS + 1))
@pytest.mark.parametrize("quantize", [None, *METHODS])
@pytest.mark.parametrize("chosen", WHOLE, ids=lambda chosen: chosen.name)
def test_whole_layers_say_what_float32_does_and_twice_the_same(chosen, quantize, rows, root):
    """Rows of different lengths, which end at different times; torch has the rounded weights."""
    folder = checkpoint(chosen, root)
    asked = steady(folder, prompts(chosen), STEPS)
    sampling = [
        jaxinfer.SamplingParams(temperature=0.0, max_tokens=STEPS - 3 * at, ignore_eos=True, logprobs=0)
        for at in range(len(asked))
    ]
    with jaxinfer.init_inference(
        folder, mesh={"tensor": 1}, dtype="bfloat16", max_batch=rows, decode_chunk=8, quantize=quantize
    ) as engine:
        serving = {choice.op: choice.implementation for choice in engine.implementations}
        outputs, again = ([output.outputs[0] for output in engine.generate(asked, sampling)] for _ in range(2))
    if Device.of(jax.devices()[0]).hopper:
        assert [name for op, name in serving.items() if op.startswith("whole layers")] == ["mosaic"]
    for one, other in zip(outputs, again, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
    rounded = folder if quantize is None else dequantized(chosen, root, quantize)
    exact, rough = (_logits(rounded, chosen, dtype, asked, outputs) for dtype in (torch.float32, torch.bfloat16))
    for output, logits in zip(outputs, exact, strict=True):
        drawn = logits[np.arange(len(logits)), output.token_ids]
        assert np.all(logits.max(axis=-1) - drawn <= 6 * rms(rough, exact)), "a token that float32 finds clearly worse"
    wanted = _said(exact, outputs)
    error, allowed = rms(_logprobs(outputs), wanted), rms(_said(rough, outputs), wanted)
    assert error <= 1.5 * allowed, (error, allowed)


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_blocks_of_a_cluster_read_sums_that_are_complete(rows):
    """Launch after launch with other inputs: each result must be, in bits, that of a launch with nothing around it."""
    heads, dim, k = 32, 128, 4096
    tuning = Tuning(tile_k=128, stages=2, splits=4)
    weight = jax.random.normal(jax.random.key(0), (heads, 3, dim, k), jnp.bfloat16) * k**-0.5
    cache = (jnp.zeros((rows, heads, 64, dim), jnp.bfloat16),) * 2
    tables, positions = jnp.arange(rows, dtype=jnp.int32)[:, None], jnp.zeros((rows, 1), jnp.int32)
    rotary = (jnp.full((rows, 1, dim // 2), 0.8), jnp.full((rows, 1, dim // 2), 0.6))

    @jax.jit
    def run(x: jax.Array, weight: jax.Array) -> list[jax.Array]:
        found = qkv_gemm(x, weight, cache, tables, positions, rotary=rotary, tuning=tuning, implementation="mosaic")
        return jax.tree.leaves(found)

    inputs = [jax.random.normal(jax.random.key(seed), (rows, 1, k), jnp.bfloat16) for seed in range(8)]
    alone = [[np.asarray(part) for part in jax.block_until_ready(run(x, weight))] for x in inputs]
    for _ in range(20):
        for got, wanted in zip([run(x, weight) for x in inputs], alone, strict=True):
            for part, want in zip(got, wanted, strict=True):
                np.testing.assert_array_equal(np.asarray(part).view(np.uint16), want.view(np.uint16))
