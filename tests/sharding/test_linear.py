"""Inputs that are split over a mesh axis give the product of the whole."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sharding import MeshError, TensorLimits, linear_psum, make_mesh

K, N = 32, 12


def operands() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"x": (2, 3, K), "weight": (N, K), "bias": (N,), "residual": (2, 3, N)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("tensor", [1, 2, 4])
@pytest.mark.parametrize("quantized", ["", "int8", "int4"])
@pytest.mark.parametrize("extras", [(), ("bias",), ("residual",), ("bias", "residual")], ids=str)
def test_split_inputs_give_the_product_of_the_whole(tensor, quantized, extras):
    given = {name: array for name, array in operands().items() if name in ("x", "weight", *extras)}
    specs = {"x": P(None, None, "tensor"), "weight": P(None, "tensor"), "bias": P(), "residual": P()}
    weight = given["weight"].astype(np.float64)
    if quantized:
        given["weight"] = np.round(given["weight"] * 2).clip(-7, 7).astype(np.int8)
        groups = (K // 8,) if quantized == "int4" else ()
        scale = np.random.default_rng(1).uniform(0.5, 1, (*groups, N)).astype(np.float32)
        given["scale"], specs["scale"] = scale, P("tensor") if groups else P()
        weight = given["weight"] * (np.repeat(scale, 8, axis=0).T if groups else scale[:, None]).astype(np.float64)
        given["weight"] = jnp.asarray(given["weight"]).astype(quantized)
    wanted = given["x"].astype(np.float64) @ weight.T + given.get("bias", 0.0) + given.get("residual", 0.0)
    mesh = make_mesh({"tensor": tensor}, TensorLimits(heads=tensor, kv_heads=tensor, intermediate=tensor))
    run = jax.shard_map(
        lambda given: linear_psum(**given, axis="tensor"),
        mesh=mesh, in_specs=({name: specs[name] for name in given},), out_specs=P(), check_vma=False,
    )  # fmt: skip
    np.testing.assert_allclose(jax.jit(run)(given), wanted, rtol=1e-5, atol=1e-5)


def test_without_a_mesh_it_is_the_product():
    given = operands()
    got = linear_psum(given["x"], jnp.asarray(given["weight"]), axis="tensor")
    np.testing.assert_allclose(got, given["x"] @ given["weight"].T, rtol=1e-5, atol=1e-5)


def test_a_misspelt_axis_is_refused():
    given = operands()
    with pytest.raises(MeshError, match="unknown mesh axis 'tensors'"):
        linear_psum(given["x"], given["weight"], axis="tensors")


@pytest.mark.parametrize("extras", [(), ("bias", "residual")], ids=str)
def test_whole_inputs_on_a_mesh_are_not_summed(extras):
    given = {name: array for name, array in operands().items() if name in ("x", "weight", *extras)}
    wanted = given["x"] @ given["weight"].T + given.get("bias", 0.0) + given.get("residual", 0.0)
    mesh = make_mesh({"tensor": 2}, TensorLimits(heads=2, kv_heads=2, intermediate=2))
    run = jax.shard_map(
        lambda given: linear_psum(**given, axis=None), mesh=mesh, in_specs=(P(),), out_specs=P(), check_vma=False
    )
    np.testing.assert_allclose(jax.jit(run)(given), wanted, rtol=1e-5, atol=1e-5)
    assert "all_reduce" not in jax.jit(run).lower(given).as_text()
