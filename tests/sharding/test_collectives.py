"""Collectives bare, in shard_map on every mesh shape, and in the compiled program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sharding.collectives import all_gather, all_to_all, axis_index, axis_size, own_part, psum
from sharding.mesh import AXES, MeshError, TensorLimits, make_mesh

LIMITS = TensorLimits(heads=8, kv_heads=8, intermediate=8)
MESHES = [{}, {"tensor": 2}, {"tensor": 8}, {"data": 2, "tensor": 4}, {"data": 8}]

meshes = pytest.mark.parametrize("sizes", MESHES, ids=str)
axes = pytest.mark.parametrize("axis", AXES)


def over(sizes, body, in_specs, out_specs):
    return jax.jit(
        jax.shard_map(body, mesh=make_mesh(sizes, LIMITS), in_specs=in_specs, out_specs=out_specs, check_vma=False)
    )


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
@axes
def test_bare_they_are_the_identity(wrap, axis):
    x = jnp.arange(12.0).reshape(3, 4)
    assert axis_size(axis) == 1
    assert axis_index(axis) == 0
    np.testing.assert_array_equal(wrap(lambda x: psum(x, axis))(x), x)
    np.testing.assert_array_equal(wrap(lambda x: all_gather(x, axis, -1))(x), x)
    assert psum(x, axis) is x
    assert all_gather(x, axis, 0) is x
    assert own_part(x, axis, 0) is x
    assert all_to_all(x, axis, 0, 1) is x


@meshes
@axes
def test_psum_is_the_sum_of_the_blocks(sizes, axis):
    x = np.random.default_rng(0).integers(-9, 9, (16, 3)).astype(np.float32)
    size = sizes.get(axis, 1)
    out = over(sizes, lambda x: psum(x, axis), P(axis), P())(x)
    np.testing.assert_array_equal(out, x.reshape(size, 16 // size, 3).sum(0))


@meshes
@axes
@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_all_gather_undoes_the_split(sizes, axis, dim):
    x = np.arange(16 * 24, dtype=np.float32).reshape(16, 24)
    spec = P(axis, None) if dim in (0, -2) else P(None, axis)
    out = over(sizes, lambda x: all_gather(x, axis, dim), spec, P())(x)
    np.testing.assert_array_equal(out, x)


@meshes
@axes
@pytest.mark.parametrize("dim", [0, 1, -1, -2])
def test_own_part_is_what_the_split_gives_each_device(sizes, axis, dim):
    x = np.arange(16 * 24, dtype=np.float32).reshape(16, 24)
    spec = P(axis, None) if dim in (0, -2) else P(None, axis)
    out = over(sizes, lambda x: own_part(x, axis, dim), P(), spec)(x)
    np.testing.assert_array_equal(out, x)


@meshes
@axes
@pytest.mark.parametrize(("split", "concat"), [(0, 2), (2, 0), (-1, 1), (1, -3)])
def test_all_to_all_divides_another_dimension(sizes, axis, split, concat):
    """As a whole the array is what it was: only where it is divided has changed."""
    x = np.arange(8 * 16 * 24, dtype=np.float32).reshape(8, 16, 24)
    before, after = [None] * 3, [None] * 3
    before[concat], after[split] = axis, axis
    out = over(sizes, lambda x: all_to_all(x, axis, split, concat), P(*before), P(*after))(x)
    np.testing.assert_array_equal(out, x)


@meshes
@axes
def test_axis_index_and_size_are_the_device_s_place(sizes, axis):
    size = sizes.get(axis, 1)
    place = over(sizes, lambda: jnp.full((1,), axis_index(axis) + 100 * axis_size(axis)), (), P(axis))()
    np.testing.assert_array_equal(place, np.arange(size) + 100 * size)


def test_axes_of_size_one_leave_no_trace_in_the_program():
    def body(x):
        for axis in AXES:
            x = psum(all_gather(x, axis, 0), axis) + axis_index(axis)
            x = all_to_all(own_part(x, axis, 0), axis, 0, 1)
        return x

    text = over({}, body, P(), P()).lower(jnp.ones((4, 4))).as_text()
    assert "all_reduce" not in text
    assert "all_gather" not in text
    assert "all_to_all" not in text
    assert "partition_id" not in text


def test_one_call_is_one_collective():
    x = jnp.ones((8, 8))
    text = over({"data": 2, "tensor": 4}, lambda x: psum(x, "tensor"), P(None, "tensor"), P()).lower(x)
    assert text.compile().as_text().count(" all-reduce(") == 1


@pytest.mark.parametrize("call", [axis_size, axis_index, lambda a: psum(jnp.ones(2), a)])
def test_a_misspelt_axis_is_refused_not_ignored(call):
    with pytest.raises(MeshError, match="unknown mesh axis 'tesnor'"):
        call("tesnor")


@pytest.mark.parametrize("dim", [2, -3])
def test_all_gather_refuses_a_dimension_that_is_not_there(dim):
    with pytest.raises(MeshError, match=r"dim -?\d is not a dimension of an array of shape \(2, 2\)"):
        all_gather(jnp.ones((2, 2)), "tensor", dim)


@pytest.mark.parametrize("dims", [(2, 0), (0, -3)])
def test_all_to_all_refuses_a_dimension_that_is_not_there(dims):
    with pytest.raises(MeshError, match=r"dim -?\d is not a dimension of an array of shape \(2, 2\)"):
        all_to_all(jnp.ones((2, 2)), "tensor", *dims)


def test_all_to_all_refuses_to_split_what_it_concatenates():
    with pytest.raises(MeshError, match="dim 1 is both split and concatenated"):
        all_to_all(jnp.ones((2, 2)), "tensor", 1, -1)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: all_to_all(x, "tensor", 0, 1), r"2 devices do not divide dim 0 of shape \(3, 2\)"),
        (lambda x: own_part(x, "tensor", 0), r"2 devices do not divide dim 0 of an array of shape \(3, 2\)"),
        (lambda x: own_part(x, "tensor", 2), "do not divide dim 2"),
    ],
)
def test_what_the_devices_do_not_divide_is_refused(call, error):
    with pytest.raises(MeshError, match=error):
        over({"tensor": 2}, call, P(), P())(jnp.ones((3, 2)))
