"""Query, key and value of a few rows, in one kernel from the norm before them to the rows of the cache.

Shapes: ``B`` sequences, ``T`` new tokens each, ``M = B * T``; ``K`` inputs; ``G`` key/value heads, ``R`` query heads
for each, ``D`` entries a head; ``N`` blocks of the cache, see :mod:`pallas_kernels.attention`.

The product is that of :mod:`pallas_kernels.skinny_gemm`, and so is its kernel; only what follows the sums differs. A
block of the grid has 64 channels of each half of one head. Rotary position embedding mixes entry ``i`` of the first
half with entry ``i`` of the second, which then are the same entry of two matrices in registers. A query goes to the
result; a token's key and value go from shared memory to their row of the blocks, a copy of the tensor memory
accelerator each. Everything is float32 up to the one rounding of what is written.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.attention import BLOCK_SIZE, write_cache
from pallas_kernels.choices import FUSED_NORMS
from pallas_kernels.skinny_gemm import (
    DTYPES,
    MAX_ROWS,
    QUANTIZED,
    SMEM_PER_SM,
    SMS,
    InputNorm,
    Tuning,
    balance,
    normalise,
    padded_rows,
    products,
    shared_bytes,
    tuning_for,
    weight_bits,
)

FEW_TOKENS = 16
"""Tokens up to which angles are fetched ahead into shared memory; those of more would leave less of it to the ring."""

Rotary = tuple[jax.Array, jax.Array]
"""Cos and sin of a token's angles, float32 [B, T, D / 2] each, factors on them included."""


