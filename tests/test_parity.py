"""The engine against transformers on torch: chunks of prompts, the blocked cache, slots and meshes change no token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jaxinfer import MeshError, SamplingParams, init_inference
from jaxinfer.models.families import FAMILIES
from tests.bare import BareModel, steady
from tests.cases import CASES, case
from tests.oracle import checkpoint, prompts, rms, shared_root, torch_greedy, torch_logits, torch_model

STEPS = 32
GREEDY = SamplingParams(temperature=0.0, max_tokens=STEPS, ignore_eos=True)

FIRST = [next(each for each in CASES if each.family == family) for family in FAMILIES]
# Beside one case a family: key/value heads that devices share, slopes of later heads, projections, every layout of QKV.
SPLIT = FIRST + [
    case(name)
    for name in (
        "bloom-twelve-heads", "falcon-alibi-twelve-heads", "falcon-grouped-one-norm", "falcon-multi-query",
        "gemma3_text-capped-untied", "gpt2-unscaled-untied", "llama-biased-tied", "llama-multi-query",
        "opt-projected-post-norm", "phi3-longrope", "qwen2-late-window",
    )
]  # fmt: skip


def each(cases):
    return pytest.mark.parametrize("chosen", list(dict.fromkeys(cases)), ids=lambda chosen: chosen.name)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return shared_root(tmp_path_factory)


def engine(folder, mesh=None, **options):
    settings = {"dtype": "float32", "max_batch": 4, "prefill_chunk": 48, "decode_chunk": 8, "progress": False}
    return init_inference(folder, mesh=mesh or {"data": 1}, **settings | options)


def tokens(model, asked):
    return [output.outputs[0].token_ids for output in model.generate(asked, GREEDY)]


@each(CASES)
def test_one_device_gives_the_tokens_and_logits_of_transformers(chosen, root):
    folder = checkpoint(chosen, root)
    asked, theirs = prompts(chosen), torch_model(folder, chosen)
    with engine(folder) as ours:
        for got, prompt in zip(ours.logits(asked), asked, strict=True):
            np.testing.assert_allclose(got, torch_logits(theirs, prompt), atol=2e-4, rtol=1e-3)
        continued = steady(folder, asked, STEPS)
        assert tokens(ours, continued) == [torch_greedy(theirs, prompt, STEPS).token_ids for prompt in continued]


@pytest.mark.parametrize(
    ("chosen", "tensor"),
    [(chosen, tensor) for tensor, cases in ((2, FIRST), (4, SPLIT)) for chosen in dict.fromkeys(cases)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_mesh_gives_the_same_tokens(chosen, tensor, root):
    folder = checkpoint(chosen, root)
    asked, theirs = steady(folder, prompts(chosen)[1::2], STEPS), torch_model(folder, chosen)
    assert tensor in chosen.tensor
    with engine(folder, {"data": 2, "tensor": tensor}) as ours:
        assert tokens(ours, asked) == [torch_greedy(theirs, prompt, STEPS).token_ids for prompt in asked]


def test_a_model_that_cannot_be_split_is_refused(root):
    folder = checkpoint(case("llama-three-heads"), root)
    with pytest.raises(MeshError, match="tensor"):
        engine(folder, {"tensor": 2})


def test_longrope_across_its_switch_takes_the_long_frequencies_throughout(root):
    chosen = case("phi3-longrope")
    folder, asked = checkpoint(chosen, root), prompts(chosen)
    across = [ids for ids in asked if ids not in steady(folder, asked, STEPS)]
    assert across
    with engine(folder) as ours:
        assert tokens(ours, across) == BareModel(folder).greedy(across, STEPS, long=[True] * len(across))


@each(FIRST)
def test_bfloat16_tokens_are_the_best_but_for_rounding(chosen, root):
    """A greedy token may miss the best one of the float32 result of the same weights, after the same tokens, by no more
    than rounding explains: six times the root-mean-square error of transformers in bfloat16. A miss takes two logits
    that err apart, 1.4 times that together, and this is the worst of a hundred draws (2.6 deviations); the rest is
    room for luck.
    """
    folder = checkpoint(chosen, root, torch.bfloat16)
    asked = steady(folder, prompts(chosen), STEPS)
    exact = torch_model(folder, chosen)
    rounded = torch_model(folder, chosen, torch.bfloat16)
    truth = [torch_logits(exact, prompt) for prompt in asked]
    error = rms([torch_logits(rounded, prompt) for prompt in asked], truth)
    with engine(folder, dtype="bfloat16") as ours:
        assert rms(ours.logits(asked), truth) < 1.25 * error
        for prompt, output in zip(asked, tokens(ours, asked), strict=True):
            logits = torch_logits(exact, prompt + output)[len(prompt) - 1 : -1]
            missed = logits.max(axis=-1) - logits[np.arange(STEPS), output]
            assert missed.max() < 6 * error
