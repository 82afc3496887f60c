from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import pytest

from pallas_kernels import BLOCK_SIZE
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_config import DecodeConfig
from tests.decode_oracle import noise
from tests.pallas_kernels.test_decode_kernel import interpret

ROOT = Path(__file__).resolve().parents[2]

# batch, groups, heads, dim, width, options, dtype; compiled ahead of time by the cases of decode_attention_cases.py
INTERPRETED: list[tuple[int, int, int, int, int, dict[str, Any], Any]] = [
    (2, 2, 1, 64, 4, {}, jnp.bfloat16),
    (3, 1, 4, 128, 3, {"window": 70}, jnp.float16),
    (2, 1, 9, 64, 4, {"softcap": 2.0, "sinks": True}, jnp.float16),
    (1, 1, 2, 80, 3, {"slopes": True, "sinks": True}, jnp.bfloat16),
    (2, 1, 8, 96, 2, {"slopes": True, "scaled": True, "softcap": 5.0, "window": 100}, jnp.bfloat16),
    (1, 2, 2, 256, 1, {"sinks": True, "window": 1}, jnp.bfloat16),
]


def test_the_kernel_in_interpret_mode_is_the_naive_one():
    """In a process of its own: where a simulated thread fails, the others wait for it for ever."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert run.stdout.count(": right") == len(INTERPRETED)


@pytest.mark.parametrize(
    ("config", "kv", "message"),
    [
        (DecodeConfig(splits=2, stages=2, resident=True), jnp.bfloat16, "a stage for each of 5 blocks of a table row"),
        (DecodeConfig(splits=9, stages=1, resident=True), jnp.bfloat16, "takes 1 to 8 splits, one consumer"),
        (DecodeConfig(splits=1, stages=6, consumers=2, resident=True), jnp.bfloat16, "takes 1 to 8 splits, one consum"),
        (DecodeConfig(splits=1, stages=5, overlap=True, resident=True), jnp.bfloat16, "neither overlap nor ahead"),
        (DecodeConfig(splits=1, stages=5, resident=True), jnp.int8, "keys and values of 16 bits, got int8"),
    ],
)
def test_what_it_cannot_run_is_refused(config, kv, message):
    blocks = jnp.zeros((6, 2, BLOCK_SIZE, 64), kv)
    factors = jnp.ones(blocks.shape[:3], jnp.float32) if kv == jnp.int8 else None
    query = jnp.asarray(noise(1, 2, 4, 64), jnp.bfloat16)
    with pytest.raises(ValueError, match=message):
        decode_attention(
            query, blocks, blocks, jnp.zeros((1, 5), jnp.int32), jnp.ones((1,), jnp.int32), scale=1.0,
            implementation="mosaic", config=config, key_scales=factors, value_scales=factors,
        )  # fmt: skip


if __name__ == "__main__":
    interpret(
        [
            (*shape, DecodeConfig(splits=1, stages=shape[-1], resident=True), options, dtype)
            for *shape, options, dtype in INTERPRETED
        ]  # type: ignore[misc]
    )
