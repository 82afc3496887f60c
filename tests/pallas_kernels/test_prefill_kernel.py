from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import BLOCK_SIZE
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.prefill_kernel import PrefillConfig, schedule, tile_steps
from tests import aot
from tests.decode_oracle import arguments, noise
from tests.pallas_kernels import prefill_kernel_cases
from tests.prefill_oracle import filled, naive_chunk

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
    return aot.compile_cases("tests.pallas_kernels.prefill_kernel_cases", list(prefill_kernel_cases.CASES))


@pytest.mark.parametrize("name", prefill_kernel_cases.CASES)
def test_the_kernel_compiles_for_hopper_without_spills(name: str, compiled: dict[str, aot.Report]):
    report = compiled[name]
    assert report.error is None
    assert report.registers, "no kernel of ours was compiled"
    assert report.spilled == 0
    assert not report.serialized, "ptxas serialized the wgmma pipeline"


@pytest.mark.parametrize(
    ("pairs", "tokens", "width", "window", "span", "programs"),
    [
        (6, 500, 8, None, 2, 5),
        (1, 1, 1, None, 1, 132),
        (256, 2040, 32, None, 16, 132),
        (256, 512, 32, None, 16, 132),
        (256, 2040, 32, 512, 16, 132),
        (64, 1024, 12, None, 16, 132),
        (7, 300, 20, None, 4, None),
    ],
)
def test_the_lists_have_every_tile_once_and_are_balanced(pairs, tokens, width, window, span, programs):
    steps = tile_steps(tokens, width, 128, window)
    tiles = len(steps)
    table = schedule(pairs, steps, span, programs, 0.3)
    lists = [row[1 : 1 + row[0]].tolist() for row in table]
    assert sorted(number for numbers in lists for number in numbers) == list(range(pairs * tiles))
    loads = [sum(steps[number % tiles] + 0.3 for number in numbers) for numbers in lists]
    assert max(loads) <= sum(loads) / len(loads) + max(steps) + 0.3


@pytest.mark.parametrize(
    ("tokens", "width", "window", "expected"),
    [
        (512, 8, None, (1, 2, 3, 4)),
        (512, 32, None, (7, 8, 9, 10)),  # starts at 768 of 1536
        (500, 8, None, (2, 3, 4, 4)),  # starts at 6
        (512, 6, None, (1, 2, 3, 0)),  # a table of 384 positions
        (512, 32, 128, (2, 2, 2, 2)),
        (512, 32, 1, (1, 1, 1, 1)),
    ],
)
def test_steps_are_those_of_a_chunk_that_starts_halfway(tokens, width, window, expected):
    assert tile_steps(tokens, width, 128, window) == expected


# batch, tokens, groups, heads a key head, head_dim, width, changes of the configuration, options, dtype
INTERPRETED: list[tuple[int, int, int, int, int, int, dict[str, Any], dict[str, Any], Any]] = [
    (2, 200, 1, 1, 64, 6, {"programs": 2}, {}, jnp.bfloat16),
    (1, 136, 1, 2, 128, 5, {"stages": 1, "turns": False}, {"window": 70}, jnp.bfloat16),
    (2, 72, 1, 2, 64, 4, {"keys": 64, "staged": False}, {"softcap": 2.0, "sinks": True}, jnp.float16),
    (1, 130, 1, 2, 80, 4, {"programs": 3}, {"slopes": True, "sinks": True}, jnp.bfloat16),
    (3, 200, 1, 1, 96, 5, {"keys": 64, "stages": 3, "programs": 1}, {"window": 1}, jnp.float16),
    (2, 5, 1, 2, 64, 3, {"programs": 2}, {}, jnp.float16),
    (1, 100, 2, 1, 256, 3, {"keys": 64, "staged": False},
     {"slopes": True, "scaled": True, "softcap": 5.0, "window": 100}, jnp.bfloat16),
]  # fmt: skip


def interpret(*chosen: str) -> None:
    """Random starts, lengths and tables for some configurations, with the race detector on; run as a script."""
    from hypothesis import given, settings
    from hypothesis import strategies as st
    from jax.experimental.pallas import mosaic_gpu as plgpu

    picked = [INTERPRETED[int(number)] for number in chosen] or INTERPRETED
    for batch, tokens, groups, heads, dim, width, changes, options, dtype in picked:
        theirs, ours = arguments(options, groups, heads)
        config = PrefillConfig(registers=False, **changes)
        query = jnp.asarray(noise(batch, tokens, groups, heads, dim), dtype)

        def run(*given: Any, config: Any = config, ours: Any = ours) -> jax.Array:
            *arrays, starts, lengths = given
            return prefill_attention(*arrays, (starts, lengths), implementation="mosaic", config=config, **ours)

        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
            jitted = jax.jit(run)
            room = width * BLOCK_SIZE
            edges = st.sampled_from([0, 1, 63, 64, 65, tokens - 1, tokens])
            starts = st.sampled_from([0, 0, 1, 63, 64, 128]) | st.integers(0, room)

            @settings(max_examples=3, deadline=None, derandomize=True, database=None)
            @given(
                lengths=st.lists(st.integers(0, tokens) | edges, min_size=batch, max_size=batch),
                starts=st.lists(starts, min_size=batch, max_size=batch),
                order=st.permutations(range(1, batch * width + 1)),
            )
            def check(lengths: list[int], starts: list[int], order: list[int], case: Any) -> None:
                counts = np.minimum(np.asarray(lengths, np.int32), case["tokens"])
                begins = np.minimum(np.asarray(starts, np.int32), case["room"] - counts).astype(np.int32)
                table = np.asarray(order, np.int32).reshape(case["shape"])
                keys, values, table = filled(case["shape"][0], case["groups"], case["dim"], table, begins, counts)
                keys, values = (jnp.asarray(array, case["dtype"]) for array in (keys, values))
                found = np.asarray(case["run"](case["query"], keys, values, table, begins, counts), np.float64)
                exact = [np.asarray(array, np.float32) for array in (case["query"], keys, values)]
                expected = naive_chunk(*exact, table, begins, counts, **case["theirs"])
                # Weights and results are rounded once each, to 8 bits (bfloat16) or 11. Padding is zero.
                tolerance = 2.0**-6 if case["dtype"] == jnp.bfloat16 else 2.0**-9
                np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)

            check(
                case={
                    "shape": (batch, width), "tokens": tokens, "room": room, "groups": groups, "dim": dim,
                    "dtype": dtype, "run": jitted, "query": query, "theirs": theirs,
                }
            )  # fmt: skip
        print(f"{batch=} {tokens=} {groups=} {heads=} {dim=} {width=} {changes} {options}: right", flush=True)


if __name__ == "__main__":
    interpret(*sys.argv[1:])
