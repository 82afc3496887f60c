from __future__ import annotations

import math

import jax.numpy as jnp
import pytest

from jaxinfer.models.decoder import abstract, parameters
from jaxinfer.models.positions import rotary
from jaxinfer.models.shapes import shapes_of
from jaxinfer.models.spec import LayerSpec, Layout, Norm
from sharding import ShardingRules
from tests.modules import small_spec


@pytest.mark.parametrize(
    ("turned", "kind"),
    [
        (None, None),
        (rotary({}, 8, 64), "halves"),
        (rotary({"partial_rotary_factor": 0.5}, 8, 64, partial=True), "partial"),
        (rotary({}, 8, 64, interleaved=True), "interleaved"),
    ],
)
def test_positions_are_described(turned, kind):
    spec = small_spec(layers=(LayerSpec(scale=1.0, rotary=turned),), qk_norm=Norm(kind="rms", eps=1e-5))
    layout = Layout.of(spec)
    listed = parameters(abstract(spec, layout, jnp.dtype(jnp.bfloat16)))
    found = shapes_of(spec, layout, "bfloat16", "int8", {path: info.dtype for path, info in listed.items()})
    assert (found.rotary, found.head_norms) == (kind, True)


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2}, {"gated_mlp": True}], ids=str)
def test_sizes_are_those_of_the_parameters_on_one_device(changes, tensor):
    spec = small_spec(**changes)
    layout = Layout.of(spec, tensor)
    listed = parameters(abstract(spec, layout, jnp.dtype(jnp.bfloat16)))
    found = shapes_of(spec, layout, "bfloat16", "int8", {path: info.dtype for path, info in listed.items()})
    assert (found.dtype, found.kv_dtype, found.norm, found.head_dim) == ("bfloat16", "int8", "layer", 8)
    assert found.heads_per_key == 4 // layout.kv_groups
    for name, inputs, outputs, dtype in found.products:
        info = listed[f"layers.0.{name}"]
        assert dtype == "bfloat16"
        halves = 2 if name == "mlp.up" and spec.gated_mlp else 1
        split = [axis == "tensor" for axis in ShardingRules().spec(info.axes)]
        size = math.prod(info.shape) // (tensor if any(split) else 1)
        assert inputs * outputs * halves == size
    assert [name for name, *_ in found.products] == ["attention.qkv", "attention.out", "mlp.up", "mlp.down"]
