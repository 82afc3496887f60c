"""Prefill attention written plainly, and caches that hold NaN wherever no sequence has a token."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.decode_oracle import naive, poisoned


def naive_chunk(
    query: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
    tables: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    **options: Any,
) -> np.ndarray:
    """[B, T, G, R, D], one token at a time: each is the last of a sequence that ends with it. Zero for padding."""
    out = np.zeros(query.shape)
    for token in range(query.shape[1]):
        stops = np.where(token < lengths, starts + token + 1, 0)
        out[:, token] = naive(query[:, token], keys, values, tables, stops, **options)
    return out


def filled(
    batch: int, groups: int, dim: int, tables: np.ndarray, starts: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys, values and tables as :func:`tests.decode_oracle.poisoned` makes them, for chunks."""
    return poisoned(batch, groups, dim, tables, np.where(lengths > 0, starts + lengths, 0))
