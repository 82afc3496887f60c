"""Attention over a blocked KV cache: the write of new keys and values, and the attention of queries over blocks.

Shapes: ``B`` sequences, ``T`` new tokens each, ``G`` key/value heads, ``R`` query heads per key/value head, ``D``
entries a head, ``N`` blocks, ``S`` key positions. A block holds the keys (or values) of 64 tokens for every head,
``[N, G, 64, D]``; a block table row names the blocks of one sequence in order, so that key position ``p`` lies in block
``table[p // 64]`` at row ``p % 64``.

The functions here are plain ``jax.numpy`` and run everywhere; :func:`paged_attention` hands decode and prefill to the
Hopper kernels of :mod:`pallas_kernels.decode_attention` and :mod:`pallas_kernels.prefill_attention` where
:mod:`pallas_kernels.choices` says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.choices import AttentionImplementation, attention_choice, device
from pallas_kernels.einsum import einsum_f32

BLOCK_SIZE = 64
"""Tokens in a block."""

SCORE_BYTES = 512 << 20
"""Most bytes of float32 scores that attention holds at once; with more, queries are taken a tile at a time."""

MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a key that a query may not see: finite, so that a row with no visible key stays finite."""


@dataclass(frozen=True, kw_only=True)
class Bias:
    """ALiBi: ``slopes[g, r] * key_position``, see :class:`jaxinfer.models.spec.Alibi` for the two options."""

    slopes: jax.Array
    scaled: bool = False
    bfloat16: bool = False

    def scores(self, positions: jax.Array) -> jax.Array:
        """The bias of key ``positions`` [S], as float32 [G, R, 1, S]."""
        slopes, keys = self.slopes.astype(jnp.float32), positions.astype(jnp.float32)
        if not self.bfloat16:
            return slopes[:, :, None, None] * keys
        # reduce_precision, because XLA may drop a round trip through bfloat16 as excess precision.
        slopes, keys = lax.reduce_precision(slopes, 8, 7), lax.reduce_precision(keys, 8, 7)
        return lax.reduce_precision(slopes[:, :, None, None] * keys, 8, 7)


jax.tree_util.register_dataclass(Bias, data_fields=["slopes"], meta_fields=["scaled", "bfloat16"])


