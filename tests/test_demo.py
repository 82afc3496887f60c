"""The bundled model, loaded by jaxinfer and by transformers from the same files."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import jaxinfer
from jaxinfer import SamplingParams
from jaxinfer.checkpoints import resolve

PROMPTS = ["It was a fine morning, and", "The captain of the ship", "“My dear,” said", "In the beginning", "—"]
TEXT = (
    "The two sisters walked slowly along the shore, and neither of them spoke until the sun had gone down behind the "
    'hills. "I am very glad," said the elder at last, "that you have come home." The other did not answer; she looked '
    "at the sea, and at the little boats that lay upon the sand, and thought of the winter. In the village there was a "
    "light in every window, and the smoke rose straight into the cold air. When they came to the door of the house, "
    "their father was waiting for them with a letter in his hand."
)


@pytest.fixture(scope="module")
def reference():
    folder = resolve("demo")
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def engine():
    with jaxinfer.init_inference("demo", mesh={"tensor": 1}, dtype="float32", max_batch=8, progress=False) as engine:
        yield engine


@torch.no_grad()
def token_logprobs(model, ids):
    logits = model(input_ids=torch.tensor([ids])).logits[0, :-1].float()
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0].numpy()


def test_it_is_small():
    folder = resolve("demo")
    files = [path for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".jinja")]
    assert sum(path.stat().st_size for path in files) <= 10_000_000


def test_greedy_text_is_that_of_transformers(engine, reference):
    tokenizer, model = reference
    outputs = engine.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=40))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        ids = tokenizer(prompt, return_tensors="pt")
        said = model.generate(**ids, do_sample=False, max_new_tokens=40, temperature=None, top_p=None)[0]
        new = said[ids["input_ids"].shape[1] :]
        assert output.outputs[0].token_ids == new.tolist()
        assert output.outputs[0].text == tokenizer.decode(new, skip_special_tokens=True)


def test_log_probabilities_and_perplexity_are_those_of_transformers(engine, reference):
    tokenizer, model = reference
    ids = tokenizer(TEXT)["input_ids"]
    expected = token_logprobs(model, ids)
    score = engine.score(TEXT)
    assert score.token_ids == ids
    np.testing.assert_allclose(np.array(score.logprobs[1:]), expected, atol=2e-4, rtol=1e-3)
    assert score.perplexity == pytest.approx(math.exp(-expected.mean()), rel=1e-4)


def test_it_knows_english(engine):
    words = TEXT.split()
    shuffled = " ".join(np.random.default_rng(0).permutation(words))
    assert engine.score(TEXT).perplexity < 100 < 5 * engine.score(TEXT).perplexity < engine.score(shuffled).perplexity


def test_bfloat16_costs_under_half_a_percent_of_perplexity(engine):
    with jaxinfer.init_inference("demo", mesh={"tensor": 1}, max_batch=8, progress=False) as rough:
        assert rough.plan.dtype == "bfloat16"
        assert rough.score(TEXT).perplexity == pytest.approx(engine.score(TEXT).perplexity, rel=5e-3)
