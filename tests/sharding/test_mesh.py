"""The mesh that is chosen, the meshes that are refused, and what the refusal says."""

from __future__ import annotations

import ast
import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh

from sharding.mesh import AXES, MeshError, TensorLimits, describe, make_mesh, mesh_sizes

LLAMA = TensorLimits(heads=32, kv_heads=8, intermediate=11008)
ODD = TensorLimits(heads=12, kv_heads=2, intermediate=48)

sizes = st.integers(1, 12)
any_limits = st.builds(
    lambda kv_heads, group, intermediate: TensorLimits(
        heads=kv_heads * group, kv_heads=kv_heads, intermediate=intermediate
    ),
    st.integers(1, 16),
    st.integers(1, 8),
    st.integers(1, 256),
)


def splits(limits: TensorLimits, tensor: int) -> bool:
    """Whether the heads can really be dealt out, by dealing them: the oracle for TensorLimits.problem."""
    if limits.heads % tensor or limits.intermediate % tensor:
        return False
    group = limits.heads // limits.kv_heads
    per_device = np.arange(limits.heads).reshape(tensor, -1) // group  # the kv head each query head reads
    held = [sorted(set(row.tolist())) for row in per_device]
    width = max(1, limits.kv_heads // tensor)
    # Every device holds the same number of kv heads, none of them cut, and together they hold each equally often.
    counts = np.bincount(list(itertools.chain(*held)), minlength=limits.kv_heads)
    return all(len(row) == width for row in held) and len(set(counts.tolist())) == 1


def nearest(error: MeshError) -> dict[str, int]:
    return ast.literal_eval(str(error).rpartition("works is ")[2])


@given(limits=any_limits, tensor=sizes)
def test_limits_agree_with_dealing_out_heads(limits, tensor):
    assert (limits.problem(tensor) is None) == splits(limits, tensor)


@pytest.mark.parametrize(
    ("tensor", "named"), [(5, "32 heads"), (64, "32 heads"), (32, None), (8, None), (16, None), (1, None)]
)
def test_problem_names_what_cannot_be_split(tensor, named):
    problem = LLAMA.problem(tensor)
    assert problem is None if named is None else named in problem


def test_problem_names_kv_heads_and_intermediate():
    assert "3 kv_heads" in TensorLimits(heads=12, kv_heads=3, intermediate=48).problem(2)
    assert "intermediate size of 50" in TensorLimits(heads=8, kv_heads=8, intermediate=50).problem(4)


@given(limits=any_limits, count=st.integers(1, 8))
def test_default_uses_every_device_with_the_largest_tensor(limits, count):
    mesh = make_mesh(None, limits, jax.devices()[:count])
    assert mesh.axis_names == AXES
    assert mesh.size == count
    assert mesh.shape["tensor"] == max(t for t in range(1, count + 1) if count % t == 0 and splits(limits, t))
    assert mesh.shape["data"] == count // mesh.shape["tensor"]


@given(limits=any_limits, data=sizes, tensor=sizes, count=st.integers(1, 8))
def test_a_size_is_used_as_given_or_refused_with_one_that_works(limits, data, tensor, count):
    devices = jax.devices()[:count]
    works = splits(limits, tensor) and data * tensor <= count and count % (data * tensor) == 0
    try:
        mesh = make_mesh({"data": data, "tensor": tensor}, limits, devices)
    except MeshError as error:
        assert not works
        offered = nearest(error)
        assert make_mesh(offered, limits, devices).size == offered["data"] * offered["tensor"]
    else:
        assert works
        assert dict(mesh.shape) == {"data": data, "pipe": 1, "expert": 1, "tensor": tensor}
        assert mesh.devices.flatten().tolist() == devices[: data * tensor]


def test_axes_are_auto_and_tensor_neighbours_are_adjacent():
    mesh = make_mesh({"tensor": 4, "data": 2}, LLAMA)
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert mesh.devices[0, 0, 0].tolist() == jax.devices()[:4]


def test_no_sizes_is_one_device():
    assert make_mesh({}, LLAMA).devices.flatten().tolist() == jax.devices()[:1]


def test_numpy_sizes_are_ints():
    assert make_mesh({"tensor": np.int64(2)}, LLAMA).shape["tensor"] == 2


@pytest.mark.parametrize(
    ("mesh", "says", "offers"),
    [
        ({"tnsor": 4}, "unknown axis 'tnsor' (the axes are data, pipe, expert, tensor)", {"data": 1, "tensor": 4}),
        ({"data": 0, "tensor": 2}, "data: expected a positive int, got 0", {"data": 1, "tensor": 2}),
        ({"tensor": -2}, "tensor: expected a positive int, got -2", {"data": 1, "tensor": 1}),
        ({"tensor": 2.0}, "tensor: expected a positive int, got 2.0", {"data": 1, "tensor": 1}),
        ({"tensor": True}, "tensor: expected a positive int, got True", {"data": 1, "tensor": 1}),
        ({"tensor": "2"}, "tensor: expected a positive int, got '2'", {"data": 1, "tensor": 1}),
        ({"data": 3}, "it uses 3 of 8 devices, which leaves a remainder", {"data": 4, "tensor": 1}),
        ({"data": 4, "tensor": 4}, "it needs 16 devices, and there are 8", {"data": 2, "tensor": 4}),
        ({"tensor": 8}, "12 heads cannot be divided by tensor=8", {"data": 2, "tensor": 4}),
        ({"pipe": 2, "tensor": 2}, "pipe=2 is not supported yet", {"data": 1, "tensor": 4}),
        ({"expert": 2}, "expert=2 is not supported yet", {"data": 1, "tensor": 2}),
        ({"data": 10**400}, "it needs 1000", {"data": 8, "tensor": 1}),
    ],
)
def test_refusals_say_why_and_offer_the_nearest(mesh, says, offers):
    with pytest.raises(MeshError) as caught:
        make_mesh(mesh, ODD)
    assert says in str(caught.value)
    assert nearest(caught.value) == offers


def test_every_problem_is_reported_at_once():
    with pytest.raises(MeshError, match=r"unknown axis 'rows'.*pipe: expected a positive int"):
        make_mesh({"rows": 2, "pipe": 0}, LLAMA)


@pytest.mark.parametrize("mesh", [[2, 4], 8, "tensor", ("tensor", 2)])
def test_other_types_are_refused(mesh):
    with pytest.raises(MeshError, match=f"got {type(mesh).__name__}"):
        make_mesh(mesh, LLAMA)


def test_no_devices_is_refused():
    with pytest.raises(MeshError, match="expected at least one"):
        make_mesh(None, LLAMA, [])


@pytest.mark.parametrize("names", [("tensor",), ("data", "tensor"), ("tensor", "data"), ("pipe", "tensor")])
def test_a_jax_mesh_is_extended_and_keeps_every_device_in_its_place(names):
    shape = tuple({"tensor": 4, "data": 2, "pipe": 1}[name] for name in names)
    given = jax.make_mesh(shape, names, axis_types=(AxisType.Explicit,) * len(names))
    mesh = make_mesh(given, LLAMA)
    assert mesh.axis_names == AXES
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert {axis: mesh.shape[axis] for axis in names} == dict(given.shape)
    for place, device in np.ndenumerate(given.devices):
        at = dict(zip(names, place, strict=True))
        assert mesh.devices[tuple(at.get(axis, 0) for axis in AXES)] == device


def test_a_jax_mesh_is_checked_as_sizes_are():
    with pytest.raises(MeshError, match="unknown axis 'model'"):
        make_mesh(jax.make_mesh((8,), ("model",)), LLAMA)
    with pytest.raises(MeshError, match="12 heads cannot be divided by tensor=8"):
        make_mesh(jax.make_mesh((8,), ("tensor",)), ODD)
    with pytest.raises(MeshError, match="pipe=2 is not supported"):
        make_mesh(jax.make_mesh((2, 2), ("pipe", "tensor")), LLAMA)
    with pytest.raises(MeshError, match="devices cannot be given together"):
        make_mesh(Mesh(np.array(jax.devices()), ("tensor",)), LLAMA, jax.devices())


@pytest.mark.parametrize(
    ("mesh", "text"),
    [
        ({"data": 2, "tensor": 4}, "data=2 tensor=4 on 8 cpu devices"),
        ({"tensor": 2}, "tensor=2 on 2 cpu devices"),
        ({}, "1 cpu device"),
    ],
)
def test_describe(mesh, text):
    assert describe(make_mesh(mesh, LLAMA)) == text


def test_sizes_of_a_mesh_whose_devices_are_not_here():
    assert mesh_sizes({"tensor": 8, "data": 128}, LLAMA) == {"data": 128, "pipe": 1, "expert": 1, "tensor": 8}
    assert mesh_sizes({}, LLAMA) == {"data": 1, "pipe": 1, "expert": 1, "tensor": 1}
    assert mesh_sizes({"data": 2}, LLAMA, device_count=4)["data"] == 2


@pytest.mark.parametrize(
    ("mesh", "count", "problem"),
    [
        ({"tensor": 5}, None, "32 heads cannot be divided by tensor=5"),
        ({"pipe": 2}, None, "pipe=2 is not supported yet"),
        ({"tensors": 2}, None, "unknown axis 'tensors'"),
        ({"tensor": 0}, None, "expected a positive int, got 0"),
        ({"tensor": True}, None, "expected a positive int, got True"),
        ({"data": 8}, 4, "it needs 8 devices, and there are 4"),
    ],
)
def test_sizes_that_cannot_be_are_refused(mesh, count, problem):
    with pytest.raises(MeshError, match=problem):
        mesh_sizes(mesh, LLAMA, count)
