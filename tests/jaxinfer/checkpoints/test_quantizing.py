from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer.checkpoints import Target, load_quantized, packed, unpacked
from jaxinfer.checkpoints import quantizing as module
from jaxinfer.errors import CheckpointError
from jaxinfer.models.decoder import abstract, parameters
from jaxinfer.models.spec import Layout
from jaxinfer.pretrained import Pretrained
from jaxinfer.quantization import Quantization, dequantize, quantize, wire_dtype
from sharding import ShardingRules, make_mesh
from tests.bare import fill, read_tensors
from tests.oracle import checkpoint, shared_root
from tests.wide import METHODS, rounded, wide


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    return shared_root(tmp_path_factory)


def targets_of(pretrained, method, mesh, layout):
    infos = parameters(abstract(pretrained.spec, layout, jnp.dtype("float32"), method))
    rules = ShardingRules()
    chosen = {
        path: Target(info.shape, info.dtype, jax.NamedSharding(mesh, rules.spec(info.axes)), info.quantization)
        for path, info in infos.items()
        if info.quantization is not None or info.factors
    }
    assert len(chosen) == 8 * pretrained.spec.num_layers
    return chosen


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sizes", [{"tensor": 1}, {"data": 2, "tensor": 2}, {"tensor": 4}], ids=str)
def test_each_weight_is_rounded_by_whole_channels_on_any_mesh(family, method, sizes, root, monkeypatch):
    monkeypatch.setattr(module, "CHUNK_BYTES", 1 << 12)
    folder = checkpoint(wide(family), root)
    with Pretrained(folder) as pretrained:
        mesh = make_mesh(sizes, pretrained.limits)
        layout = Layout.of(pretrained.spec, sizes["tensor"])
        targets = targets_of(pretrained, method, mesh, layout)
        sources = pretrained.sources(layout)
        found = load_quantized(pretrained.checkpoint, sources, targets)
        shapes = {path: target.shape for path, target in targets.items() if target.quantization}
        weights = fill(shapes, {path: sources[path] for path in shapes}, read_tensors(folder))
    for path, weight in weights.items():
        target, how = targets[path], targets[path].quantization
        assert (found[path].dtype, found[path].sharding) == (target.dtype, target.sharding)
        scale = np.asarray(found[f"{path}_scale"])
        assert scale.shape == how.scale_shape(weight.shape)
        inner = weight.shape[weight.ndim - how.inputs :]
        expected = rounded(weight.reshape(-1, np.prod(inner)), method, how.group).reshape(weight.shape)
        got = dequantize(np.asarray(found[path]), scale, how)
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=0, err_msg=path)
        for shard in found[path].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(found[path])[shard.index])


@pytest.mark.parametrize("method", METHODS)
def test_only_quantized_bytes_go_to_a_device_and_each_once(method, root, monkeypatch):
    filled = []
    original = module.Assembly.fill

    def fill_and_note(self, part, target):
        filled.append((part.dtype, part.nbytes))
        original(self, part, target)

    monkeypatch.setattr(module.Assembly, "fill", fill_and_note)
    with Pretrained(checkpoint(wide("llama"), root)) as pretrained:
        layout = Layout.of(pretrained.spec)
        targets = targets_of(pretrained, method, make_mesh({"tensor": 1}, pretrained.limits), layout)
        load_quantized(pretrained.checkpoint, pretrained.sources(layout), targets)
    assert {dtype for dtype, _ in filled} == {wire_dtype(method), np.dtype(np.float32)}
    wired = [packed(target) for target in targets.values()]
    assert sum(nbytes for _, nbytes in filled) == sum(np.prod(t.shape) * np.dtype(t.dtype).itemsize for t in wired)


def test_a_weight_that_is_not_finite_is_named(root, tmp_path):
    folder = tmp_path / "poisoned"
    shutil.copytree(checkpoint(wide("llama"), root), folder)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] = np.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with Pretrained(folder) as pretrained:
        layout = Layout.of(pretrained.spec)
        targets = targets_of(pretrained, "int8", make_mesh({"tensor": 1}, pretrained.limits), layout)
        with pytest.raises(
            CheckpointError, match=r"layers\.1\.mlp\.down: cannot be quantized to int8: expected finite"
        ):
            load_quantized(pretrained.checkpoint, pretrained.sources(layout), targets)


def test_regions_lie_among_the_factors_where_whole_weights_have_them():
    weight = np.random.default_rng(0).standard_normal((2, 12, 256)).astype(np.float32)
    how = Quantization("int4", lead=1, group=64)
    _, scales = module.quantize_box("w", weight, how)
    assert scales.shape == how.scale_shape(weight.shape) == (2, 4, 12)
    box = (slice(1, 2), slice(3, 7), slice(0, 256))
    found, part = module.quantize_box("w", weight[box], how)
    np.testing.assert_array_equal(part, scales[module.scale_box(box, weight.shape, how)])
    np.testing.assert_array_equal(found.reshape(4, -1), quantize(weight[1, 3:7], "int4", 64)[0])


def test_what_is_not_packed_stays_as_it_is():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    plain = Target((4, 6), np.dtype(np.float32), sharding)
    assert packed(plain) is plain
    values = jnp.ones((4, 6))
    assert unpacked(values, plain) is values
    target = Target((4, 6), np.dtype(jnp.int4), sharding, Quantization("int4", group=64))
    assert (packed(target).shape, packed(target).dtype) == ((4, 3), np.uint8)
    arrived = jnp.full((4, 3), 0x2F, jnp.uint8)
    assert np.asarray(unpacked(arrived, target))[0].astype(int).tolist() == [-1, 2] * 3
    assert arrived.is_deleted()
