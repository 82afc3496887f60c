"""Configurations of the gated product of many rows that are compiled for Hopper; see tests/aot.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.gated_gemm import GatedConfig, gated_gemm

# rows, outputs, inputs, activation, dtype, changes of the configuration
SHAPES: dict[str, tuple[int, int, int, Any, Any, dict[str, Any]]] = {
    "llama-7b": (16384, 11008, 4096, "silu", jnp.bfloat16, {}),
    "llama-7b, one warpgroup ahead": (16384, 11008, 4096, "silu", jnp.bfloat16, {"lead": 2}),
    "llama-7b, narrow steps": (16384, 11008, 4096, "silu", jnp.bfloat16, {"tile_k": 32, "stages": 8}),
    "no cluster": (16384, 11008, 4096, "silu", jnp.bfloat16, {"cluster": 1}),
    "ragged, float16": (5003, 1040, 1024, "silu", jnp.float16, {"group": 3}),
    "tensor parallel": (16384, 1376, 4096, "silu", jnp.bfloat16, {}),
    "gelu_tanh": (4096, 9216, 2304, "gelu_tanh", jnp.bfloat16, {}),
    "quick_gelu": (4096, 4096, 1024, "quick_gelu", jnp.bfloat16, {}),
    "no activation": (4096, 4096, 1024, None, jnp.bfloat16, {}),
}


def _case(name: str) -> tuple[Callable[..., jax.Array], list[jax.ShapeDtypeStruct]]:
    rows, outputs, inputs, activation, dtype, changes = SHAPES[name]
    run = partial(gated_gemm, activation=activation, implementation="mosaic", config=GatedConfig(**changes))
    return run, [jax.ShapeDtypeStruct((rows, inputs), dtype), jax.ShapeDtypeStruct((2, outputs, inputs), dtype)]


CASES: dict[str, Callable[[], Any]] = {name: partial(_case, name) for name in SHAPES}
