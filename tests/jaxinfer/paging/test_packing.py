"""The layout of a layer's buffer: what is put in comes out, on one device and on several."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from jaxinfer.models.parameter import ParameterInfo
from jaxinfer.paging.packing import PAGE, Packing, two_to_a_byte
from sharding import ShardingRules, TensorLimits, make_mesh

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16, jnp.int8, jnp.int4, jnp.float8_e4m3fn]
MESH = make_mesh({"tensor": 2}, TensorLimits(heads=2, kv_heads=2, intermediate=2))


def random(rng, shape, dtype):
    bits = rng.integers(0, 256, (*shape, np.dtype(dtype).itemsize), dtype=np.uint8)
    if dtype == jnp.int4:
        return rng.integers(-8, 8, shape).astype(ml_dtypes.int4)
    return bits.view(np.dtype(dtype))[..., 0]


@st.composite
def layers(draw):
    infos = {}
    for index in range(draw(st.integers(1, 5))):
        dtype = draw(st.sampled_from(DTYPES))
        rank = draw(st.integers(1, 4))
        shape = [draw(st.integers(1, 5)) for _ in range(rank)]
        axis = draw(st.sampled_from([None, *range(rank)]))
        if dtype == jnp.int4:
            shape[-1] *= 2
        if axis is not None:
            shape[axis] *= 2
        if draw(st.booleans()):
            shape[0] *= 2048  # large enough to travel alone, often
        axes = tuple("mlp" if i == axis else None for i in range(rank))
        infos[f"p{index}"] = ParameterInfo(tuple(shape), jnp.dtype(dtype), axes)
    return infos


@settings(max_examples=25)
@given(layers(), st.sampled_from([1, 2]), st.sampled_from([1, 1 << 12, 1 << 30]))
def test_what_is_packed_comes_out_on_each_device_in_parts_and_whole(infos, tensor, small):
    rng = np.random.default_rng(0)
    mesh = make_mesh({"tensor": tensor}, TensorLimits(heads=2, kv_heads=2, intermediate=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxinfer.paging.packing.SMALL_BYTES", small)
        packing = Packing.of(infos, ShardingRules(), dict(mesh.shape))
    values = {name: random(rng, info.shape, info.dtype) for name, info in infos.items()}
    buffers = [np.full(packing.nbytes, 255, np.uint8) for _ in range(tensor)]
    for part, buffer in enumerate(buffers):
        views = packing.views(buffer)
        for leaf in packing.leaves:
            own = values[leaf.name]
            if leaf.axis is not None:
                own = np.split(own, tensor, axis=leaf.axis)[part]
            assert own.shape == leaf.shape
            if leaf.dtype == ml_dtypes.int4:
                two_to_a_byte(own, views[leaf.name])
            else:
                views[leaf.name][...] = own
    arrays = []
    for i, segment in enumerate(packing.segments):
        assert segment.offset % PAGE == 0
        parts = [jax.device_put(packing.arrays(b)[i], d) for b, d in zip(buffers, mesh.devices.flat, strict=True)]
        sharding = NamedSharding(mesh, segment.spec)
        arrays.append(jax.make_array_from_single_device_arrays(segment.shape, sharding, parts))
    specs = [ShardingRules().spec(info.axes) for info in infos.values()]
    given = ([s.spec for s in packing.segments],)
    for take_apart, out in ((packing.unpack, specs), (packing.gather, PartitionSpec())):
        mapped = jax.shard_map(take_apart, mesh=mesh, in_specs=given, out_specs=out, check_vma=False)
        for (name, info), got in zip(infos.items(), jax.jit(mapped)(arrays), strict=True):
            assert got.dtype == info.dtype, name
            if info.dtype == jnp.int4:
                np.testing.assert_array_equal(np.asarray(got, np.int8), values[name].astype(np.int8))
            else:
                unsigned = f"u{np.dtype(info.dtype).itemsize}"
                np.testing.assert_array_equal(np.asarray(got).view(unsigned), values[name].view(unsigned))


def test_large_parameters_travel_alone_and_small_ones_together():
    infos = {
        "norm": ParameterInfo((1024,), jnp.dtype(jnp.float32), (None,)),
        "up": ParameterInfo((2048, 1024), jnp.dtype(jnp.bfloat16), ("mlp", "hidden")),
        "bias": ParameterInfo((2048,), jnp.dtype(jnp.bfloat16), ("mlp",)),
        "down": ParameterInfo((1024, 2048), jnp.dtype(jnp.int4), ("hidden", "mlp")),
    }
    packing = Packing.of(infos, ShardingRules(), {"tensor": 2})
    assert [leaf.name for leaf in packing.leaves] == list(infos)
    assert [segment.local for segment in packing.segments] == [(1024, 1024), (4096 + 2048 + (1 << 19),)]
    assert packing.leaves[3].host_shape == (1024, 512)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jaxinfer.paging.packing.SMALL_BYTES", 1 << 19)
        packing = Packing.of(infos, ShardingRules(), {"tensor": 2})
    assert [segment.local for segment in packing.segments] == [(1024, 1024), (1024, 512), (4096 + 2048,)]
    assert packing.moved_bytes == (2 << 20) + (1 << 19) + 4096 + 2048
    assert packing.parts == 2


def test_four_bits_lie_with_the_even_one_low():
    values = np.array([[1, -1, 7, -8]]).astype(ml_dtypes.int4)
    out = np.empty((1, 2), np.uint8)
    two_to_a_byte(values, out)
    assert out.tolist() == [[0xF1, 0x87]]
