"""Rotary embedding and the write of keys and values into their blocks in one pass, for prefill.

Shapes as in :mod:`pallas_kernels.attention`. XLA makes three passes of it, each over a strided part of the product
``qkv``: queries are rotated, keys rotated and scattered, values scattered. The kernel reads all of it once. It serves
models without rotary embedding too, where the three passes are a copy and two scatters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.attention import write_cache
from pallas_kernels.choices import rotary_cache_problem

Angles = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""Of positions [B, S], none of them negative: their cos and sin, float32 [B, S, D / 2]."""


def rotary_cache(
    qkv: jax.Array,
    angles: Angles | None,
    cache: tuple[jax.Array, ...],
    tables: jax.Array,
    positions: jax.Array,
    *,
    implementation: Literal["mosaic", "reference"] | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Rotate queries and keys, entry ``i`` of a head with entry ``i + D / 2``, and write keys and values into a cache.

    Args:
        qkv: [B, T, G, R + 2, D]: of each key head its queries, its key and its value.
        angles: of positions; the kernel asks for those of a sequence's tokens and of up to 127 after them. None rotates
            nothing.
        cache: a layer's, as :func:`pallas_kernels.write_cache` takes it; donate it, so that the write is in place.
        tables: int32 [B, W] block tables.
        positions: int32 [B, T]; negative ones mark padding, which is not written. For the kernel those of a row are
            consecutive up to its padding, and no block that is written belongs to two rows.
        implementation: ``mosaic`` is the Hopper kernel; ``reference``, or None, is ``jax.numpy``.
        interpret: run the kernel on the CPU, slowly, as tests do.

    Returns:
        Queries [B, T, G, R, D], meaningless where there is padding, and the cache.

    Raises:
        ValueError: an unknown implementation, or operands that the kernel cannot run.
    """
    if qkv.ndim != 5 or qkv.shape[3] < 3 or qkv.shape[4] % 2 or positions.shape != qkv.shape[:2]:
        raise ValueError(
            f"rotary_cache: qkv must be [B, T, G, R + 2, D] with an even D, and positions [B, T], got {qkv.shape} and "
            f"{positions.shape}"
        )
    if implementation is None or implementation == "reference":
        if angles is None:
            return qkv[..., :-2, :], write_cache(cache, qkv[..., -2, :], qkv[..., -1, :], tables, positions)
        cos, sin = (angle[:, :, None, None] for angle in angles(jnp.maximum(positions, 0)))
        first, second = jnp.split(qkv[..., :-1, :].astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(qkv.dtype)
        return turned[..., :-1, :], write_cache(cache, turned[..., -1, :], qkv[..., -1, :], tables, positions)
    if implementation != "mosaic":
        raise ValueError(f"rotary_cache: implementation {implementation!r} is none of 'mosaic', 'reference'")
    dim = qkv.shape[-1]
    pairs = None if angles is None else dim // 2
    problem = rotary_cache_problem(qkv.dtype, cache[0].dtype, head_dim=dim, pairs=pairs, interleaved=False)
    if problem is None and not qkv.size:
        problem = f"a product of shape {qkv.shape}"
    if problem is not None:
        raise ValueError(f"rotary_cache: implementation 'mosaic' does not run {problem}")
    # Imported here, since it takes a second and only this implementation needs it.
    from pallas_kernels.rotary_cache_mosaic import angle_rows, run

    starts, lengths = jnp.maximum(positions[:, 0], 0), jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
    given = None
    if angles is not None:
        given = angles(starts[:, None] + jnp.arange(angle_rows(qkv.shape[1]), dtype=jnp.int32))
    query, *written = run(qkv, given, *cache, tables, starts, lengths, interpret=interpret)
    return query, tuple(written)
