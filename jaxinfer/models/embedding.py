"""Token and position embedding, and the head that turns hidden states into logits."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.models.attention import Batch
from jaxinfer.models.norm import Norm
from jaxinfer.models.parameter import matmul, parameter
from jaxinfer.models.spec import Layout, ModelSpec
from pallas_kernels import device, einsum_f32
from sharding import all_gather, axis_index, psum


class Embedding(nnx.Module):
    """Tokens [B, T] to hidden states [B, T, H]; the vocabulary is split over the ``tensor`` axis."""

    def __init__(self, spec: ModelSpec, layout: Layout, dtype: jnp.dtype) -> None:
        """Declare ``tokens`` [V, E] and what else the spec asks for."""
        width = spec.embedding_dim or spec.hidden
        self.scale = spec.embedding_scale
        self.offset = spec.position_offset
        self.tokens = parameter((layout.vocab_rows, width), ("vocab", "hidden"), dtype)
        self.has_positions = spec.learned_positions is not None
        if spec.learned_positions is not None:
            rows = spec.learned_positions + spec.position_offset
            self.positions = parameter((rows, spec.hidden), ("positions", "hidden"), dtype)
        self.projected = spec.embedding_dim is not None
        if spec.embedding_dim is not None:
            self.project = parameter((spec.hidden, width), ("hidden", None), dtype)
        self.normed = spec.embedding_norm
        if spec.embedding_norm:
            self.norm = Norm(spec.norm, spec.hidden, dtype)

    def __call__(self, batch: Batch) -> jax.Array:
        """Embed; ids must be in the vocabulary (the engine checks them on the host)."""
        with jax.named_scope("embedding"):
            table = self.tokens[...]
            local = batch.tokens - axis_index("tensor") * table.shape[0]
            mine = (local >= 0) & (local < table.shape[0])
            x = jnp.take(table, jnp.clip(local, 0, table.shape[0] - 1), axis=0, mode="clip")
            x = psum(jnp.where(mine[..., None], x, jnp.zeros((), x.dtype)), "tensor")
            if self.projected:
                x = matmul(x, self.project[...])
            if self.scale is not None:
                x = x * jnp.asarray(self.scale, x.dtype)
            if self.has_positions:
                x = x + jnp.take(
                    self.positions[...], jnp.maximum(batch.positions, 0) + self.offset, axis=0, mode="clip"
                )
            return self.norm(x) if self.normed else x


class Head(nnx.Module):
    """Hidden states [..., H] to float32 logits [..., V] over the whole vocabulary."""

    def __init__(self, spec: ModelSpec, layout: Layout, dtype: jnp.dtype) -> None:
        """Declare the final norm, the projection and, unless it is the embedding's, the weight [V, H]."""
        width = spec.embedding_dim or spec.hidden
        self.vocab_size, self.softcap = spec.vocab_size, spec.logit_softcap
        self.normed = spec.final_norm
        if spec.final_norm:
            self.norm = Norm(spec.norm, spec.hidden, dtype)
        self.projected = spec.embedding_dim is not None
        if spec.embedding_dim is not None:
            self.project = parameter((width, spec.hidden), (None, "hidden"), dtype)
        self.tied = spec.tied_head
        if not spec.tied_head:
            self.tokens = parameter((layout.vocab_rows, width), ("vocab", "hidden"), dtype)
        self.biased = spec.head_bias
        if spec.head_bias:
            self.bias = parameter((layout.vocab_rows,), ("vocab",), dtype)

    def __call__(self, x: jax.Array, embedding: Embedding) -> jax.Array:
        """Compute the logits; those of the vocabulary's padding are cut off."""
        with jax.named_scope("head"):
            if self.normed:
                x = self.norm(x)
            if self.projected:
                x = matmul(x, self.project[...])
            table = embedding.tokens[...] if self.tied else self.tokens[...]
            logits = _product(x, table)
            if self.biased:
                logits = logits + self.bias[...].astype(jnp.float32)
            logits = all_gather(logits, "tensor", logits.ndim - 1)[..., : self.vocab_size]
            return logits if self.softcap is None else jnp.tanh(logits / self.softcap) * self.softcap


def _product(x: jax.Array, table: jax.Array) -> jax.Array:
    """Multiply [..., H] with [V, H] in float32.

    One row is given another one on a GPU: alone, XLA may make it a vector of float32, and a copy of the table as well
    (0.49 ms for 0.1 instead of 50,272 x 4096 on an H200, and twice the table's memory).
    """
    single = math.prod(x.shape[:-1]) == 1 and device().platform == "gpu"
    rows = jnp.pad(x.reshape(1, -1), ((0, 1), (0, 0))) if single else x
    logits = einsum_f32("...h,vh->...v", rows, table)
    return logits[0].reshape(*x.shape[:-1], -1) if single else logits
