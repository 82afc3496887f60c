"""Prefill attention over a blocked KV cache: a chunk of each sequence's tokens, over all that came before it.

The kernel (:mod:`pallas_kernels.prefill_kernel`), cuDNN, the ``jax.numpy`` reference, and what chooses between them.
Shapes as in :mod:`pallas_kernels.attention`: ``B`` sequences, ``T`` tokens of a chunk, ``G`` key/value heads, ``R``
query heads per key/value head, ``D`` entries a head, ``W`` blocks in a table row.

:func:`pallas_kernels.attention.paged_attention` is what models call, and comes here where the kernel is chosen.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.attention import BLOCK_SIZE, Bias, paged_attention
from pallas_kernels.choices import HALVES, attention_choice, device, prefill_choice, prefill_problem
from pallas_kernels.prefill_kernel import TILE, PrefillConfig, tiled_attention

PrefillImplementation = Literal["mosaic", "cudnn", "reference"]

SMEM_BYTES = 227 * 1024
"""Shared memory that a Hopper SM gives to programs."""
SMS = 132
RUNS = {
    "mosaic": "mosaic runs on Hopper with bfloat16 or float16 and head_dim 64, 80, 96, 128 or 256",
    "cudnn": (
        "cudnn runs on a GPU with bfloat16 or float16, head_dim up to 256 in steps of 8, chunks that are whole prompts "
        "and come with their own keys and values, and no softcap, bias or sinks"
    ),
}


def prefill_config(
    *, heads: int, tokens: int, width: int, head_dim: int, shaped: bool = False, sms: int = SMS
) -> PrefillConfig:
    """Choose steps, stages, turns and programs.

    Measured on an H200 with ``benchmarks/prefill_attention.py``, bfloat16, one run:

    - Steps of 128 keys, 550 TFLOP/s against 425 with 64 (8 x 2040 tokens, 32 heads of 128). But 64 where there is no
      more than a tile for each SM and it has few keys: 50 us against 60 (1 x 512 tokens).
    - One program for each SM, 550 TFLOP/s against 432 with one for each tile, 631 against 622 (1 x 8192). But one for
      each tile where chunks may start late, 515 against 409 (512 tokens at 1536). That was with lists made for chunks
      that start at 0; they are made for a start halfway since, see :func:`pallas_kernels.prefill_kernel.tile_steps`,
      and not measured again.
    - Turns, 550 TFLOP/s against 481; but none for heads of 256, 538 against 528.

    Not measured: 64 keys where a cap, a bias or an output of 256 columns takes the registers; as many stages, up to 4,
    as shared memory holds beside queries and results (2 and 4 were the same for heads of 64).

    Args:
        heads: sequences times query heads.
        tokens: query tokens of a chunk.
        width: blocks of a table row.
        head_dim: entries of a head.
        shaped: whether scores get a softcap or a bias.
        sms: SMs of the device.
    """
    staged, room = head_dim <= 128, width * BLOCK_SIZE
    short = heads * -(-tokens // TILE) <= sms and room <= 512
    keys = 128 if staged and not shaped and not short else 64
    stages = max(
        stages
        for stages in (1, 2, 3, 4)
        if stages == 1
        or PrefillConfig(keys=keys, stages=stages, staged=staged).shared_bytes(head_dim) + 2048 <= SMEM_BYTES
    )
    if short:
        stages = 2
    programs = sms if staged and room < 2 * tokens else None
    return PrefillConfig(keys=keys, stages=stages, staged=staged, turns=staged, programs=programs)


def prefill_attention(
    query: jax.Array,
    key_blocks: jax.Array,
    value_blocks: jax.Array,
    tables: jax.Array,
    positions: jax.Array | tuple[jax.Array, jax.Array],
    *,
    scale: float,
    softcap: float | None = None,
    window: int | None = None,
    bias: Bias | None = None,
    sinks: jax.Array | None = None,
    own: tuple[jax.Array, jax.Array] | None = None,
    implementation: PrefillImplementation | None = None,
    config: PrefillConfig | None = None,
) -> jax.Array:
    """Causal attention of a chunk of each sequence over the blocks of that sequence.

    Args:
        query: [B, T, G, R, D].
        key_blocks, value_blocks: [N, G, 64, D], the chunk's own keys and values already written.
        tables: int32 [B, W]; entries past a sequence's length may name any block, and what lies past it may be
            anything, also NaN.
        positions: int32 [B, T], those of a row consecutive, then negative ones for padding. Or the start of each chunk
            and its length, both int32 [B].
        scale: multiplies the scores.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        window: a query sees itself and the ``window - 1`` keys before it; steps before them are not read.
        bias: ALiBi, slopes [G, R].
        sinks: [G, R] logits that take part in the softmax and have no value (as in GPT-OSS).
        own: keys and values [B, T, G, D] of the chunks, as they were written into the blocks. Giving them says that
            every chunk starts at position 0, so that nothing else is seen: ``cudnn`` reads them in place of the blocks.
        implementation: ``mosaic``, ``cudnn`` or ``reference``; None is the first or the last of these, as
            :func:`pallas_kernels.choices.prefill_choice` says.
        config: how ``mosaic`` divides its work; None asks :func:`prefill_config`.

    Returns:
        [B, T, G, R, D] in the dtype of ``query``; meaningless where there is padding. Scores and softmax are float32.

    Raises:
        ValueError: arguments that do not fit together, or that the named implementation cannot run.
    """
    starts, lengths = _check(query, key_blocks, value_blocks, tables, positions, window, bias, sinks, own)
    tokens, dim = query.shape[1], query.shape[4]
    if implementation is None:
        chosen = prefill_choice(device(), head_dim=dim, dtype=query.dtype, kv_dtype=key_blocks.dtype)
        implementation = "mosaic" if chosen.implementation == "mosaic" else "reference"
    if implementation == "reference":
        if isinstance(positions, tuple):
            places = jnp.arange(tokens, dtype=jnp.int32)
            positions = jnp.where(places < lengths[:, None], starts[:, None] + places, -1)
        # Named, since left to choose it would come back to a kernel where that runs.
        plain = attention_choice(
            device(), query_tokens=tokens, heads_per_key=query.shape[3], head_dim=dim, dtype=query.dtype, paged=False
        ).implementation
        return paged_attention(
            query, key_blocks, value_blocks, tables, positions,
            scale=scale, softcap=softcap, window=window, bias=bias, sinks=sinks, implementation=plain,
        )  # fmt: skip
    if implementation == "cudnn":
        problem = _cudnn_problem(query.dtype, dim, own is not None, softcap, bias is not None, sinks is not None)
        if problem is None and own is not None:
            return _cudnn(query, *own, lengths, scale=scale, window=window)
    elif implementation == "mosaic":
        problem = prefill_problem(query.dtype, key_blocks.dtype, head_dim=dim)
        if key_blocks.dtype != value_blocks.dtype:
            problem = f"keys of {key_blocks.dtype} with values of {value_blocks.dtype}"
    else:
        raise ValueError(f"implementation must be 'mosaic', 'cudnn', 'reference' or None, got {implementation!r}")
    if problem is not None:
        raise ValueError(
            f"prefill_attention: implementation {implementation!r} does not run {problem}; {RUNS[implementation]}"
        )
    if config is None:
        config = prefill_config(
            heads=query.shape[0] * query.shape[2] * query.shape[3], tokens=tokens, width=tables.shape[1], head_dim=dim,
            shaped=softcap is not None or bias is not None,
        )  # fmt: skip
    _check_config(config, dim)
    return tiled_attention(
        query, key_blocks, value_blocks, tables, starts, lengths, config,
        scale=scale, softcap=softcap, window=window, bias=bias, sinks=sinks,
    )  # fmt: skip


def _check(
    query: jax.Array,
    key_blocks: jax.Array,
    value_blocks: jax.Array,
    tables: jax.Array,
    positions: jax.Array | tuple[jax.Array, jax.Array],
    window: int | None,
    bias: Bias | None,
    sinks: jax.Array | None,
    own: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array, jax.Array]:
    """Refuse arguments that do not fit together; return starts and lengths."""
    if query.ndim != 5 or 0 in query.shape:
        raise ValueError(f"query must be [B, T, G, R, D], none of them 0, got {query.shape}")
    batch, tokens, groups, per_key, dim = query.shape
    for name, blocks in (("key_blocks", key_blocks), ("value_blocks", value_blocks)):
        if blocks.ndim != 4 or blocks.shape[1:] != (groups, BLOCK_SIZE, dim):
            raise ValueError(
                f"{name} must be [N, {groups}, {BLOCK_SIZE}, {dim}] for query {query.shape}, got {blocks.shape}"
            )
    if key_blocks.shape != value_blocks.shape:
        raise ValueError(f"key_blocks {key_blocks.shape} and value_blocks {value_blocks.shape} differ")
    if tables.ndim != 2 or tables.shape[0] != batch or tables.shape[1] == 0 or tables.dtype != jnp.int32:
        raise ValueError(f"tables must be int32 [{batch}, W] with W > 0, got {tables.dtype} {tables.shape}")
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    for name, array in (("bias.slopes", None if bias is None else bias.slopes), ("sinks", sinks)):
        if array is not None and array.shape != (groups, per_key):
            raise ValueError(f"{name} must be [{groups}, {per_key}], got {array.shape}")
    for name, array in zip(("own keys", "own values"), own or (), strict=False):
        if array.shape != (batch, tokens, groups, dim) or array.dtype != query.dtype:
            raise ValueError(
                f"{name} must be {query.dtype} [{batch}, {tokens}, {groups}, {dim}], got {array.dtype} {array.shape}"
            )
    if isinstance(positions, tuple):
        for name, array in zip(("starts", "lengths"), positions, strict=True):
            if array.shape != (batch,) or array.dtype != jnp.int32:
                raise ValueError(f"{name} must be int32 [{batch}], got {array.dtype} {array.shape}")
        return positions[0], jnp.minimum(positions[1], tokens)
    if positions.shape != (batch, tokens) or positions.dtype != jnp.int32:
        raise ValueError(f"positions must be int32 [{batch}, {tokens}], got {positions.dtype} {positions.shape}")
    return jnp.maximum(positions[:, 0], 0), jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)


def _cudnn_problem(
    dtype: Any, dim: int, whole: bool, softcap: float | None, bias: bool, sinks: bool
) -> str | None:  # fmt: skip
    """What cuDNN cannot run of this, or None."""
    problems = (
        (jnp.dtype(dtype).name not in HALVES, f"dtype {jnp.dtype(dtype).name}"),
        (dim % 8 != 0 or dim > 256, f"head_dim {dim}"),
        # JAX's interface aligns the causal mask to the first key, and reads no blocks.
        (not whole, "chunks without their own keys and values"),
        (softcap is not None, "a softcap"),
        (bias, "ALiBi"),
        (sinks, "sinks"),
    )
    return next((problem for found, problem in problems if found), None)


def _check_config(config: PrefillConfig, dim: int) -> None:
    """Refuse a configuration that no kernel can be made of."""
    if config.keys < BLOCK_SIZE or config.keys % BLOCK_SIZE or config.keys > 256:
        raise ValueError(f"config: keys must be {BLOCK_SIZE}, 128, 192 or 256, got {config}")
    if config.stages < 1 or (config.programs is not None and config.programs < 1):
        raise ValueError(f"config: stages and programs must be at least 1, got {config}")
    if not config.staged and config.programs is not None:
        raise ValueError(f"config: results that are not staged need a program for each tile, got {config}")
    if (taken := config.shared_bytes(dim)) > SMEM_BYTES - 2048:
        raise ValueError(
            f"config: takes {taken} bytes of shared memory at head_dim {dim}, there are {SMEM_BYTES - 2048}: {config}"
        )


def _cudnn(
    query: jax.Array, key: jax.Array, value: jax.Array, lengths: jax.Array, *, scale: float, window: int | None
) -> jax.Array:
    """The same by cuDNN, over the chunk's own keys and values [B, T, G, D]."""
    out = jax.nn.dot_product_attention(
        query.reshape(*query.shape[:2], -1, query.shape[-1]), key, value,
        scale=scale, is_causal=True, query_seq_lengths=lengths, key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0), implementation="cudnn",
    )  # fmt: skip
    return out.reshape(query.shape)
