"""Every family on the GPU, through the engine, against transformers on torch on the same GPU.

bfloat16 has 8 bits of mantissa, so two correct implementations that add in different orders differ by about 1 % of a
logit's size. The bound therefore is torch's own: measured against torch in float32, our bfloat16 logits may be off by
at most 1.3 times what torch's bfloat16 logits are off by (root mean square over all positions), and a greedy token may
only differ from float32's where that finds the two nearer than four times the error of torch.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import jaxinfer
from tests.bare import steady
from tests.cases import CASES
from tests.oracle import checkpoint, prompts, rms, shared_root, torch_logits, torch_model

pytestmark = pytest.mark.gpu
STEPS = 32


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
        assert np.all(best - chosen_logits <= 4 * allowed), "a token that float32 finds clearly worse"


@pytest.mark.parametrize("chosen", CASES[::4], ids=lambda chosen: chosen.name)
def test_float32_is_that_of_torch(chosen, root):
    folder, asked = checkpoint(chosen, root), prompts(chosen)
    exact = torch_model(folder, chosen, device="cuda")
    with jaxinfer.init_inference(folder, mesh={"tensor": 1}, dtype="float32", max_batch=4, decode_chunk=8) as engine:
        for got, prompt in zip(engine.logits(asked), asked, strict=True):
            np.testing.assert_allclose(got, torch_logits(exact, prompt), atol=2e-4, rtol=1e-3)
