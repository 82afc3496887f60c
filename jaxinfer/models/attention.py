"""The attention half of a layer: projections, positions, the write into the blocks, and attention over them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
from flax import nnx

import pallas_kernels as ops
from jaxinfer.models import positions
from jaxinfer.models.norm import Norm
from jaxinfer.models.parameter import array, parameter, weight
from jaxinfer.models.spec import LayerSpec, Layout, ModelSpec
from jaxinfer.quantization import quantization
from sharding import all_to_all, axis_index, axis_size, linear_psum

LayerCache = tuple[jax.Array, ...]
"""Key and value blocks of one layer, each [N, G, 64, D]; of 8 bits also their factors, each float32 [N, G, 64]."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pieces:
    """How attention sees tokens that are packed, chunks of several sequences one behind the other: as padded rows.

    So products compute no padding, and attention, which is a few percent of them, is the same as of rows.

    Attributes:
        tokens: int32 [P, L], the token at each place of the rows; T where there is none.
        positions: int32 [P, L], its position; negative where there is none.
        places: int32 [T], the place of each token, counted over all rows.
        tables: int32 [T, W], the block table of each token's row.
    """

    tokens: jax.Array
    positions: jax.Array
    places: jax.Array
    tables: jax.Array

    @classmethod
    def of(cls, tokens: jax.Array, positions: jax.Array, tables: jax.Array) -> Pieces:
        """Derive the rest from ``tokens`` [P, L], the positions [1, T] of the packed tokens, and tables [P, W]."""
        count = positions.shape[1]
        there = tokens < count
        spread = jnp.where(there, jnp.take(positions[0], tokens, mode="clip"), -1)
        places = (
            jnp.zeros(count, jnp.int32)
            .at[tokens]
            .set(jnp.arange(tokens.size, dtype=jnp.int32).reshape(tokens.shape), mode="drop")
        )
        return cls(tokens, spread, places, tables[places // tokens.shape[1]])

    def spread(self, values: jax.Array) -> jax.Array:
        """[1, T, ...] to the rows [P, L, ...]; anything where there is no token."""
        return jnp.take(values[0], self.tokens, axis=0, mode="clip")

    def gather(self, values: jax.Array) -> jax.Array:
        """[P, L, ...] back to [1, T, ...]; anything where the packed tokens are padding."""
        return jnp.take(values.reshape(-1, *values.shape[2:]), self.places, axis=0, mode="clip")[None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """What a step is given: new tokens of several sequences, and where their keys and values live.

    Attributes:
        tokens: int32 [B, T] token ids; any valid id where there is padding.
        positions: int32 [B, T] place of each token in its sequence; negative marks padding.
        tables: int32 [B, W] block tables, or None for a forward pass without a cache, whose sequences start at 0.
        long: bool [B], sequences that take the long rotary frequencies; None where the model has one set.
        pieces: where tokens are packed [1, T], the rows that attention sees, whose block tables ``tables`` are.
        gathered: the layers' weights are whole on every device of the ``tensor`` axis, and hidden states are those of
            the device's own T / n tokens; all else here, and the cache, is as it is otherwise.
        ends: int32 [P], the only tokens whose hidden states are asked for; None for all. See :func:`at_ends`.
    """

    tokens: jax.Array
    positions: jax.Array
    tables: jax.Array | None = None
    long: jax.Array | None = None
    pieces: Pieces | None = None
    gathered: bool = field(default=False, metadata={"static": True})
    ends: jax.Array | None = None

    def kept(self, values: jax.Array) -> jax.Array:
        """Of [B, T, ...] what is asked for: [P, 1, ...], or all of it."""
        return values if self.ends is None else at_ends(values, self.ends, packed=self.pieces is not None)[:, None]


def at_ends(values: jax.Array, ends: jax.Array, *, packed: bool) -> jax.Array:
    """Of [B, T, ...] one token a sequence, [P, ...]: ``ends`` int32 [P] are columns of P rows, or of one if packed."""
    return values[0 if packed else jnp.arange(len(values)), ends]


class Attention(nnx.Module):
    """Multi-head, grouped-query or multi-query attention with any of the position schemes.

    Query, key and value are one weight ``[G, R + 2, D, H]``: for each key/value head its ``R`` query heads, its key
    and its value. So one product gives all three, the tensor axis splits it at whole heads, and head counts are read
    off the local shape.
    """

    def __init__(
        self, spec: ModelSpec, layer: LayerSpec, layout: Layout, dtype: jnp.dtype, quantize: str | None = None
    ) -> None:
        """Declare the weights ``qkv`` [G, R + 2, D, H] and ``out`` [H, G, R, D].

        Quantized, there are factors too: ``qkv_scale`` [G, R + 2, D] and ``out_scale`` [H], or of int4
        [H / g, G, R + 2, D] and [G, R * D / g, H].

        Raises:
            ConfigError: int4, and no group divides the inputs.
        """
        groups, dim = layout.kv_groups, spec.head_dim
        per_group = spec.heads // groups
        self.layer, self.softcap, self.alibi = layer, spec.softcap, spec.alibi
        qkv = out = None
        if quantize is not None:
            qkv = quantization(quantize, "attention.qkv", spec.hidden)
            out = quantization(quantize, "attention.out", per_group * dim, inputs=3)
        axes = ("kv_heads", None, "head_dim")
        shape = (groups, per_group + 2, dim, spec.hidden)
        self.qkv, self.qkv_scale = weight(shape, (*axes, "hidden"), dtype, qkv)
        shape = (spec.hidden, groups, per_group, dim)
        self.out, self.out_scale = weight(shape, ("hidden", *axes), dtype, out)
        self.qkv_biased, self.out_biased = spec.qkv_bias, spec.out_bias
        if spec.qkv_bias:
            self.qkv_bias = parameter((groups, per_group + 2, dim), ("kv_heads", None, "head_dim"), dtype)
        if spec.out_bias:
            self.out_bias = parameter((spec.hidden,), ("hidden",), dtype)
        self.normed = spec.qk_norm is not None
        if spec.qk_norm is not None:
            self.query_norm = Norm(spec.qk_norm, dim, dtype)
            self.key_norm = Norm(spec.qk_norm, dim, dtype)

    def __call__(
        self,
        x: jax.Array,
        batch: Batch,
        cache: LayerCache | None,
        norm: Norm | None = None,
        residual: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attend from [B, T, H] to [B, T, H], summed over the ``tensor`` axis; new tokens are written to the cache.

        Where the batch has ``ends``, the result and what is added to it are those tokens' alone, [P, 1, H].

        Args:
            x: hidden states; where weights are gathered, as the result, [B, T / n, H], those of the device's tokens.
            batch: where they stand.
            cache: the layer's blocks, or None.
            norm: of ``x``, before all else.
            residual: [B, T, H], added to the result.
        """
        with jax.named_scope("attention"):
            groups, per_group = self.qkv.shape[0], self.qkv.shape[1] - 2
            groups //= axis_size("tensor") if batch.gathered else 1
            bias = self._bias(groups, per_group)
            scale, window = self.layer.scale, self.layer.window
            if cache is None or batch.tables is None:
                query, key, value = self._heads(self._product(x, batch, norm), batch)
                y = ops.attention(
                    query, jnp.moveaxis(key, 1, 2), jnp.moveaxis(value, 1, 2), batch.positions,
                    scale=scale, softcap=self.softcap, window=window, bias=bias,
                )  # fmt: skip
            else:
                query, cache = self._written(x, batch, batch.tables, cache, norm)
                pieces, places = batch.pieces, batch.positions
                if pieces is not None:
                    query, places = pieces.spread(query), pieces.positions
                keys, values, *factors = cache
                key_scales, value_scales = factors or (None, None)
                y = ops.paged_attention(
                    query, keys, values, batch.tables, places,
                    scale=scale, softcap=self.softcap, window=window, bias=bias,
                    key_scales=key_scales, value_scales=value_scales,
                )  # fmt: skip
                y = y if pieces is None else pieces.gather(y)
            if batch.gathered:
                y = all_to_all(y, "tensor", 1, 2)
            y = batch.kept(y)
            y = linear_psum(
                y.reshape(*y.shape[:2], -1), *self.out_product(),
                axis=None if batch.gathered else "tensor",
                bias=self.out_bias[...] if self.out_biased else None,
                residual=None if residual is None else batch.kept(residual),
            )  # fmt: skip
            return y, cache

    def out_product(self) -> tuple[jax.Array, jax.Array | None]:
        """The weight of the output as a product has it [H, G * R * D], and its factors [H] or [G * R * D / g, H]."""
        out, scale = self.out[...], array(self.out_scale)
        if scale is not None and scale.ndim > 1:
            scale = scale.reshape(-1, scale.shape[-1])
        return out.reshape(out.shape[0], -1), scale

    def _product(self, x: jax.Array, batch: Batch, norm: Norm | None) -> jax.Array:
        """Query, key and value [B, T, G, R + 2, D], before they are normalised and rotated.

        Of this device's heads and all tokens, also where weights are gathered: there the devices exchange them.
        """
        qkv = ops.linear(
            x, self.qkv[...], array(self.qkv_scale),
            norm=None if norm is None else norm.of_input(),
            bias=self.qkv_bias[...] if self.qkv_biased else None,
        )  # fmt: skip
        return all_to_all(qkv, "tensor", 2, 1) if batch.gathered else qkv

    def _heads(self, qkv: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Query [B, T, G, R, D], key and value [B, T, G, D], normalised and rotated."""
        query, key, value = qkv[..., :-2, :], qkv[..., -2:-1, :], qkv[..., -1, :]
        if self.normed:
            query, key = self.query_norm(query), self.key_norm(key)
        rotary = self.layer.rotary
        if rotary is not None:
            cos, sin = positions.angles(rotary, jnp.maximum(batch.positions, 0), batch.long)
            query = positions.rotate(query, cos, sin, interleaved=rotary.interleaved)
            key = positions.rotate(key, cos, sin, interleaved=rotary.interleaved)
        return query, key[..., 0, :], value

    def _written(
        self, x: jax.Array, batch: Batch, tables: jax.Array, cache: LayerCache, norm: Norm | None
    ) -> tuple[jax.Array, LayerCache]:
        """Query [B, T, G, R, D], and the cache with keys and values in it."""
        rotary, dim, pieces = self.layer.rotary, self.qkv.shape[2], batch.pieces
        chosen = ops.qkv_choice(
            ops.device(), rows=math.prod(x.shape[:-1]), inputs=x.shape[-1], head_dim=dim, dtype=x.dtype,
            weight_dtype=self.qkv.dtype, kv_dtype=cache[0].dtype,
            rotary=None if rotary is None else rotary.kind_in(dim), head_norms=self.normed,
        )  # fmt: skip
        if pieces is None and not batch.gathered and chosen.implementation != "apart":
            keys, values = cache
            angles = None if rotary is None else positions.angles(rotary, jnp.maximum(batch.positions, 0), batch.long)
            return ops.qkv_gemm(
                x, self.qkv[...], (keys, values), tables, batch.positions,
                norm=None if norm is None else norm.of_input(),
                bias=self.qkv_bias[...] if self.qkv_biased else None,
                rotary=angles, weight_scale=array(self.qkv_scale), implementation="mosaic",
            )  # fmt: skip
        qkv = self._product(x, batch, norm)
        if pieces is None and self._one_pass(qkv, cache):
            turn = None if rotary is None else functools.partial(positions.angles, rotary, long=batch.long)
            return ops.rotary_cache(qkv, turn, cache, tables, batch.positions, implementation="mosaic")
        query, key, value = self._heads(qkv, batch)
        if pieces is None:
            return query, ops.write_cache(cache, key, value, tables, batch.positions)
        # Every token as a sequence of its own.
        new = (key[0][:, None], value[0][:, None])
        return query, ops.write_cache(cache, *new, pieces.tables, batch.positions[0][:, None])

    def _one_pass(self, qkv: jax.Array, cache: LayerCache) -> bool:
        """Whether a kernel rotates queries and keys and writes keys and values at once."""
        rotary = self.layer.rotary
        chosen = ops.rotary_cache_choice(
            ops.device(), query_tokens=qkv.shape[1], head_dim=qkv.shape[-1], dtype=qkv.dtype, kv_dtype=cache[0].dtype,
            pairs=None if rotary is None else len(rotary.inv_freq),
            interleaved=rotary is not None and rotary.interleaved, normed=self.normed,
        )  # fmt: skip
        return chosen.implementation == "mosaic"

    def _bias(self, groups: int, per_group: int) -> ops.Bias | None:
        """ALiBi for this device's heads."""
        if self.alibi is None:
            return None
        slopes = jnp.asarray(self.alibi.slopes, jnp.float32).reshape(-1, per_group)
        slopes = jax.lax.dynamic_slice_in_dim(slopes, axis_index("tensor") * groups, groups)
        return ops.Bias(slopes=slopes, scaled=self.alibi.scaled, bfloat16=self.alibi.bfloat16)
