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
    "a program a tile, no turns": (8, 2048, 32, 1, 128, 32, {"programs": None, "turns": False}, {}, jnp.bfloat16),
    "steps of 64, three stages": (8, 2048, 32, 1, 128, 32, {"keys": 64, "stages": 3}, {}, jnp.bfloat16),
    "results in the query's place": (8, 2048, 32, 1, 128, 32, {"staged": False, "programs": None}, {}, jnp.bfloat16),
    "grouped, capped window and sinks": (
        2, 512, 8, 4, 128, 64, {"keys": 64}, {"window": 1024, "softcap": 50.0, "sinks": True}, jnp.bfloat16,
    ),
    "float16 and scaled ALiBi": (2, 512, 16, 1, 128, 16, {"keys": 64}, {"slopes": True, "scaled": True}, jnp.float16),
    "heads of 64": (2, 512, 12, 1, 64, 16, {"stages": 4}, {}, jnp.bfloat16),
    "heads of 64, ALiBi": (2, 512, 1, 71, 64, 16, {"stages": 4}, {"slopes": True}, jnp.bfloat16),
    "heads of 80": (2, 512, 32, 1, 80, 16, {"stages": 4}, {}, jnp.bfloat16),
    "heads of 96": (2, 512, 32, 1, 96, 64, {"stages": 3}, {"window": 2047}, jnp.float16),
    "heads of 256": (2, 512, 8, 2, 256, 16, {"keys": 64, "staged": False, "programs": None}, {}, jnp.bfloat16),
    "heads of 256, capped window": (
        2, 512, 8, 2, 256, 128, {"keys": 64, "staged": False, "programs": None},
        {"softcap": 50.0, "window": 4096}, jnp.bfloat16,
    ),
    "chunks of 330 tokens": (12, 330, 2, 4, 128, 9, {"programs": 7}, {}, jnp.bfloat16),
    "chunks of 5 tokens": (2, 5, 8, 1, 64, 9, {}, {"window": 100}, jnp.float16),
    "everything, steps of 64": (
        2, 512, 8, 4, 128, 64, {"keys": 64},
        {"window": 1024, "softcap": 50.0, "sinks": True, "slopes": True}, jnp.bfloat16,
    ),
}  # fmt: skip


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
