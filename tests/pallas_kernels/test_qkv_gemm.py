"""Query, key and value: the reference, what is refused, and how the work is divided."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.qkv_gemm import Tuning, _shared_bytes, qkv_gemm, slots_of, tuning_for_heads
from pallas_kernels.skinny_gemm import SMEM_PER_SM, SMS, InputNorm
from tests.pallas_kernels import textbook
from tests.pallas_kernels.textbook import array

SIZE = 64


def operands(rng, batch, tokens, groups, per_group, dim, k, *, dtype=jnp.float32, width=2, blocks=None):
    """Operands whose tables name each block once, positions that follow each other, and a cache full of a pattern."""
    blocks = batch * width + 1 if blocks is None else blocks
    starts = rng.integers(0, width * SIZE - tokens + 1, (batch, 1))
    return {
        "x": array(rng, batch, tokens, k, dtype=dtype),
        "weight": array(rng, groups, per_group + 2, dim, k, dtype=dtype) * jnp.asarray(k**-0.5, dtype),
        "cache": tuple(array(rng, blocks, groups, SIZE, dim, dtype=dtype) for _ in range(2)),
        "tables": jnp.asarray(rng.permutation(blocks)[: batch * width].reshape(batch, width), jnp.int32),
        "positions": jnp.asarray(starts + np.arange(tokens), jnp.int32),
    }


def angles(rng, batch, tokens, dim):
    turned = rng.uniform(-3, 3, (batch, tokens, dim // 2))
    return jnp.asarray(np.cos(turned), jnp.float32), jnp.asarray(np.sin(turned), jnp.float32)


def exact(x, weight, cache, tables, positions, *, rotary=None, **rest):
    """The same in float64 of numpy: complex numbers turn a head, and rows are written one by one."""
    (batch, tokens, k), (groups, heads, dim, _) = x.shape, weight.shape
    flat = {
        name: None if a is None else a if name == "norm" else a.reshape(*a.shape[:-3], groups * heads * dim)
        for name, a in rest.items()
    }
    y = textbook.exact(x.reshape(-1, k), weight.reshape(-1, k), **flat).reshape(batch, tokens, groups, heads, dim)
    if rotary is not None:
        cos, sin = (np.asarray(a, np.float64)[:, :, None, None] for a in rotary)
        turned = (y[..., : dim // 2] + 1j * y[..., dim // 2 :]) * (cos + 1j * sin)
        y[..., :-1, :] = np.concatenate((turned.real, turned.imag), axis=-1)[..., :-1, :]
    blocks = [np.asarray(a.astype(jnp.float32), np.float64) for a in cache]
    for b, t in np.ndindex(batch, tokens):
        place = int(positions[b, t])
        if place >= 0:
            for number, kept in enumerate(blocks):
                kept[int(tables[b, place // SIZE]), :, place % SIZE] = y[b, t, :, heads - 2 + number]
    return y[..., : heads - 2, :], blocks


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("kind", [None, "rms", "layer"])
@pytest.mark.parametrize(("tokens", "weights"), [(1, "float32"), (3, "int8"), (1, "int4")])
def test_reference_is_the_textbook(tokens, weights, kind, rotary):
    rng = np.random.default_rng(tokens)
    given_ = operands(rng, 4, tokens, 2, 3, 16, 128)
    given_["positions"] = given_["positions"].at[1].set(-1)
    channels = given_["weight"].shape[:-1]
    rest = {"bias": array(rng, *channels, dtype=jnp.float32)}
    if rotary:
        rest["rotary"] = angles(rng, 4, tokens, 16)
    if weights != "float32":
        top = 8 if weights == "int4" else 128
        given_["weight"] = jnp.asarray(rng.integers(1 - top, top, given_["weight"].shape), weights)
        scale = ((2,) if weights == "int4" else ()) + channels
        rest["weight_scale"] = jnp.asarray(rng.uniform(0.5, 1.5, scale) / (5 * top), jnp.float32)
    if kind:
        scale, shift = array(rng, 128, dtype=jnp.float32), array(rng, 128, dtype=jnp.float32)
        rest["norm"] = InputNorm(kind=kind, eps=1e-5, scale=scale, bias=shift)
    query, cache = qkv_gemm(**given_, **rest)
    wanted, blocks = exact(**given_, **rest)
    np.testing.assert_allclose(query, wanted, atol=2e-4, rtol=2e-4)
    for found, want in zip(cache, blocks, strict=True):
        np.testing.assert_allclose(found, want, atol=2e-4, rtol=2e-4)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), width=st.integers(1, 4), batch=st.integers(1, 6))
def test_a_slot_is_where_the_table_says(data, width, batch):
    blocks = data.draw(st.integers(1, 12))
    # Tables and positions as anybody may hand them in: blocks that are not there, places past the table's end.
    tables = data.draw(st.lists(st.lists(st.integers(-2, blocks + 2), min_size=width, max_size=width),
                                min_size=batch, max_size=batch))  # fmt: skip
    places = data.draw(st.lists(st.integers(-3, width * SIZE - 1), min_size=batch, max_size=batch))
    found = slots_of(jnp.asarray(tables, jnp.int32), jnp.asarray(places, jnp.int32)[:, None], blocks)
    for row, place, slot in zip(tables, places, np.asarray(found)[:, 0], strict=True):
        block = row[place // SIZE] if place >= 0 else -1
        assert slot == (block * SIZE + place % SIZE if 0 <= block < blocks else -1)


def test_an_empty_cache_takes_nothing_and_loses_nothing():
    rng = np.random.default_rng(0)
    given_ = operands(rng, 3, 1, 2, 1, 16, 32)
    given_["positions"] = jnp.full((3, 1), -1, jnp.int32)
    _, cache = qkv_gemm(**given_)
    for found, before in zip(cache, given_["cache"], strict=True):
        np.testing.assert_array_equal(found, before)


def refused(match, *, dim=128, k=64, batch=2, dtype=jnp.bfloat16, turned=False, **changes):
    rng = np.random.default_rng(0)
    given_ = operands(rng, batch, 1, 2, 1, dim, k, dtype=dtype)
    if turned:
        given_["rotary"] = angles(rng, batch, 1, dim)
    with pytest.raises(ValueError, match=match):
        jax.eval_shape(lambda: qkv_gemm(**given_ | changes))


def test_operands_that_do_not_fit_are_refused():
    blocks = jnp.zeros((5, 2, 64, 128), jnp.bfloat16)
    refused(r"x must be \[B, T, K\].*\(2, 64\)", x=jnp.zeros((2, 64)))
    refused(r"weight \[G, R \+ 2, D, K\]", weight=jnp.zeros((2, 2, 128, 64)))
    refused("key and value blocks, got 4 arrays", cache=(blocks,) * 4)
    refused(r"value blocks must be \(5, 2, 64, 128\), got \(4, 2, 64, 128\)", cache=(blocks, blocks[:4]))
    refused(r"tables must be \(2, 1\), got \(3, 1\)", tables=jnp.zeros((3, 1), jnp.int32))
    refused(r"tables must be \(2, 2\), got \(2,\)", tables=jnp.zeros(2, jnp.int32))
    refused(r"positions must be \(2, 1\), got \(2,\)", positions=jnp.zeros(2, jnp.int32))
    refused(r"bias must be \(2, 3, 128\), got \(3, 128\)", bias=jnp.zeros((3, 128)))
    refused(r"sin must be \(2, 1, 64\), got \(2, 1, 128\)", rotary=(jnp.zeros((2, 1, 64)), jnp.zeros((2, 1, 128))))
    refused(r"norm.scale must be \(64,\)", norm=InputNorm(kind="rms", eps=1e-5, scale=jnp.zeros(32)))
    refused("goes with a weight of int8, int4 or float8_e4m3fn; one", weight_scale=jnp.ones((2, 3, 128)))
    refused("none with one of int8", weight=jnp.zeros((2, 3, 128, 64), jnp.int8))
    int8 = jnp.zeros((2, 3, 128, 64), jnp.int8)
    refused(r"weight_scale must be \(2, 3, 128\)", weight=int8, weight_scale=jnp.ones((1, 2, 3, 128)))
    refused("halves to rotate", dim=63, turned=True)


def test_what_the_kernel_cannot_run_is_refused_and_says_what_runs():
    runs = (
        "it runs 1 to 64 tokens, K a multiple of 16, heads of a multiple of 64 entries, of 128 where they are rotated"
    )
    mosaic = {"implementation": "mosaic"}
    refused(f"cannot run x of float32 .*{runs}", dtype=jnp.float32, **mosaic)
    refused(rf"cannot run x \(65, 1, 64\).*{runs}", batch=65, **mosaic)
    refused(rf"cannot run x \(2, 1, 40\).*{runs}", k=40, **mosaic)
    refused(rf"weight \(2, 3, 80, 64\) and.*{runs}", dim=80, **mosaic)
    refused(rf"weight \(2, 3, 64, 64\), rotated, and.*{runs}", dim=64, turned=True, **mosaic)
    wide = jnp.zeros((5, 2, 64, 128))
    refused(f"blocks of float32 and float32: {runs}", cache=(wide, wide), **mosaic)
    refused("'triton' is none of 'mosaic', 'reference'", implementation="triton")
    refused("multiples of 64", tuning=Tuning(rows=96), **mosaic)
    refused("rows must divide the 64 channels", tuning=Tuning(rows=128), turned=True, **mosaic)
    refused("at most one for each tile", tuning=Tuning(splits=4), **mosaic)
    refused("meet in a cluster", tuning=Tuning(reduce="memory"), **mosaic)
    refused("more shared memory", tuning=Tuning(stages=40), **mosaic)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize(("heads", "dim", "k"), [(96, 128, 4096), (3, 128, 336), (32, 256, 3584), (10, 128, 8192)])
def test_tunings_fit_an_sm(heads, dim, k, parts):
    norm = InputNorm(kind="layer", eps=1e-5, scale=jnp.zeros(k), bias=jnp.zeros(k))
    for rows in (1, 8, 17, 64):
        for size in (0.5, 1, 2):
            tuning = tuning_for_heads(rows, heads, dim, k, parts=parts, norm=norm, weight_bytes=size)
            alone = size == 2 and heads * dim // (tuning.rows * parts) * tuning.splits <= SMS
            blocks = 1 if rows > 32 or alone else 2
            assert blocks * (_shared_bytes(tuning, rows, parts, norm, size) + 1024) <= SMEM_PER_SM
            assert tuning.stages >= 2
            assert tuning.splits <= -(-k // tuning.tile_k)
            assert dim // parts % tuning.rows == 0
