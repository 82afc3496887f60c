"""Shapes of the kernel of rotation and cache write that are compiled for Hopper; see tests/aot.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import BLOCK_SIZE
from pallas_kernels.rotary_cache import rotary_cache

# batch, tokens, groups, queries of each, dim, width, dtype
SHAPES: dict[str, tuple[int, int, int, int, int, int, Any]] = {
    "llama-7b": (8, 2040, 32, 1, 128, 33, jnp.bfloat16),
    "grouped": (4, 512, 8, 4, 128, 64, jnp.bfloat16),
    "multi-query, heads of 64": (2, 300, 1, 71, 64, 16, jnp.float16),
    "heads of 256": (2, 130, 8, 2, 256, 16, jnp.bfloat16),
    "opt-6.7b, not rotated": (16, 128, 32, 1, 128, 3, jnp.bfloat16),
    "gpt2-xl, not rotated": (1, 128, 25, 1, 64, 3, jnp.bfloat16),
}


def angles(dim: int, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of a rotary embedding of base 10,000."""
    phase = positions[..., None].astype(jnp.float32) * 1e4 ** (-jnp.arange(dim // 2, dtype=jnp.float32) / (dim // 2))
    return jnp.cos(phase), jnp.sin(phase)


def _case(name: str) -> tuple[Callable[..., Any], list[jax.ShapeDtypeStruct]]:
    batch, tokens, groups, per_key, dim, width, dtype = SHAPES[name]
    blocks = jax.ShapeDtypeStruct((batch * width + 1, groups, BLOCK_SIZE, dim), dtype)
    given = [
        jax.ShapeDtypeStruct((batch, tokens, groups, per_key + 2, dim), dtype),
        blocks,
        blocks,
        jax.ShapeDtypeStruct((batch, width), jnp.int32),
        jax.ShapeDtypeStruct((batch, tokens), jnp.int32),
    ]

    def run(qkv: jax.Array, keys: jax.Array, values: jax.Array, tables: jax.Array, positions: jax.Array) -> Any:
        turn = None if "not rotated" in name else partial(angles, dim)
        return rotary_cache(qkv, turn, (keys, values), tables, positions, implementation="mosaic")

    return run, given


CASES: dict[str, Callable[[], Any]] = {name: partial(_case, name) for name in SHAPES}
