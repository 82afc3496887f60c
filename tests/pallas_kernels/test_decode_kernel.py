from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BLOCK_SIZE
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.decode_config import DecodeConfig
from tests import aot
from tests.decode_oracle import arguments, naive, narrowed, noise, poisoned
from tests.pallas_kernels import decode_attention_cases

ROOT = Path(__file__).resolve().parents[2]


def test_the_kernel_in_interpret_mode_is_the_naive_one():
    """In a process of its own: where a simulated thread fails, the others wait for it for ever."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]


@pytest.fixture(scope="module")
def compiled() -> dict[str, aot.Report]:
    why = aot.missing()
    if why:
        pytest.skip(why)
    return aot.compile_cases("tests.pallas_kernels.decode_attention_cases", list(decode_attention_cases.CASES))


@pytest.mark.parametrize("name", decode_attention_cases.CASES)
def test_the_kernel_compiles_for_hopper_without_spills(name: str, compiled: dict[str, aot.Report]):
    report = compiled[name]
    assert report.error is None
    assert report.registers, "no kernel of ours was compiled"
    assert report.spilled == 0
    assert not report.serialized, "ptxas serialized the wgmma pipeline"


# batch, groups, heads, dim, width, splits, stages, consumers, options, dtype
INTERPRETED: list[tuple[int, int, int, int, int, int, int, int, dict[str, Any], Any]] = [
    (2, 2, 1, 64, 4, 1, 2, 1, {}, jnp.bfloat16),
    (2, 1, 4, 128, 5, 3, 1, 1, {"window": 70}, jnp.bfloat16),
    (2, 1, 9, 64, 4, 2, 3, 1, {"softcap": 2.0, "sinks": True}, jnp.float16),
    (1, 1, 2, 80, 3, 1, 2, 1, {"slopes": True, "sinks": True}, jnp.bfloat16),
    (1, 1, 2, 96, 3, 2, 2, 1, {"window": 1}, jnp.float16),
    (1, 1, 8, 96, 3, 1, 1, 1, {}, jnp.bfloat16),
    (2, 2, 4, 64, 4, 1, 2, 1, {"kv": jnp.int8}, jnp.bfloat16),
    (2, 1, 2, 128, 5, 3, 1, 1, {"window": 70, "sinks": True, "kv": jnp.float8_e4m3fn}, jnp.bfloat16),
    (1, 1, 9, 64, 3, 2, 3, 1, {"softcap": 2.0, "kv": jnp.float8_e4m3fn}, jnp.float16),
    (1, 1, 2, 256, 3, 1, 1, 1, {"slopes": True, "kv": jnp.int8}, jnp.bfloat16),
    (2, 2, 1, 64, 5, 1, 2, 2, {}, jnp.bfloat16),
    (1, 1, 4, 128, 6, 1, 3, 3, {"window": 200, "sinks": True, "slopes": True}, jnp.bfloat16),
    (1, 1, 3, 96, 5, 2, 4, 2, {"softcap": 2.0}, jnp.float16),
    (1, 1, 4, 64, 5, 1, 2, 2, {"kv": jnp.int8}, jnp.bfloat16),
    (1, 1, 3, 256, 3, 3, 2, 1, {"slopes": True, "scaled": True, "softcap": 5.0, "window": 100}, jnp.bfloat16),
]


def interpret(cases: Sequence[tuple[int, int, int, int, int, DecodeConfig, dict[str, Any], Any]]) -> None:
    """Random lengths and tables for each case, with the race detector on; in a process of its own.

    A case is batch, groups, heads, dim, width, how the work is divided, options and dtype.
    """
    from hypothesis import given, settings
    from hypothesis import strategies as st
    from jax.experimental.pallas import mosaic_gpu as plgpu

    for batch, groups, heads, dim, width, config, options, dtype in cases:
        kv = options.get("kv", dtype)
        theirs, ours = arguments({name: value for name, value in options.items() if name != "kv"}, groups, heads)
        query = jnp.asarray(noise(batch, groups, heads, dim), dtype)

        def run(*given: Any, config: Any = config, ours: Any = ours) -> jax.Array:
            *given, factors = given
            return decode_attention(*given, implementation="mosaic", config=config, **ours, **factors)

        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            jitted = jax.jit(run)
            full = width * BLOCK_SIZE
            edges = st.sampled_from([0, 1, 63, 64, 65, full - 1, full])

            @settings(max_examples=4, deadline=None, derandomize=True, database=None)
            @given(
                lengths=st.lists(st.integers(0, full) | edges, min_size=batch, max_size=batch),
                order=st.permutations(range(1, batch * width + 1)),
            )
            def check(lengths: list[int], order: list[int], **case: Any) -> None:
                stops = np.asarray(lengths, np.int32)
                table = np.asarray(order, np.int32).reshape(case["shape"])
                keys, values, table = poisoned(case["shape"][0], case["groups"], case["dim"], table, stops)
                factors: dict[str, Any] = {}
                if case["kv"] == case["dtype"]:
                    keys, values = (jnp.asarray(array, case["dtype"]) for array in (keys, values))
                    exact = [keys, values]
                else:
                    (keys, values, *scales), exact = narrowed(keys, values, case["kv"])
                    factors = dict(zip(("key_scales", "value_scales"), scales, strict=True))
                found = np.asarray(case["run"](case["query"], keys, values, table, stops, factors), np.float64)
                exact = [np.asarray(array, np.float32) for array in (case["query"], *exact)]
                expected = naive(*exact, table, stops, **case["theirs"])
                # Weights and results are rounded once each, to 8 bits (bfloat16) or 11.
                tolerance = 2.0**-6 if case["dtype"] == jnp.bfloat16 else 2.0**-9
                np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)

            check(
                shape=(batch, width), groups=groups, dim=dim, dtype=dtype, run=jitted, query=query, theirs=theirs, kv=kv
            )  # fmt: skip
        print(f"{batch=} {groups=} {heads=} {dim=} {width=} {config} {options}: right", flush=True)


if __name__ == "__main__":
    interpret(
        [
            (*shape, DecodeConfig(splits=splits, stages=stages, consumers=consumers), options, dtype)
            for *shape, splits, stages, consumers, options, dtype in INTERPRETED
        ]  # type: ignore[misc]
    )
