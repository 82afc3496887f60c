"""The decoder: ``embed -> layers -> unembed``, composed from a spec's parts.

A module sees the local block of every array and takes head counts from shapes, so the same code runs bare on one device
and as the body of ``jax.shard_map`` on a mesh.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.models import whole
from jaxinfer.models.attention import Attention, Batch, LayerCache
from jaxinfer.models.embedding import Embedding, Head
from jaxinfer.models.mlp import Mlp
from jaxinfer.models.norm import Norm
from jaxinfer.models.parameter import ParameterInfo
from jaxinfer.models.spec import LayerSpec, Layout, ModelSpec

Half = Callable[[jax.Array, Norm | None, jax.Array | None], jax.Array]
"""Attention or MLP: of hidden states, the norm before it or None, and what is added to its result or None.

Norm and residual are handed down, not written here, because a kernel computes both in the product beside them.
"""

Kept = Callable[[jax.Array], jax.Array]
"""Of hidden states those that attention gives, which may be fewer; see :attr:`jaxinfer.models.attention.Batch.ends`."""

# One function a way of joining the stream; ``norms`` are called n1, n2, n1b, n2b in ``spec.Residual``.
RESIDUALS: dict[str, tuple[int, Callable[[jax.Array, Sequence[Norm], Half, Half, Kept], jax.Array]]] = {}


def _residual(name: str, norms: int) -> Callable[[Callable[..., jax.Array]], Callable[..., jax.Array]]:
    def register(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        RESIDUALS[name] = (norms, function)
        return function

    return register


@_residual("pre", 2)
def _pre(x: jax.Array, n: Sequence[Norm], attend: Half, mlp: Half, kept: Kept) -> jax.Array:
    x = attend(x, n[0], x)
    return mlp(x, n[1], x)


@_residual("post", 2)
def _post(x: jax.Array, n: Sequence[Norm], attend: Half, mlp: Half, kept: Kept) -> jax.Array:
    x = n[0](attend(x, None, x))
    return n[1](mlp(x, None, x))


@_residual("normed", 2)
def _normed(x: jax.Array, n: Sequence[Norm], attend: Half, mlp: Half, kept: Kept) -> jax.Array:
    x = n[0](x)
    x = n[1](attend(x, None, x))
    return mlp(x, None, x)


@_residual("parallel", 1)
def _parallel(x: jax.Array, n: Sequence[Norm], attend: Half, mlp: Half, kept: Kept) -> jax.Array:
    # XLA computes a norm that is written twice once; a kernel computes it with each product.
    return mlp(kept(x), n[0], attend(x, n[0], x))


@_residual("parallel_two_norms", 2)
def _parallel_two_norms(x: jax.Array, n: Sequence[Norm], attend: Half, mlp: Half, kept: Kept) -> jax.Array:
    return mlp(kept(x), n[1], attend(x, n[0], x))


@_residual("sandwich", 4)
def _sandwich(x: jax.Array, n: Sequence[Norm], attend: Half, mlp: Half, kept: Kept) -> jax.Array:
    x = kept(x) + n[2](attend(x, n[0], None))
    return x + n[3](mlp(x, n[1], None))


class Layer(nnx.Module):
    """One transformer layer: [B, T, H] to [B, T, H], and its cache with the new tokens written.

    Where the batch has ``ends``, keys and values are those of all tokens, and all else is computed of these alone.
    """

    def __init__(
        self, spec: ModelSpec, layer: LayerSpec, layout: Layout, dtype: jnp.dtype, quantize: str | None = None
    ) -> None:
        """Declare the layer's parts."""
        count, self.join = RESIDUALS[spec.residual]
        self.norms = nnx.List([Norm(spec.norm, spec.hidden, dtype) for _ in range(count)])
        self.attention = Attention(spec, layer, layout, dtype, quantize)
        self.mlp = Mlp(spec, dtype, quantize, layout.tensor)

    def __call__(self, x: jax.Array, batch: Batch, cache: LayerCache | None) -> tuple[jax.Array, LayerCache | None]:
        """Run the layer."""
        written: list[LayerCache | None] = []

        def attend(h: jax.Array, norm: Norm | None, residual: jax.Array | None) -> jax.Array:
            y, new = self.attention(h, batch, cache, norm, residual)
            written.append(new)
            return y

        mlp = functools.partial(self.mlp, gathered=batch.gathered)
        return self.join(x, self.norms, attend, mlp, batch.kept), written[0]


