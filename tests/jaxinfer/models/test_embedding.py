from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.models.attention import Batch
from jaxinfer.models.embedding import Embedding, Head
from jaxinfer.models.spec import Layout
from tests.modules import Built, normal, small_spec

TOKENS = jnp.asarray([[0, 36, 5, 20], [7, 7, 19, 1]])
POSITIONS = jnp.asarray([[0, 1, 2, 3], [3, 4, -1, -1]])
BATCH = Batch(tokens=TOKENS, positions=POSITIONS)


def built_pair(tensor=1, **changes):
    spec = small_spec(**changes)
    layout = Layout.of(spec, tensor)
    embed = Built(lambda: Embedding(spec, layout, jnp.float32))
    head = Built(lambda: Head(spec, layout, jnp.float32), seed=1)
    return spec, embed, head


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_tokens_are_looked_up_wherever_their_rows_lie(tensor):
    _, embed, _ = built_pair(tensor)
    got = embed(lambda module: module(BATCH)) if tensor == 1 else embed.split(lambda module: module(BATCH), tensor)
    np.testing.assert_allclose(got, embed.weights["tokens"][np.asarray(TOKENS)], atol=1e-6)


def test_positions_have_an_offset_and_padding_reads_a_valid_row():
    _, embed, _ = built_pair(learned_positions=8, position_offset=2)
    places = np.maximum(np.asarray(POSITIONS), 0) + 2
    wanted = embed.weights["tokens"][np.asarray(TOKENS)] + embed.weights["positions"][places]
    np.testing.assert_allclose(embed(lambda module: module(BATCH)), wanted, atol=1e-6)


def test_a_narrow_embedding_is_projected_in_and_out():
    spec, embed, head = built_pair(embedding_dim=6)
    x = embed(lambda module: module(BATCH))
    np.testing.assert_allclose(x, embed.weights["tokens"][np.asarray(TOKENS)] @ embed.weights["project"].T, atol=1e-5)
    assert head.weights["tokens"].shape == (spec.vocab_size, 6)
    y = np.asarray(x, np.float64)
    y = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-5)
    y = y * head.weights["norm.scale"] + head.weights["norm.bias"]
    wanted = y @ head.weights["project"].T @ head.weights["tokens"].T
    np.testing.assert_allclose(head(lambda module: module(x, None)), wanted, atol=1e-4)


def test_the_scale_is_rounded_to_the_dtype():
    spec = small_spec(embedding_scale=3072**0.5)
    built = Built(lambda: Embedding(spec, Layout.of(spec), jnp.bfloat16), dtype=jnp.bfloat16)
    got = built(lambda module: module(BATCH))
    table = jnp.asarray(built.weights["tokens"], jnp.bfloat16)[TOKENS]
    np.testing.assert_array_equal(got, table * jnp.asarray(55.5, jnp.bfloat16))  # not 55.4256


@pytest.mark.parametrize("tensor", [2, 4])
def test_a_split_head_gives_whole_logits_without_the_padding(tensor):
    x = normal(2, 3, 16)
    spec, _, head = built_pair(tensor, final_norm=False, head_bias=True, logit_softcap=2.0)
    wanted = np.asarray(x) @ head.weights["tokens"].T + head.weights["bias"]
    wanted = 2 * np.tanh(wanted[..., : spec.vocab_size] / 2)
    got = head.split(lambda module: module(x, None), tensor)
    assert got.shape == (2, 3, spec.vocab_size)
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_a_tied_head_has_no_weight_of_its_own_and_reads_that_of_the_embedding():
    spec, embed, head = built_pair(tied_head=True, final_norm=False)
    assert not head.weights
    x = normal(2, 16)
    wanted = np.asarray(x) @ embed.weights["tokens"].T
    got = embed(lambda module: Head(spec, Layout.of(spec), jnp.float32)(x, module))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_logits_are_float32_whatever_the_weights_are():
    spec = small_spec()
    built = Built(lambda: Head(spec, Layout.of(spec), jnp.bfloat16), dtype=jnp.bfloat16)
    assert built(lambda module: module(normal(2, 16).astype(jnp.bfloat16), None)).dtype == jnp.float32