def qkv_gemm(
    x: jax.Array,
    weight: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    tables: jax.Array,
    positions: jax.Array,
    *,
    norm: InputNorm | None = None,
    bias: jax.Array | None = None,
    rotary: Rotary | None = None,
    weight_scale: jax.Array | None = None,
    implementation: Literal["mosaic", "reference"] | None = None,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Compute ``norm(x) W^T + bias``, rotate queries and keys, and write keys and values into the cache.

    Args:
        x: [B, T, K].
        weight: [G, R + 2, D, K], for each key/value head its query heads, its key and its value.
        cache: key and value blocks, each [N, G, 64, D] in the dtype of ``x``; donate them, so that the write is in
            place.
        tables: int32 [B, W] block tables.
        positions: int32 [B, T]; a negative one marks padding, which is not written. No two tokens go to one place.
        norm: normalisation of the rows of ``x``.
        bias: [G, R + 2, D].
        rotary: rotate entry ``i`` of each query and key with entry ``i + D / 2``; None rotates nothing.
        weight_scale: float32, of a quantized weight: [G, R + 2, D], or of int4 [K / g, G, R + 2, D], the factor of each
            group of ``g`` inputs, g 64 or 128.
        implementation: ``mosaic`` is the Hopper kernel for 1 to 64 tokens; ``reference``, or None, is ``jax.numpy``.
        tuning: how the kernel divides the work; its ``rows`` are channels of each half of a head. None asks
            :func:`tuning_for_heads`.
        interpret: run the kernel on the CPU, slowly, as tests do.

    Returns:
        The query [B, T, G, R, D] in the dtype of ``x``, and the cache with the rows written.

    Raises:
        ValueError: the operands do not fit each other, or the named implementation cannot run them.
    """
    _check(x, weight, cache, tables, positions, norm, bias, rotary, weight_scale)
    rest: dict[str, Any] = {"norm": norm, "bias": bias, "rotary": rotary, "weight_scale": weight_scale}
    if implementation is None or implementation == "reference":
        return reference(x, weight, cache, tables, positions, **rest)
    if implementation != "mosaic":
        raise ValueError(f"qkv_gemm: implementation {implementation!r} is none of 'mosaic', 'reference'")
    _check_mosaic(x, weight, cache, rotary)
    # Imported here, since it takes a second and only this implementation needs it.
    from pallas_kernels import qkv_gemm_mosaic

    (batch, tokens, k), (groups, heads, dim, _) = x.shape, weight.shape
    x = x.reshape(-1, k)
    rows, parts, size = x.shape[0], 1 if rotary is None else 2, weight_bits(weight.dtype) / 8
    group = k // weight_scale.shape[0] if weight_scale is not None and weight_scale.ndim == 4 else 1
    if tuning is None:
        tuning = tuning_for_heads(rows, groups * heads, dim, k, parts=parts, norm=norm, weight_bytes=size)
    # As in skinny_gemm: before the division by its size, a row of float16 may overflow.
    if norm is not None and (x.dtype == jnp.float16 or k % 64 or not tuning.fuse_norm):
        x, norm = normalise(x, norm), None
    if interpret:
        # Interpret mode has none of: dependent launch, remote shared memory, wgmma with an operand in registers.
        tuning, weight = dataclasses.replace(tuning, overlap=False, splits=1), weight.astype(x.dtype)
    _check_tuning(tuning, rows, dim, k, parts, group, norm, size)
    slots = slots_of(tables, positions, cache[0].shape[0]).reshape(-1)
    rotary = None if rotary is None else (rotary[0].reshape(rows, -1), rotary[1].reshape(rows, -1))
    query, keys, values = qkv_gemm_mosaic.run(
        x, weight, *cache, slots,
        norm=norm, bias=bias, rotary=rotary, weight_scale=weight_scale, tuning=tuning, interpret=interpret,
    )  # fmt: skip
    return query.reshape(batch, tokens, groups, heads - 2, dim), (keys, values)


def reference(
    x: jax.Array,
    weight: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    tables: jax.Array,
    positions: jax.Array,
    *,
    norm: InputNorm | None = None,
    bias: jax.Array | None = None,
    rotary: Rotary | None = None,
    weight_scale: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """What :func:`qkv_gemm` computes, in ``jax.numpy``: any platform, any shape."""
    (batch, tokens, k), channels = x.shape, weight.shape[:-1]
    if weight_scale is not None:
        weight_scale = weight_scale.reshape(*weight_scale.shape[:-3], math.prod(channels))
    y = products(x.reshape(-1, k), weight.reshape(-1, k), norm, weight_scale).reshape(batch, tokens, *channels)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    turned, value = y[..., :-1, :], y[..., -1, :]
    if rotary is not None:
        cos, sin = (angle.astype(jnp.float32)[:, :, None, None] for angle in rotary)
        first, second = jnp.split(turned, 2, axis=-1)
        turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    query, key = turned[..., :-1, :], turned[..., -1, :]
    keys, values = write_cache(cache, key, value, tables, positions)
    return query.astype(x.dtype), (keys, values)


def slots_of(tables: jax.Array, positions: jax.Array, num_blocks: int) -> jax.Array:
    """The row of the blocks for each token, ``block * 64 + row``, as int32 [B, T]; -1 for one that has none.

    That is padding, and a token whose table names a block that there is not.
    """
    safe = jnp.maximum(positions, 0)
    block = jnp.take_along_axis(tables, safe // BLOCK_SIZE, axis=1, mode="clip")
    there = (positions >= 0) & (block >= 0) & (block < num_blocks)
    return jnp.where(there, block * BLOCK_SIZE + safe % BLOCK_SIZE, -1).astype(jnp.int32)


def tuning_for_heads(
    rows: int, heads: int, dim: int, k: int, *, parts: int, norm: InputNorm | None = None, weight_bytes: float = 2
) -> Tuning:
    """Choose how the kernel divides the product of ``heads`` heads, each of ``parts`` parts.

    As :func:`pallas_kernels.skinny_gemm.tuning_for` does, except that two parts are split too: a model has few heads.
    Weights of 16 bits are split no further than it takes to keep most SMs busy: a step of a 7B Llama (96 heads) took
    4.99 ms with 16 rows and four splits, 4.85 with two or one, 4.80 with one that has all of an SM's memory and tiles
    of 64 KiB; with 8 rows 4.29, 4.16 and 4.19 (H200, one run).
    """
    base = tuning_for(rows, heads * dim // parts, k, gated=parts == 2, norm=norm, weight_bytes=weight_bytes)
    share = max(1, SMEM_PER_SM // (shared_bytes(base, rows, parts == 2, norm=norm, weight_bytes=weight_bytes) + 1024))
    most, blocks = max(1, min(8, k // (2 * base.tile_k))), heads * dim // (64 * parts)
    balances = {splits: balance(blocks * splits) for splits in range(1, most + 1)}
    enough = max(balances.values()) - 0.05
    splits = min(
        splits for splits, even in balances.items() if even > (min(enough, 0.7) if weight_bytes == 2 else enough)
    )
    # With more rows, a LayerNorm's sums and columns of its own are more than the registers hold.
    fuses = base.fuse_norm and (norm is None or (norm.kind in FUSED_NORMS and (norm.kind == "rms" or rows <= 32)))
    tuning = dataclasses.replace(base, rows=64, stages=8, splits=splits, fuse_norm=fuses)
    if weight_bytes == 2 and rows <= 32 and blocks * splits <= SMS:
        share = 1
        if parts == 2 and 4 * tuning.tile_k <= k:
            tuning = dataclasses.replace(tuning, tile_k=2 * tuning.tile_k)
    room = SMEM_PER_SM // share - 1024
    while tuning.stages > 2 and _shared_bytes(tuning, rows, parts, norm, weight_bytes) > room:
        tuning = dataclasses.replace(tuning, stages=tuning.stages - 1)
    return tuning


def _shared_bytes(tuning: Tuning, rows: int, parts: int, norm: InputNorm | None, weight_bytes: float) -> int:
    """Shared memory of a block, in bytes: as the skinny GEMM's, whose output and residual are two of these rows."""
    tokens = padded_rows(rows, norm)
    angles = 2 * tuning.rows * tokens * 4 if parts == 2 and tokens <= FEW_TOKENS else 0
    return shared_bytes(tuning, rows, parts == 2, norm=norm, weight_bytes=weight_bytes) + angles


def _check(
    x: jax.Array,
    weight: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    tables: jax.Array,
    positions: jax.Array,
    norm: InputNorm | None,
    bias: jax.Array | None,
    rotary: Rotary | None,
    weight_scale: jax.Array | None,
) -> None:
    """Whether the operands fit each other."""
    if x.ndim != 3 or weight.ndim != 4 or weight.shape[1] < 3 or x.shape[2] != weight.shape[3]:
        raise ValueError(
            f"qkv_gemm: x must be [B, T, K] and weight [G, R + 2, D, K], R at least 1: {x.shape} and {weight.shape}"
        )
    (batch, tokens, k), (groups, _, dim, _) = x.shape, weight.shape
    if len(cache) != 2:
        raise ValueError(f"qkv_gemm: the cache must be key and value blocks, got {len(cache)} arrays")
    blocks = (cache[0].shape[0], groups, BLOCK_SIZE, dim)
    expected: dict[str, tuple[Any, tuple[int, ...]]] = {
        "key blocks": (cache[0], blocks),
        "value blocks": (cache[1], blocks),
        "tables": (tables, (batch, tables.shape[-1])),
        "positions": (positions, (batch, tokens)),
        "bias": (bias, weight.shape[:-1]),
    }
    if norm is not None:
        expected |= {"norm.scale": (norm.scale, (k,)), "norm.bias": (norm.bias, (k,))}
    if rotary is not None:
        expected |= {
            name: (angle, (batch, tokens, dim // 2)) for name, angle in zip(("cos", "sin"), rotary, strict=True)
        }
        if dim % 2:
            raise ValueError(f"qkv_gemm: heads of {dim} entries have no halves to rotate")
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"qkv_gemm: {name} must be {shape}, got {array.shape}")
    if (weight.dtype in QUANTIZED) != (weight_scale is not None):
        given = "none" if weight_scale is None else "one"
        raise ValueError(
            "qkv_gemm: a weight_scale goes with a weight of int8, int4 or float8_e4m3fn; "
            f"{given} with one of {weight.dtype}"
        )
    if weight_scale is not None:
        channels = weight.shape[:-1]
        shapes = [(k // g, *channels) for g in (64, 128) if k % g == 0] if weight.dtype == jnp.int4 else [channels]
        if weight_scale.shape not in shapes:
            wanted = " or ".join(map(str, shapes)) or "of groups of 64 or 128, which do not divide K"
            raise ValueError(f"qkv_gemm: weight_scale must be {wanted}, got {weight_scale.shape}")


def _check_mosaic(x: jax.Array, weight: jax.Array, cache: tuple[jax.Array, jax.Array], rotary: Rotary | None) -> None:
    """Whether the kernel can run the operands."""
    runs = (
        f"it runs 1 to {MAX_ROWS} tokens, K a multiple of 16, heads of a multiple of 64 entries, of 128 where they are "
        "rotated, x and blocks of bfloat16 or float16, and a weight of the same dtype, int8, int4 or float8_e4m3fn"
    )
    dtypes = [array.dtype for array in cache]
    if x.dtype not in DTYPES or weight.dtype not in (x.dtype, *QUANTIZED) or dtypes != [x.dtype] * 2:
        raise ValueError(
            f"qkv_gemm: implementation 'mosaic' cannot run x of {x.dtype} with a weight of {weight.dtype} and blocks "
            f"of {dtypes[0]} and {dtypes[1]}: {runs}"
        )
    (batch, tokens, k), dim = x.shape, weight.shape[2]
    halves = 1 if rotary is None else 2
    sizes = 1 <= batch * tokens <= MAX_ROWS and k > 0 and k % 16 == 0 and dim > 0 and dim % (64 * halves) == 0
    if not sizes or not weight.size or not cache[0].size:
        turned = "" if rotary is None else ", rotated,"
        raise ValueError(
            f"qkv_gemm: implementation 'mosaic' cannot run x {x.shape} with weight {weight.shape}{turned} and blocks "
            f"{cache[0].shape}: {runs}"
        )


def _check_tuning(
    tuning: Tuning, rows: int, dim: int, k: int, parts: int, group: int, norm: InputNorm | None, weight_bytes: float
) -> None:
    """Whether the tuning makes sense for the operands."""
    if tuning.rows % 64 or tuning.tile_k % 64 or min(tuning.rows, tuning.tile_k, tuning.stages) < 1:
        raise ValueError(f"qkv_gemm: rows and tile_k must be multiples of 64, stages at least 1: {tuning}")
    if dim // parts % tuning.rows:
        raise ValueError(f"qkv_gemm: rows must divide the {dim // parts} channels of each part of a head: {tuning}")
    if tuning.tile_k % group:
        raise ValueError(f"qkv_gemm: tile_k must be a multiple of the group, {group}: {tuning}")
    if not 1 <= tuning.splits <= min(8, -(-k // tuning.tile_k)) or tuning.reduce != "cluster":
        raise ValueError(
            f"qkv_gemm: splits must be 1 to 8, at most one for each tile of K={k}, and meet in a cluster: {tuning}"
        )
    if _shared_bytes(tuning, rows, parts, norm, weight_bytes) > SMEM_PER_SM:
        raise ValueError(f"qkv_gemm: more shared memory than an SM has, for {rows} rows: {tuning}")
