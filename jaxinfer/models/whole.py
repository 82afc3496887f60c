"""All layers of a decode step in one operation, where a kernel runs them so.

The layers' modules stay what they are: this reads their parameters and calls
:func:`pallas_kernels.decoder_layers.decoder_layers` instead of one module after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp

import pallas_kernels as ops
from jaxinfer.models import positions
from jaxinfer.models.attention import Batch, LayerCache
from jaxinfer.models.parameter import array
from jaxinfer.models.spec import ModelSpec
from pallas_kernels.decoder_layers import LayerOperands, decoder_layers
from pallas_kernels.layers_choice import layers_problem
from sharding import axis_size

if TYPE_CHECKING:
    from jaxinfer.models.decoder import Layer


def spec_problem(spec: ModelSpec) -> str | None:
    """Name what of an architecture the operation does not compute, or None where it computes all."""
    first = spec.layers[0]
    turned = None if first.rotary is None else first.rotary.kind_in(spec.head_dim)
    if spec.residual != "pre":
        return f"residuals of kind {spec.residual!r}"
    if spec.qk_norm is not None:
        return "norms of queries and keys"
    if spec.softcap is not None:
        return "a softcap of scores"
    if spec.alibi is not None:
        return "ALiBi"
    for name in ("rotary", "scale", "window"):
        if any(getattr(layer, name) != getattr(first, name) for layer in spec.layers):
            said = {"rotary": "rotary embedding", "scale": "scale of the scores", "window": "window"}[name]
            return f"layers that differ in their {said}"
    return None if turned in (None, "halves") else f"{turned} rotary embedding"


def split_problem(devices: int) -> str | None:
    """Name that layers are divided among devices, which would have sums to do inside; None where they are not."""
    return f"layers divided among {devices} devices" if devices > 1 else None


def operands(layer: Layer) -> LayerOperands:
    """The parameters of a layer with residuals of kind ``pre``, as the operation takes them."""
    attention, mlp = layer.attention, layer.mlp
    out, out_scale = attention.out_product()
    return LayerOperands(
        weights=(attention.qkv[...], out, mlp.up[...], mlp.down[...]),
        scales=(array(attention.qkv_scale), out_scale, array(mlp.up_scale), array(mlp.down_scale)),
        biases=(
            attention.qkv_bias[...] if attention.qkv_biased else None,
            attention.out_bias[...] if attention.out_biased else None,
            mlp.up_bias[...] if mlp.biased else None,
            mlp.down_bias[...] if mlp.biased else None,
        ),
        norms=(layer.norms[0].of_input(), layer.norms[1].of_input()),
        activation=mlp.activation,
    )


def implementation(
    problem: str | None, layers: Sequence[Layer], x: jax.Array, batch: Batch, caches: Sequence[LayerCache] | None
) -> Literal["apart", "mosaic", "reference"]:
    """Choose how layers are computed: ``apart``, one after the other, or as :func:`run` takes it.

    Args:
        problem: of the architecture, as :func:`spec_problem` names it.
        layers: on this device.
        x: [B, T, H], what is given to the first.
        batch: the new tokens.
        caches: of each layer, or None.
    """
    if caches is None or batch.tables is None or batch.pieces is not None or batch.gathered or x.shape[1] != 1:
        return "apart"
    if not layers:  # they are paged, and run by whoever pages them
        return "apart"
    problem = problem or split_problem(axis_size("tensor"))
    on, tokens = ops.device(), batch.tables.shape[1] * ops.BLOCK_SIZE
    about = {"rows": len(x), "tokens": tokens}
    # Operands are looked at only where nothing else decides: elsewhere nothing of this is traced.
    if ops.layers_choice(on, **about, problem=problem).implementation == "mosaic":
        attention = layers[0].attention
        problem = layers_problem(
            x[:, 0], [operands(layer) for layer in layers], list(caches), batch.tables,  # type: ignore[arg-type]
            rotary=_angles(layers, batch), scale=attention.layer.scale, window=attention.layer.window,
        )  # fmt: skip
    return ops.layers_choice(on, **about, problem=problem).implementation


def run(
    layers: Sequence[Layer],
    x: jax.Array,
    batch: Batch,
    caches: Sequence[LayerCache],
    implementation: Literal["mosaic", "reference"],
) -> tuple[jax.Array, list[LayerCache]]:
    """Run layers over one new token of each sequence: [B, 1, H] to [B, 1, H], and the caches with it written.

    Args:
        layers: with residuals of kind ``pre``, and nothing that :func:`spec_problem` names.
        x: hidden states.
        batch: where they stand; with block tables, and neither packed nor gathered.
        caches: key and value blocks of each layer.
        implementation: of :func:`pallas_kernels.decoder_layers.decoder_layers`.

    Raises:
        ValueError: the named implementation cannot run them.
    """
    assert batch.tables is not None
    attention = layers[0].attention
    with jax.named_scope("layers"):
        pairs: list[Any] = [(keys, values) for keys, values in caches]
        y, written = decoder_layers(
            x[:, 0], [operands(layer) for layer in layers], pairs, batch.tables, batch.positions[:, 0],
            rotary=_angles(layers, batch), scale=attention.layer.scale, window=attention.layer.window,
            implementation=implementation,
        )  # fmt: skip
    return y[:, None], list(written)


def _angles(layers: Sequence[Layer], batch: Batch) -> tuple[jax.Array, jax.Array] | None:
    """Cos and sin of each sequence's position, float32 [B, D / 2], where heads are rotated."""
    rotary = layers[0].attention.layer.rotary
    if rotary is None:
        return None
    cos, sin = positions.angles(rotary, jnp.maximum(batch.positions, 0), batch.long)
    return cos[:, 0], sin[:, 0]
