"""Decode attention over a blocked KV cache: one query token a sequence, split over its blocks.

The kernel (:mod:`pallas_kernels.decode_kernel`), its ``jax.numpy`` reference, and what chooses between them. Shapes as
in :mod:`pallas_kernels.attention`: ``B`` sequences, ``G`` key/value heads, ``R`` query heads per key/value head, ``D``
entries a head, ``W`` blocks in a table row.

:func:`pallas_kernels.attention.paged_attention` is what models call, and comes here where the kernel is chosen.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from pallas_kernels.attention import BLOCK_SIZE, Bias, paged_attention
from pallas_kernels.choices import DECODE_HEADS, attention_choice, decode_problem, device
from pallas_kernels.decode_config import DecodeConfig, decode_config
from pallas_kernels.decode_kernel import LOG2E, NEVER, split_attention
from pallas_kernels.decode_resident import resident_attention

DecodeImplementation = Literal["mosaic", "reference"]

RUNS = (
    "mosaic runs on Hopper with bfloat16 or float16 and query heads a key head up to "
    + ", ".join(f"{heads} at head_dim {dim}" for dim, heads in DECODE_HEADS.items())
    + "; reference runs everywhere"
)


def decode_attention(
    query: jax.Array,
    key_blocks: jax.Array,
    value_blocks: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    bias: Bias | None = None,
    sinks: jax.Array | None = None,
    key_scales: jax.Array | None = None,
    value_scales: jax.Array | None = None,
    implementation: DecodeImplementation | None = None,
    config: DecodeConfig | None = None,
) -> jax.Array:
    """Attention of one query token a sequence over the blocks of that sequence.

    Args:
        query: [B, G, R, D].
        key_blocks, value_blocks: [N, G, 64, D], the queries' own keys and values already written; of 8 bits where they
            come with factors.
        tables: int32 [B, W]; entries past a sequence's length may name any block, and what lies there is not read.
        lengths: int32 [B], tokens of each sequence, its query's included; at most W * 64. 0 marks an idle row, whose
            result is zero.
        scale: multiplies the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        window: a query sees itself and the ``window - 1`` keys before it; blocks before them are not read.
        bias: ALiBi, slopes [G, R].
        sinks: [G, R] logits that take part in the softmax and have no value (as in GPT-OSS).
        key_scales, value_scales: float32 [N, G, 64], factors of keys and values of 8 bits; None where they are not.
        implementation: ``mosaic`` or ``reference``; None is ``reference``, which runs everywhere.
        config: how ``mosaic`` divides its work; None asks :func:`decode_config`.

    Returns:
        [B, G, R, D] in the dtype of ``query``. Scores and softmax are float32.

    Raises:
        ValueError: arguments that do not fit together, or that the named implementation cannot run.
    """
    _check(query, key_blocks, value_blocks, tables, lengths, window, bias, sinks, key_scales, value_scales)
    if implementation is None or implementation == "reference":
        return _reference(
            query, key_blocks, value_blocks, tables, lengths,
            scale=scale, softcap=softcap, window=window, bias=bias, sinks=sinks,
            key_scales=key_scales, value_scales=value_scales,
        )  # fmt: skip
    if implementation != "mosaic":
        raise ValueError(f"implementation must be 'mosaic', 'reference' or None, got {implementation!r}")
    _check_mosaic(query, key_blocks, value_blocks)
    if config is None:
        batch, groups, heads_per_key, dim = query.shape
        config = decode_config(
            batch=batch, groups=groups, heads_per_key=heads_per_key, width=tables.shape[1], head_dim=dim,
            kv_bytes=key_blocks.dtype.itemsize,
        )  # fmt: skip
    if min(config.splits, config.stages, config.consumers) < 1:
        raise ValueError(f"config: splits, stages and consumers must be at least 1, got {config}")
    if config.stages % config.consumers:
        raise ValueError(f"config: consumers must divide stages, got {config}")
    if config.ahead and not config.overlap:
        raise ValueError(f"config: ahead is a kind of overlap, which must be set too, got {config}")
    if config.resident:
        _check_resident(config, tables.shape[1], key_blocks.dtype)
        return resident_attention(
            query, key_blocks, value_blocks, tables, lengths, config,
            scale=scale, softcap=softcap, window=window, bias=bias, sinks=sinks,
        )  # fmt: skip
    splits = split_attention(
        query, key_blocks, value_blocks, tables, lengths, config,
        scale=scale, softcap=softcap, window=window, bias=bias, sinks=sinks,
        key_scales=key_scales, value_scales=value_scales,
    )  # fmt: skip
    if isinstance(splits, jax.Array):
        return splits
    outs, maxima, sums, active = splits
    return _combine(outs, maxima, sums, active, sinks, query.dtype)


def _check(
    query: jax.Array,
    key_blocks: jax.Array,
    value_blocks: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    window: int | None,
    bias: Bias | None,
    sinks: jax.Array | None,
    key_scales: jax.Array | None,
    value_scales: jax.Array | None,
) -> None:
    """Refuse arguments that do not fit together."""
    if query.ndim != 4 or 0 in query.shape:
        raise ValueError(f"query must be [B, G, R, D], none of them 0, got {query.shape}")
    batch, groups, heads_per_key, dim = query.shape
    for name, blocks in (("key_blocks", key_blocks), ("value_blocks", value_blocks)):
        if blocks.ndim != 4 or blocks.shape[1:] != (groups, BLOCK_SIZE, dim):
            raise ValueError(
                f"{name} must be [N, {groups}, {BLOCK_SIZE}, {dim}] for query {query.shape}, got {blocks.shape}"
            )
    if key_blocks.shape != value_blocks.shape:
        raise ValueError(f"key_blocks {key_blocks.shape} and value_blocks {value_blocks.shape} differ")
    for name, blocks, scales in (("key", key_blocks, key_scales), ("value", value_blocks, value_scales)):
        if (scales is not None) != (blocks.dtype.itemsize == 1):
            given = "without" if scales is None else "with"
            raise ValueError(f"{name}_scales come with blocks of 8 bits, got {name}_blocks of {blocks.dtype} {given}")
        if scales is not None and (scales.shape != blocks.shape[:3] or scales.dtype != jnp.float32):
            raise ValueError(
                f"{name}_scales must be float32 {list(blocks.shape[:3])}, got {scales.dtype} {scales.shape}"
            )
    if tables.ndim != 2 or tables.shape[0] != batch or tables.shape[1] == 0 or tables.dtype != jnp.int32:
        raise ValueError(f"tables must be int32 [{batch}, W] with W > 0, got {tables.dtype} {tables.shape}")
    if lengths.shape != (batch,) or lengths.dtype != jnp.int32:
        raise ValueError(f"lengths must be int32 [{batch}], got {lengths.dtype} {lengths.shape}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    for name, array in (("bias.slopes", None if bias is None else bias.slopes), ("sinks", sinks)):
        if array is not None and array.shape != (groups, heads_per_key):
            raise ValueError(f"{name} must be [{groups}, {heads_per_key}], got {array.shape}")


def _check_mosaic(query: jax.Array, key_blocks: jax.Array, value_blocks: jax.Array) -> None:
    """Refuse what the kernel cannot run."""
    _, _, heads_per_key, dim = query.shape
    problem = None
    if key_blocks.dtype != value_blocks.dtype:
        problem = f"keys of {key_blocks.dtype} with values of {value_blocks.dtype}"
    problem = problem or decode_problem(query.dtype, key_blocks.dtype, head_dim=dim, heads_per_key=heads_per_key)
    if problem is not None:
        raise ValueError(f"decode_attention: implementation 'mosaic' does not run {problem}; {RUNS}")


def _check_resident(config: DecodeConfig, width: int, dtype: jnp.dtype) -> None:
    """Refuse a configuration that the kernel for short contexts cannot run."""
    if config.consumers > 1 or config.overlap or config.ahead or config.splits > 8:
        raise ValueError(
            f"config: resident takes 1 to 8 splits, one consumer, and neither overlap nor ahead, got {config}"
        )
    if config.stages * config.splits < width:
        raise ValueError(f"config: resident takes a stage for each of {width} blocks of a table row, got {config}")
    if dtype.itemsize == 1:
        raise ValueError(f"config: resident takes keys and values of 16 bits, got {dtype}")


def _reference(
    query: jax.Array,
    key_blocks: jax.Array,
    value_blocks: jax.Array,
    tables: jax.Array,
    lengths: jax.Array,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    bias: Bias | None,
    sinks: jax.Array | None,
    key_scales: jax.Array | None,
    value_scales: jax.Array | None,
) -> jax.Array:
    """The same by :func:`pallas_kernels.attention.paged_attention`."""
    lengths = jnp.minimum(lengths, tables.shape[1] * BLOCK_SIZE)
    _, _, heads_per_key, dim = query.shape
    # Named, since left to choose it would come back to the kernel where that runs.
    chosen = attention_choice(
        device(), query_tokens=1, heads_per_key=heads_per_key, head_dim=dim, dtype=query.dtype, paged=False
    ).implementation
    out = paged_attention(
        query[:, None], key_blocks, value_blocks, tables, lengths[:, None] - 1,
        scale=scale, softcap=softcap, window=window, bias=bias, sinks=sinks,
        key_scales=key_scales, value_scales=value_scales, implementation=chosen,
    )[:, 0]  # fmt: skip
    return jnp.where((lengths > 0)[:, None, None, None], out, jnp.zeros((), out.dtype))


def _combine(
    outs: jax.Array,
    maxima: jax.Array,
    sums: jax.Array,
    active: jax.Array,
    sinks: jax.Array | None,
    dtype: jnp.dtype,
) -> jax.Array:
    """Put splits together: [B, G, S, R, D], maxima in log2 and sums [B, G, S, R], active [B, S] to [B, G, R, D]."""
    active = active[:, None, :, None]
    # What an idle split left in memory may be anything, NaN included.
    maxima, sums = jnp.where(active, maxima, NEVER), jnp.where(active, sums, 0.0)
    outs = jnp.where(active[..., None], outs, 0.0)
    splits = outs.shape[2]
    # Slice by slice: reductions would be three kernels where elementwise operations are one.
    top = maxima[:, :, 0]
    for split in range(1, splits):
        top = jnp.maximum(top, maxima[:, :, split])
    if sinks is not None:
        top = jnp.maximum(top, sinks.astype(jnp.float32) * LOG2E)
    total = jnp.zeros_like(top) if sinks is None else jnp.exp2(sinks.astype(jnp.float32) * LOG2E - top)
    out = jnp.zeros_like(outs[:, :, 0])
    for split in range(splits):
        factor = jnp.exp2(maxima[:, :, split] - top)
        total = total + factor * sums[:, :, split]
        out = out + factor[..., None] * outs[:, :, split]
    return (out / jnp.where(total > 0, total, 1.0)[..., None]).astype(dtype)
