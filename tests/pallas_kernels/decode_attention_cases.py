"""Configurations of the decode attention kernel that are compiled for Hopper; see tests/aot.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import BLOCK_SIZE
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_config import DecodeConfig
from tests.decode_oracle import arguments

# batch, groups, heads, dim, width, the configuration or None for what would be chosen, options, dtype
SHAPES: dict[str, tuple[int, int, int, int, int, DecodeConfig | None, dict[str, Any], Any]] = {
    "llama-7b batch 1": (1, 32, 1, 128, 9, None, {}, jnp.bfloat16),
    "two consumers": (1, 32, 1, 128, 9, DecodeConfig(splits=1, stages=6, consumers=2, overlap=True), {}, jnp.bfloat16),
    "three consumers": (
        1, 32, 1, 128, 9, DecodeConfig(splits=1, stages=6, consumers=3, overlap=True), {}, jnp.bfloat16,
    ),
    "two consumers, grouped, ahead": (
        4, 8, 8, 128, 64, DecodeConfig(splits=2, stages=4, consumers=2, overlap=True, ahead=True),
        {"window": 1024, "softcap": 50.0, "sinks": True}, jnp.bfloat16,
    ),
    "two consumers, int8": (
        1, 32, 1, 128, 9, DecodeConfig(splits=1, stages=6, consumers=2, overlap=True, ahead=True), {"kv": jnp.int8},
        jnp.bfloat16,
    ),
    "resident, llama-7b": (1, 32, 1, 128, 9, DecodeConfig(splits=4, stages=3, resident=True), {}, jnp.bfloat16),
    "resident, llama-7b, two splits": (
        1, 32, 1, 128, 9, DecodeConfig(splits=2, stages=5, resident=True), {}, jnp.bfloat16,
    ),
    "resident, grouped, 8 splits, all options": (
        1, 8, 4, 128, 16, DecodeConfig(splits=8, stages=2, resident=True),
        {"window": 600, "softcap": 50.0, "sinks": True, "slopes": True}, jnp.bfloat16,
    ),
    "resident, OPT": (16, 32, 1, 128, 3, DecodeConfig(splits=1, stages=3, resident=True), {}, jnp.float16),
    "resident, GPT-2 XL": (1, 25, 1, 64, 3, DecodeConfig(splits=3, stages=1, resident=True), {}, jnp.bfloat16),
    "resident, one split, all options": (
        2, 8, 4, 128, 5, DecodeConfig(splits=1, stages=5, resident=True),
        {"window": 100, "softcap": 50.0, "sinks": True, "slopes": True, "scaled": True}, jnp.bfloat16,
    ),
    "resident, heads of 96": (
        1, 8, 9, 96, 4, DecodeConfig(splits=2, stages=2, resident=True), {"sinks": True}, jnp.bfloat16,
    ),
    "two consumers, splits and ALiBi": (
        8, 2, 3, 96, 9, DecodeConfig(splits=3, stages=2, consumers=2), {"slopes": True, "scaled": True}, jnp.bfloat16,
    ),
    "llama-7b batch 16": (16, 32, 1, 128, 9, None, {}, jnp.bfloat16),
    "grouped, 4096 tokens": (32, 8, 4, 128, 64, None, {}, jnp.bfloat16),
    "grouped, capped window and sinks": (
        4, 8, 8, 128, 64, DecodeConfig(splits=4, stages=3),
        {"window": 1024, "softcap": 50.0, "sinks": True}, jnp.bfloat16,
    ),
    "float16 and ALiBi": (
        4, 32, 1, 128, 16, DecodeConfig(splits=2, stages=3), {"slopes": True, "scaled": True}, jnp.float16,
    ),
    "multi-query, 71 heads of 64": (2, 1, 71, 64, 16, None, {}, jnp.bfloat16),
    "heads of 80": (2, 32, 1, 80, 16, None, {}, jnp.bfloat16),
    "heads of 96": (2, 32, 1, 96, 16, None, {"window": 2047}, jnp.bfloat16),
    "int8, llama-7b batch 16": (16, 32, 1, 128, 9, None, {"kv": jnp.int8}, jnp.bfloat16),
    "int8, grouped, capped window and sinks": (
        4, 8, 8, 128, 64, DecodeConfig(splits=4, stages=3),
        {"window": 1024, "softcap": 50.0, "sinks": True, "kv": jnp.int8}, jnp.bfloat16,
    ),
    "fp8, grouped, 4096 tokens": (32, 8, 4, 128, 64, None, {"kv": jnp.float8_e4m3fn}, jnp.bfloat16),
    "fp8, float16": (4, 8, 4, 64, 64, None, {"kv": jnp.float8_e4m3fn}, jnp.float16),
    "int8, 64 heads of 64": (2, 1, 64, 64, 16, None, {"kv": jnp.int8}, jnp.bfloat16),
    "fp8, 48 heads of 128": (2, 1, 48, 128, 16, None, {"kv": jnp.float8_e4m3fn}, jnp.bfloat16),
    "int8, heads of 256": (2, 8, 32, 256, 16, None, {"kv": jnp.int8}, jnp.bfloat16),
    "heads of 256": (2, 8, 2, 256, 16, None, {"softcap": 50.0, "window": 4096}, jnp.bfloat16),
}  # fmt: skip


def _case(name: str) -> tuple[Callable[..., jax.Array], list[jax.ShapeDtypeStruct]]:
    batch, groups, heads, dim, width, chosen, options, dtype = SHAPES[name]
    options = dict(options)
    kv = options.pop("kv", dtype)
    _, ours = arguments(options, groups, heads)
    blocks = jax.ShapeDtypeStruct((batch * width + 1, groups, BLOCK_SIZE, dim), kv)
    given = [
        jax.ShapeDtypeStruct((batch, groups, heads, dim), dtype),
        blocks,
        blocks,
        jax.ShapeDtypeStruct((batch, width), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    ]
    run = partial(decode_attention, implementation="mosaic", config=chosen, **ours)
    if kv == dtype:
        return run, given
    factors = jax.ShapeDtypeStruct(blocks.shape[:3], jnp.float32)

    def narrow(*arrays: jax.Array) -> jax.Array:
        return run(*arrays[:-2], key_scales=arrays[-2], value_scales=arrays[-1])

    return narrow, [*given, factors, factors]


CASES: dict[str, Callable[[], Any]] = {name: partial(_case, name) for name in SHAPES}
