"""How layers are joined, and that steps through the cache are one full forward."""

from __future__ import annotations

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxinfer.models import decoder
from jaxinfer.models.attention import Batch, Pieces, at_ends
from jaxinfer.models.decoder import RESIDUALS, Decoder, abstract, parameters
from jaxinfer.models.families import FAMILIES
from jaxinfer.models.positions import rotary
from jaxinfer.models.spec import Alibi, LayerSpec, Layout, Norm
from tests.modules import Built, small_spec

# Functions that do not commute, so that any wrong order or residual shows.
NORMS = [lambda x: 2 * x + 1, lambda x: 3 * x - 2, lambda x: 5 * x + 4, lambda x: 7 * x - 3]
FORMULAS = {
    "pre": lambda x, a, m, n: (y := x + a(n[0](x))) + m(n[1](y)),
    "post": lambda x, a, m, n: n[1]((y := n[0](x + a(x))) + m(y)),
    "normed": lambda x, a, m, n: (z := n[1]((y := n[0](x)) + a(y))) + m(z),
    "parallel": lambda x, a, m, n: x + a(n[0](x)) + m(n[0](x)),
    "parallel_two_norms": lambda x, a, m, n: x + a(n[0](x)) + m(n[1](x)),
    "sandwich": lambda x, a, m, n: (y := x + n[2](a(n[0](x)))) + n[3](m(n[1](y))),
}


@pytest.mark.parametrize("name", RESIDUALS)
def test_the_ways_of_joining(name):
    count, join = RESIDUALS[name]
    attend, mlp = (lambda x: x * x + 1), (lambda x: x * x * x - 2)

    def half(function):
        """As attention and MLP are called, which norm what they are given and add the residual."""
        return lambda x, norm, residual: function(norm(x) if norm else x) + (0 if residual is None else residual)

    whole = join(1.5, NORMS[:count], half(attend), half(mlp), lambda x: x)
    assert whole == FORMULAS[name](1.5, attend, mlp, NORMS)


@pytest.mark.parametrize("name", RESIDUALS)
def test_the_ways_of_joining_where_attention_gives_fewer(name):
    count, join = RESIDUALS[name]
    x, ends = np.linspace(-1, 1, 7), [2, 6, 0]

    def attend(x, norm, residual):
        y = (norm(x) if norm else x) ** 2 + 1
        return y[ends] + (0 if residual is None else residual[ends])

    def mlp(x, norm, residual):
        assert len(x) == len(ends)
        return (norm(x) if norm else x) ** 3 - 2 + (0 if residual is None else residual)

    found = join(x, NORMS[:count], attend, mlp, lambda x: x[ends])
    np.testing.assert_allclose(found, FORMULAS[name](x, lambda x: x**2 + 1, lambda x: x**3 - 2, NORMS)[ends])


def test_all_formulas_differ():
    values = {f(1.5, lambda x: x * x + 1, lambda x: x * x * x - 2, NORMS) for f in FORMULAS.values()}
    assert len(values) == len(FORMULAS) == len(RESIDUALS)


def test_the_decoder_does_not_know_families():
    source = inspect.getsource(decoder)
    assert not [family for family in FAMILIES if f'"{family}"' in source]


SPECS = {
    "rotary": small_spec(
        kv_heads=2,
        layers=(LayerSpec(scale=0.3, rotary=rotary(None, 8, 256)), LayerSpec(scale=0.3, window=5)),
        gated_mlp=True,
        residual="sandwich",
        qk_norm=Norm(kind="rms", eps=1e-6),
        softcap=3.0,
    ),
    "alibi": small_spec(
        alibi=Alibi(slopes=(0.5, 0.25, 0.125, 0.0625), scaled=True, bfloat16=True), residual="parallel"
    ),
    "learned": small_spec(learned_positions=256, position_offset=2, residual="post", tied_head=True),
}


@functools.cache
def built_of(name):
    return Built(lambda: Decoder(SPECS[name], Layout.of(SPECS[name]), jnp.float32))


