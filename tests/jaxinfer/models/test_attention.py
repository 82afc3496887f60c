"""The attention half against loops over heads in numpy, bare and split over heads."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
import sharding
from jaxinfer.models import norm as norms
from jaxinfer.models.attention import Attention, Batch
from jaxinfer.models.positions import alibi_slopes, rotary
from jaxinfer.models.spec import Alibi, LayerSpec, Layout, Norm
from pallas_kernels.choices import MAX_LINEAR_ROWS, Device, compiling_for
from pallas_kernels.qkv_gemm import qkv_gemm
from tests.modules import Built, normal, small_spec

X = normal(2, 7, 16)
PLACES = jnp.tile(jnp.arange(7), (2, 1))
BATCH = Batch(tokens=jnp.zeros((2, 7), jnp.int32), positions=PLACES)
TURN = rotary({"partial_rotary_factor": 0.5}, 8, 64, partial=True)

VARIANTS = {
    "plain": {},
    "biased": {"qkv_bias": True, "out_bias": True},
    "grouped": {"kv_heads": 2},
    "window": {"layers": (LayerSpec(scale=0.3, window=3),)},
    "softcap": {"softcap": 0.5},
    "rotary": {"layers": (LayerSpec(scale=0.3, rotary=TURN),), "kv_heads": 2},
    "alibi": {"alibi": Alibi(slopes=alibi_slopes(4))},
    "alibi-scaled": {"alibi": Alibi(slopes=alibi_slopes(4), scaled=True), "kv_heads": 2},
    "normed": {"qk_norm": Norm(kind="rms", eps=1e-3), "layers": (LayerSpec(scale=0.3, rotary=TURN),)},
}  # fmt: skip
DTYPES = ("dtype", "weight_dtype", "kv_dtype")
each = pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)


def build(changes):
    spec = small_spec(**changes)
    layout = Layout.of(spec)
    return spec, Built(lambda: Attention(spec, spec.layers[0], layout, jnp.float32))


def turned(x, places):
    """Rotate the first half of each head by complex numbers; [T, D]."""
    count = len(TURN.inv_freq)
    phase = np.exp(1j * places[:, None] * np.asarray(TURN.inv_freq))
    pairs = (x[:, :count] + 1j * x[:, count : 2 * count]) * phase
    return np.concatenate([pairs.real, pairs.imag, x[:, 2 * count :]], axis=1)


def slowly(spec, w, x):
    """[T, H] to [T, H], one head and one query at a time."""
    layer, per_group = spec.layers[0], spec.heads // spec.kv_heads
    places = np.arange(len(x))
    y = np.zeros_like(x)

    def project(group, row, norm):
        head = x @ w["qkv"][group, row].T + (w["qkv_bias"][group, row] if spec.qkv_bias else 0)
        if norm and spec.qk_norm:
            head = head / np.sqrt((head * head).mean(-1, keepdims=True) + spec.qk_norm.eps) * w[f"{norm}.scale"]
        return turned(head, places) if norm and layer.rotary else head

    for head in range(spec.heads):
        group, row = divmod(head, per_group)
        query, key = project(group, row, "query_norm"), project(group, per_group, "key_norm")
        value = project(group, per_group + 1, None)
        for t in places:
            first = 0 if layer.window is None else max(0, t - layer.window + 1)
            keys = np.arange(first, t + 1)
            bias = spec.alibi.slopes[head] * keys if spec.alibi else 0 * keys
            scores = (key[keys] @ query[t] + (bias if spec.alibi and spec.alibi.scaled else 0)) * layer.scale
            if spec.softcap:
                scores = spec.softcap * np.tanh(scores / spec.softcap)
            scores = scores + (bias if spec.alibi and not spec.alibi.scaled else 0)
            weights = np.exp(scores - scores.max())
            y[t] += w["out"][:, group, row] @ (weights / weights.sum() @ value[keys])
    return y + (w["out_bias"] if spec.out_bias else 0)


@each
def test_it_is_what_loops_over_heads_give(changes):
    spec, built = build(changes)
    weights = {name: value.astype(np.float64) for name, value in built.weights.items()}
    wanted = [slowly(spec, weights, np.asarray(x, np.float64)) for x in X]
    np.testing.assert_allclose(built(lambda module: module(X, BATCH, None)[0]), wanted, atol=2e-5)


@each
@pytest.mark.parametrize("tensor", [2, 4])
def test_split_over_heads_it_is_the_same(changes, tensor):
    spec, built = build(changes)
    if spec.kv_heads % tensor:
        spec, built = build(changes | {"kv_heads": 4})
    one = built(lambda module: module(X, BATCH, None)[0])
    np.testing.assert_allclose(built.split(lambda module: module(X, BATCH, None)[0], tensor), one, atol=1e-5)


@each
def test_through_the_cache_it_is_the_same(changes):
    """Tokens in two pieces, the second one token at a time, in blocks that are out of order."""
    spec, built = build(changes)
    empty = jnp.zeros((5, spec.kv_heads, 64, spec.head_dim))
    tables = jnp.asarray([[3], [1]])

    def stepwise(module):
        cache, out = (empty, empty), []
        for start, stop in ((0, 4), (4, 5), (5, 6), (6, 7)):
            batch = Batch(BATCH.tokens[:, start:stop], PLACES[:, start:stop], tables)
            y, cache = module(X[:, start:stop], batch, cache)
            out.append(y)
        return jnp.concatenate(out, axis=1)

    whole = built(lambda module: module(X, BATCH, None)[0])
    np.testing.assert_allclose(built(stepwise), whole, atol=1e-5)


def test_padding_changes_nothing():
    _, built = build({})
    padded = Batch(jnp.zeros((2, 9), jnp.int32), jnp.pad(PLACES, ((0, 0), (0, 2)), constant_values=-1))
    x = jnp.concatenate([X, jnp.full((2, 2, 16), 1e3)], axis=1)
    whole = built(lambda module: module(X, BATCH, None)[0])
    np.testing.assert_allclose(built(lambda module: module(x, padded, None)[0])[:, :7], whole, atol=1e-5)


def test_without_a_cache_none_comes_back():
    _, built = build({})
    seen = []
    built(lambda module: seen.append(module(X, BATCH, None)[1]))
    assert seen == [None]


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("changes", [{}, {"qkv_bias": True, "out_bias": True}], ids=["plain", "biased"])
def test_norm_and_residual_are_those_around_it(changes, tensor):
    _, built = build(changes)
    size = Norm(kind="layer", eps=1e-3, weight=False)

    def inside(module):
        return module(X, BATCH, None, norms.Norm(size, 16, jnp.float32), 3 * X)[0]

    centred = X - jnp.mean(X, axis=-1, keepdims=True)
    normed = centred / jnp.sqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + 1e-3)
    wanted = built(lambda module: module(normed, BATCH, None)[0]) + 3 * X
    np.testing.assert_allclose(built(inside) if tensor == 1 else built.split(inside, tensor), wanted, atol=2e-5)


@pytest.mark.parametrize(
    ("on", "dtype", "kernel"),
    [
        (Device("cpu"), jnp.bfloat16, False),
        (Device("gpu", "8.0"), jnp.bfloat16, False),
        (Device("gpu", "9.0"), jnp.bfloat16, True),
        (Device("gpu", "9.0"), jnp.float32, False),
    ],
    ids=str,
)
def test_prefill_over_a_cache_is_its_kernels_on_hopper_and_plain_elsewhere(on, dtype, kernel):
    spec = small_spec(hidden=64, head_dim=64)
    built = Built(lambda: Attention(spec, spec.layers[0], Layout.of(spec), dtype), dtype=dtype)
    cache = tuple(jnp.zeros((3, 4, 64, 64), dtype) for _ in range(2))
    batch = dataclasses.replace(BATCH, tables=jnp.asarray([[1], [2]], jnp.int32))
    with compiling_for(on):
        program = str(
            jax.make_jaxpr(lambda state, x, cache: nnx.merge(built.graph, state)(x, batch, cache))(
                built.state, jnp.zeros((2, 7, 64), dtype), cache
            )
        )
    assert ("prefill_attention_kernel" in program) == kernel


@pytest.mark.parametrize("changes", [
    {"layers": (LayerSpec(scale=0.3, rotary=rotary({}, 8, 64)),), "kv_heads": 2},
    {"qkv_bias": True, "alibi": Alibi(slopes=alibi_slopes(4))},
], ids=["rotated", "biased"])  # fmt: skip
@pytest.mark.parametrize("tensor", [1, 2])
def test_query_key_and_value_of_one_kernel_are_those_apart(monkeypatch, changes, tensor):
    """What the module hands to the kernel: its reference, in the kernel's place, gives the same."""
    spec, built = build(changes)
    size = Norm(kind="rms", eps=1e-3, weight=False)
    places = jnp.asarray([[65], [-1]])
    batch = Batch(jnp.zeros((2, 1), jnp.int32), places, jnp.asarray([[3, 0], [1, 2]]))
    x, cache = normal(2, 1, 16), tuple(normal(5, spec.kv_heads, 64, 8, seed=i) for i in (2, 3))

    def run(module):
        groups = module.qkv.shape[0]
        first = sharding.axis_index("tensor") * groups
        own = tuple(jax.lax.dynamic_slice_in_dim(blocks, first, groups, axis=1) for blocks in cache)
        y, written = module(x, batch, own, norms.Norm(size, 16, jnp.float32))
        return y[:1], *(sharding.all_gather(blocks, "tensor", 1) for blocks in written)

    def both():
        return built(run) if tensor == 1 else built.split(run, tensor)

    apart, asked = both(), []
    real = pallas_kernels.qkv_choice

    def chosen(on, **about):
        asked.append(about)
        choice = real(Device("gpu", "9.0"), **about | {"head_dim": 128} | dict.fromkeys(DTYPES, "bfloat16"))
        assert choice.implementation == "mosaic", choice.reason
        return choice

    def instead(*arguments, implementation, **rest):
        assert implementation == "mosaic"
        return qkv_gemm(*arguments, **rest)

    monkeypatch.setattr(pallas_kernels, "qkv_choice", chosen)
    monkeypatch.setattr(pallas_kernels, "qkv_gemm", instead)
    for found, wanted in zip(both(), apart, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert asked[0]["rows"] == 2


@pytest.mark.parametrize(
    ("on", "rows", "changes", "kernel"),
    [
        (Device("gpu", "9.0"), 1, {}, True),
        (Device("gpu", "9.0"), MAX_LINEAR_ROWS, {}, True),
        (Device("gpu", "9.0"), MAX_LINEAR_ROWS + 1, {}, False),
        (Device("gpu", "9.0"), 1, {"layers": (LayerSpec(scale=1.0, rotary=rotary({}, 128, 64)),)}, True),
        (Device("gpu", "9.0"), 1, {"qk_norm": Norm(kind="rms", eps=1e-3)}, False),
        (Device("gpu", "8.0"), 1, {}, False),
    ],
    ids=str,
)
def test_decode_is_one_kernel_from_the_norm_to_the_cache_where_it_runs(on, rows, changes, kernel):
    spec = small_spec(hidden=64, head_dim=128, **changes)
    built = Built(lambda: Attention(spec, spec.layers[0], Layout.of(spec), jnp.bfloat16), dtype=jnp.bfloat16)
    cache = tuple(jnp.zeros((3, 4, 64, 128), jnp.bfloat16) for _ in range(2))
    zeros = jnp.zeros((rows, 1), jnp.int32)
    with compiling_for(on):
        program = str(
            jax.make_jaxpr(lambda state, x, cache: nnx.merge(built.graph, state)(x, Batch(zeros, zeros, zeros), cache))(
                built.state, jnp.zeros((rows, 1, 64), jnp.bfloat16), cache
            )
        )
    assert ("qkv_gemm" in program) == kernel
    assert ("scatter" in program) != kernel