def write_blocks(blocks: jax.Array, values: jax.Array, tables: jax.Array, positions: jax.Array) -> jax.Array:
    """Write new keys (or values) into their blocks.

    Args:
        blocks: [N, G, 64, D]; donate it, so that the write is in place.
        values: [B, T, G, D], cast to the dtype of ``blocks``.
        tables: int32 [B, W] block tables.
        positions: int32 [B, T]; a negative one marks padding, which is not written.

    Returns:
        The blocks with the rows written.
    """
    num_blocks, groups, size, dim = blocks.shape
    batch, tokens = positions.shape
    safe = jnp.maximum(positions, 0)
    block = jnp.take_along_axis(tables, safe // size, axis=1, mode="clip")
    rows = (block[:, :, None] * groups + jnp.arange(groups)) * size + (safe % size)[:, :, None]
    # Rows of a matrix, not (block, offset) pairs: XLA transposes the operand of a scatter whose indexed axes are not
    # the leading ones, which would copy the whole cache at every step. Padding goes to rows past the end, each its own.
    past_end = num_blocks * groups * size + jnp.arange(batch * tokens * groups).reshape(rows.shape)
    rows = jnp.where((positions >= 0)[:, :, None], rows, past_end)
    flat = blocks.reshape(num_blocks * groups * size, dim)
    flat = flat.at[rows.reshape(-1)].set(values.reshape(-1, dim).astype(blocks.dtype), mode="drop", unique_indices=True)
    return flat.reshape(blocks.shape)


def quantize_rows(values: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Quantize keys (or values) to 8 bits, symmetrically, each head of each token with a factor of its own.

    Args:
        values: [..., D].
        dtype: ``int8`` or ``float8_e4m3fn``.

    Returns:
        [..., D] in ``dtype``, and float32 factors [...]: their product is ``values``, nearly. A row that is not finite
        has a factor that is not.
    """
    wide = values.astype(jnp.float32)
    top = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    largest = jnp.max(jnp.abs(wide), axis=-1)
    # Not less than the least normal number: what is below it may be flushed to zero, and divides to NaN.
    factor = jnp.maximum(largest / top, float(jnp.finfo(jnp.float32).tiny))
    scaled = wide / factor[..., None]
    return (jnp.round(scaled) if dtype == jnp.int8 else scaled).astype(dtype), factor


def write_cache(
    cache: tuple[jax.Array, ...], key: jax.Array, value: jax.Array, tables: jax.Array, positions: jax.Array
) -> tuple[jax.Array, ...]:
    """Write new keys and values into a layer's cache, quantized where the cache is.

    Args:
        cache: key and value blocks [N, G, 64, D]; where they are of 8 bits also their factors, float32 [N, G, 64] each.
        key, value: [B, T, G, D].
        tables, positions: as in :func:`write_blocks`.

    Returns:
        The cache with the rows written.
    """
    if len(cache) == 2:
        return tuple(
            write_blocks(blocks, new, tables, positions) for blocks, new in zip(cache, (key, value), strict=True)
        )
    blocks, factors = [], []
    for old, old_factors, new in zip(cache[:2], cache[2:], (key, value), strict=True):
        rows, factor = quantize_rows(new, old.dtype)
        blocks.append(write_blocks(old, rows, tables, positions))
        factors.append(write_blocks(old_factors[..., None], factor[..., None], tables, positions)[..., 0])
    return (*blocks, *factors)


def read_blocks(blocks: jax.Array, tables: jax.Array) -> jax.Array:
    """Gather the blocks of each sequence: [N, G, 64, D] and [B, W] to [B, G, W * 64, D]."""
    num_blocks, groups, size, dim = blocks.shape
    batch, width = tables.shape
    # Head-major, so that the products below need no transpose of what was gathered.
    rows = tables[:, None, :] * groups + jnp.arange(groups)[None, :, None]
    gathered = jnp.take(blocks.reshape(num_blocks * groups, size, dim), rows, axis=0, mode="clip")
    return gathered.reshape(batch, groups, width * size, dim)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_positions: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    bias: Bias | None = None,
    sinks: jax.Array | None = None,
    key_scale: jax.Array | None = None,
    value_scale: jax.Array | None = None,
    implementation: Literal["dot", "reduce"] | None = None,
) -> jax.Array:
    """Causal attention of queries over keys that start at position 0.

    Args:
        query: [B, T, G, R, D].
        key, value: [B, G, S, D]; the key at index ``s`` has position ``s``.
        query_positions: int32 [B, T]; keys after a query's position are not seen, and those after a sequence's last
            query may hold anything, also NaN. A negative one marks padding, whose result is meaningless.
        scale: multiplies the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        window: a query sees itself and the ``window - 1`` keys before it.
        bias: ALiBi.
        sinks: [G, R] logits that take part in the softmax and have no value.
        key_scale, value_scale: float32 [B, G, S], factors of keys and values of 8 bits; None where they are not.
        implementation: ``dot`` uses matrix products, ``reduce`` multiplies and sums, which XLA fuses with the gather of
            the blocks; None picks as :func:`pallas_kernels.choices` says.

    Returns:
        [B, T, G, R, D] in the dtype of ``query``. Scores and softmax are float32.
    """
    chosen: str | None = implementation
    if chosen is None:
        _, tokens, _, per_key, dim = query.shape
        chosen = attention_choice(
            device(), query_tokens=tokens, heads_per_key=per_key, head_dim=dim, dtype=query.dtype, paged=False
        ).implementation
    elif chosen not in ("dot", "reduce"):
        raise ValueError(f"implementation must be 'dot', 'reduce' or None, got {implementation!r}")
    positions = jnp.arange(key.shape[2], dtype=jnp.int32)
    # Zero times a value that is not finite is NaN, and what lies past a sequence's end is not its own.
    own = positions <= jnp.max(query_positions, axis=1, keepdims=True)
    value = jnp.where(own[:, None, :, None], value, jnp.zeros((), value.dtype))
    if value_scale is not None:
        value_scale = jnp.where(own[:, None], value_scale, 0.0)

    def attend(some: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _attend(
            *some, key, value, positions, scale, softcap, window, bias, sinks, key_scale, value_scale, chosen
        )

    batch, tokens, groups, per_key, dim = query.shape
    tile = query_tile(batch * groups * per_key, tokens, key.shape[2])
    if tile == tokens:
        return attend((query, query_positions))
    tiles = jnp.moveaxis(query.reshape(batch, tokens // tile, tile, groups, per_key, dim), 1, 0)
    places = jnp.moveaxis(query_positions.reshape(batch, tokens // tile, tile), 1, 0)
    return jnp.moveaxis(jax.lax.map(attend, (tiles, places)), 0, 1).reshape(query.shape)


def query_tile(rows: int, tokens: int, keys: int) -> int:
    """Query tokens whose scores are held at once: all, or the half, quarter, ... that :data:`SCORE_BYTES` hold.

    Args:
        rows: sequences times query heads.
        tokens: query tokens of each.
        keys: key positions.
    """
    tile = tokens
    while tile % 2 == 0 and 4 * rows * tile * keys > SCORE_BYTES:
        tile //= 2
    return tile


def _attend(
    query: jax.Array,
    query_positions: jax.Array,
    key: jax.Array,
    value: jax.Array,
    positions: jax.Array,
    scale: float,
    softcap: float | None,
    window: int | None,
    bias: Bias | None,
    sinks: jax.Array | None,
    key_scale: jax.Array | None,
    value_scale: jax.Array | None,
    implementation: str,
) -> jax.Array:
    """Attend with all scores [B, G, R, T, S] in memory; see :func:`attention`."""
    # 8 bits are exact in 16, and a key's factor is one of its score, so scores lose nothing by it.
    key, value = (x if s is None else x.astype(query.dtype) for x, s in ((key, key_scale), (value, value_scale)))
    if implementation == "dot":
        scores = einsum_f32("btgrd,bgsd->bgrts", query, key)
    else:
        scores = jnp.sum(
            jnp.moveaxis(query, 1, 3)[:, :, :, :, None].astype(jnp.float32) * key[:, :, None, None].astype(jnp.float32),
            -1,
        )
    if key_scale is not None:
        scores = scores * key_scale[:, :, None, None]
    if bias is not None and bias.scaled:
        scores = scores + bias.scores(positions)
    scores = scores * scale
    if softcap is not None:
        scores = jnp.tanh(scores / softcap) * softcap
    if bias is not None and not bias.scaled:
        scores = scores + bias.scores(positions)
    distance = jnp.maximum(query_positions, 0)[:, :, None] - positions
    visible = distance >= 0
    if window is not None:
        visible &= distance < window
    scores = jnp.where(visible[:, None, None], scores, MASKED)
    if sinks is None:
        weights = jax.nn.softmax(scores, axis=-1)
    else:
        sink = jnp.broadcast_to(sinks.astype(jnp.float32)[:, :, None, None], (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
    if value_scale is not None:
        weights = weights * value_scale[:, :, None, None]
    if implementation == "dot":
        out = einsum_f32("bgrts,bgsd->btgrd", weights.astype(value.dtype), value)
    else:
        out = jnp.sum(weights[..., None] * value[:, :, None, None].astype(jnp.float32), axis=-2)
        out = jnp.moveaxis(out, 3, 1)
    return out.astype(query.dtype)


def paged_attention(
    query: jax.Array,
    key_blocks: jax.Array,
    value_blocks: jax.Array,
    tables: jax.Array,
    query_positions: jax.Array,
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    bias: Bias | None = None,
    sinks: jax.Array | None = None,
    key_scales: jax.Array | None = None,
    value_scales: jax.Array | None = None,
    implementation: AttentionImplementation | None = None,
) -> jax.Array:
    """Causal attention of queries over the blocks of their sequences; one query token is decode, several are prefill.

    Args:
        query: [B, T, G, R, D].
        key_blocks, value_blocks: [N, G, 64, D], the queries' own keys and values already written.
        tables: int32 [B, W]; entries past a sequence's length may name any block.
        query_positions: int32 [B, T], as in :func:`attention`.
        scale, softcap, window, bias, sinks: as in :func:`attention`.
        key_scales, value_scales: float32 [N, G, 64], factors of blocks of 8 bits; None where they are not.
        implementation: as in :func:`attention`, or ``mosaic``: the Hopper kernel of decode for one query token a
            sequence, that of prefill for more, whose positions then are consecutive in each row up to its padding. None
            picks as :func:`pallas_kernels.choices` says.

    Returns:
        [B, T, G, R, D] in the dtype of ``query``.

    Raises:
        ValueError: an unknown implementation, or arguments that the kernel, asked for by name, cannot run.
    """
    _, tokens, _, per_key, dim = query.shape
    if implementation is None:
        implementation = attention_choice(
            device(), query_tokens=tokens, heads_per_key=per_key, head_dim=dim, dtype=query.dtype,
            kv_dtype=key_blocks.dtype,
        ).implementation  # fmt: skip
    if implementation == "mosaic":
        # Imported here, since they import this module, and their kernels take a second that only Hopper needs to spend.
        if tokens > 1:
            from pallas_kernels.prefill_attention import prefill_attention

            if key_scales is not None or value_scales is not None:
                raise ValueError(
                    f"implementation 'mosaic' of prefill does not run keys and values of {key_blocks.dtype}"
                )
            return prefill_attention(
                query, key_blocks, value_blocks, tables, query_positions,
                scale=scale, softcap=softcap, window=window, bias=bias, sinks=sinks, implementation="mosaic",
            )  # fmt: skip
        from pallas_kernels.decode_attention import decode_attention

        lengths = jnp.maximum(query_positions[:, 0] + 1, 0)
        return decode_attention(
            query[:, 0], key_blocks, value_blocks, tables, lengths,
            scale=scale, softcap=softcap, window=window, bias=bias, sinks=sinks,
            key_scales=key_scales, value_scales=value_scales, implementation="mosaic",
        )[:, None]  # fmt: skip

    def factors(scales: jax.Array | None) -> jax.Array | None:
        return None if scales is None else read_blocks(scales[..., None], tables)[..., 0]

    return attention(
        query,
        read_blocks(key_blocks, tables),
        read_blocks(value_blocks, tables),
        query_positions,
        scale=scale,
        softcap=softcap,
        window=window,
        bias=bias,
        sinks=sinks,
        key_scale=factors(key_scales),
        value_scale=factors(value_scales),
        implementation=implementation,
    )
