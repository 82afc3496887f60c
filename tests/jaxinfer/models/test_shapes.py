from __future__ import annotations

import math

import jax.numpy as jnp
import pytest

from jaxinfer.models.decoder import abstract, parameters
from jaxinfer.models.positions import rotary
from jaxinfer.models.shapes import shapes_of
from jaxinfer.models.spec import LayerSpec, Layout, Norm
from pallas_kernels import MAX_LAYER_ROWS
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


def whole(dtype="bfloat16", kv_dtype=None, tensor=1, quantize=None, paged=False, **changes):
    """What is said of whole layers."""
    sizes = {"hidden": 256, "intermediate": 512, "heads": 8, "kv_heads": 4, "head_dim": 64, "gated_mlp": True}
    spec = small_spec(**sizes | changes)
    layout = Layout.of(spec, tensor)
    listed = parameters(abstract(spec, layout, jnp.dtype(dtype), quantize))
    weights = {path: info.dtype for path, info in listed.items()}
    return shapes_of(spec, layout, dtype, kv_dtype or dtype, weights, paged=paged).whole


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "fp8"])
def test_whole_layers_are_described(quantize):
    assert whole(quantize=quantize) == (None,) * MAX_LAYER_ROWS
    biased = {"qkv_bias": True, "out_bias": True, "mlp_bias": True, "gated_mlp": False, "activation": "relu"}
    turned = (LayerSpec(scale=1.0, rotary=rotary({}, 64, 64), window=9),) * 2
    assert whole(quantize=quantize, **biased, dtype="float16", layers=turned) == (None,) * MAX_LAYER_ROWS


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"paged": True}, "layers that are paged"),
        ({"tensor": 2}, "layers divided among 2 devices"),
        ({"residual": "parallel"}, "residuals of kind 'parallel'"),
        ({"dtype": "float32"}, "x of float32"),
        ({"kv_dtype": "int8"}, "keys of int8"),
        ({"head_dim": 32}, "head_dim 32"),
        ({"head_dim": 512}, "head_dim 512"),
        ({"hidden": 260}, "260 inputs"),
        ({"heads": 16, "kv_heads": 1}, "16 query heads a key head"),
    ],
    ids=str,
)
def test_why_whole_layers_are_not_served(changes, why):
    found = whole(**changes)
    assert found
    assert all(why in problem for problem in found)


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