class Decoder(nnx.Module):
    """A decoder-only language model."""

    def __init__(self, spec: ModelSpec, layout: Layout, dtype: jnp.dtype, quantize: str | None = None) -> None:
        """Declare all parameters; call it through :func:`abstract`, which allocates nothing."""
        self.embed = Embedding(spec, layout, dtype)
        self.layers = nnx.List([Layer(spec, layer, layout, dtype, quantize) for layer in spec.layers])
        self.head = Head(spec, layout, dtype)
        self.problem = whole.spec_problem(spec)

    def hidden_states(
        self,
        batch: Batch,
        caches: Sequence[LayerCache] | None = None,
        x: jax.Array | None = None,
        own: range | None = None,
        ends: jax.Array | None = None,
    ) -> tuple[jax.Array, list[LayerCache]]:
        """Run embedding and layers: hidden states [B, T, H] before the final norm, and the written caches.

        Args:
            batch: the new tokens.
            caches: of the layers that are run, or None.
            x: [B, T, H], what the layers before ``own`` made of the tokens; None to begin with the embedding.
            own: the layers to run, or None for all.
            ends: int32 [P], tokens that are all that is asked for of the last layer, see
                :func:`jaxinfer.models.attention.at_ends`; hidden states then are [P, 1, H]. None for all.
        """
        own = range(len(self.layers)) if own is None else own
        layers = [self.layers[index] for index in own]
        x = self.embed(batch) if x is None else x
        chosen = whole.implementation(self.problem, layers, x, batch, caches)
        if caches is not None and chosen != "apart":
            return whole.run(layers, x, batch, caches, chosen)
        written: list[LayerCache] = []
        for place, (index, layer) in enumerate(zip(own, layers, strict=True)):
            if index == len(self.layers) - 1 and ends is not None:
                batch = dataclasses.replace(batch, ends=ends)
            with jax.named_scope(f"layer{index}"):
                x, cache = layer(x, batch, None if caches is None else caches[place])
            if cache is not None:
                written.append(cache)
        return x, written

    def logits(self, x: jax.Array) -> jax.Array:
        """Turn hidden states [..., H] into float32 logits [..., V]."""
        return self.head(x, self.embed)

    def __call__(self, batch: Batch, caches: Sequence[LayerCache] | None = None) -> tuple[jax.Array, list[LayerCache]]:
        """Compute the logits [B, T, V] of every position, and the written caches."""
        x, written = self.hidden_states(batch, caches)
        return self.logits(x), written


def abstract(spec: ModelSpec, layout: Layout, dtype: jnp.dtype, quantize: str | None = None) -> Decoder:
    """Build a decoder whose parameters are shapes only.

    Args:
        spec: the architecture.
        layout: how it is laid out over devices.
        dtype: of the parameters that are not quantized.
        quantize: how the weights of attention and MLP are: one of :data:`jaxinfer.quantization.DTYPES`, or None.

    Raises:
        ConfigError: int4, and no group divides a weight's inputs on one device.
    """
    return nnx.eval_shape(lambda: Decoder(spec, layout, dtype, quantize))


def parameters(decoder: Decoder) -> dict[str, ParameterInfo]:
    """List a decoder's parameters by dotted path (``layers.0.attention.qkv``), in the order of its flat leaves."""
    _, state = nnx.split(decoder)
    found: dict[str, ParameterInfo] = {}
    for path, variable in jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: isinstance(x, nnx.Variable)):
        value = variable.get_value()
        name = ".".join(str(getattr(key, "key", key)) for key in path)
        about = variable.get_metadata()
        found[name] = ParameterInfo(
            tuple(value.shape), value.dtype, about["axes"], about.get("quantization"), about.get("factors", False)
        )
    return found
