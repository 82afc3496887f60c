from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Device, compiling_for
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_config import DecodeConfig
from tests.decode_oracle import arguments, naive, narrowed, noise, poisoned

OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 70},
    {"window": 1, "sinks": True},
    {"softcap": 2.0, "sinks": True},
    {"slopes": True},
    {"slopes": True, "scaled": True, "softcap": 5.0, "window": 200, "sinks": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_reference_is_the_naive_one(options):
    batch, groups, heads, dim, width = 4, 2, 3, 8, 4
    lengths = np.asarray([0, 1, 100, 256], np.int32)
    order = np.random.default_rng(0).permutation(batch * width) + 1
    keys, values, tables = poisoned(batch, groups, dim, order.reshape(batch, width).astype(np.int32), lengths)
    theirs, ours = arguments(options, groups, heads)
    query = noise(batch, groups, heads, dim)
    found = decode_attention(query, keys, values, tables, lengths, implementation="reference", **ours)
    np.testing.assert_allclose(
        np.asarray(found), naive(query, keys, values, tables, lengths, **theirs), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_reference_over_8_bits_is_the_naive_one_over_what_they_stand_for(dtype, options):
    batch, groups, heads, dim, width = 4, 2, 3, 8, 4
    lengths = np.asarray([0, 1, 100, 256], np.int32)
    order = np.random.default_rng(0).permutation(batch * width) + 1
    keys, values, tables = poisoned(batch, groups, dim, order.reshape(batch, width).astype(np.int32), lengths)
    theirs, ours = arguments(options, groups, heads)
    query = noise(batch, groups, heads, dim)
    (*blocks, key_scales, value_scales), exact = narrowed(keys, values, dtype)
    found = decode_attention(
        query, *blocks, tables, lengths, implementation="reference", key_scales=key_scales, value_scales=value_scales,
        **ours,
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(found), naive(query, *exact, tables, lengths, **theirs), rtol=2e-5, atol=2e-5)


def test_the_reference_asked_for_by_name_is_not_the_kernel():
    with compiling_for(Device("gpu", "9.0")):
        text = str(jax.make_jaxpr(lambda *a: decode_attention(*a, scale=1.0, implementation="reference"))(*shapes()))
    assert "decode_attention_kernel" not in text


def shapes(**changes: Any) -> list[Any]:
    given = {
        "query": ((2, 2, 4, 64), jnp.bfloat16), "keys": ((9, 2, 64, 64), jnp.bfloat16),
        "values": ((9, 2, 64, 64), jnp.bfloat16), "tables": ((2, 3), jnp.int32), "lengths": ((2,), jnp.int32),
    } | changes  # fmt: skip
    return [jnp.zeros(shape, dtype) for shape, dtype in given.values()]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": ((2, 1, 2, 4, 64), jnp.bfloat16)}, r"query must be \[B, G, R, D\]"),
        ({"keys": ((9, 2, 32, 64), jnp.bfloat16)}, r"key_blocks must be \[N, 2, 64, 64\].*got \(9, 2, 32, 64\)"),
        ({"values": ((8, 2, 64, 64), jnp.bfloat16)}, "differ"),
        ({"tables": ((2, 0), jnp.int32)}, r"tables must be int32 \[2, W\]"),
        ({"lengths": ((2,), jnp.float32)}, r"lengths must be int32 \[2\], got float32"),
        ({"lengths": ((3,), jnp.int32)}, r"lengths must be int32 \[2\], got int32 \(3,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        decode_attention(*shapes(**changes), scale=1.0)


@pytest.mark.parametrize(
    ("dim", "heads", "dtype", "problem"),
    [
        (64, 4, jnp.float32, "dtype float32"),
        (72, 4, jnp.bfloat16, "head_dim 72"),
        (512, 1, jnp.bfloat16, "head_dim 512"),
        (128, 65, jnp.bfloat16, "65 query heads a key head with head_dim 128"),
    ],
)
def test_what_the_kernel_does_not_run_is_refused_by_name(dim, heads, dtype, problem):
    given = shapes(query=((2, 2, heads, dim), dtype), keys=((9, 2, 64, dim), dtype), values=((9, 2, 64, dim), dtype))
    with pytest.raises(
        ValueError, match=rf"'mosaic' does not run {problem}; mosaic runs on Hopper .* 80 at head_dim 64, 64 at"
    ):
        decode_attention(*given, scale=1.0, implementation="mosaic")
    assert decode_attention(*given, scale=1.0, implementation="reference").shape == (2, 2, heads, dim)


def test_mixed_dtypes_are_refused():
    given = shapes(query=((2, 2, 4, 64), jnp.float16))
    with pytest.raises(ValueError, match="does not run queries of float16 with keys and values of bfloat16"):
        decode_attention(*given, scale=1.0, implementation="mosaic")


def test_factors_come_with_8_bits_and_only_with_them():
    narrow = {name: ((9, 2, 64, 64), jnp.int8) for name in ("keys", "values")}
    with pytest.raises(ValueError, match="key_scales come with blocks of 8 bits, got key_blocks of int8 without"):
        decode_attention(*shapes(**narrow), scale=1.0)
    ones = jnp.ones((9, 2, 64))
    with pytest.raises(ValueError, match="got key_blocks of bfloat16 with"):
        decode_attention(*shapes(), scale=1.0, key_scales=ones, value_scales=ones)
    with pytest.raises(ValueError, match=r"value_scales must be float32 \[9, 2, 64\], got float32 \(9, 2\)"):
        decode_attention(*shapes(**narrow), scale=1.0, key_scales=ones, value_scales=ones[..., 0])


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="must be 'mosaic', 'reference' or None, got 'fast'"):
        decode_attention(*shapes(), scale=1.0, implementation="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="window must be at least 1"):
        decode_attention(*shapes(), scale=1.0, window=0)
    with pytest.raises(ValueError, match=r"sinks must be \[2, 4\]"):
        decode_attention(*shapes(), scale=1.0, sinks=jnp.zeros((8,)))
    with pytest.raises(ValueError, match="splits, stages and consumers must be at least 1"):
        decode_attention(*shapes(), scale=1.0, implementation="mosaic", config=DecodeConfig(splits=0, stages=1))
    wide = DecodeConfig(splits=9, stages=1, resident=True)
    with pytest.raises(ValueError, match="resident takes 1 to 8 splits"):
        decode_attention(*shapes(), scale=1.0, implementation="mosaic", config=wide)
    uneven = DecodeConfig(splits=1, stages=3, consumers=2)
    with pytest.raises(ValueError, match="consumers must divide stages"):
        decode_attention(*shapes(), scale=1.0, implementation="mosaic", config=uneven)
    ahead = DecodeConfig(splits=1, stages=3, ahead=True)
    with pytest.raises(ValueError, match="ahead is a kind of overlap"):
        decode_attention(*shapes(), scale=1.0, implementation="mosaic", config=ahead)
