"""What of a model decides which implementations serve it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxinfer.models.spec import Layout, ModelSpec
from pallas_kernels import Shapes


def shapes_of(spec: ModelSpec, layout: Layout, dtype: str, kv_dtype: str, weights: Mapping[str, Any]) -> Shapes:
    """Describe a model to :func:`pallas_kernels.choices`, in sizes of one device.

    Args:
        spec: the architecture.
        layout: how it is laid out over devices.
        dtype: of activations.
        kv_dtype: of cached keys and values.
        weights: dtype of each parameter, by path.
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
    )
