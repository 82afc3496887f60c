"""The Hopper kernel behind :func:`pallas_kernels.qkv_gemm`; see that module for the idea."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.gemm_channels import Heads, whole_tiles
from pallas_kernels.skinny_gemm import InputNorm, Tuning, padded_rows
from pallas_kernels.skinny_gemm_mosaic import launch


# Jitted, so that the layers of a model trace, lower and compile one kernel, not one each.
@functools.partial(jax.jit, static_argnames=("tuning", "interpret"))
def run(
    x: jax.Array,
    weight: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    slots: jax.Array,
    *,
    norm: InputNorm | None,
    bias: jax.Array | None,
    rotary: tuple[jax.Array, jax.Array] | None,
    weight_scale: jax.Array | None,
    tuning: Tuning,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Run the kernel on operands that :func:`pallas_kernels.qkv_gemm` has checked.

    Args:
        x: [M, K].
        weight: [G, R + 2, D, K].
        keys, values: blocks [N, G, 64, D], written in place where the caller has no more use for them.
        slots: int32 [M], the row of the blocks, ``block * 64 + row``, for each token; negative for none.
        norm, bias, weight_scale, tuning, interpret: as in :func:`pallas_kernels.qkv_gemm`.
        rotary: cos and sin, float32 [M, D / 2] each.

    Returns:
        The query [M, G, R, D], and the blocks.
    """
    (m, k), (groups, heads, dim, _) = x.shape, weight.shape
    x, tokens = whole_tiles(x), padded_rows(m, norm)
    parts = 1 if rotary is None else 2
    if rotary is not None:
        rotary = tuple(jnp.pad(angle, ((0, tokens - m), (0, 0))).T for angle in rotary)  # type: ignore[assignment]
    slots = jnp.pad(slots, (0, tokens - m), constant_values=-1)
    if weight_scale is not None:
        grouped = weight_scale.ndim == 4
        weight_scale = weight_scale.reshape((-1, groups * heads, dim) if grouped else (-1,))
    # References that the kernel closes over are aliased: what it does not write is left as it is.
    key_blocks, value_blocks = jax.new_ref(keys), jax.new_ref(values)
    own = Heads(
        groups, heads - 2, dim, parts=parts, rows=tuning.rows, m=m, tokens=tokens, held=x.shape[0], dtype=x.dtype,
        blocks=(key_blocks, value_blocks), slots=slots, rotary=rotary,
    )  # fmt: skip
    (query,) = launch(
        x, weight.reshape(groups * heads * parts, dim // parts, k), own, m=m, norm=norm, bias=bias,
        weight_scale=weight_scale, tuning=tuning, interpret=interpret, name="qkv_gemm",
    )  # fmt: skip
    return query[:m], jax.freeze(key_blocks), jax.freeze(value_blocks)
