"""Rotation and cache write at once: the reference, what is refused, and where a model gets the kernel."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.choice_table import choices
from pallas_kernels.choices import Device, rotary_cache_choice
from pallas_kernels.rotary_cache import rotary_cache
from tests.pallas_kernels.rotary_cache_cases import angles
from tests.pallas_kernels.test_rotary_cache_mosaic import INTERPRETED, interpret

HOPPER = Device("gpu", "9.0")
CHOSEN: dict[str, Any] = {
    "query_tokens": 64, "head_dim": 128, "pairs": 64, "interleaved": False, "dtype": "bfloat16", "kv_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("name", INTERPRETED)
def test_reference_is_the_naive_one(name: str):
    query, keys, values = interpret(name, None)
    assert max(query, keys) <= 2.0**-6
    assert values == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"query_tokens": 1}, "of one token there is little to write"),
        ({"pairs": None}, None),
        ({"pairs": 32}, "64 rotated entries of 128"),
        ({"interleaved": True}, "pairs of neighbours"),
        ({"head_dim": 80, "pairs": 40}, "head_dim 80"),
        ({"kv_dtype": "int8"}, "bfloat16 with keys and values of int8"),
        ({"dtype": "float32", "kv_dtype": "float32"}, "dtype float32"),
        ({"normed": True}, "does not normalise heads"),
        ({"on": Device("gpu", "8.0")}, "made for Hopper"),
    ],
)
def test_it_is_chosen_where_it_runs(change: dict[str, Any], reason: str | None):
    given = {"on": HOPPER} | CHOSEN | change
    chosen = rotary_cache_choice(given.pop("on"), **given)
    assert chosen.implementation == ("mosaic" if reason is None else "jnp")
    assert reason is None or reason in chosen.reason


def test_the_table_has_it():
    said = {choice.op: choice.implementation for choice in choices(HOPPER)}
    assert said["rotation and cache write of prefill"] == "mosaic"


@pytest.mark.parametrize(
    ("shape", "dtype", "implementation", "message"),
    [
        ((1, 4, 2, 2, 128), jnp.bfloat16, "mosaic", "qkv must be [B, T, G, R + 2, D]"),
        ((1, 4, 2, 3, 127), jnp.bfloat16, None, "even D"),
        ((1, 4, 2, 3, 96), jnp.bfloat16, "mosaic", "does not run head_dim 96"),
        ((1, 4, 2, 3, 128), jnp.float32, "mosaic", "does not run dtype float32"),
        ((1, 4, 2, 3, 128), jnp.bfloat16, "xla", "implementation 'xla' is none of"),
    ],
)
def test_what_it_cannot_run_is_refused(shape: Any, dtype: Any, implementation: Any, message: str):
    blocks = jax.ShapeDtypeStruct((3, shape[2], 64, shape[4]), dtype)
    given = [
        jax.ShapeDtypeStruct(shape, dtype), blocks, blocks, jax.ShapeDtypeStruct((1, 2), jnp.int32),
        jax.ShapeDtypeStruct(shape[:2], jnp.int32),
    ]  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
        jax.eval_shape(
            lambda qkv, k, v, *rest: rotary_cache(
                qkv, partial(angles, shape[4]), (k, v), *rest, implementation=implementation
            ),
            *given,
        )
