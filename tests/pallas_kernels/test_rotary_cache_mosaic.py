"""The Hopper kernel of rotation and cache write: interpreted on the CPU, and what ptxas says of it."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rotary_cache import rotary_cache
from tests import aot, interpreted
from tests.pallas_kernels import rotary_cache_cases
from tests.pallas_kernels.rotary_cache_cases import angles

# batch, tokens, groups, queries of each, dim, blocks of a sequence, starts, lengths. Chunks that fill their blocks,
# that start and end within one, that cross one end to end, and a row of padding alone.
INTERPRETED: dict[str, tuple[int, int, int, int, int, int, list[int], list[int]]] = {
    "whole blocks": (1, 128, 1, 1, 128, 4, [0], [128]),
    "padding": (2, 130, 2, 1, 128, 5, [0, 64], [128, 70]),
    "late starts": (3, 130, 1, 4, 64, 6, [5, 71, 127], [130, 0, 1]),
    "across a block's end": (1, 5, 1, 1, 256, 2, [62], [5]),
    "padding, not rotated": (2, 130, 2, 1, 128, 5, [0, 64], [128, 70]),
    "late starts, not rotated": (3, 130, 1, 4, 64, 6, [5, 71, 127], [130, 0, 1]),
}


def naive(qkv: Any, keys: Any, values: Any, tables: Any, positions: Any, rotated: bool) -> tuple[Any, Any, Any]:
    """Token by token, in numpy."""
    half = qkv.shape[-1] // 2
    query, keys, values = np.zeros((*qkv.shape[:3], qkv.shape[3] - 2, 2 * half)), keys.copy(), values.copy()
    for row, token in zip(*np.nonzero(positions >= 0), strict=True):
        place = positions[row, token]
        cos, sin = np.ones(half), np.zeros(half)
        if rotated:
            cos, sin = (np.asarray(angle, np.float64) for angle in angles(2 * half, jnp.asarray([place])))
        first, second = np.split(qkv[row, token, :, :-1], 2, axis=-1)
        turned = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        query[row, token] = turned[:, :-1]
        keys[tables[row, place // 64], :, place % 64] = turned[:, -1]
        values[tables[row, place // 64], :, place % 64] = qkv[row, token, :, -1]
    return query, keys, values


def interpret(name: str, implementation: Any) -> list[float]:
    """The largest errors of queries, keys and values; of what is not to be written too."""
    batch, tokens, groups, per_key, dim, width, starts, lengths = INTERPRETED[name]
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)  # noqa: E731
    qkv = draw(batch, tokens, groups, per_key + 2, dim)
    keys, values = (draw(batch * width + 1, groups, 64, dim) for _ in range(2))
    tables = rng.permutation(batch * width + 1)[: batch * width].reshape(batch, width).astype(np.int32)
    places = np.arange(tokens)
    positions = np.where(places < np.array(lengths)[:, None], np.array(starts)[:, None] + places, -1).astype(np.int32)
    rotated = "not rotated" not in name
    query, written = rotary_cache(
        qkv, partial(angles, dim) if rotated else None, (keys, values), jnp.asarray(tables), jnp.asarray(positions),
        implementation=implementation, interpret=implementation == "mosaic",
    )  # fmt: skip
    wide = lambda x: np.asarray(x.astype(jnp.float32), np.float64)  # noqa: E731
    wanted = naive(wide(qkv), wide(keys), wide(values), tables, positions, rotated)
    query = np.where((positions >= 0)[:, :, None, None, None], wide(query), 0.0)
    return [float(np.abs(a - b).max()) for a, b in zip((query, *map(wide, written)), wanted, strict=True)]


def run_case(name: str) -> str:
    return json.dumps(interpret(name, "mosaic"))


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted_kernel_is_the_naive_one(name: str):
    query, keys, values = json.loads(interpreted.result(__name__, INTERPRETED, name))
    # Entries up to 8, rounded once to 8 bits; what is not rotated is only moved.
    assert max(query, keys) <= (0 if "not rotated" in name else 2.0**-6)
    assert values == 0


@pytest.fixture(scope="session")
def compiled() -> dict[str, aot.Report]:
    why = aot.missing()
    if why:
        pytest.skip(why)
    return aot.compile_cases("tests.pallas_kernels.rotary_cache_cases", list(rotary_cache_cases.CASES))


@pytest.mark.parametrize("name", rotary_cache_cases.CASES)
def test_compiles_for_hopper_without_spills(name: str, compiled: dict[str, aot.Report]):
    report = compiled[name]
    assert report.error is None
    assert report.registers, "no kernel of ours was compiled"
    assert report.spilled == 0