@settings(max_examples=8)
@given(
    st.sampled_from(sorted(SPECS)),
    st.integers(1, 90),
    st.integers(1, 90),
    st.lists(st.integers(1, 40), max_size=3),
    st.integers(0, 2**16),
)
def test_any_cut_into_steps_is_one_full_forward(name, first, second, cuts, seed):
    """Two sequences of unequal length, prefilled in chunks and then decoded token by token, in scattered blocks."""
    spec, built = SPECS[name], built_of(name)
    rng = np.random.default_rng(seed)
    lengths = [first, second]
    longest = max(lengths)
    tokens = rng.integers(0, spec.vocab_size, (2, longest)).astype(np.int32)
    positions = np.where(np.arange(longest) < np.asarray(lengths)[:, None], np.arange(longest), -1).astype(np.int32)
    tables = rng.permutation(np.arange(1, 7)).reshape(2, 3)[:, :2].astype(np.int32)
    whole = built(lambda model: model(Batch(jnp.asarray(tokens), jnp.asarray(positions)))[0])
    edges = sorted(
        {0, *(min(cut, longest) for cut in np.cumsum(cuts).tolist()), max(longest - 2, 0), longest - 1, longest}
    )

    def steps(model):
        caches = [(jnp.zeros((7, spec.kv_heads, 64, 8)),) * 2] * spec.num_layers
        out = []
        for start, stop in itertools.pairwise(edges):
            batch = Batch(
                jnp.asarray(tokens[:, start:stop]), jnp.asarray(positions[:, start:stop]), jnp.asarray(tables)
            )
            logits, caches = model(batch, caches)
            out.append(logits)
        return jnp.concatenate(out, axis=1)

    stepped = built(steps)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(stepped[row, :length], whole[row, :length], atol=5e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_narrowed_to_some_tokens_the_last_layer_is_the_same_at_these(name, packed):
    """Of rows and of packed tokens; keys and values of every token are written."""
    spec, built = SPECS[name], built_of(name)
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (2, 6)).astype(np.int32)
    positions, tables = np.broadcast_to(np.arange(6, dtype=np.int32), (2, 6)), jnp.asarray([[2], [1]])
    ends = jnp.asarray([5, 2]) if not packed else jnp.asarray([5, 8])
    pieces = None
    if packed:
        tokens, positions = tokens.reshape(1, 12), positions.reshape(1, 12)
        pieces = Pieces.of(jnp.arange(12, dtype=jnp.int32).reshape(2, 6), jnp.asarray(positions), tables)
    batch = Batch(jnp.asarray(tokens), jnp.asarray(positions), tables, pieces=pieces)
    caches = [(jnp.zeros((3, spec.kv_heads, 64, 8)),) * 2] * spec.num_layers
    whole, written = built(lambda model: model.hidden_states(batch, caches))
    narrow, again = built(lambda model: model.hidden_states(batch, caches, ends=ends))
    assert narrow.shape == (2, 1, spec.hidden)
    np.testing.assert_allclose(narrow[:, 0], at_ends(whole, ends, packed=packed), atol=2e-5)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(written), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("name", SPECS)
def test_layers_go_on_from_what_others_made(name):
    spec, built = SPECS[name], built_of(name)
    batch = Batch(jnp.asarray([[1, 2, 3, 36, 0]]), jnp.arange(5)[None], jnp.asarray([[1]]))
    caches = [(jnp.zeros((2, spec.kv_heads, 64, 8)),) * 2] * spec.num_layers

    def parted(model):
        x, first = model.hidden_states(batch, caches[:1], own=range(1))
        x, rest = model.hidden_states(batch, caches[1:], x, range(1, spec.num_layers))
        return x, first + rest

    for one, other in zip(
        jax.tree.leaves(built(parted)),
        jax.tree.leaves(built(lambda model: model.hidden_states(batch, caches))),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=2e-5)


@pytest.mark.parametrize("name", SPECS)
def test_split_over_two_devices_it_is_the_same(name):
    spec = SPECS[name]
    built = Built(lambda: Decoder(spec, Layout.of(spec, 2), jnp.float32))
    batch = Batch(jnp.asarray([[1, 2, 3, 36, 0]]), jnp.arange(5)[None])
    one = built(lambda model: model(batch)[0])
    np.testing.assert_allclose(built.split(lambda model: model(batch)[0], 2), one, atol=2e-5)


def test_parameters_are_listed_by_path_in_the_order_of_the_leaves():
    listed = parameters(abstract(SPECS["rotary"], Layout.of(SPECS["rotary"]), jnp.dtype(jnp.bfloat16)))
    assert list(listed) == list(built_of("rotary").weights)
    assert [info.shape for info in listed.values()] == [value.shape for value in built_of("rotary").weights.values()]
    qkv = listed["layers.1.attention.qkv"]
    assert (qkv.shape, qkv.dtype, qkv.axes) == ((2, 4, 8, 16), jnp.bfloat16, ("kv_heads", None, "head_dim", "hidden"))
    assert {"embed.tokens", "layers.0.norms.3.scale", "layers.0.mlp.up", "head.norm.bias", "head.tokens"} <= set(listed)


def test_a_model_of_any_size_is_described_without_memory():
    spec = small_spec(hidden=16384, intermediate=65536, vocab_size=256_000, layers=(LayerSpec(scale=1.0),) * 4)
    listed = parameters(abstract(spec, Layout.of(spec), jnp.dtype(jnp.bfloat16)))
    assert sum(info.nbytes for info in listed.values()) > 30e9
