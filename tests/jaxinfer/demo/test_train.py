"""The demo model's training script: its model against transformers', its data, and a short training to the end."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from jaxinfer.demo import train
from jaxinfer.demo.fetch_text import CHAPTER

TEXTS = [
    f"The {age} {who} went home.\nIt was {when}."
    for age in ("old", "young")
    for who in ("man", "cat")
    for when in ("late", "dark")
]


@pytest.fixture(scope="module")
def config() -> LlamaConfig:
    """The demo's architecture, made small."""
    config = train.llama_config(300)
    config.update({"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8})
    return config


def oracle(config: LlamaConfig, params: nnx.State) -> LlamaForCausalLM:
    """transformers' model with the exported float32 weights."""
    model = LlamaForCausalLM(config).float().eval()
    weights = {name: torch.tensor(np.asarray(leaf)) for name, leaf in train.tensors(params, jnp.float32).items()}
    assert set(weights) == set(model.state_dict()) - {"lm_head.weight"}
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    return model


def test_forward_equals_transformers(config: LlamaConfig) -> None:
    model = train.Llama(config, 0.5, nnx.Rngs(3))
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(leaf.size), leaf.shape), nnx.state(model, nnx.Param)
    )
    nnx.update(model, params)
    tokens = np.random.default_rng(0).integers(0, 300, (2, 37))
    with torch.no_grad():
        expected = oracle(config, params)(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(model(jnp.asarray(tokens)), expected, atol=2e-4, rtol=1e-3)


def test_the_real_configuration_has_four_million_parameters() -> None:
    model = nnx.eval_shape(lambda: train.Llama(train.llama_config(), 0.0, nnx.Rngs(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == 4_000_512


def test_read_chapters_holds_out_one_in_so_many(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text(CHAPTER.join(f"b{i}\n" for i in range(train.HELD_OUT)))
    (tmp_path / "a.txt").write_text("a0")
    chapters = list(train.read_chapters(tmp_path))
    assert [text for _, text in chapters] == ["a0", *(f"b{i}" for i in range(train.HELD_OUT))]
    assert [text for held_out, text in chapters if held_out] == [f"b{train.HELD_OUT // 2}"]


def test_no_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no \.txt file"):
        list(train.read_chapters(tmp_path))


def test_paragraphs_start_behind_breaks() -> None:
    tokenizer = train.train_tokenizer(TEXTS, 300)
    stream = train.encode(tokenizer, TEXTS[:2])
    starts = train.paragraph_starts(tokenizer, stream, 4)
    texts = [tokenizer.decode(stream[start:].tolist(), skip_special_tokens=True) for start in starts]
    rest = "".join(TEXTS[:2])
    assert stream[0] == stream[-1] == 0
    assert texts[0] == rest
    assert texts[1] == rest[rest.index("\n") + 1 :]
    assert all(start + 4 <= len(stream) for start in starts)


def test_training_to_checkpoint(config: LlamaConfig, tmp_path: Path) -> None:
    tokenizer = train.train_tokenizer(TEXTS, 300)
    recipe = train.Recipe(batch=4, context=16, warmup=10)
    texts = (TEXTS[1:] * 8, TEXTS[:1] * 4)
    params, report = train.fit(config, recipe, tokenizer, texts, dropout=0.1, steps=train.CHUNK, minutes=1)
    assert report["steps"] == report["best_step"] == train.CHUNK
    assert report["validation_loss"] < 3.0 < np.log(300)

    train.export(tmp_path, config, params, tokenizer)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 0
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "The cat\u2014late"
    ids = loaded(text).input_ids
    assert ids == [0, *tokenizer.encode(text, add_special_tokens=False).ids]
    assert loaded.decode(ids, skip_special_tokens=True) == text

    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.bfloat16
    stream = train.encode(tokenizer, texts[1])
    count = (len(stream) - 1) // recipe.context
    losses = []
    for row in range(count):
        window = torch.tensor(stream[row * recipe.context :][: recipe.context + 1].astype(np.int64))[None]
        window[0, 0] = 0
        with torch.no_grad():
            logits = model.float()(window[:, :-1]).logits
        losses.append(torch.nn.functional.cross_entropy(logits[0], window[0, 1:]).item())
    # Same bfloat16 weights; training evaluates in bfloat16 (8 bits), transformers here in float32.
    assert np.mean(losses) == pytest.approx(report["validation_loss"], rel=1e-2)
