"""Decode attention written plainly, and caches that hold NaN wherever nothing may be read."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels import BLOCK_SIZE, Bias
from pallas_kernels.attention import quantize_rows


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def naive(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    tables: np.ndarray,
    lengths: np.ndarray,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    slopes: np.ndarray | None = None,
    scaled: bool = False,
    sinks: np.ndarray | None = None,
) -> np.ndarray:
    """One head of one sequence at a time, over the keys that it may see and no others, in float64."""
    out = np.zeros(query.shape)
    for b, g, r in np.ndindex(query.shape[:3]):
        stop = lengths[b]
        if stop == 0:
            continue
        places = np.arange(0 if window is None else max(stop - window, 0), stop)
        at = tables[b, places // BLOCK_SIZE], g, places % BLOCK_SIZE
        scores = keys[at].astype(np.float64) @ query[b, g, r].astype(np.float64)
        bias = 0.0 if slopes is None else slopes[g, r] * places
        scores = (scores + (bias if scaled else 0.0)) * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        scores = scores + (0.0 if scaled else bias)
        top = scores.max() if sinks is None else max(scores.max(), sinks[g, r])
        weights = np.exp(scores - top)
        total = weights.sum() + (0.0 if sinks is None else np.exp(sinks[g, r] - top))
        out[b, g, r] = (weights / total) @ values[at].astype(np.float64)
    return out


def poisoned(
    batch: int, groups: int, dim: int, tables: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, values and tables: NaN wherever no sequence has a token, ids out of range past a sequence's last block."""
    blocks = [noise(batch * tables.shape[1] + 2, groups, BLOCK_SIZE, dim, seed=seed) for seed in (1, 2)]
    used = np.zeros((len(blocks[0]), BLOCK_SIZE), bool)
    tables = tables.copy()
    for b, length in enumerate(lengths):
        for w in range(tables.shape[1]):
            own = np.clip(length - w * BLOCK_SIZE, 0, BLOCK_SIZE)
            if own == 0:
                tables[b, w] = (-(2**31), -1, 2**31 - 1)[(b + w) % 3]
            else:
                used[tables[b, w], :own] = True
    for array in blocks:
        array.swapaxes(1, 2)[~used] = np.nan
    return blocks[0], blocks[1], tables


def narrowed(keys: np.ndarray, values: np.ndarray, dtype: Any) -> tuple[list[Any], list[np.ndarray]]:
    """Keys, values and their factors of 8 bits, and the keys and values that they stand for; NaN stays NaN."""
    held, wide = [], []
    for blocks in (keys, values):
        rows, factors = quantize_rows(jnp.asarray(blocks), dtype)
        held.append((rows, factors))
        wide.append(np.asarray(rows, np.float32) * np.asarray(factors)[..., None])
    return [held[0][0], held[1][0], held[0][1], held[1][1]], wide


def arguments(options: dict[str, Any], groups: int, heads: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options as :func:`naive` takes them, and as :func:`decode_attention` does."""
    theirs: dict[str, Any] = {"scale": 0.2} | options
    if theirs.pop("sinks", False):
        theirs["sinks"] = noise(groups, heads, seed=5)
    if theirs.pop("slopes", False):
        theirs["slopes"] = np.abs(noise(groups, heads, seed=6)) / 16
    ours = {name: value for name, value in theirs.items() if name not in ("slopes", "scaled")}
    if "slopes" in theirs:
        ours["bias"] = Bias(slopes=jnp.asarray(theirs["slopes"]), scaled=theirs.get("scaled", False))
    return theirs, ours
