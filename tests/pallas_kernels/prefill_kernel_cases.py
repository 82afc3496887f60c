"""Configurations of the prefill attention kernel that are compiled for Hopper; see tests/aot.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import BLOCK_SIZE
from pallas_kernels.prefill_kernel import PrefillConfig, tiled_attention
from tests.decode_oracle import arguments

# batch, tokens, groups, heads, dim, width, changes of the configuration, options, dtype
SHAPES: dict[str, tuple[int, int, int, int, int, int, dict[str, Any], dict[str, Any], Any]] = {
    "llama-7b": (8, 2040, 32, 1, 128, 32, {}, {}, jnp.bfloat16),
}


def _case(name: str) -> tuple[Callable[..., jax.Array], list[jax.ShapeDtypeStruct]]:
    batch, tokens, groups, heads, dim, width, changes, options, dtype = SHAPES[name]
    _, ours = arguments(options, groups, heads)
    ours = {"softcap": None, "window": None, "bias": None, "sinks": None} | ours
    config = PrefillConfig(**({"programs": 132} | changes))
    blocks = jax.ShapeDtypeStruct((batch * width + 1, groups, BLOCK_SIZE, dim), dtype)
    given = [
        jax.ShapeDtypeStruct((batch, tokens, groups, heads, dim), dtype),
        blocks,
        blocks,
        jax.ShapeDtypeStruct((batch, width), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    ]
    return (lambda *arrays: tiled_attention(*arrays, config, **ours)), given


CASES: dict[str, Callable[[], Any]] = {name: partial(_case, name) for name in SHAPES}
