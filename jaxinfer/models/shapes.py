"""What of a model decides which implementations serve it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.models import whole
from jaxinfer.models.decoder import Layer
from jaxinfer.models.spec import Layout, ModelSpec
from jaxinfer.quantization import DTYPES
from pallas_kernels import BLOCK_SIZE, MAX_LAYER_ROWS, Shapes
from pallas_kernels.layers_choice import layers_problem


def shapes_of(
    spec: ModelSpec, layout: Layout, dtype: str, kv_dtype: str, weights: Mapping[str, Any], *, paged: bool = False
) -> Shapes:
    """Describe a model to :func:`pallas_kernels.choices`, in sizes of one device.

    Args:
        spec: the architecture.
        layout: how it is laid out over devices.
        dtype: of activations.
        kv_dtype: of cached keys and values.
        weights: dtype of each parameter, by path.
        paged: whether layers come to the device one after the other.
    """
    groups, split = layout.kv_groups // layout.tensor, spec.intermediate // layout.tensor
    per_group = spec.heads // layout.kv_groups
    sizes = {
        "attention.qkv": (spec.hidden, groups * (per_group + 2) * spec.head_dim),
        "attention.out": (groups * per_group * spec.head_dim, spec.hidden),
        "mlp.up": (spec.hidden, split),
        "mlp.down": (split, spec.hidden),
    }
    rotary = spec.layers[0].rotary  # layers differ in frequencies, not in what they rotate
    return Shapes(
        dtype=dtype,
        heads_per_key=per_group,
        head_dim=spec.head_dim,
        kv_dtype=kv_dtype,
        products=tuple((name, *size, jnp.dtype(weights[f"layers.0.{name}"]).name) for name, size in sizes.items()),
        pairs=None if rotary is None else len(rotary.inv_freq),
        interleaved=rotary is not None and rotary.interleaved,
        activation=spec.activation,
        gated={"mlp.up": spec.mlp_bias} if spec.gated_mlp else {},
        norm=spec.norm.kind,
        rotary=next((s.rotary.kind_in(spec.head_dim) for s in spec.layers if s.rotary), None),
        head_norms=spec.qk_norm is not None,
        whole=_whole(spec, layout, dtype, kv_dtype, jnp.dtype(weights["layers.0.attention.qkv"]), paged),
    )


def _whole(
    spec: ModelSpec, layout: Layout, dtype: str, kv_dtype: str, weight: jnp.dtype, paged: bool
) -> tuple[str | None, ...]:
    """For 1, 2, ... rows, why a kernel cannot run all layers of a decode step, or None."""
    problem = "layers that are paged" if paged else whole.spec_problem(spec) or whole.split_problem(layout.tensor)
    if problem is not None:
        return (problem,)
    quantize = next((method for method, narrow in DTYPES.items() if narrow == weight), None)
    first = spec.layers[0]
    layer = jax.eval_shape(lambda: whole.operands(Layer(spec, first, layout, jnp.dtype(dtype), quantize)))

    def shape(*sizes: int, of: str = dtype) -> Any:
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(of))

    def of_rows(rows: int) -> str | None:
        blocks = shape(1, layout.kv_groups, BLOCK_SIZE, spec.head_dim, of=kv_dtype)
        angles = shape(rows, spec.head_dim // 2, of="float32")
        return layers_problem(
            shape(rows, spec.hidden), [layer] * spec.num_layers, [(blocks, blocks)] * spec.num_layers,
            shape(rows, 1, of="int32"),
            rotary=None if first.rotary is None else (angles, angles), scale=first.scale, window=first.window,
        )  # fmt: skip

    return tuple(of_rows(rows) for rows in range(1, MAX_LAYER_ROWS + 1))
